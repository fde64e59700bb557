"""What the server and the GPUs say of themselves while they are measured: Prometheus metrics and NVML, once a second.

A process of its own takes the samples, so that no scrape delays a timestamp of the load. Its times are of the monotonic
clock, which all processes of a machine share; NVML is asked only where the server is on this machine.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tkit.specs.record import PointSummary

INTERVAL_S = 1.0
SCRAPE_TIMEOUT_S = 2.0
SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\d+)?")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Columns as in `specs.record`; empty where nothing answered."""

    server: Mapping[str, list[Any]]
    gpu: Mapping[str, list[Any]]


class Sampler:
    """Entered, it samples until it is left."""

    def __init__(self, metrics_url: str | None, *, asks_gpus: bool):
        self._command = [sys.executable, "-m", "tkit.loadgen.telemetry"]
        self._command += ["--metrics-url", metrics_url] if metrics_url else []
        self._command += ["--gpus"] if asks_gpus else []
        self._is_idle = not metrics_url and not asks_gpus

    def __enter__(self) -> Sampler:
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(tempfile.TemporaryFile())
            if not self._is_idle:
                self._process = stack.enter_context(
                    subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=self._file, start_new_session=True)
                )
                assert self._process.stdin is not None
                stack.callback(self._process.stdin.close)  # it ends with its input
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def between(self, start_ns: int, end_ns: int) -> Samples:
        self._file.seek(0)
        server: dict[str, list[Any]] = {"when_ns": [], "metric": [], "labels": [], "value": []}
        gpu: dict[str, list[Any]] = {"when_ns": [], **{name: [] for name in GPU_READINGS}}
        for line in self._file.read().splitlines(keepends=True):
            if not line.endswith(b"\n"):  # still being written
                break
            sample = json.loads(line)
            if not start_ns <= sample["when_ns"] <= end_ns:
                continue
            for metric, labels, value in sample["server"]:
                for name, cell in zip(server, (sample["when_ns"], metric, labels, value), strict=True):
                    server[name].append(cell)
            for readings in sample["gpus"]:
                gpu["when_ns"].append(sample["when_ns"])
                for name in GPU_READINGS:
                    gpu[name].append(readings[name])
        return Samples(server=server, gpu=gpu)


def telemetry_numbers(samples: Samples, summary: PointSummary) -> dict[str, float]:
    """Means over the point, of all GPUs together; energy per output token at that power and the steady rate."""
    times = samples.gpu["when_ns"]
    if not times:
        return {}
    num_times = len(set(times))
    numbers = {"gpus": len(times) / num_times}
    for name, together in (("power_w", True), ("memory_bytes", True), ("utilisation", False), ("sm_clock_mhz", False)):
        values = [value for value in samples.gpu[name] if value is not None]
        if values:
            numbers[f"gpu_{name}"] = sum(values) / (num_times if together else len(values))
    if "gpu_power_w" in numbers and summary.output_tok_s:
        numbers["joules_per_output_token"] = numbers["gpu_power_w"] / summary.output_tok_s
    return numbers


def _nvml_readings() -> Callable[[], list[dict[str, float | None]]]:
    """What reads every GPU once; nothing where there is no driver. A reading that a GPU does not have is None."""
    import pynvml as nvml

    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return list
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]

    def asked(question: Callable[[Any, Any], float], handle: Any) -> float | None:
        try:
            return question(nvml, handle)
        except nvml.NVMLError:
            return None

    def read() -> list[dict[str, float | None]]:
        return [
            {"gpu": index, **{name: asked(question, handle) for name, question in ASKED.items()}}
            for index, handle in enumerate(handles)
        ]

    return read


ASKED: dict[str, Callable[[Any, Any], float]] = {
    "power_w":         lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "sm_clock_mhz":    lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "utilisation":     lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    "memory_bytes":    lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    "temperature_c":   lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
}  # fmt: skip
GPU_READINGS = ("gpu", *ASKED)


def parse_prometheus(text: str) -> list[tuple[str, str, float]]:
    """(metric, labels, value) of a text exposition. The buckets of histograms are left out: sums and counts tell the mean."""
    samples = []
    for line in text.splitlines():
        found = SAMPLE.fullmatch(line.strip())
        if found is None or found[1].endswith("_bucket"):
            continue
        try:
            value = float(found[3])
        except ValueError:
            continue
        if math.isfinite(value):
            samples.append((found[1], found[2] or "", value))
    return samples


def _scraper(url: str) -> Callable[[], Sequence[tuple[str, str, float]]]:
    """What reads the metrics once; nothing where nobody answers."""
    from urllib.request import ProxyHandler, build_opener  # 3 MB that the process which measures need not have

    opener = build_opener(ProxyHandler({}))  # no proxy from the environment, as for the load

    def scrape() -> Sequence[tuple[str, str, float]]:
        try:
            with opener.open(url, timeout=SCRAPE_TIMEOUT_S) as reply:
                return parse_prometheus(reply.read().decode("utf-8", "replace"))
        except (OSError, ValueError):
            return ()

    return scrape


def main() -> None:
    """A line of JSON per second on standard output, until standard input ends."""
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--metrics-url")
    parser.add_argument("--gpus", action="store_true")
    given = parser.parse_args()
    read_gpus = _nvml_readings() if given.gpus else list
    scrape = _scraper(given.metrics_url) if given.metrics_url else tuple
    due = time.monotonic()
    while True:
        when_ns = time.monotonic_ns()
        gpus = read_gpus()
        server = scrape()
        if gpus or server:
            print(json.dumps({"when_ns": when_ns, "server": server, "gpus": gpus}), flush=True)
        due = max(due + INTERVAL_S, time.monotonic())
        if select.select([sys.stdin], [], [], max(due - time.monotonic(), 0))[0]:
            return


if __name__ == "__main__":
    main()
