"""What the load generator adds to the numbers, against a mock server whose first token is due after 50 ms and the others
every 10 ms. Yardsticks against the same server: a plain aiohttp client, grpc.aio with raw bytes, tritonclient.grpc.aio, and
AIPerf where its command is given.

    python -m benchmarks.client [--streams 256] [--rounds 1] [--aiperf VENV/bin/aiperf]

Every client is a process of its own, started for the row. `of ideal`: output tokens per second over those of the schedule, in
the steady window; `server late`: the mock server's own delay, which every client sees. CPU is that of the client's process
over its output tokens while it measures (whole: from start to end), RSS that of the client's process when it has measured,
peak that of all processes together, with the one that writes Parquet afterwards. At 256 streams the bars that tkit is held to
follow, each with its value, the median of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tkit import demo
from tkit.loadgen.mock_server import DEFAULT_ITL_MS, DEFAULT_TTFT_MS, running_mock

ISL, OSL = 64, 64
E2E_S = (DEFAULT_TTFT_MS + (OSL - 1) * DEFAULT_ITL_MS) / 1000
ROUNDS_PER_STREAM = 5
TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
COLUMNS = {
    "TTFT p50": "{:.1f}", "TTFT p99": "{:.1f}", "ITL p50": "{:.2f}", "of ideal": "{:.1%}", "us/token": "{:.1f}",
    "whole": "{:.1f}", "RSS MB": "{:.0f}", "peak MB": "{:.0f}", "start s": "{:.2f}",
    "server late p50": "{:.2f}", "server late p99": "{:.1f}",
}  # fmt: skip
SSE, GRPC = "tkit SSE", "tkit gRPC"
# client, streams, column, least, most
BARS = (
    (SSE,  256, "start s",  None,  0.5),
    (SSE,  256, "TTFT p50", None,  52),
    (SSE,  256, "TTFT p99", None,  60),
    (SSE,  256, "ITL p50",  9.95,  10.05),
    (SSE,  256, "of ideal", 0.995, None),
    (SSE,  256, "us/token", None,  15),
    (SSE,  256, "RSS MB",   None,  80),
    (SSE,  512, "of ideal", 0.99,  None),
    (GRPC, 256, "start s",  None,  0.5),
    (GRPC, 256, "TTFT p50", None,  53),
    (GRPC, 256, "of ideal", 0.99,  None),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Milliseconds; `cpu_us` while it measured, where the client tells."""

    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    tok_s: float
    cpu_us: float | None = None
    rss_bytes: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--aiperf", type=Path, help="AIPerf's command, in an environment of its own")
    parser.add_argument("--plain", nargs=2, metavar=("CLIENT", "URL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        client, url = arguments.plain
        asyncio.run(run_plain(client, url, arguments.streams))
        return
    streams = arguments.streams
    rows: list[tuple[str, int, Callable[[str, int, Path], tuple[list[str], Callable[[str], Figures]]]]] = [
        (SSE, streams, tkit_openai),
        (SSE, 2 * streams, tkit_openai),
        (GRPC, streams, tkit_grpc),
        *((name, streams, functools.partial(plain_client, name)) for name in PLAIN),
    ]
    if arguments.aiperf:
        rows.append(("AIPerf", streams, lambda url, streams, work: aiperf_client(arguments.aiperf, url, streams, work)))
    print("  ".join(f"{name:>15s}" for name in ("client", "C", *COLUMNS)))
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for name, count, prepare in rows:
            values = measure(count, prepare)
            found.setdefault((name, count), []).append(values)
            cells = (form.format(values[column]) if column in values else "-" for column, form in COLUMNS.items())
            print("  ".join(f"{cell:>15s}" for cell in (name, str(count), *cells)), flush=True)
    for name, count, column, least, most in BARS:
        measured = [values[column] for values in found.get((name, count), ()) if column in values]
        if measured:
            value, form = statistics.median(measured), COLUMNS[column]
            limits = " and ".join(
                f"{sign} {form.format(limit)}" for sign, limit in ((">=", least), ("<=", most)) if limit
            )
            is_met = (least is None or value >= least) and (most is None or value <= most)
            print(f"{name} {count}: {column} {form.format(value)}, bar {limits}: {'met' if is_met else 'MISSED'}")


def measure(streams: int, prepare: Callable[..., Any]) -> dict[str, float]:
    """One row, by column; empty when the client failed."""
    with tempfile.TemporaryDirectory() as work, running_mock() as url:
        command, read = prepare(url, streams, Path(work))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": f"{work}/hf"}
        cpu_before, started_ns = children_cpu_s(), time.monotonic_ns()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        ) as process:
            peak = PeakMemory(process.pid)
            output = process.stdout.read() if process.stdout else ""
        if process.wait() != 0:
            return {}
        cpu_s = children_cpu_s() - cpu_before
        with urllib.request.urlopen(f"http://{url}/record", timeout=60) as reply:
            record = json.load(reply)
        figures: Figures = read(output)
    late = np.concatenate([np.array(line["sent_ns"]) - np.array(line["due_ns"]) for line in record]) / 1e6
    start_s = (min(line["arrived_ns"] for line in record) - started_ns) / 1e9
    tokens = sum(sum(line["tokens"]) for line in record)
    values = {
        "TTFT p50": figures.ttft_p50,
        "TTFT p99": figures.ttft_p99,
        "ITL p50": figures.itl_p50,
        "of ideal": figures.tok_s / (streams * OSL / E2E_S),
        "whole": cpu_s / tokens * 1e6,
        "peak MB": peak.bytes / 1e6,
        "start s": start_s,
        "server late p50": float(np.percentile(late, 50)),
        "server late p99": float(np.percentile(late, 99)),
    }
    if figures.cpu_us is not None and figures.rss_bytes is not None:
        values |= {"us/token": figures.cpu_us, "RSS MB": figures.rss_bytes / 1e6}
    return values


def children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class PeakMemory:
    """The largest sum of a process and its descendants, looked at every 0.2 s until it ends."""

    def __init__(self, pid: int):
        self.bytes = 0
        self._root = psutil.Process(pid)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            try:
                family = [self._root, *self._root.children(recursive=True)]
                self.bytes = max(self.bytes, sum(process.memory_info().rss for process in family))
            except psutil.Error:
                return
            time.sleep(0.2)


def tkit_openai(url: str, streams: int, work: Path) -> tuple[list[str], Callable[[str], Figures]]:
    return tkit_sweep("openai", url, streams, work)


def tkit_grpc(url: str, streams: int, work: Path) -> tuple[list[str], Callable[[str], Figures]]:
    return tkit_sweep("triton-grpc", url, streams, work)


def tkit_sweep(protocol: str, url: str, streams: int, work: Path) -> tuple[list[str], Callable[[str], Figures]]:
    command = [
        sys.executable, "-m", "tkit", "sweep", "standard", "--repeats", "1", "--protocol", protocol, "--url", url,
        "--model", "exact", "--shape", f"{ISL}/{OSL}", "--concurrency", str(streams),
        "--requests", str(ROUNDS_PER_STREAM * streams), "--tokenizer", str(demo.MODEL_DIR), "--out", str(work), "--name", "run",
    ]  # fmt: skip

    def read(output: str) -> Figures:
        (path,) = (work / "run/points").iterdir()
        point = json.loads((path / "point.json").read_text())
        return Figures(
            ttft_p50=point["ttft"]["p50"],
            ttft_p99=point["ttft"]["p99"] or point["ttft"]["max"],
            itl_p50=point["chunk_gap"]["p50"],
            tok_s=point["output_tok_s"],
            cpu_us=point["client"]["cpu_cores"] / point["output_tok_s"] * 1e6,
            rss_bytes=point["client"]["rss_bytes"],
        )

    return command, read


def plain_client(client: str, url: str, streams: int, work: Path) -> tuple[list[str], Callable[[str], Figures]]:
    command = [sys.executable, "-m", "benchmarks.client", "--plain", client, url, "--streams", str(streams)]
    return command, lambda output: Figures(**json.loads(output))


async def run_plain(client: str, url: str, streams: int) -> None:
    """A task per stream; a token's time is taken when the client's own library hands it over."""
    ttfts: list[float] = []
    gaps: list[float] = []
    arrivals: list[float] = []

    async def stream(answers: Answers, index: int) -> None:
        await asyncio.sleep(E2E_S * index / streams)
        for number in range(ROUNDS_PER_STREAM + 2):
            sent, last = time.monotonic(), None
            async for _ in answers(f"{index}-{number}"):
                now = time.monotonic()
                if last is None:
                    ttfts.append((now - sent) * 1000)
                else:
                    gaps.append((now - last) * 1000)
                last = now
                arrivals.append(now)

    async with PLAIN[client](url) as answers:
        cpu_before = time.process_time()
        await asyncio.gather(*(stream(answers, index) for index in range(streams)))
        cpu_s = time.process_time() - cpu_before
    times = np.array(arrivals)
    low, high = times[0] + 2 * E2E_S, times[-1] - 2 * E2E_S  # the steady window
    tok_s = float(((times > low) & (times < high)).sum() / (high - low))
    figures = {
        "ttft_p50": np.percentile(ttfts, 50),
        "ttft_p99": np.percentile(ttfts, 99),
        "itl_p50": np.percentile(gaps, 50),
        "tok_s": tok_s,
        "cpu_us": cpu_s / len(arrivals) * 1e6,
        "rss_bytes": psutil.Process().memory_info().rss,
    }
    print(json.dumps({name: float(value) for name, value in figures.items()}))


Answers = Callable[[str], AsyncIterator[object]]  # request id -> something per token


@contextlib.asynccontextmanager
async def aiohttp_answers(url: str) -> AsyncIterator[Answers]:
    """As one would write it: a session, a line at a time, JSON at once."""
    import aiohttp

    body = {"model": "exact", "prompt": "word " * ISL, "max_tokens": OSL, "stream": True}

    async def answers(id: str) -> AsyncIterator[object]:
        async with session.post(f"http://{url}/v1/completions", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:])["choices"]
                    if choices and choices[0]["text"]:
                        yield choices

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield answers


@contextlib.asynccontextmanager
async def raw_grpc_answers(url: str) -> AsyncIterator[Answers]:
    """grpc.aio without protobuf: bytes there, bytes back."""
    import grpc.aio
    from tritonclient.grpc import service_pb2 as pb

    async def answers(id: str) -> AsyncIterator[object]:
        message = pb.ModelInferRequest(model_name="exact", id=id)
        message.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
        message.inputs.add(name="max_tokens", datatype="INT32", shape=[1, 1])
        text = b"word " * ISL
        message.raw_input_contents.extend([struct.pack("<I", len(text)) + text, struct.pack("<i", OSL)])
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        async for answer in call(iter([message.SerializeToString()])):
            yield answer

    async with grpc.aio.insecure_channel(url) as channel:
        yield answers


@contextlib.asynccontextmanager
async def triton_grpc_answers(url: str) -> AsyncIterator[Answers]:
    """NVIDIA's own client."""
    import tritonclient.grpc.aio as triton

    text, most = triton.InferInput("text_input", [1, 1], "BYTES"), triton.InferInput("max_tokens", [1, 1], "INT32")
    text.set_data_from_numpy(np.array([[b"word " * ISL]], dtype=object))
    most.set_data_from_numpy(np.array([[OSL]], dtype=np.int32))

    async def answers(id: str) -> AsyncIterator[object]:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": "exact", "inputs": [text, most], "request_id": id}

        async for result, error in client.stream_infer(requests()):
            if error is not None:
                raise error
            yield result.as_numpy("text_output")

    async with triton.InferenceServerClient(url) as client:
        yield answers


PLAIN = {"aiohttp": aiohttp_answers, "grpc.aio raw": raw_grpc_answers, "tritonclient": triton_grpc_answers}


def aiperf_client(aiperf: Path, url: str, streams: int, work: Path) -> tuple[list[str], Callable[[str], Figures]]:
    """Its tokenizer must be one of the hub, so the demo model's is laid out as if it had been fetched from there."""
    revision = "0" * 40
    repository = work / "hf/hub/models--demo--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copy(demo.MODEL_DIR / name, snapshot)
    config = json.loads((snapshot / "tokenizer_config.json").read_text())
    config = {name: value for name, value in config.items() if name != "backend"}
    (snapshot / "tokenizer_config.json").write_text(
        json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    settings = {
        "model": "exact", "url": f"http://{url}", "endpoint-type": "completions", "tokenizer": "demo/model",
        "concurrency": streams, "request-count": ROUNDS_PER_STREAM * streams, "warmup-request-count": streams,
        "synthetic-input-tokens-mean": ISL, "synthetic-input-tokens-stddev": 0, "output-tokens-mean": OSL,
        "output-tokens-stddev": 0, "artifact-dir": work / "out", "ui-type": "none",
    }  # fmt: skip
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [str(aiperf), "profile", "--streaming", *options]

    def read(output: str) -> Figures:
        told = json.loads((work / "out/profile_export_aiperf.json").read_text())
        ttft = told["time_to_first_token"]
        tok_s = told["output_token_throughput"]["avg"]
        return Figures(
            ttft_p50=ttft["p50"], ttft_p99=ttft["p99"], itl_p50=told["inter_token_latency"]["p50"], tok_s=tok_s
        )

    return command, read


if __name__ == "__main__":
    main()
