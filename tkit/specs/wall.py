"""What a measured point could have reached, and what it was expected to: made where hardware is known, shown beside it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """`low` to `high` is the error band of the plan that made it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Wall:
    """One load of one run. `limit_` is what physics allows: no server is faster.

    Tokens per second of the whole engine, milliseconds; TTFT is the mean, as published measurements give it, in an open loop
    from the schedule. `limit_binds` names what sets the limit on the rate, `limit_ttft_binds` that on TTFT, and
    `predicted_binds` what takes most of a predicted step, or that the arrivals set the rate.
    """

    limit_tok_s: float
    limit_tpot_ms: float
    limit_ttft_ms: float
    limit_binds: str
    limit_ttft_binds: str
    predicted_tok_s: Prediction | None = None
    predicted_tpot_ms: Prediction | None = None
    predicted_ttft_ms: Prediction | None = None
    predicted_binds: str | None = None


@dataclass(frozen=True, kw_only=True)
class PlannedMemory:
    """What the plan says an engine takes, in bytes. The `gpu_` ones are of the fullest GPU; None on a processor."""

    stored: int | None  # weights on disk, all ranks; None where modules differ in their format
    kv_per_token: int  # all layers and ranks
    gpu_weights: int | None = None
    gpu_activations: int | None = None
    gpu_overhead: int | None = None  # CUDA context, libraries, captured graphs, NCCL
    gpu_kv_pool: int | None = None  # what is left for the cache
    gpu_usable: int | None = None


@dataclass(frozen=True, kw_only=True)
class TokenCost:
    """Of output tokens at a measured rate: `usd_` over the interval of the rate, joules from data sheet to wall socket."""

    usd_per_million: Prediction
    joules_per_token: tuple[float, float]
