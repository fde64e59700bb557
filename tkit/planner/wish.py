"""What the user asks of a plan, and what of it no engine can do."""

from __future__ import annotations

from dataclasses import dataclass

from tkit.errors import InputError
from tkit.planner.engines import DEFAULT_ENGINE, version_number
from tkit.planner.fit import violations
from tkit.planner.gpus import GPUS_PER_NODE, gpu_table
from tkit.planner.precision import KV_DTYPES, KV_MIN_SM, Precision, precision
from tkit.planner.shapes import ModelShape
from tkit.specs.hardware import Gpu
from tkit.specs.parallel import Parallel
from tkit.specs.record import SLO_TIERS

ALTERNATIVE_QUANTS = ("none", "fp8", "int8_sq", "int8", "int4_awq", "nvfp4")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the user asked for. None = the planner chooses."""

    gpu: Gpu
    num_gpus: int | None = None
    tp: int | None = None
    pp: int | None = None
    quant: str = "none"
    kv_cache: str = "auto"
    isl: int = 1024
    osl: int = 1024
    concurrency: int = 16
    slo: str | None = None
    requests_s: float | None = None  # the load to size for
    engine: str = DEFAULT_ENGINE
    engine_version: str | None = None
    mixed: Precision | None = None  # `quant` and the modules that differ

    @property
    def weights(self) -> Precision:
        return self.mixed or precision(self.quant)

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, expected at least 1"
            for name in ("num_gpus", "tp", "pp", "isl", "osl", "concurrency")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if self.slo is not None and self.slo not in SLO_TIERS:
            problems.append(f'slo is "{self.slo}", expected one of {", ".join(SLO_TIERS)}')
        if None not in (self.num_gpus, self.tp, self.pp) and self.num_gpus != self.tp * self.pp:  # type: ignore[operator]
            problems.append(f"tp {self.tp} x pp {self.pp} is not num-gpus {self.num_gpus}")
        if self.engine_version is not None and version_number(self.engine_version) is None:
            problems.append(f'engine_version is "{self.engine_version}", expected one such as 1.2.0')
        if problems:
            raise InputError("impossible plan", problems=problems)


def check(shape: ModelShape, wish: Wish, weights: Precision, kv: str) -> None:
    """What no engine can do is refused, all of it at once."""
    gpu, problems, hints = wish.gpu, [], []
    if gpu.sm < weights.min_sm:
        able = [name for name in ALTERNATIVE_QUANTS if gpu.sm >= precision(name).min_sm and name != "none"]
        first = next(card for card in gpu_table().values() if card.sm >= weights.min_sm)
        problems.append(f"{wish.quant} needs compute capability {weights.min_sm / 10}, {gpu.name} has {gpu.sm / 10}")
        hints.append(f"--quant {', '.join(able)} run on {gpu.name}; {wish.quant} starts with {first.name}")
    if gpu.sm < KV_MIN_SM[kv]:
        problems.append(f"a {kv} KV cache needs compute capability {KV_MIN_SM[kv] / 10}, {gpu.name} has {gpu.sm / 10}")
        hints.append(f"--kv-cache {', '.join(name for name in KV_DTYPES if gpu.sm >= KV_MIN_SM[name])}")
    if wish.isl + wish.osl > shape.max_position:
        problems.append(
            f"isl {wish.isl} + osl {wish.osl} = {wish.isl + wish.osl} exceeds the {shape.max_position} positions of {shape}"
        )
        hints.append(f"--isl {max(shape.max_position - wish.osl, 1)} --osl {min(wish.osl, shape.max_position - 1)}")
    if wish.tp or wish.pp:
        problems += violations(shape, weights, Parallel(tp_size=wish.tp or 1, pp_size=wish.pp or 1))
    if problems:
        raise InputError(f"{shape} on {gpu.name}: this cannot run", problems=problems, hint="; ".join(hints) or None)


def no_layout(shape: ModelShape, wish: Wish) -> InputError:
    """TP stays within a node or an NVLink domain, and TP x PP has to give the asked number of GPUs."""
    limit = max(wish.gpu.nvlink_domain if wish.gpu.nvlink_domain >= 72 else GPUS_PER_NODE, GPUS_PER_NODE)
    asked = ", ".join(
        f"{name} {value}" for name, value in (("num-gpus", wish.num_gpus), ("tp", wish.tp), ("pp", wish.pp)) if value
    )
    problems, hint = [], "leave --tp and --pp to auto"
    if wish.tp and wish.tp > limit:
        near = max(size for size in range(1, limit + 1) if wish.tp % size == 0)
        problems.append(f"tp {wish.tp} is more than the {limit} GPUs that a fast link joins")
        hint = f"--tp {near} --pp {wish.tp // near}"
    elif wish.num_gpus and wish.num_gpus % ((wish.tp or 1) * (wish.pp or 1)):
        problems.append(f"{wish.num_gpus} GPUs are no multiple of what was asked for")
    else:
        problems.append(f"no split of {shape.num_heads} heads and {shape.num_layers} layers gives these numbers")
    return InputError(f"{shape} on {wish.gpu.name}: no layout with {asked}", problems=problems, hint=hint)
