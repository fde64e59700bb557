"""`tkit sweep` as a user types it, against a server that behaves and one that does not."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from servers import fake_server

from tkit.files import from_mapping, read_json, sha256_file, write_json
from tkit.loadgen.profiles import PROFILES
from tkit.specs.engine import EngineCard
from tkit.specs.progress import Progress
from tkit.specs.record import Manifest, PointSummary
from tkit.specs.server import ServerRecord
from tkit.stages.servers import ServerLock, server_files
from tkit.stages.sweep import open_run, run_name

Tkit = Callable[..., Result]
SMALL = ("--shape", "16/8", "--concurrency", "1,2", "--requests", "4")


def write_engine(directory: Path, tokenizer_dir: Path, **changes: Any) -> Path:
    values = dict(
        name=directory.name, key="0" * 64, created="2026-01-01T00:00:00Z", backend="reference",
        architecture="LlamaForCausalLM", dtype="float32", quant="int8", quant_algo="W8A16", tp_size=2, pp_size=1,
        num_params=1, weight_bytes=4, max_position_embeddings=256, vocab_size=256, recipe={}, source={}, files={},
        versions={}, command="tkit build", build={},
    )  # fmt: skip
    write_json(directory / "engine.json", EngineCard(**{**values, **changes}))
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer/tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    return directory


@pytest.fixture
def served(tmp_path: Path, tokenizer_dir: Path) -> Iterator[Path]:
    """engines/toy, served: its record is there and its lock is held."""
    engine = write_engine(tmp_path / "engines/toy", tokenizer_dir)
    files = server_files("toy", tmp_path / "engines")
    lock = ServerLock(files)
    with fake_server(str(engine)) as url:
        record = ServerRecord(
            engine=str(engine), pid=os.getpid(), host="127.0.0.1", http_port=1, grpc_port=int(url.rpartition(":")[2]),
            metrics_port=2, openai_port=3, model_pids=(), openai_pid=4, api_key_file=None,
        started="2026-01-01T00:00:00Z", log=str(files.log),
        )  # fmt: skip
        write_json(files.record, record)
        yield engine
    lock.release()


def last_line(result: Result) -> Path:
    assert result.exit_code == 0, result.stderr
    return Path(result.stdout.splitlines()[-1])


def test_with_nothing_else_the_served_engine_is_measured(tkit: Tkit, served: Path, tmp_path: Path) -> None:
    write_json(served / "validation.json", {"schema": "tkit.validation/1", "kl": 0.01})
    result = tkit("sweep", *SMALL, "--repeats", "2")
    run = tmp_path / last_line(result)
    assert run.parent == tmp_path / "reports"
    assert run.name.startswith("toy-quick-")
    manifest = from_mapping(Manifest, read_json(run / "manifest.json"), "manifest.json")
    assert (manifest.run, manifest.label, manifest.profile, manifest.model) == (run.name, "toy", "quick/1", "ensemble")
    assert (manifest.shapes, manifest.concurrency, manifest.repeats) == (("16/8",), (1, 2), 2)
    assert manifest.command == "tkit sweep quick --shape 16/8 --concurrency 1,2 --requests 4 --repeats 2"
    assert manifest.engine == read_json(served / "engine.json")
    assert manifest.validation == read_json(served / "validation.json")
    assert manifest.identity["engine_card_sha256"] == sha256_file(served / "engine.json")
    assert manifest.identity["tokenizer_sha256"] == sha256_file(served / "tokenizer/tokenizer.json")
    assert manifest.identity["server"]["parameters"]["engine_dir"] == str(served)
    names = ["16x8-c1-r1", "16x8-c2-r1", "16x8-c1-r2", "16x8-c2-r2"]
    assert sorted(path.name for path in (run / "points").iterdir()) == sorted(names)
    for name in names:
        point = from_mapping(PointSummary, read_json(run / "points" / name / "point.json"), name)
        assert (point.requests, point.errors, point.token_source) == (4, {}, "server_usage")
        assert point.tok_s_gpu is None, "the reference backend has no GPUs to divide by"
    journal = [json.loads(line) for line in (run / "state.jsonl").read_text().splitlines()]
    assert [line.get("point", line["event"]) for line in journal] == ["started", *names, "finished"]
    with open(run / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row[name] for name in ("label", "backend", "precision", "tp", "conc", "repeat")) for row in rows] == [
        ("toy", "reference", "int8", "2", concurrency, repeat) for repeat in "12" for concurrency in "12"
    ]
    for text in (
        "measuring toy at 127.0.0.1:",
        "16/8 C = 2 #1: ",
        "tok/s, TTFT p50 ",
        " 0 errors in 4, ",
        "TPOT p50  ",
    ):
        assert text in result.stderr


def test_a_url_needs_no_engine(tkit: Tkit, fake_url: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    result = tkit(
        "sweep", "--url", fake_url, "--tokenizer", tokenizer_dir, *SMALL, "--gpus", "2", "--out", "here", "--name", "mine",
        "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["directory"] == "here/mine"
    assert record["manifest"] == read_json(tmp_path / "here/mine/manifest.json")
    assert record["points"] == [
        read_json(tmp_path / f"here/mine/points/16x8-c{concurrency}-r1/point.json") for concurrency in (1, 2)
    ]
    assert record["manifest"]["engine"] is None
    for point in record["points"]:
        assert point["tok_s_gpu"] == pytest.approx(point["output_tok_s"] / 2)
    again = tkit("sweep", "--url", fake_url, "--tokenizer", tokenizer_dir, *SMALL, "--out", "here", "--name", "mine")
    assert (again.exit_code, again.stderr.splitlines()[-2:]) == (
        2, ["error: here/mine exists", "hint: give another --name, or remove it"],
    )  # fmt: skip


def test_equal_seeds_send_equal_requests(tkit: Tkit, served: Path, tmp_path: Path) -> None:
    """What the server counts is exact, and the same prompts are sent again."""
    import pyarrow.parquet as pq

    run = tmp_path / last_line(tkit("sweep", *SMALL, "--seed", "7"))
    rows = pq.read_table(run / "points/16x8-c2-r1/requests.parquet").to_pylist()
    assert {(row["isl_asked"], row["isl"], row["osl_asked"], row["osl"]) for row in rows} == {(16, 16, 8, 8)}
    assert read_json(run / "manifest.json")["seed"] == 7
    assert [row["id"] for row in rows] == list(range(len(rows)))


def test_open_loop_from_the_command_line_to_the_report(
    tkit: Tkit, fake_url: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / last_line(
        tkit("sweep", "--url", fake_url, "--tokenizer", tokenizer_dir, "--shape", "16/8", "--rate", "20,40.5",
             "--concurrency", "1", "--arrivals", "gamma:2", "--requests", "12", "--name", "r")
    )  # fmt: skip
    names = ["16x8-c1-r1", "16x8-rate20-r1", "16x8-rate40.5-r1"]
    assert sorted(path.name for path in (run / "points").iterdir()) == names
    manifest = read_json(run / "manifest.json")
    assert (manifest["concurrency"], manifest["rates"], manifest["arrivals"]) == ([1], [20.0, 40.5], "gamma:2")
    assert "--rate 20,40.5 --arrivals gamma:2" in manifest["command"]
    (run / "points/16x8-rate40.5-r1").rename(run / "points/.hidden")
    result = tkit("report", run, "--out", "compared", "--fail-on", "ttft_sched_p50>60000")
    assert result.exit_code == 3
    assert "ensemble, 16/8 at 40.5 req/s: not evaluated: point is missing" in result.stderr
    record = read_json(tmp_path / "compared/report.json")
    closed, opened = record["groups"]
    assert (closed["arrivals"], opened["arrivals"]) == (None, "gamma:2")
    checks = record["gates"][0]["checks"]
    assert [check["load"]["rate"] for check in checks] == [20.0, 40.5], "a closed loop has no schedule"
    assert [(point["shape"], point["load"]["rate"]) for point in record["runs"][0]["missing"]] == [("16/8", 40.5)]
    markdown = (tmp_path / "compared/report.md").read_text()
    assert "Throughput, 16/8, gamma:2 arrivals" in markdown
    assert "TTFT from schedule p50, ms" in markdown


def error_lines(result: Result, exit_code: int) -> list[str]:
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    return [line for line in result.stderr.splitlines() if not line.startswith("measuring")]


def test_no_server(tkit: Tkit) -> None:
    assert error_lines(tkit("sweep"), 1) == [
        "error: no server is running",
        "hint: start one with tkit serve, or give the address of another: --url HOST:PORT",
    ]


def test_a_record_without_a_living_server_is_no_server(tkit: Tkit, tmp_path: Path, tokenizer_dir: Path) -> None:
    engine = write_engine(tmp_path / "engines/toy", tokenizer_dir)
    record = ServerRecord(
        engine=str(engine), pid=os.getpid(), host="127.0.0.1", http_port=1, grpc_port=9, metrics_port=2,
        openai_port=3, model_pids=(), openai_pid=4, api_key_file=None, started="2026-01-01T00:00:00Z", log="log",
    )  # fmt: skip
    files = server_files("toy", tmp_path / "engines")
    write_json(files.record, record)
    assert error_lines(tkit("sweep"), 1)[0] == "error: no server is running"
    lock = ServerLock(files)
    write_json(files.record, record)
    try:
        assert "127.0.0.1:9: no Triton server answers over gRPC" in error_lines(tkit("sweep"), 1)[0]
    finally:
        lock.release()


def test_another_engine_is_not_measured_for_the_one_that_was_named(
    tkit: Tkit, served: Path, tmp_path: Path, tokenizer_dir: Path, fake_url: str
) -> None:
    write_engine(tmp_path / "engines/other", tokenizer_dir)
    assert error_lines(tkit("sweep", "--engine", "other"), 1)[0] == "error: no server of other is running"
    url = f"127.0.0.1:{read_json(tmp_path / 'engines/.servers/toy.json')['grpc_port']}"
    assert error_lines(tkit("sweep", "--engine", "other", "--url", url), 1) == [
        f"error: {url} serves toy, not other",
        "hint: another server has taken the port; restart yours, or name the engine that is served: --engine",
    ]
    assert not (tmp_path / "reports").exists()


def test_an_engine_that_is_not_what_its_server_loaded(tkit: Tkit, served: Path) -> None:
    card = read_json(served / "engine.json")
    write_json(served / "engine.json", {**card, "name": "rebuilt"})
    (line, hint) = error_lines(tkit("sweep"), 1)
    assert line.startswith(f"error: {served} holds the card of rebuilt: not what the server with pid ")
    assert hint == "hint: restart the server: tkit stop, tkit serve"


def test_a_shape_that_the_engine_cannot_hold(tkit: Tkit, served: Path) -> None:
    assert error_lines(tkit("sweep", "--shape", "16/8,200/100,250/6"), 2) == [
        "error: toy has 256 positions, too few for 1 of 3 shapes",
        "  - 200/100 needs 300 positions",
        "hint: choose shorter ones: --shape ISL/OSL, or shapes in the recipe's sweep",
    ]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["quik"], 2, 'no profile "quik" (did you mean "quick"?)'),
        (["--protocol", "triton-grcp"], 2, '--protocol: unknown protocol "triton-grcp" (did you mean "triton-grpc"?)'),
        (["--protocol", "zzz"], 2, "hint: known: triton-grpc, triton-http, openai, openai-chat, hf-generate"),
        (["--shape", "128"], 2, 'shape "128": expected input/output tokens, 1 to 10,000,000 each, like 128/64'),
        (["--concurrency", "0"], 2, "concurrency is 0, expected at least 1 each"),
        (["--concurrency", "1,x"], 2, "'1,x' is not a list of whole numbers like 1,4,16"),
        (["--concurrency", "100000000"], 2, "concurrency is 100000000, expected at least 1 each, at most 65,535"),
        (["--rate", "1e300"], 2, "rate is 1e+300, expected more than 0 each, at most 1,000,000"),
        (["--rate", "0"], 2, "rate is 0.0, expected more than 0 each"),
        (["--rate", "1,x"], 2, "'1,x' is not a list of numbers like 0.5,2,4"),
        (["--arrivals", "posson"], 2, 'unknown process "posson" (did you mean "poisson"?)'),
        (["--rate", "2", "--max-outstanding", "0"], 2, "max_outstanding is 0, expected at least 1"),
        (["--seed", "-1"], 2, "seed is -1, expected 0 to 9223372036854775807"),
        (["--requests", "0"], 2, "requests is 0, expected at least 1"),
        (["--timeout", "0"], 2, "--timeout is 0.0, expected more than 0 seconds"),
        (["--reconnect", "-1"], 2, "--reconnect is -1.0, expected 0 or more seconds"),
        (["--find-max", "batch"], 2, 'no tier "batch" with limits, expected one of interactive, conversational'),
        (["--metrics-url", "http://me:secret@h/metrics"], 2, "expected http://HOST:PORT/metrics"),  # runs keep it
        (["--gpus", "0"], 2, "--gpus is 0, expected at least 1"),
        (["--url", "http://h/x"], 2, "--url is 'http://h/x', expected host:port"),
        (["--name", "../x"], 2, "--name is '../x', expected a directory name without a path"),
        (["--url", "127.0.0.1:9"], 2, "prompts of an exact length need the served model's tokenizer"),
        (["--url", "127.0.0.1:9", "--tokenizer", "."], 2, ".: no tokenizer.json in it"),
        (["--calibrate", "--resume", "--rate", "2"], 2, "measures this client alone: leave out --rate, --resume"),
        (["--engine", "nowhere"], 2, 'no engine "nowhere"'),
    ],
)
def test_what_was_typed_is_wrong(tkit: Tkit, arguments: list[str], exit_code: int, message: str) -> None:
    result = tkit("sweep", *arguments)
    assert result.exit_code == exit_code, result.output
    assert message in result.stderr or message in str(result.exception)


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    manifest = Manifest(
        run="r", label="r", profile="quick/1", profile_digest="0", seed=0, protocol="openai", url="h:1", model="m",
        shapes=("8/3",), concurrency=(1,), repeats=1, command="tkit sweep", started="2026-01-01T00:00:00Z",
    )  # fmt: skip
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # as a full disk
    try:
        with pytest.raises(OSError, match="manifest.json"):
            open_run(tmp_path / "reports", "r", manifest, Progress(), resume=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "reports").iterdir()) == []


def test_names_of_runs_fit_into_file_systems() -> None:
    assert len(run_name("x" * 300, PROFILES["quick/1"])) < 150


def test_points_with_failures_are_kept_and_marked(
    tkit: Tkit, fake_url: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Past its eighth request this model takes a second to answer, too long for the limit; the server itself is fine."""
    result = tkit(
        "sweep", "--url", fake_url, "--tokenizer", tokenizer_dir, "--model", "sluggish", "--shape", "16/8",
        "--concurrency", "2", "--requests", "8", "--timeout", "0.4",
    )  # fmt: skip
    run = tmp_path / last_line(result)
    point = read_json(run / "points/16x8-c2-r1/point.json")
    assert point["errors"]["timeout"] > 0
    assert point["is_valid"] is False
    assert "INVALID: " in result.stderr
    assert "requests failed (" in point["invalid_reasons"][0]


def test_a_server_that_answers_only_errors(tkit: Tkit, fake_url: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    result = tkit(
        "sweep", "--url", fake_url, "--tokenizer", tokenizer_dir, "--model", "overloaded", *SMALL, "--name", "r"
    )
    assert result.exit_code == 1
    line = (
        "every request of 16/8 C = 1 failed; the first: the server answered with an error: Exceeds maximum queue size"
    )
    assert f"error: {fake_url}: {line}" in result.stderr
    assert (tmp_path / "reports/r/points/16x8-c1-r1/point.json").is_file()
    assert not (tmp_path / "reports/r/points/16x8-c2-r1").exists(), "no further point was tried"
    journal = (tmp_path / "reports/r/state.jsonl").read_text().splitlines()
    assert json.loads(journal[-1])["event"] == "failed"


def test_a_server_that_dies(tkit: Tkit, tokenizer_dir: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    with fake_server() as url:
        arguments = ("--model", "dying", "--shape", "16/8", "--concurrency", "1,2,4", "--requests", "4", "--name", "r")
        arguments += ("--reconnect", "0.5")
        result = tkit("sweep", "--url", url, "--tokenizer", tokenizer_dir, *arguments)
    assert result.exit_code == 1
    assert f"error: {url}: the server stopped answering during 16/8 C = " in result.stderr
    assert "the connection broke before the answer was complete" in result.stderr
    assert time.monotonic() - began < 120
    rows = read_json(tmp_path / "reports/r/summary.json")
    assert rows[-1]["errors"] > 0 or not rows[-1]["is_valid"]
    assert len(rows) == len(list((tmp_path / "reports/r/points").iterdir()))


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_sweep_that_is_stopped_keeps_what_it_has(
    fake_url: str, tokenizer_dir: Path, tmp_path: Path, signum: int, exit_code: int
) -> None:
    command = [sys.executable, "-m", "tkit", "sweep", "--url", fake_url, "--tokenizer", str(tokenizer_dir), "--shape",
               "16/8", "--concurrency", "1,2", "--requests", "4", "--name", "r"]  # fmt: skip
    command[command.index("--requests") + 1] = "4"
    with subprocess.Popen([*command, "--repeats", "500"], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        first = tmp_path / "reports/r/points/16x8-c1-r1"
        deadline = time.monotonic() + 30
        while not first.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signum)
        _, told = process.communicate(timeout=60)
        assert process.returncode == exit_code
    names = {path.name for path in (tmp_path / "reports/r/points").iterdir()}
    assert all((tmp_path / "reports/r/points" / name / "point.json").is_file() for name in names)
    assert len(read_json(tmp_path / "reports/r/summary.json")) == len(names)
    assert f"reports/r: points kept: {len(names)}; --resume goes on" in told
    assert json.loads((tmp_path / "reports/r/state.jsonl").read_text().splitlines()[-1])["reason"] == "interrupted"


def test_nothing_heavy_is_imported(fake_url: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    """No torch and no transformers in a whole sweep; before the first request nothing that is slow to import."""
    program = f"""
import sys
from pathlib import Path
from tkit.loadgen.session import Session
heavy = {{"torch", "transformers", "safetensors"}}
probe = Session.probe
def first_request(self, shape):
    assert not (heavy | {{"pyarrow", "pandas", "rich"}}) & set(sys.modules), "before the first request"
    return probe(self, shape)
Session.probe = first_request
from tkit.cli.main import cli
cli.main(["sweep", "--url", {fake_url!r}, "--tokenizer", {str(tokenizer_dir)!r}, "--shape", "16/8", "--concurrency", "1",
          "--requests", "2"], standalone_mode=False)
assert not heavy & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_terminal_shows_the_moment(fake_url: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Bar and numbers on the terminal; without one (every other test here) nothing but whole lines."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "tkit", "sweep", "--url", fake_url, "--tokenizer", str(tokenizer_dir), "--shape",
               "16/8", "--concurrency", "2", "--requests", "80"]  # fmt: skip
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed when the process ends
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert process.wait(60) == 0
    text = shown.decode()
    assert re.search(r"\d+ tok/s, (TTFT|first bytes) \d+ ms, 2 in flight, 0 errors, [\d.]+ m?s left", text), text
    assert re.search(r"\d+/80", text)
