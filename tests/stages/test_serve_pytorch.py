"""`tkit serve` of a unified checkpoint: the real tritonserver, tkit's `ensemble`, and a stand-in for TensorRT-LLM's model."""

from __future__ import annotations

import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tritonclient.grpc as triton
from container import write_container
from nvidia_node import write_programs
from tritonclient.utils import InferenceServerException

from tkit.errors import ServerError
from tkit.specs.server import ServeOptions
from tkit.stages.serve import running_server
from tkit.triton import launcher, probe

FREE = ServeOptions(http_port=0, grpc_port=0, metrics_port=0, openai_port=0, timeout_s=120, kv_cache_fraction=0.7)


def text_of(count: int) -> str:
    return " ".join(f"a{i}é" for i in range(count))


def test_the_llm_api_is_served_behind_the_same_surface(tkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.ServerProcess, "stop", launcher.ServerProcess.kill)
    for make in (write_programs, write_container):
        for name, value in make(tmp_path / "node").items():
            monkeypatch.setenv(name, value)
    built = tkit("build", "--tp", "2", "--backend", "pytorch", "--name", "unified")
    assert built.exit_code == 0, built.output
    engine = Path(built.stdout.strip())
    with running_server(engine, FREE) as record:
        settings = (
            Path("engines") / ".servers" / "unified" / "repository" / "tensorrt_llm" / "1" / "model.yaml"
        ).read_text()
        assert f"model: {engine.resolve()}/hf\nbackend: pytorch\ntensor_parallel_size: 2\n" in settings
        assert "free_gpu_memory_fraction: 0.7\n" in settings
        with ThreadPoolExecutor(8) as pool:  # deltas, in order, also when many stream at once
            texts = list(
                pool.map(lambda count: probe.generate("127.0.0.1", record.grpc_port, "a", count, 60), range(5, 21))
            )
        assert texts == [text_of(count) for count in range(5, 21)]
        request = urllib.request.Request(
            f"http://127.0.0.1:{record.openai_port}/v1/completions",
            json.dumps({"model": "ensemble", "prompt": "a", "max_tokens": 3}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.load(answer)["choices"][0]["text"] == text_of(3)
        size = ("--shape", "16/8", "--concurrency", "2", "--requests", "4")
        result = tkit("sweep", *size)  # without the inputs that the model lacks; the stand-in's words are no tokens
        assert result.exit_code == 0, result.output
        [point] = Path(result.stdout.split("\n", 1)[0]).glob("points/*/point.json")
        assert json.loads(point.read_text())["token_source"] == "tokenizer"
        for protocol, port in (("triton-grpc", record.grpc_port), ("triton-http", record.http_port)):
            # TensorRT-LLM's own model, as another's server would have it: the whole text so far in every response
            url = ("--url", f"127.0.0.1:{port}", "--model", "tensorrt_llm", "--isl-chars", "--protocol", protocol)
            result = tkit("sweep", *size, *url)
            assert result.exit_code == 0, result.output
            [point] = Path(result.stdout.split("\n", 1)[0]).glob("points/*/point.json")
            summary = json.loads(point.read_text())
            assert (summary["token_source"], summary["errors"]) == ("chunks", {})
            requests = pd.read_parquet(point.with_name("requests.parquet"))
            assert set(requests.osl) == set(requests.chunks) == {8}
            assert set(requests.n_first) == {1}
            tpot_ms = summary["tpot"]["p50"]
            assert tpot_ms is not None
            assert tpot_ms >= 19.9, "the stand-in waits 20 ms before each word"
        refused = tkit("sweep", *size, "--protocol", "openai")
        assert (refused.exit_code, "the served model cannot do min_tokens, ignore_eos" in refused.stderr) == (1, True)
        with pytest.raises(ServerError, match="max_tokens is 0, expected at least 1"):
            probe.generate("127.0.0.1", record.grpc_port, "a", 0, 30)

        served = engine / "hf" / ".served"
        before = len(served.read_text().splitlines())
        client = triton.InferenceServerClient(f"127.0.0.1:{record.grpc_port}")
        answers: list[InferenceServerException | None] = []
        client.start_stream(lambda result, error: answers.append(error))
        inputs = [
            probe._input("text_input", np.array([[b"a"]], np.object_)),
            probe._input("max_tokens", np.array([[5000]], np.int32)),
            probe._input("stream", np.array([[True]])),
        ]
        client.async_stream_infer("ensemble", inputs)
        deadline = time.monotonic() + 30
        while not answers and time.monotonic() < deadline:
            time.sleep(0.02)
        client.stop_stream(cancel_requests=True)
        client.close()
        while len(lines := served.read_text().splitlines()) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(lines) == before + 1
        assert int(lines[-1].split()[0]) < 3000  # of 5000: it was told that its client had gone
