"""The whole sentence on real parts: checkpoint -> engine -> Triton -> sweep -> report, typed as a user types it."""

from __future__ import annotations

import contextlib
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import psutil
import pytest
import torch
import tritonclient.grpc as triton
from transformers import AutoModelForCausalLM, AutoTokenizer

from tkit import demo
from tkit.files import from_mapping
from tkit.specs.server import ServerRecord

Tkit = Callable[..., subprocess.CompletedProcess[str]]
PORTS = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--openai-port", "0"]
PROMPTS = [
    text[start : start + length]
    for text in [demo.HELD_OUT.read_text()]
    for start, length in zip(range(1000, 90000, 5000), [20, 700, 150, 60] * 4, strict=False)
]  # 16 prompts of mixed lengths


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty directory in which everything happens."""
    return tmp_path_factory.mktemp("checkout")


@pytest.fixture(scope="module")
def tkit(checkout: Path) -> Tkit:
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tkit", *map(str, arguments)]
        result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        return result

    return run


@pytest.fixture(scope="module")
def engine(tkit: Tkit, checkout: Path) -> Path:
    return checkout / tkit("build", "--tp", "2").stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def server(tkit: Tkit, engine: Path) -> Iterator[dict]:
    """The record of a detached server of the `none` engine, two shards."""
    record = json.loads(tkit("serve", "--detach", "--json", "--max-batch-size", "16", *PORTS).stdout)
    yield record
    [stopped] = json.loads(tkit("stop", "--json").stdout)
    assert (stopped["pid"], stopped["was_killed"]) == (record["pid"], False)
    with contextlib.suppress(psutil.NoSuchProcess):  # ended, and perhaps not yet reaped by whoever inherited it
        assert psutil.Process(record["pid"]).status() == psutil.STATUS_ZOMBIE
    assert not list(Path("/dev/shm").glob(f"tkit{record['pid']}_*"))


@pytest.fixture(scope="module")
def expected() -> Callable[[str, int], str]:
    """transformers' own greedy continuation on the source checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32).eval()

    def generate(prompt: str, max_tokens: int) -> str:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        if tokenizer.eos_token_id in new:
            new = new[: new.index(tokenizer.eos_token_id)]
        return tokenizer.decode(new, skip_special_tokens=True)

    return generate


def stream(server: dict, prompt: str, max_tokens: int) -> str:
    """The text of one greedy streaming request, by NVIDIA's own client."""
    inputs = []
    for name, dtype, value in (
        ("text_input", "BYTES", np.array([[prompt.encode()]], dtype=object)),
        ("max_tokens", "INT32", np.array([[max_tokens]], dtype=np.int32)),
        ("temperature", "FP32", np.array([[0.0]], dtype=np.float32)),
        ("stream", "BOOL", np.array([[True]])),
    ):
        inputs.append(triton.InferInput(name, value.shape, dtype))
        inputs[-1].set_data_from_numpy(value)
    answers: list[tuple[triton.InferResult | None, Exception | None]] = []
    with triton.InferenceServerClient(f"127.0.0.1:{server['grpc_port']}") as client:
        client.start_stream(callback=lambda result, error: answers.append((result, error)))
        client.async_stream_infer(server["model"], inputs, outputs=[triton.InferRequestedOutput("text_output")])
        client.stop_stream()
    text = b""
    for result, error in answers:
        assert error is None, error
        part = result.as_numpy("text_output")
        text += b"" if part is None else part.reshape(-1)[0]
    return text.decode()


def test_greedy_text_through_triton_is_transformers_own(server, expected):
    for prompt in PROMPTS[:6]:
        assert stream(server, prompt, 24) == expected(prompt, 24)


def test_sixteen_at_once_answer_as_one_by_one(server):
    alone = [stream(server, prompt, 32) for prompt in PROMPTS[:16]]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda prompt: stream(server, prompt, 32), PROMPTS[:16]))
    assert together == alone
    assert len(set(alone)) > 8  # the prompts do lead to different texts


def test_greedy_text_through_the_openai_front_is_transformers_own(server, expected):
    """Alone and among 32 requests of mixed lengths; sampled text is reproducible."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server['openai_port']}/v1", api_key="-", timeout=120) as client:

        def complete(prompt: str, max_tokens: int, **more: float) -> str:
            options = {"temperature": 0, **more}
            return (
                client.completions.create(model="ensemble", prompt=prompt, max_tokens=max_tokens, **options)
                .choices[0]
                .text
            )

        lengths = [8, 40, 16, 24]
        alone = [complete(prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=False)]
        assert alone == [expected(prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=False)]
        events = client.completions.create(
            model="ensemble", prompt=PROMPTS[1], max_tokens=lengths[1], temperature=0, stream=True
        )
        assert "".join(event.choices[0].text for event in events) == alone[1]
        with pytest.raises(openai.BadRequestError, match="the model has 2048 positions") as too_long:
            complete(PROMPTS[0], 2048)
        assert too_long.value.code == "context_length_exceeded"
        with ThreadPoolExecutor(32) as pool:
            wanted = [(PROMPTS[number % 16], lengths[number % 4]) for number in range(32)]
            together = list(pool.map(lambda one: complete(*one), wanted))
        assert together[:4] == alone
        assert together == [expected(*one) for one in wanted[:16]] * 2
        sampled = [complete(PROMPTS[0], 16, temperature=1, seed=seed) for seed in (1, 1, 2)]
        assert sampled[0] == sampled[1] != sampled[2]


def test_the_server_gets_over_what_its_clients_do(server, monkeypatch, capsys):
    """The small form of benchmarks/serve_faults.py: clients that leave, nonsense, and too much of everything."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from benchmarks import serve_faults

    record = from_mapping(ServerRecord, server, "tkit serve --json")
    assert serve_faults.run(record, serve_faults.expected_answers(), 40, random.Random(0)) == []
    counts = re.match(r"(\d+) answered, (\d+) left, (\d+) malformed, (\d+) oversized\n", capsys.readouterr().out)
    assert counts is not None and all(int(count) > 0 for count in counts.groups())


def test_sweep_and_report_need_nothing_but_their_names(tkit, checkout, server, engine):
    size = ("--shape", "32/16", "--requests", "8")
    run = checkout / tkit("sweep", *size, "--concurrency", "1,4").stdout.splitlines()[-1]
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["engine"]["name"] == engine.name
    points = [json.loads(path.read_text()) for path in sorted(run.glob("points/*/point.json"))]
    assert [point["concurrency"] for point in points] == [1, 4]
    assert all(point["errors"] == {} and point["output_tok_s"] > 0 for point in points)
    openai_run = checkout / tkit("sweep", "--protocol", "openai", *size, "--concurrency", "4").stdout.splitlines()[-1]
    assert json.loads((openai_run / "manifest.json").read_text())["protocol"] == "openai"
    [point] = [json.loads(path.read_text()) for path in openai_run.glob("points/*/point.json")]
    assert (point["errors"], point["output_tok_s"] > 0) == ({}, True)
    html = checkout / tkit("report").stdout.splitlines()[-1]
    assert engine.name in html.read_text()
