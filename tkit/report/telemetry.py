"""What server and GPUs said of themselves during a point: samples -> quantities over time. Knows by which names servers
publish them; draws nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tkit.report.read import Point


@dataclass(frozen=True, kw_only=True)
class Source:
    """One server's name for a quantity. `labels` and `of` are parts of the labels, `of` those of what it is a share of."""

    metric: str
    labels: str = ""
    of: str | None = None


# fmt: off
# quantity -> sources; the first that a server has counts. Several series of one source, such as ranks, are added up; shares are
# averaged.
SERVER: dict[str, tuple[Source, ...]] = {
    "running": (
        Source(metric="tkit_open_requests", labels='state="running"'),
        Source(metric="nv_trt_llm_request_metrics", labels='request_type="scheduled"'),
        Source(metric="trtllm_num_requests_running"),
        Source(metric="vllm:num_requests_running"),
        Source(metric="sglang:num_running_reqs"),
    ),
    "waiting": (
        Source(metric="tkit_open_requests", labels='state="waiting"'),
        Source(metric="nv_trt_llm_request_metrics", labels='request_type="waiting"'),
        Source(metric="trtllm_num_requests_waiting"),
        Source(metric="vllm:num_requests_waiting"),
        Source(metric="sglang:num_queue_reqs"),
    ),
    "kv_share": (
        Source(metric="tkit_kv_cache_tokens", labels='kind="stored"', of='kind="limit"'),
        Source(metric="nv_trt_llm_kv_cache_block_metrics", labels='kv_cache_block_type="used"', of='kv_cache_block_type="max"'),
        Source(metric="trtllm_kv_cache_utilization"),
        Source(metric="vllm:kv_cache_usage_perc"),
        Source(metric="vllm:gpu_cache_usage_perc"),
        Source(metric="sglang:token_usage"),
    ),
    "server_bytes": (Source(metric="tkit_resident_memory_bytes"),),
}
# fmt: on


def over_time(point: Point) -> dict[str, pd.Series]:
    """Quantity -> values by seconds since the first request: those of SERVER, and power_w, all GPUs together."""
    found: dict[str, pd.Series] = {}
    server = {str(metric): rows for metric, rows in point.server_samples().groupby("metric")}
    for quantity, sources in SERVER.items():
        source = next((source for source in sources if source.metric in server), None)
        if source is not None:
            found[quantity] = _told(server[source.metric], source)
    power = point.gpu_samples().dropna(subset=["power_w"])
    found["power_w"] = power.groupby("when_s")["power_w"].sum()
    finite = {quantity: values[np.isfinite(values) & np.isfinite(values.index)] for quantity, values in found.items()}
    return {quantity: values for quantity, values in finite.items() if len(values)}


def _told(rows: pd.DataFrame, source: Source) -> pd.Series:
    def of(labels: str) -> pd.Series:
        chosen = [labels in str(told) for told in rows["labels"]]
        grouped = rows[chosen].groupby("when_s")["value"]
        return grouped.mean() if source.metric in SHARES else grouped.sum()

    values = of(source.labels)
    return values if source.of is None else values / of(source.of)


SHARES = {source.metric for source in SERVER["kv_share"] if source.of is None}


def numbers(points: Sequence[Point]) -> Mapping[str, float]:
    """Of repeats of one load: what point.json says of the GPUs, and means and highest values of what the server said."""
    tables = [{**point.summary.telemetry, **_server_numbers(point)} for point in points]
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: float(pd.Series([table[name] for table in tables if name in table]).median()) for name in names}


def _server_numbers(point: Point) -> dict[str, float]:
    told = over_time(point)
    means = {f"{name}_mean": told[name].mean() for name in ("running", "waiting") if name in told}
    highest = {f"{name}_max": told[name].max() for name in ("waiting", "kv_share", "server_bytes") if name in told}
    return {name: float(value) for name, value in (means | highest).items()}
