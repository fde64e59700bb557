"""Fits what engines reach of the hardware to measurements. Robust, in logarithms, and held back by a prior.

Residual r = ln(predicted / measured), Huber's loss (linear beyond 15 %, so that a misprint does not pull), Levenberg-Marquardt
with a numerical Jacobian. Every constant has a prior around its textbook value, and each generation of an engine a second one
around what all have in common: a generation with few rows stays close to the others.

Dense rows fix everything that dense models use; MoE rows then fix the MoE terms alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tkit.planner.engines import generation_index
from tkit.planner.published import Row
from tkit.planner.roofline import Efficiencies, Machine, Number, decode_step, host_s, prefill_s, stacked
from tkit.planner.speed import offline_throughput, throughput, tpot_s

Floats = NDArray[np.float64]

HUBER = 0.15
PRIOR_WEIGHT = 0.5  # of a constant one prior width off, in units of one row that is 100 % off
GENERATIONS: dict[str, tuple[tuple[str, str | None], ...]] = {  # engine -> (name, ends before)
    "tensorrt-llm": (("0.5-0.14", "0.15"), ("0.15-0.20", "1.0"), ("1.0", "1.1"), ("1.1+", None)),
    "vllm": (("0.x", None),),
    "sglang": (("0.x", None),),
}
GROUPS = [(engine, index) for engine, rows in GENERATIONS.items() for index in range(len(rows))]


@dataclass(frozen=True, kw_only=True)
class Constant:
    """`width`: of the prior, in ln. `group_width`: how far generations may differ; 0 = one value for all."""

    start: float
    width: float
    group_width: float = 0.0
    most: float = float("inf")


# fmt: off
CONSTANTS: dict[str, Constant] = {
    "memory":              Constant(start=0.75,  width=0.2,  group_width=0.1, most=0.95),
    "memory_fp4":          Constant(start=0.90,  width=0.2,  most=1.0),
    "kv":                  Constant(start=0.80,  width=0.2,  group_width=0.2, most=0.98),
    "kv_heads":            Constant(start=0.10,  width=1.0,  group_width=1.0),
    "gemm_fp16":           Constant(start=0.70,  width=0.2,  group_width=0.15, most=0.95),
    "gemm_fp8":            Constant(start=0.62,  width=0.2,  group_width=0.15, most=0.95),
    "gemm_fp4":            Constant(start=0.45,  width=0.3,  most=0.95),
    "ramp":                Constant(start=90.0,  width=0.7),
    "attention":           Constant(start=0.55,  width=0.4,  most=0.95),
    "nvlink":              Constant(start=0.70,  width=0.3,  most=0.95),
    "pcie":                Constant(start=0.50,  width=0.3,  most=0.95),
    "pcie_far":            Constant(start=0.80,  width=0.3,  most=1.0),
    "alpha_nvlink_s":      Constant(start=25e-6, width=0.7,  group_width=0.5),
    "alpha_pcie_s":        Constant(start=90e-6, width=0.7),
    "host_s":              Constant(start=1e-3,  width=0.7,  group_width=0.5),
    "host_per_sequence_s": Constant(start=5e-6,  width=0.7,  group_width=0.5),
    "prefill":             Constant(start=1.0,   width=0.3),
    "reserved_bytes":      Constant(start=2e9,   width=1.0,  group_width=1.0),
}
MOE_CONSTANTS: dict[str, Constant] = {
    "moe_gemm":            Constant(start=0.60,  width=0.5,  group_width=0.2),
    "moe_layer_s":         Constant(start=15e-6, width=1.0,  group_width=0.5),
    "moe_host_s":          Constant(start=1e-3,  width=1.0,  group_width=0.5),
}
# fmt: on
# of the way in and out, per engine generation; a server on the same machine
TTFT_CONSTANTS: dict[str, Constant] = {
    "request_s": Constant(start=20e-3, width=2.0),
    "moe_request_s": Constant(start=30e-3, width=2.0),
    "request_in_flight_s": Constant(start=5e-4, width=2.0),
    "waiting": Constant(start=1.0, width=0.4),
}  # fmt: skip
NEVER_MEASURED = {"gemm_int8": 0.62}  # no published INT8 row; as FP8


@dataclass(frozen=True)
class Table:
    """Rows as arrays; `group` indexes GROUPS."""

    rows: Sequence[Row]
    machine: Machine
    group: NDArray[np.int64]
    isl: Floats
    osl: Floats
    amount: Floats
    pool: Floats
    per_sequence: Floats
    truth: Floats

    def where(self, mask: NDArray[np.bool_]) -> Table:
        index = np.flatnonzero(mask)
        return table([self.rows[i] for i in index])


Values = Mapping[str, Floats]  # constant -> one value per group


def table(rows: Sequence[Row]) -> Table:
    def column(get: Callable[[Row], float]) -> Floats:
        return np.array([get(row) for row in rows], dtype=float)

    return Table(
        rows,
        stacked([row.machine for row in rows]),
        np.array([group_of(row.engine, row.version) for row in rows]),
        column(lambda row: row.isl),
        column(lambda row: row.osl),
        column(lambda row: row.amount),
        column(lambda row: row.kv_pool),
        column(lambda row: row.kv_bytes_per_sequence),
        column(lambda row: row.value),
    )


def group_of(engine: str, version: str) -> int:
    before = [end for _, end in GENERATIONS[engine]]
    return GROUPS.index((engine, generation_index(before, version or None)))


def is_steady(row: Row) -> bool:
    """Rows that follow from the closed formulas; the others need the simulation."""
    return row.load in ("offline", "static") or (row.load in ("closed", "burst") and row.metric != "ttft")


def capacity(pool: Number, per_sequence: Number, reserved_bytes: Number) -> Number:
    """Sequences that fit. An engine that reserves more than there is still runs a few, as the published ones did."""
    return np.maximum(pool - 0.9 * reserved_bytes, 0.02 * pool) / np.maximum(per_sequence, 1)


def predict(rows: Table, values: Values) -> Floats:
    """Steady rows: seconds, or tokens per second of the whole engine."""
    per_row: dict[str, Any] = {name: value[rows.group] for name, value in values.items()}
    e = Efficiencies(**per_row)
    m, isl, osl, amount = rows.machine, rows.isl, rows.osl, rows.amount
    fits = capacity(rows.pool, rows.per_sequence, per_row["reserved_bytes"])
    load = np.array([row.load for row in rows.rows])
    metric = np.array([row.metric for row in rows.rows])
    batch = np.clip(np.minimum(amount, fits), 1, None)
    first = prefill_s(m, isl, e, requests=amount) + host_s(m, e)
    static = amount * osl / (first + osl * decode_step(m, amount, isl + osl / 2, e).total)
    finite = np.where(load == "offline", amount, 1.0)
    cases = [
        (load == "offline", offline_throughput(m, fits, isl, osl, finite, e)),
        ((load == "static") & (metric == "throughput"), static),
        ((load == "static") & (metric == "ttft"), first),
        ((load == "closed") & (metric == "tpot"), tpot_s(m, batch, isl, osl, e)),
        ((load == "burst") & (metric == "tpot"), tpot_s(m, batch, isl, osl, e, share=0.5)),
        ((load == "closed") & (metric == "throughput"), throughput(m, batch, isl, osl, e)),
    ]
    return np.select([is_case for is_case, _ in cases], [value for _, value in cases], default=np.nan)


def fit(rows: Table, moe_rows: Table | None = None) -> dict[str, Floats]:
    """Constants of every group. Groups without rows get what the others have in common."""
    ones = np.ones(len(GROUPS))
    base = {name: constant.start * ones for name, constant in {**CONSTANTS, **MOE_CONSTANTS, **TTFT_CONSTANTS}.items()}
    base |= {name: value * ones for name, value in NEVER_MEASURED.items()}
    fitted = _fit(rows, CONSTANTS, base)
    if moe_rows is not None and len(moe_rows.rows):
        fitted = _fit(moe_rows, MOE_CONSTANTS, fitted)
    return fitted


def _fit(rows: Table, constants: Mapping[str, Constant], base: Values) -> dict[str, Floats]:
    names = list(constants)
    local = [name for name in names if constants[name].group_width]
    groups = sorted(set(rows.group.tolist()))
    widths = np.array(
        [constants[name].width for name in names] + [constants[name].group_width for name in local for _ in groups]
    )
    target = np.log(rows.truth)

    def values(x: Floats) -> dict[str, Floats]:
        result = dict(base)
        for index, name in enumerate(names):
            result[name] = base[name] * np.exp(x[index])
        for index, name in enumerate(local):
            start = len(names) + index * len(groups)
            factors = np.ones(len(GROUPS))
            factors[groups] = np.exp(x[start : start + len(groups)])
            result[name] = result[name] * factors
        return {name: np.minimum(value, _most(constants, name)) for name, value in result.items()}

    x = levenberg_marquardt(lambda x: np.log(predict(rows, values(x))) - target, np.zeros(len(widths)), widths)
    return values(x)


def _most(constants: Mapping[str, Constant], name: str) -> float:
    return constants[name].most if name in constants else float("inf")


def levenberg_marquardt(
    residuals: Callable[[Floats], Floats], x: Floats, widths: Floats, max_steps: int = 40
) -> Floats:
    """Minimizes Huber(residuals(x)) + PRIOR_WEIGHT/2 |x / widths|^2 from x on; the prior's centre is 0."""
    penalty = PRIOR_WEIGHT / widths**2

    def loss(r: Floats, x: Floats) -> float:
        size = np.abs(r)
        huber = np.where(size < HUBER, 0.5 * size**2, HUBER * (size - 0.5 * HUBER))
        return float(np.sum(huber) + 0.5 * np.sum(penalty * x**2))

    damping, r = 1e-2, residuals(x)
    best = loss(r, x)
    for _ in range(max_steps):
        columns = [(residuals(x + delta) - r) / 1e-4 for delta in 1e-4 * np.eye(len(x))]
        jacobian = np.stack(columns, axis=1)
        weights = np.where(np.abs(r) < HUBER, 1.0, HUBER / np.maximum(np.abs(r), 1e-12))
        hessian = jacobian.T @ (jacobian * weights[:, None]) + np.diag(penalty)
        gradient = jacobian.T @ (weights * r) + penalty * x
        for _ in range(10):
            step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), -gradient)
            tried = x + np.clip(step, -0.7, 0.7)
            r_tried = residuals(tried)
            if (value := loss(r_tried, tried)) < best:
                break
            damping *= 4
        else:
            return x
        improvement = best - value
        x, r, best, damping = tried, r_tried, value, damping / 4
        if improvement < 1e-6 * best:
            break
    return x
