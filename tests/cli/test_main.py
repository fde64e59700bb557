"""What every command does with input that cannot be: one error, the exit code, nothing half written."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from tkit import demo
from tkit.cli.main import COMMANDS, cli

TKIT = [sys.executable, "-m", "tkit"]


@pytest.mark.parametrize("name", ["../x", "a/b", ".", ".hidden", "", "a\nb", "a\udcff", "x" * 300])
@pytest.mark.parametrize(
    "command", [["build"], ["sweep", "--url", "127.0.0.1:1"], ["import", "results.json"], ["run", "demo"]]
)
def test_a_name_is_that_of_a_directory(tkit, tmp_path, command, name):
    (tmp_path / "results.json").write_text("{}")
    option = "--save-baseline" if command[0] == "run" else "--name"
    result = tkit(*command, option, name)
    assert result.exit_code == 2
    assert "expected at most 200" in result.stderr if len(name) > 200 else "without a path" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["build", ""], 'no model ""'),
        (["plan", "meta/Llama-3.1-8"], 'shipped model table (did you mean "Llama-3.1-8B"?)'),
        (["run", ""], 'no model ""'),
        (["plan", ""], 'no model ""'),
        (["run", "model_configs/dmeo.yaml"], 'model_configs/dmeo.yaml: no such file (did you mean "demo"?)'),
        (["build", demo.MODEL_DIR / "config.json"], "a file, expected a model's directory"),
        (["build", "--quant", "INT4_AWQ"], 'unknown quantization "INT4_AWQ" (did you mean "int4_awq"?)'),
        (["build", "--quant", "zzz"], 'unknown quantization "zzz", expected one of none, int8, fp8'),
        (["run", "demo", "--fail-on", ""], "a gate is empty"),
        (["serve", "--out", "x"], "--out goes with --render"),
        (["serve", "--render", "docker", "--detach"], "--render starts nothing"),
        (["build", "--workers", "100000"], "not in the range"),
        (["build", "--backend", "pytorch", "--max-seq-len", "9999"], "max_seq_len is 9999, the model's limit is 2048"),
        (["sweep", "--url", "127.0.0.1:99999"], "--url is '127.0.0.1:99999', expected host:port"),
        (["validate", "--max-kl", "nan"], "nan is not a finite number"),
        (["validate", "--max-ppl-ratio", "-1"], "-1.0 is not in the range"),
    ],
)
def test_what_is_typed_wrong_is_named(tkit, tmp_path, command, message):
    result = tkit(*command)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ["build", "--out"],
        ["plan", "--html"],
        ["sweep", "--calibrate", "--protocol", "openai", "--out"],
        ["sweep", "--protocol", "hf-generate", "--engine", demo.MODEL_DIR, "--out"],
    ],
)
def test_what_the_system_refuses_is_an_error_and_no_traceback(tkit, tmp_path, command):
    (tmp_path / "file").write_text("a file")
    result = tkit(*command, "file/below")
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.count("error: ") == 1
    assert (tmp_path / "file").read_text() == "a file"


def test_a_full_and_a_closed_stdout():
    with open("/dev/full", "w") as stdout:
        full = subprocess.run([*TKIT, "plan", "demo"], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (full.returncode, full.stderr) == (1, "error: No space left on device\n")
    closed = subprocess.run(
        ["sh", "-c", '"$@" >&- 2>&-', "sh", *TKIT, "plan", "demo"], capture_output=True, text=True, timeout=60
    )
    assert (closed.returncode, closed.stdout, closed.stderr) == (0, "", "")


def test_a_file_that_may_not_grow_is_named_and_nothing_is_left(tmp_path):
    limited = ["sh", "-c", 'ulimit -f 2000; exec "$@"', "sh", *TKIT, "build"]
    result = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].endswith("/checkpoint/rank0.safetensors: File too large")
    assert not list((tmp_path / "engines").iterdir())


def test_what_the_base_install_lacks_is_named_with_the_extra_that_has_it(tmp_path):
    without_torch = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Absent())
from tkit.cli.main import main
main()
"""
    command = [sys.executable, "-c", without_torch, "build", "--quant", "fp8"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-2:] == [
        "error: torch is not installed, which tkit build needs",
        "hint: pip install 'tkit[convert]', or 'tkit[all]' to serve as well",
    ]
    assert not list((tmp_path / "engines").iterdir())


def test_a_path_that_is_no_text_is_refused(tkit, tmp_path):
    """Linux allows any bytes; JSON does not."""
    shutil.copytree(demo.MODEL_DIR, tmp_path / "m\udcff")
    result = tkit("build", "m\udcff", "--name", "e")
    assert (result.exit_code, "is not UTF-8" in result.stderr) == (2, True), result.exception
    assert not list((tmp_path / "engines").iterdir())


def test_options_that_say_nothing_of_this_engine_are_told(tkit):
    result = tkit("build", "--goal", "latency", "--max-batch-size", 4, "--dry-run")
    assert result.exit_code == 0
    assert "--goal, --max-batch-size: not of a reference engine" in result.stderr
    assert "not of a reference" not in tkit("build", "--backend", "pytorch", "--goal", "latency", "--dry-run").stderr


def test_on_a_terminal_the_result_stands_last(tmp_path):
    terminal, end = pty.openpty()
    with subprocess.Popen([*TKIT, "build"], cwd=tmp_path, stdout=end, stderr=end) as build:
        os.close(end)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while some := os.read(terminal, 1000):
                shown += some
    os.close(terminal)
    assert build.returncode == 0
    assert "hash source" in shown.decode()
    assert re.fullmatch(r"engines/demo-none-tp1-\w+\s*", shown.decode().splitlines()[-1])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option_once(name):
    """Some commands list theirs under headings."""
    command = cli.get_command(None, name)
    text = CliRunner().invoke(command, ["--help"], terminal_width=80).output
    options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
    listed = re.findall(r"^  (?:-h, )?(--[a-z-]+)", text, re.MULTILINE)
    assert sorted(listed) == sorted([*options, "--help"])
    assert max(map(len, text.splitlines())) <= 80
