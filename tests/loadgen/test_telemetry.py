"""Samples of the server and the GPUs, on the clock of the requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import Result

from tkit.files import read_json
from tkit.loadgen.mock_server import running_mock
from tkit.loadgen.telemetry import Sampler, parse_prometheus
from tkit.report.read import read_run
from tkit.report.telemetry import over_time

Tkit = Callable[..., Result]

# No machine of ours has a GPU: what NVML answers, and two GPUs of which one cannot tell its power.
NVML = """
NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
class NVMLError(Exception): pass
class Used:
    def __init__(self, gpu): self.gpu, self.used = 50 + gpu, 1_000_000_000 * (gpu + 1)
def nvmlInit(): pass
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetPowerUsage(gpu):
    if gpu: raise NVMLError("not supported")
    return 300_000
def nvmlDeviceGetClockInfo(gpu, kind): return 1000 * kind
def nvmlDeviceGetUtilizationRates(gpu): return Used(gpu)
def nvmlDeviceGetMemoryInfo(gpu): return Used(gpu)
def nvmlDeviceGetTemperature(gpu, kind): return 40
"""

EXPOSITION = """# HELP x y
# TYPE nv_inference_count counter
nv_inference_count{model="a b",version="1"} 12
vllm:num_requests_running{engine="0"} 3.0 1700000000
ttft_bucket{le="0.1"} 4
ttft_sum 1.5e-3
nothing NaN
<html>
"""


def test_a_text_exposition() -> None:
    assert parse_prometheus(EXPOSITION) == [
        ("nv_inference_count", 'model="a b",version="1"', 12.0),
        ("vllm:num_requests_running", 'engine="0"', 3.0),
        ("ttft_sum", "", 0.0015),
    ]


def test_a_sweep_stores_what_server_and_gpus_say(
    tkit: Tkit, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/pynvml.py").write_text(NVML)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'fake'}:{Path(__file__).parents[2]}")
    with running_mock() as url:
        result = tkit(
            "sweep", "--protocol", "openai", "--url", url, "--model", "exact", "--tokenizer", tokenizer_dir, "--shape",
            "16/64", "--concurrency", "3", "--duration", "4", "--name", "run",
        )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (directory,) = (tmp_path / "reports/run/points").iterdir()
    requests = pq.read_table(directory / "requests.parquet").to_pydict()
    server, gpu = (pq.read_table(directory / f"{name}.parquet").to_pydict() for name in ("server", "gpu"))
    first, last = min(requests["sent_ns"]), max(requests["end_ns"])
    for samples in (server, gpu):
        assert first <= min(samples["when_ns"]) <= max(samples["when_ns"]) <= last, "one clock"
    assert set(server["metric"]) == {"mock_answers_in_flight"}
    for when, value in zip(server["when_ns"], server["value"], strict=True):
        flying = sum(sent <= when <= end for sent, end in zip(requests["sent_ns"], requests["end_ns"], strict=True))
        assert abs(value - flying) <= 1
    assert set(zip(gpu["gpu"], gpu["power_w"], strict=True)) == {(0, 300.0), (1, None)}
    point = read_json(directory / "point.json")
    numbers = point["telemetry"]
    assert numbers["gpus"] == 2
    assert numbers["gpu_power_w"] == pytest.approx(300)
    assert numbers["gpu_memory_bytes"] == pytest.approx(3e9)
    assert numbers["gpu_utilisation"] == pytest.approx(0.505)
    assert numbers["joules_per_output_token"] == pytest.approx(300 / point["output_tok_s"])
    run = read_run(tmp_path / "reports/run")
    assert run.left_out == ()
    power = over_time(run.points[0])["power_w"]
    assert set(power) == {300.0} and 0 <= power.index.min() <= power.index.max() <= (last - first) / 1e9


def test_nothing_answers() -> None:
    with Sampler("http://127.0.0.1:9/metrics", asks_gpus=True) as sampler:
        time.sleep(0.5)
        samples = sampler.between(0, time.monotonic_ns())
    assert samples.server["when_ns"] == samples.gpu["when_ns"] == []


def test_a_sampler_of_nothing_starts_nothing() -> None:
    with Sampler(None, asks_gpus=False) as sampler:
        assert not hasattr(sampler, "_process")
        assert np.size(sampler.between(0, time.monotonic_ns()).gpu["when_ns"]) == 0


def test_a_metrics_url_that_is_none(tkit: Tkit) -> None:
    result: Any = tkit("sweep", "--metrics-url", "h:1")
    assert result.exit_code == 2
    assert "--metrics-url is 'h:1', expected http://HOST:PORT/metrics" in result.stderr
