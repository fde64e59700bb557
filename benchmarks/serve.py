"""What serving costs: `model.generate`, the engine alone, through Triton, and through the OpenAI front, in one run.

Streamed, a response per token, and whole, one response per request, as `generate` answers.

    python -m benchmarks.serve [--model demo|100m] [--requests 16] [--prompt-tokens 128] [--new-tokens 64] [--rounds 3]

The same prompts go every way, all at once, greedily and with the end of sequence ignored; rounds alternate between the
ways. The best round of each is told, and beside it the median of the rounds' ratios to `generate` on a static batch, of
the rate and of the CPU time of everything but the client, who is told apart; the ratio of rates holds for an idle machine.
Requests sent one after the other give the time to the first token and between tokens without a queue.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer

from benchmarks.runtime import make_model
from tkit import demo
from tkit.loadgen.exchange import Exchange
from tkit.loadgen.prompts import PromptMaker
from tkit.loadgen.protocols import find_protocol, make_client
from tkit.runtime.engine import Engine
from tkit.specs.generation import GenerationChunk, GenerationRequest
from tkit.specs.server import ServeOptions, ServerRecord
from tkit.stages.serve import running_server

NUM_ALONE = 8  # requests one after the other


@dataclass
class Cost:
    """Of one way: seconds per round, CPU seconds by process, milliseconds of single requests."""

    wall: list[float] = field(default_factory=list)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)

    @property
    def own_cpu(self) -> list[float]:
        """Of everything but the client, per round."""
        own = [seconds for name, seconds in self.cpu.items() if name != "client"]
        return [sum(of_round) for of_round in zip(*own, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", choices=("demo", "100m"))
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        engine_dir = built_engine(options.model, Path(directory))
        maker = PromptMaker(engine_dir / "tokenizer", 0)
        prompts = [maker.prompt(options.prompt_tokens, index) for index in range(options.requests)]
        alone = [maker.prompt(options.prompt_tokens, "alone", index) for index in range(NUM_ALONE)]
        serve_options = ServeOptions(
            http_port=0, grpc_port=0, metrics_port=0, openai_port=0, device="cpu", max_batch_size=options.requests
        )
        with running_server(engine_dir, serve_options, engines_dir=Path(directory)) as record:
            costs = measure(engine_dir, record, maker, prompts, alone, options.new_tokens, options.rounds)
    report(costs, options.requests * options.new_tokens)


def built_engine(name: str, directory: Path) -> Path:
    source = demo.MODEL_DIR
    if name != "demo":
        source = directory / "source"
        make_model(name).to(torch.bfloat16).save_pretrained(source)
        for path in demo.MODEL_DIR.glob("tokenizer*"):
            shutil.copy(path, source)
    command = [
        sys.executable,
        "-m",
        "tkit",
        "build",
        str(source),
        "--out",
        str(directory),
        "--name",
        "bench",
        "--quiet",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=directory, env=environment())
    return directory / "bench"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def measure(
    engine_dir: Path,
    record: ServerRecord,
    maker: PromptMaker,
    prompts: list[str],
    alone: list[str],
    new_tokens: int,
    rounds: int,
) -> dict[str, Cost]:
    """`prompts` at once, `rounds` times; `alone` one after the other."""
    [model_pid] = record.model_pids
    pids = {"engine's process": model_pid, "Triton": record.pid}
    with_front = {**pids, "front": record.openai_pid}
    clients: dict[str, tuple[Client | WholeClient, dict[str, int]]] = {
        "Triton gRPC, streamed": (Client("triton-grpc", record, maker), pids),
        "Triton HTTP, whole": (WholeClient(record.http_port, "/v2/models/ensemble/generate", triton_body), pids),
        "OpenAI front, streamed": (Client("openai", record, maker), with_front),
        "OpenAI front, whole": (WholeClient(record.openai_port, "/v1/completions", openai_body), with_front),
    }
    costs = {name: Cost() for name in ("generate, static batch", "engine alone", *clients)}
    with Engine.load(engine_dir, device="cpu", max_batch_size=len(prompts), num_threads=1) as engine:
        static = static_batch(engine.model, engine_dir, prompts, new_tokens)
        for _ in range(rounds):
            with metered(costs["generate, static batch"], {"generate": os.getpid()}):
                static()
            with metered(costs["engine alone"], {"engine's process": os.getpid()}):
                run_engine(engine, prompts, new_tokens)
            for name, (client, processes) in clients.items():
                with metered(costs[name], {**processes, "client": os.getpid()}):
                    client.run(prompts, new_tokens)
        for prompt in ([one] for one in alone):
            note_alone(costs["engine alone"], run_engine(engine, prompt, new_tokens), new_tokens)
            for name, (client, _) in clients.items():
                note_alone(costs[name], client.run(prompt, new_tokens), new_tokens)
    for client, _ in clients.values():
        client.close()
    return costs


@contextmanager
def metered(cost: Cost, pids: dict[str, int]) -> Iterator[None]:
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    before = {name: cpu_seconds(process) for name, process in processes.items()}
    started = time.perf_counter()
    yield
    cost.wall.append(time.perf_counter() - started)
    for name, process in processes.items():
        cost.cpu.setdefault(name, []).append(cpu_seconds(process) - before[name])


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def static_batch(model: Any, engine_dir: Path, prompts: list[str], new_tokens: int) -> Callable[[], None]:
    tokenizer = AutoTokenizer.from_pretrained(engine_dir / "tokenizer")
    prompt_ids = torch.tensor([tokenizer.encode(prompt) for prompt in prompts])

    def run() -> None:
        with torch.inference_mode():
            model.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )

    return run


Times = tuple[int, list[int]]  # nanoseconds: sent, each token


def run_engine(engine: Engine, prompts: list[str], new_tokens: int) -> list[Times]:
    ended: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    answers: list[Times] = []

    def submit(prompt: str) -> None:
        times: list[int] = []

        def on_chunk(chunk: GenerationChunk) -> None:
            times.append(time.monotonic_ns())
            if chunk.finish_reason:
                ended.put(chunk.error)

        answers.append((time.monotonic_ns(), times))
        engine.submit(GenerationRequest(prompt=prompt, max_tokens=new_tokens, temperature=0, end_id=-1), on_chunk)

    for prompt in prompts:
        submit(prompt)
    for _ in prompts:
        if error := ended.get():
            sys.exit(error)
    return answers


class Client:
    """tkit's own load generator over one protocol."""

    def __init__(self, protocol: str, record: ServerRecord, maker: PromptMaker):
        self._loop = asyncio.new_event_loop()
        port = getattr(record, find_protocol(protocol).port)
        self._client = make_client(protocol, f"127.0.0.1:{port}", record.model, maker.token_ends)
        self._loop.run_until_complete(self._client.open(30))

    def run(self, prompts: list[str], new_tokens: int) -> list[Times]:
        exchanges = [
            Exchange(
                index=index,
                request=self._client.request(f"bench-{index}", prompt, new_tokens, 0),
                isl=0,
                osl=new_tokens,
            )
            for index, prompt in enumerate(prompts)
        ]
        self._loop.run_until_complete(self._all(exchanges))
        for exchange in exchanges:
            if exchange.error:
                sys.exit(f"{exchange.error}: {exchange.detail}")
        return [(exchange.sent_ns, list(exchange.times[:new_tokens])) for exchange in exchanges]

    async def _all(self, exchanges: list[Exchange]) -> None:
        await asyncio.gather(*map(self._client.perform, exchanges))

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


class WholeClient:
    """A thread and a connection per request; each answer comes as one."""

    def __init__(self, port: int, path: str, body: Callable[[str, int], dict[str, Any]]):
        self._port = port
        self._path = path
        self._body = body

    def run(self, prompts: list[str], new_tokens: int) -> list[Times]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self._ask(prompt, new_tokens), prompts))

    def _ask(self, prompt: str, new_tokens: int) -> Times:
        sent = time.monotonic_ns()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        connection.request("POST", self._path, json.dumps(self._body(prompt, new_tokens)))
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        if response.status != 200:
            sys.exit(answer.decode())
        return sent, [time.monotonic_ns()]

    def close(self) -> None:
        pass


def triton_body(prompt: str, new_tokens: int) -> dict[str, Any]:
    return {"text_input": prompt, "max_tokens": new_tokens, "end_id": -1}


def openai_body(prompt: str, new_tokens: int) -> dict[str, Any]:
    return {"model": "ensemble", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}


def note_alone(cost: Cost, answers: list[Times], new_tokens: int) -> None:
    """Several tokens may arrive at once; of a whole answer only its end is known."""
    [(sent, times)] = answers
    if len(times) == 1:
        return
    cost.ttft_ms.append((times[0] - sent) / 1e6)
    cost.tpot_ms.append((times[-1] - times[0]) / 1e6 / (new_tokens - 1))


def report(costs: dict[str, Cost], num_tokens: int) -> None:
    static = costs["generate, static batch"]
    print(f"{'of generate:':>53}")
    print(f"{'':24} {'tok/s':>7} {'CPU us/tok':>10} {'rate':>6} {'CPU':>6} {'TTFT':>9} {'TPOT':>9}   CPU us per token")
    for name, cost in costs.items():
        shares = ", ".join(f"{who} {min(seconds) / num_tokens * 1e6:.0f}" for who, seconds in cost.cpu.items())
        alone = [f"{statistics.median(values):6.2f} ms" if values else "" for values in (cost.ttft_ms, cost.tpot_ms)]
        rate, cpu = median_ratio(static.wall, cost.wall), median_ratio(static.own_cpu, cost.own_cpu)
        print(
            f"{name:24} {num_tokens / min(cost.wall):7.0f} {min(cost.own_cpu) / num_tokens * 1e6:10.0f} "
            f"{rate:6.2f} {cpu:6.2f} {alone[0]:>9} {alone[1]:>9}   {shares}"
        )


def median_ratio(reference: list[float], own: list[float]) -> float:
    """Of the rounds, each beside the reference's of the same round: what disturbs one disturbs the other."""
    return statistics.median(each / other for each, other in zip(reference, own, strict=True))


if __name__ == "__main__":
    main()
