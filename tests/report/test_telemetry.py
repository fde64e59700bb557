"""What server and GPUs said: on the time axis, in tables, and as energy and memory; nothing where nobody was asked."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from factory import MS, card, edit, make_run, write_parquet

from tkit.loadgen.telemetry import parse_prometheus
from tkit.report.compare import compare
from tkit.report.read import read_runs
from tkit.report.render_csv import render_csv
from tkit.report.sections import Section, sections
from tkit.report.telemetry import SERVER, over_time
from tkit.specs.record import GPU_COLUMNS, SERVER_COLUMNS

S = 1000 * MS
SAMPLES = 12

# running, waiting, KV cache a quarter full
EXPOSITIONS = {
    "tkit": """
        tkit_open_requests{state="running"} 6
        tkit_open_requests{state="waiting"} 2
        tkit_kv_cache_tokens{kind="limit"} 1000
        tkit_kv_cache_tokens{kind="stored"} 250
        tkit_resident_memory_bytes 123000000
    """,
    "TensorRT-LLM in Triton": """
        nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 2
        nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 6
        nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 8
        nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 10
        nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 40
    """,
    "trtllm-serve": "trtllm_num_requests_running 6\ntrtllm_num_requests_waiting 2\ntrtllm_kv_cache_utilization 0.25",
    "vLLM, two ranks": """
        vllm:num_requests_running{engine="0"} 4.0
        vllm:num_requests_running{engine="1"} 2.0
        vllm:num_requests_waiting{engine="0"} 0.0
        vllm:num_requests_waiting{engine="1"} 2.0
        vllm:kv_cache_usage_perc{engine="0"} 0.3
        vllm:kv_cache_usage_perc{engine="1"} 0.2
        vllm:gpu_cache_usage_perc{engine="0"} 0.3
    """,
    "SGLang": """
        sglang:num_running_reqs{tp_rank="0"} 6
        sglang:num_queue_reqs{tp_rank="0"} 2
        sglang:token_usage{tp_rank="0"} 0.25
    """,
}


def tell(point: Path, exposition: str = "", powers: Sequence[float | None] = ()) -> None:
    """As a sweep would: a sample per second, the first with the first request; `powers` by GPU, 10 W more every second."""
    start = min(pq.read_table(point / "requests.parquet")["sent_ns"].to_pylist())
    times = [start + second * S for second in range(SAMPLES)]
    if exposition:
        rows = [(when, *sample) for when in times for sample in parse_prometheus(exposition)]
        columns = dict(zip(SERVER_COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
        write_parquet(point / "server.parquet", columns, SERVER_COLUMNS)
    if powers:
        rows = [
            (when, gpu, None if power is None else power + 10 * second, 1500.0, 2600.0, 0.5, 20e9, 60.0)
            for second, when in enumerate(times)
            for gpu, power in enumerate(powers)
        ]
        columns = dict(zip(GPU_COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
        write_parquet(point / "gpu.parquet", columns, GPU_COLUMNS)
        rate = json.loads((point / "point.json").read_text())["output_tok_s"]
        power = sum(power + 5 * (SAMPLES - 1) for power in powers if power is not None)
        told = {"gpus": 2, "gpu_power_w": power, "gpu_memory_bytes": 40e9, "joules_per_output_token": power / rate}
        edit(point / "point.json", telemetry=told)


def made(*runs: Path) -> tuple[dict[str, Section], str]:
    found, left_out = read_runs(runs)
    comparison = compare(found, baseline=None, left_out=left_out, created="2025-06-01T12:00:00+00:00", tkit="0.1.0")
    return {section.id: section for section in sections(comparison, found)}, render_csv(comparison)


@pytest.mark.parametrize("server", EXPOSITIONS)
def test_every_server_is_understood_by_its_own_names(tmp_path: Path, server: str) -> None:
    run = make_run(tmp_path, "run", concurrency=(4,), requests=20)
    tell(run / "points" / "128x64-c4-r1", EXPOSITIONS[server])
    (found,), _ = read_runs([run])
    told = over_time(found.points[0])
    assert {name: set(told[name]) for name in ("running", "waiting", "kv_share")} == {
        "running": {6.0}, "waiting": {2.0}, "kv_share": {0.25},
    }  # fmt: skip
    assert list(told["waiting"].index) == [float(second) for second in range(SAMPLES)]
    assert set(told) <= set(SERVER)


def test_power_and_queue_stand_on_the_time_axis_and_energy_is_the_measured_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", engine=card("fp8", tp_size=2), concurrency=(4,), requests=20, has_gpu=True)
    point = run / "points" / "128x64-c4-r1"
    tell(point, EXPOSITIONS["tkit"], (300.0, 290.0))
    parts, csv = made(run)
    drawn = {plot.id: plot.spec["data"]["values"] for plot in parts["telemetry"].plots}
    assert set(drawn) == {"told-power_w", "told-waiting", "told-kv_share"}
    assert [(row["x"], row["y"]) for row in drawn["told-power_w"]] == [(s, 590.0 + 20 * s) for s in range(SAMPLES)]
    (table,) = parts["telemetry"].tables
    cells = dict(zip([column.name for column in table.columns], [entry.text for entry in table.rows[0]], strict=True))
    assert {name: cells[name] for name in ("running", "waiting, most", "KV cache in use, most")} == {
        "running": "6.00", "waiting, most": "2", "KV cache in use, most": "25.0\N{NARROW NO-BREAK SPACE}%",
    }  # fmt: skip
    rate = json.loads((point / "point.json").read_text())["output_tok_s"]
    (costs,) = parts["cost"].tables
    assert (costs.rows[0][-1].text, costs.rows[0][-1].note) == (f"{700 / rate:.2f}", "measured")
    header, row = (line.split(",") for line in csv.splitlines())
    values = dict(zip(header, row, strict=True))
    assert float(values["joules_per_output_token"]) == pytest.approx(700 / rate)
    assert float(values["server_bytes_max"]) == 123e6


def test_where_nobody_was_asked_nothing_is_shown(tmp_path: Path) -> None:
    parts, _ = made(make_run(tmp_path, "run", concurrency=(4,), requests=20))
    assert "telemetry" not in parts and parts["cost"].tables == ()


def test_a_gpu_that_cannot_tell_its_power_is_left_out_of_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", concurrency=(4,), requests=20)
    tell(run / "points" / "128x64-c4-r1", powers=(300.0, None))
    (found,), _ = read_runs([run])
    assert over_time(found.points[0])["power_w"].iloc[0] == 300.0


def test_samples_that_are_no_numbers_are_no_samples(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", engine=card("fp8"), concurrency=(4,), requests=20)
    point = run / "points" / "128x64-c4-r1"
    tell(point, EXPOSITIONS["tkit"].replace('limit"} 1000', 'limit"} 0'), (math.inf, 1.0))
    edit(point / "point.json", telemetry={"gpu_memory_bytes": 1e9})  # of how many GPUs?
    table = pq.read_table(point / "server.parquet").to_pydict()
    table["value"][:4] = [math.nan] * 4
    table["when_ns"][5] = table["labels"][6] = None
    write_parquet(point / "server.parquet", table, SERVER_COLUMNS)
    (found,), _ = read_runs([run])
    told = over_time(found.points[0])
    assert set(told) == {"running", "waiting", "server_bytes"}
    assert all(math.isfinite(value) for series in told.values() for value in (*series, *series.index))
    parts, _ = made(run)
    assert all(plot.spec["data"]["values"] for plot in parts["telemetry"].plots)


def test_torn_samples_take_their_point_with_them_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", concurrency=(1, 4), requests=20)
    (run / "points" / "128x64-c4-r1" / "gpu.parquet").write_bytes(b"PAR1 torn")
    (found,), left_out = read_runs([run])
    assert [point.summary.concurrency for point in found.points] == [1]
    assert "gpu.parquet: not readable as Parquet" in left_out[0].reason
    assert isinstance(found.points[0].server_samples(), pd.DataFrame)
