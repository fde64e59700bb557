"""`tkit build --backend tensorrt` on a machine where stand-ins answer for nvidia-smi and trtllm-build."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from nvidia_node import write_programs

NodeMaker = Callable[..., None]


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeMaker:
    """node(sm=90, ...) puts the programs of an NVIDIA node on PATH."""

    def make(**facts) -> None:
        for name, value in write_programs(tmp_path / "node", **facts).items():
            monkeypatch.setenv(name, value)

    return make


def card_of(stdout: str) -> tuple[Path, dict]:
    engine = Path(stdout.splitlines()[-1])
    return engine, json.loads((engine / "engine.json").read_text())


def engines() -> list[str]:
    return sorted(path.name for path in Path("engines").iterdir())


def test_auto_compiles_where_there_is_a_gpu_with_tensorrt_llm(tkit, node) -> None:
    node()
    options = ("--tp", "2", "--quant", "fp8_rowwise", "--max-batch-size", "8")
    result = tkit("build", *options)
    assert result.exit_code == 0, result.output
    assert "backend tensorrt: NVIDIA H100 80GB HBM3 (SM 90), TensorRT-LLM 1.2.1\n" in result.stderr
    engine, card = card_of(result.stdout)
    checkpoint = Path("engines") / card["compiled"]["checkpoint_engine"]
    assert engine.name.startswith(f"{checkpoint.name}-sm90-trtllm1.2.1-")
    assert (card["backend"], card["versions"]["tensorrt_llm"]) == ("tensorrt", "1.2.1")
    on_disk = {str(path.relative_to(engine)) for path in engine.rglob("*") if path.is_file()}
    assert card["files"].keys() == on_disk - {"engine.json"}
    assert {
        f"trt/{name}" for name in ("config.json", "rank0.engine", "rank1.engine", "build.log", "model.cache")
    } <= on_disk
    for name in json.loads((checkpoint / "engine.json").read_text())["files"]:
        assert (engine / name).samefile(checkpoint / name)
    built = json.loads((engine / "trt" / "config.json").read_text())["build_config"]
    assert (built["max_batch_size"], built["plugin_config"]["gemm_plugin"]) == (8, "auto")
    assert "trtllm-build --checkpoint_dir " in (engine / "trt" / "build.log").read_text()
    assert tkit("verify", engine).exit_code == 0

    again = tkit("build", *options)
    assert (again.exit_code, again.stdout) == (0, result.stdout)
    assert "built from the same inputs" in again.stderr
    other = tkit(*card["command"].split()[1:], "--max-num-tokens", "4096")
    other_engine, other_card = card_of(other.stdout)
    assert (other_card["compiled"]["checkpoint_engine"], other_engine.name == engine.name) == (checkpoint.name, False)
    limits = other_card["compiled"]
    assert (limits["goal"], limits["max_batch_size"], limits["max_num_tokens"]) == ("throughput", 8, 4096)
    assert (
        f"--input_timing_cache {engine.resolve()}/trt/model.cache" in (other_engine / "trt" / "build.log").read_text()
    )


def test_an_engine_from_another_machine_is_compiled_here(tkit, node) -> None:
    checkpoint = Path(tkit("build", "--tp", "2", "--name", "carried").stdout.strip())
    node(sm=80, num_gpus=1)
    result = tkit("build", checkpoint, "--backend", "tensorrt", "--max-seq-len", "128")
    assert result.exit_code == 0, result.output
    _, card = card_of(result.stdout)
    assert (card["compiled"]["sm"], card["compiled"]["max_seq_len"]) == (80, 128)
    assert "--workers 1 " in " ".join(card["compiled"]["arguments"])
    changed = tkit("build", checkpoint, "--backend", "tensorrt", "--quant", "fp8")
    assert changed.exit_code == 2
    assert "quant is part of its checkpoint" in changed.stderr
    other = tkit("build", checkpoint, "--backend", "pytorch")
    assert (other.exit_code, "is an engine: it can be compiled, not changed" in other.stderr) == (2, True)


def test_a_failure_shows_the_end_of_the_log_and_leaves_the_checkpoint_only(tkit, node, monkeypatch) -> None:
    node()
    monkeypatch.setenv("STAND_IN_FAILURE", "crash")
    result = tkit("build", "--tp", "2")
    assert result.exit_code == 1
    assert "error: trtllm-build ended with exit code 1; its last lines:\n" in result.stderr
    assert "  | [TRT-LLM] [E] Error Code 1: Cuda Runtime (out of memory)\n" in result.stderr
    log = Path(result.stderr.splitlines()[-1].removeprefix("hint: the whole log: "))
    assert "Build TensorRT engine 0" in log.read_text()
    [checkpoint, left] = sorted(engines(), key=lambda name: name.startswith("."))
    assert (checkpoint.startswith("demo-none-tp2-"), left) == (True, log.name)

    monkeypatch.setenv("STAND_IN_FAILURE", "incomplete")
    result = tkit("build", "--tp", "2")
    assert result.exit_code == 1
    for problem in ("rank1.engine is missing or empty", "config.json is missing"):
        assert problem in result.stderr
    monkeypatch.delenv("STAND_IN_FAILURE")
    assert tkit("build", "--tp", "2").exit_code == 0
    assert not [name for name in engines() if name.startswith(".")]


def test_an_interrupted_build_ends_trtllm_build_and_leaves_nothing_of_it(tkit, node, monkeypatch, tmp_path) -> None:
    node()
    assert tkit("build", "--backend", "reference").exit_code == 0
    monkeypatch.setenv("STAND_IN_FAILURE", "hang")
    command = [sys.executable, "-m", "tkit", "build", "--backend", "tensorrt"]
    building = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(Path("engines").glob(".tmp-*/trt/rank0.engine")):
        assert building.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(building.pid).children(recursive=True)
    assert children
    building.send_signal(signal.SIGINT)
    building.communicate(timeout=60)
    assert building.returncode == 130
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert len(engines()) == 1


def test_a_long_build_says_where_it_is(tkit, node, monkeypatch) -> None:
    node()
    monkeypatch.setenv("STAND_IN_SECONDS", "1.5")
    monkeypatch.setattr("tkit.stages.compile.HEARTBEAT_S", 0.5)
    result = tkit("build", "--tp", "2")
    assert result.exit_code == 0, result.output
    assert re.search(
        r"trtllm-build: \d of 2 ranks after .* s: \[TRT-LLM\] \[I\] Build TensorRT engine \d\n", result.stderr
    )


def test_everything_that_is_missing_is_listed(tkit, node, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    result = tkit("build", "--backend", "tensorrt")
    assert result.exit_code == 2
    for problem in ("no GPU: no nvidia-smi on PATH", "no trtllm-build on PATH"):
        assert problem in result.stderr
    assert not Path("engines").exists()
    node(version="1.3.0")
    assert "TensorRT-LLM 1.3.0: the checkpoint is for 1.0 to 1.2" in tkit("build", "--backend", "tensorrt").stderr
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert 'CUDA_VISIBLE_DEVICES is "7" and leaves none' in tkit("build", "--backend", "tensorrt").stderr


def test_auto_falls_back_and_says_why(tkit, node) -> None:
    node(sm=80)
    result = tkit("build", "--quant", "fp8_rowwise")
    assert result.exit_code == 0, result.output
    assert "backend reference: quant_algo FP8_PER_CHANNEL_PER_TOKEN needs sm 89 or 90, not 80" in result.stderr
    assert card_of(result.stdout)[1]["backend"] == "reference"


def test_a_dry_run_prints_the_command_for_a_gpu_that_is_not_here(tkit) -> None:
    options = ("build", "--backend", "tensorrt", "--gpu", "h100", "--tp", "2", "--quant", "fp8", "--goal", "latency")
    result = tkit(*options, "--dry-run")
    assert result.exit_code == 0, result.output
    command = result.stdout.splitlines()[-1]
    assert command.startswith("trtllm-build --checkpoint_dir demo-fp8-tp2-")
    assert command.endswith("--reduce_fusion enable --user_buffer enable")
    assert not Path("engines").exists()
    assert json.loads(tkit(*options, "--dry-run", "--json").stdout)["command"] == command.split()
    assert tkit("build", *options[3:], "--dry-run").stdout == result.stdout  # auto: a GPU that is named is meant
    refused = tkit(*options)
    assert (refused.exit_code, "--gpu: an engine is compiled on the GPU it is for" in refused.stderr) == (2, True)


def test_the_pytorch_backend_gets_a_unified_checkpoint_and_its_options(tkit) -> None:
    result = tkit("build", "--backend", "pytorch", "--quant", "fp8_rowwise", "--tp", "2", "--max-batch-size", "8")
    assert result.exit_code == 0, result.output
    engine, card = card_of(result.stdout)
    assert (card["backend"], engine.name.startswith("demo-fp8_rowwise-tp2-pytorch-")) == ("pytorch", True)
    assert not (engine / "checkpoint").exists()
    assert (engine / "hf" / "hf_quant_config.json").is_file()
    assert (engine / "llm_api.yaml").read_text() == (
        "tensor_parallel_size: 2\n"
        "pipeline_parallel_size: 1\n"
        "moe_expert_parallel_size: 1\n"
        "dtype: auto\n"
        "max_batch_size: 8\n"
        "max_num_tokens: 8192\n"
        "max_seq_len: 2048\n"
        "max_beam_width: 1\n"
        "enable_chunked_prefill: true\n"
        "kv_cache_config:\n"
        "  enable_block_reuse: true\n"
        "cuda_graph_config:\n"
        "  enable_padding: true\n"
        "  max_batch_size: 8\n"
    )
    again = tkit(*card["command"].split()[1:])
    assert (again.exit_code, again.stdout) == (0, result.stdout)
