"""A server under clients that leave, send nonsense and send too much: everything is given back, the others get their text.

    python -m benchmarks.serve_faults [--requests 500] [--seed 0]

A third of the requests is abandoned at a random time; beside them go malformed and oversized ones. The others, over the
OpenAI front (streamed and whole) and over Triton's gRPC, must get the text that transformers generates. Afterwards
nothing runs, waits or lies in the KV cache, the processes have not grown, and the server ends by itself. Exits 1 if not.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import struct
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from tritonclient.grpc import service_pb2 as pb

from benchmarks.serve import built_engine
from tkit import demo
from tkit.gateway.app import MAX_BODY_BYTES
from tkit.specs.server import ServeOptions, ServerRecord
from tkit.stages.serve import running_server

NUM_PROMPTS = 12
NUM_AT_ONCE = 24
MAX_LEAVE_S = 0.6
TIMEOUT_S = 120
# Python and Triton keep some of what the first requests took; what one request leaves behind would show many times.
MAX_GROWTH_BYTES_PER_REQUEST = 20_000
GROWTH_FLOOR_BYTES = 16_000_000
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"

Answers = dict[tuple[str, int], str]  # prompt and number of tokens -> text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    answers = expected_answers()
    with tempfile.TemporaryDirectory() as directory:
        engine_dir = built_engine("demo", Path(directory))
        serve_options = ServeOptions(
            http_port=0, grpc_port=0, metrics_port=0, openai_port=0, device="cpu", max_batch_size=8, timeout_s=600
        )
        with running_server(engine_dir, serve_options, engines_dir=Path(directory)) as record:
            problems = run(record, answers, options.requests, random.Random(options.seed))
    for problem in problems:
        print(f"FAILED: {problem}")
    sys.exit(bool(problems))


def expected_answers() -> Answers:
    """By transformers, on the source."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32).eval()
    text = demo.HELD_OUT.read_text()
    answers = {}
    for index in range(NUM_PROMPTS):
        prompt, max_tokens = text[index * 4000 :][: 30 + 60 * index], 8 + 3 * index
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        if tokenizer.eos_token_id in new:
            new = new[: new.index(tokenizer.eos_token_id)]
        answers[prompt, max_tokens] = tokenizer.decode(new, skip_special_tokens=True)
    return answers


def run(record: ServerRecord, answers: Answers, num_requests: int, pick: random.Random) -> list[str]:
    """What went wrong."""
    pids = {"Triton": record.pid, "engine's process": record.model_pids[0], "front": record.openai_pid}
    sizes = [memory(pids)]
    problems: list[str] = []
    outcomes: Counter[str] = Counter()
    for half in range(2):
        jobs = make_jobs(record, answers, num_requests // 2, pick)
        with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            for name, problem in pool.map(lambda job: job(), jobs):
                outcomes[name] += 1
                problems += [f"{name}: {problem}"] if problem else []
        left = wait_until_idle(record)
        problems += [f"half a minute after half {half + 1}: {left}"] if left else []
        sizes.append(memory(pids))
    print(", ".join(f"{count} {name}" for name, count in sorted(outcomes.items())))
    print(f"on the server: {', '.join(f'{name} {value:g}' for name, value in metrics(record).items())}")
    for name in pids:
        mb = [size[name] / 1e6 for size in sizes]
        print(f"{name}: {mb[0]:.0f} MB at first, {mb[1]:.0f} MB after half of the requests, {mb[2]:.0f} MB after all")
        allowed = max(GROWTH_FLOOR_BYTES, MAX_GROWTH_BYTES_PER_REQUEST * num_requests)
        if sizes[2][name] - sizes[1][name] > allowed:
            problems.append(f"{name} grew by {mb[2] - mb[1]:.0f} MB in the second half")
    return problems


Job = Callable[[], tuple[str, str | None]]  # -> what it was, what is wrong with the answer


def make_jobs(record: ServerRecord, answers: Answers, num_requests: int, pick: random.Random) -> list[Job]:
    def ordinary() -> Job:
        (prompt, max_tokens), text = pick.choice(list(answers.items()))
        ask = pick.choice([ask_streamed, ask_whole, ask_grpc])
        leave_s = pick.uniform(0.001, MAX_LEAVE_S) if pick.random() < 1 / 3 else None
        return lambda: checked(ask, record, prompt, max_tokens, text, leave_s)

    num_malformed, num_oversized = max(num_requests // 25, 1), max(num_requests // 80, 1)
    jobs = [ordinary() for _ in range(num_requests)]
    jobs += [lambda body=body: refused("malformed", record, body) for body in pick.choices(MALFORMED, k=num_malformed)]
    jobs += [lambda body=body: refused("oversized", record, body) for body in pick.choices(OVERSIZED, k=num_oversized)]
    pick.shuffle(jobs)
    return jobs


def checked(
    ask: Callable[..., str], record: ServerRecord, prompt: str, max_tokens: int, text: str, leave_s: float | None
) -> tuple[str, str | None]:
    try:
        got = ask(record, prompt, max_tokens, leave_s or TIMEOUT_S)
    except (TimeoutError, grpc.RpcError) as error:
        is_late = isinstance(error, TimeoutError) or error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if leave_s is not None and is_late:
            return "left", None
        return "answered", f"{ask.__name__}: {error!r}"
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        return "answered", f"{ask.__name__}: {error!r}"
    return "answered", None if got == text else f"{ask.__name__}: {got!r}, expected {text!r}"


def ask_streamed(record: ServerRecord, prompt: str, max_tokens: int, timeout_s: float) -> str:
    _, body = post(record, completion(prompt, max_tokens, stream=True), timeout_s)
    events = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    if events[-1] != "[DONE]":
        raise ValueError(f"the stream ends with {events[-1]!r}")
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def ask_whole(record: ServerRecord, prompt: str, max_tokens: int, timeout_s: float) -> str:
    text: str = json.loads(post(record, completion(prompt, max_tokens), timeout_s)[1])["choices"][0]["text"]
    return text


def completion(prompt: str, max_tokens: int, **more: Any) -> bytes:
    return json.dumps(
        {"model": "ensemble", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}
    ).encode()


def post(record: ServerRecord, body: bytes, timeout_s: float) -> tuple[int, str]:
    """Raises TimeoutError, having left with or without a word, when the answer is not complete by then."""
    deadline = time.monotonic() + timeout_s
    connection = socket.create_connection(("127.0.0.1", record.openai_port), timeout=TIMEOUT_S)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        response = http.client.HTTPResponse(connection)
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        response.begin()
        parts = []
        while part := response.read1(65536):
            parts.append(part)
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
        return response.status, b"".join(parts).decode()
    finally:
        if len(body) % 2:  # a reset instead of an orderly end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def ask_grpc(record: ServerRecord, prompt: str, max_tokens: int, timeout_s: float) -> str:
    message = pb.ModelInferRequest(model_name="ensemble")
    text = prompt.encode()
    for name, data_type, raw in (
        ("text_input", "BYTES", struct.pack("<I", len(text)) + text),
        ("max_tokens", "INT32", struct.pack("<i", max_tokens)),
        ("stream", "BOOL", b"\1"),
    ):
        message.inputs.add(name=name, datatype=data_type, shape=[1, 1])
        message.raw_input_contents.append(raw)
    parts = []
    with grpc.insecure_channel(f"127.0.0.1:{record.grpc_port}") as channel:
        for data in channel.unary_stream(STREAM)(message.SerializeToString(), timeout=timeout_s):
            answer = pb.ModelStreamInferResponse.FromString(data)
            if answer.error_message:
                raise ValueError(answer.error_message)
            parts += [raw[4:].decode() for raw in answer.infer_response.raw_output_contents]
    return "".join(parts)


MALFORMED = [
    b"{",
    b"\xff\xfe",
    b"[]",
    b"null",
    b'{"model": "ensemble"}',
    b'{"model": "ensemble", "prompt": ""}',
    b'{"model": "ensemble", "prompt": "a", "max_tokens": -1}',
    b'{"model": "ensemble", "prompt": "a", "max_tokens": "many"}',
    b'{"model": "ensemble", "prompt": "a", "temperature": NaN}',
    b'{"model": "ensemble", "prompt": "\\ud800"}',
    b'{"model": "other", "prompt": "a"}',
    b"[" * 50_000,
]
OVERSIZED = [
    b'{"model": "ensemble", "prompt": "' + b"a " * (MAX_BODY_BYTES // 2) + b'"}',
    b'{"model": "ensemble", "prompt": "' + b"word " * 200_000 + b'"}',
    b'{"model": "ensemble", "prompt": "a", "max_tokens": 2048}',
]


def refused(name: str, record: ServerRecord, body: bytes) -> tuple[str, str | None]:
    try:
        status, told = post(record, body, TIMEOUT_S)
    except ConnectionError:  # refused while it was still sending
        return name, None if len(body) > MAX_BODY_BYTES else "the connection broke"
    except (OSError, http.client.HTTPException) as error:
        return name, repr(error)
    is_refused = status in (400, 404, 413) and "error" in json.loads(told)
    return name, None if is_refused else f"{body[:60]!r} got {status} {told[:200]}"


def wait_until_idle(record: ServerRecord) -> str | None:
    """None when nothing is left; else what is."""
    deadline = time.monotonic() + 30
    while True:
        busy = {name: value for name, value in metrics(record).items() if name in IDLE and value}
        if not busy:
            return None
        if time.monotonic() > deadline:
            return str(busy)
        time.sleep(0.2)


IDLE = {'open_requests{state="running"}', 'open_requests{state="waiting"}', 'kv_cache_tokens{kind="stored"}'}


def metrics(record: ServerRecord) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{record.metrics_port}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    pairs = (line.removeprefix("tkit_").rsplit(" ", 1) for line in lines if line.startswith("tkit_"))
    return {name: float(value) for name, value in pairs if "seconds" not in name}


def memory(pids: dict[str, int]) -> dict[str, int]:
    """Resident bytes of each process, files not counted."""
    return {name: (info := psutil.Process(pid).memory_info()).rss - info.shared for name, pid in pids.items()}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
