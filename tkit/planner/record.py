"""A plan as it is stored: what every number is. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tkit.planner.cost import Cost
from tkit.planner.fit import Layout

PLAN_SCHEMA = "tkit.plan/1"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """`factor` times the formula's value. `low` to `high` holds the truth nine times out of ten, as `n` held-out rows say."""

    value: float
    low: float
    high: float
    n: int
    factor: float
    source: str  # of the factor and the band


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What is expected of a load: means."""

    ttft_ms: Estimate
    tpot_ms: Estimate
    tok_s: Estimate
    binds: str


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Where prefill and decode stand on the roofline. Intensity in operations per byte of weights and cache read."""

    name: str
    intensity: float
    ridge: float
    seconds: float
    binds: str
    share_of_peak: float  # of the limit that binds
    terms: Mapping[str, float] = field(default_factory=dict)  # seconds


@dataclass(frozen=True, kw_only=True)
class Point:
    """One concurrency of the curve. Milliseconds and tokens per second."""

    concurrency: int
    running: int  # what the KV cache holds of it
    ttft_ms: float  # the median
    tpot_ms: float
    tok_s: float
    tok_s_gpu: float
    tok_s_gpu_low: float  # of the 90 % band at this load
    tok_s_gpu_high: float
    tok_s_user: float
    binds: str


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another quantization of the same model on the same GPU."""

    quant: str
    kv_cache: str
    num_gpus: int | None  # smallest that fits the same load; None = none does
    tp: int | None
    weight_bytes: int
    max_concurrency: int
    decode_speedup: float | None  # at the asked batch, same GPUs where both fit
    prefill_speedup: float | None
    tok_s_gpu: float | None
    is_built: bool


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Drafting `tokens` per step. `gain` at the asked batch; beyond `break_even_batch` it costs more than it gives, None =
    at no batch up to MAX_BATCH: reading long contexts, which drafting saves, outgrows the products."""

    acceptance: float
    tokens: int
    gain: float
    break_even_batch: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    schema: str = PLAN_SCHEMA
    model: str
    model_source: str
    num_params: int
    num_active_params: int
    gpu: str
    quant: str
    kv_cache: str
    isl: int
    osl: int
    concurrency: int
    engine: str
    engine_generation: str
    provenance: str
    fits: bool
    verdict: str
    chosen: Layout
    considered: tuple[Layout, ...]
    stored_bytes: int
    kv_bytes_per_token: int  # of the whole model, whatever TP repeats
    max_concurrency: int
    max_context: int
    max_position: int
    concurrency_by_context: Mapping[int, int]
    kv_bytes_by_context: Mapping[int, int]  # of one sequence on the fullest rank
    ttft_idle_ms: Estimate
    ttft_ms: Estimate  # mean under the load
    ttft_p50_p90_p99_ms: tuple[float, float, float]
    ttft_burst_ms: float  # of the last one when all requests arrive at once
    tpot_ms: Estimate
    tok_s: Estimate
    requests_s: float
    phases: tuple[Phase, ...]
    peak_flops: float  # of one GPU, in the type of the products
    curve: tuple[Point, ...]
    slo: Mapping[str, Any] | None
    alternatives: tuple[Alternative, ...]
    speculation: tuple[Speculation, ...]
    cost: Cost | None
    rate: float | None  # requests per second to size for
    gpus_for_load: int | None  # engines of this plan, each with `concurrency` in flight
    gpus_for_load_sure: int | None  # at the low end of the throughput's band
    notes: tuple[str, ...]


def as_record(plan: Plan) -> dict[str, Any]:
    """JSON: the plan as it is stored."""
    record = asdict(plan)
    for name in ("concurrency_by_context", "kv_bytes_by_context"):
        record[name] = {str(key): value for key, value in getattr(plan, name).items()}
    record["chosen"]["ledger"]["weight_bytes"] = plan.chosen.ledger.weight_bytes
    return record
