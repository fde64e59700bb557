"""`tkit serve` of a compiled engine: the real tritonserver, TensorRT-LLM's models, and stand-ins for what needs a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from container import write_container
from nvidia_node import write_programs

from tkit.files import from_mapping
from tkit.specs.server import ServerRecord
from tkit.stages.servers import server_files
from tkit.triton import launcher, probe


@pytest.fixture
def engine(tkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An engine for two GPUs, compiled on a node that is also the container."""
    node = tmp_path / "node"
    for make in (write_programs, write_container):
        for name, value in make(node).items():
            monkeypatch.setenv(name, value)
    built = tkit("build", "--tp", "2", "--backend", "tensorrt", "--max-batch-size", "4", "--name", "compiled")
    assert built.exit_code == 0, built.output
    yield Path(built.stdout.strip())
    files = server_files("compiled")
    if (pid := files.pid()) is not None:
        launcher.kill_group(pid)
    files.remove_leftovers()


def test_a_compiled_engine_is_served_on_both_its_ranks_and_keeps_others_off_its_gpus(tkit, engine: Path) -> None:
    ports = [word for port in ("http", "grpc", "metrics", "openai") for word in (f"--{port}-port", "0")]
    command = [sys.executable, "-m", "tkit", "serve", "compiled", "--json", *ports]
    serving = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert serving.stdout is not None
        record = from_mapping(ServerRecord, json.loads("".join(iter(serving.stdout.readline, "}\n")) + "}"), "stdout")
        leader = psutil.Process(record.pid)
        assert "mpirun" in " ".join(leader.cmdline())
        ranks = [child for child in leader.children() if "--model-repository" in " ".join(child.cmdline())]
        assert len(ranks) == 2
        assert "--load-model=tensorrt_llm" in ranks[1].cmdline()
        assert probe.generate("127.0.0.1", record.grpc_port, "ab c", 6, 30) == "ab cab"
        request = urllib.request.Request(
            f"http://127.0.0.1:{record.openai_port}/v1/completions",
            json.dumps({"model": "ensemble", "prompt": "xyz", "max_tokens": 4}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            told = json.load(answer)
        assert (told["choices"][0]["text"], told["usage"]["completion_tokens"]) == ("xyzx", 4)
        assert swept(tkit, "triton-grpc") == swept(tkit, "openai") == "server_usage"
        assert record.kv_cache_shares == {"GPU-00000000": 0.9, "GPU-10000000": 0.9}
        processes = [leader, *leader.children(recursive=True)]

        shutil.copytree(engine, engine.with_name("other"))
        message = refused(tkit, "other")
        assert "GPU GPU-10000000: --kv-cache-fraction 0.9 beside 0.9 of compiled is more than all its memory" in message
    finally:
        serving.kill()
        serving.communicate()
    _, left = psutil.wait_procs(processes, timeout=60)  # no rank stays behind a foreground that was killed
    assert not [process for process in left if launcher.is_running(process.pid)]


def swept(tkit, protocol: str) -> str:
    """Who counted the tokens of a sweep, which ends well. Its point is invalid: the stand-in's tokens are bytes."""
    size = ("--shape", "16/8", "--concurrency", "2", "--requests", "4")
    result = tkit("sweep", "--protocol", protocol, *size)
    assert result.exit_code == 0, result.output
    [point] = Path(result.stdout.split("\n", 1)[0]).glob("points/*/point.json")
    record = json.loads(point.read_text())
    assert record["errors"] == {}
    return str(record["token_source"])


def refused(tkit, name: str) -> str:
    result = tkit("serve", name, "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--openai-port", "0")
    assert result.exit_code == 1
    assert "error: the server cannot start here\n" in result.stderr
    assert not list((Path("engines") / ".servers").glob(f"{name}*"))
    return result.stderr


def test_preflight_lists_everything_before_anything_starts(tkit, engine: Path, tmp_path: Path, monkeypatch) -> None:
    other = tmp_path / "other"
    for name, value in write_programs(other, sm=80, num_gpus=1, free_mib=0, version="1.1.0").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TKIT_TRTLLM_MODELS", str(other))
    monkeypatch.delenv("TKIT_TRITONSERVER")
    (engine / "tokenizer" / "tokenizer_config.json").write_text("{}")
    message = refused(tkit, "compiled")
    for problem in (
        "the engine is of TensorRT-LLM 1.2.1, this machine has 1.1.0: use nvcr.io/nvidia/tritonserver:26.07-trtllm",
        "is the wheel's, which has no tensorrtllm backend; run tkit in NVIDIA's container",
        "the engine spans 2 GPUs, this machine shows 1",
        "GPU 0 NVIDIA H100 80GB HBM3 is SM 80, the engine is compiled for SM 90",
        "GPU 0 has 0 B free, rank 0 takes 16 B and a KV cache",
        f"{other} lacks inflight_batcher_llm/preprocessing/1/model.py, inflight_batcher_llm/postprocessing/1/model.py",
        "tokenizer_config.json: no eos_token",
    ):
        assert problem in message, message
