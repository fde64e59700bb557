"""Alternatives side by side: one row per combination of GPU, quantization and layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tkit.errors import InputError, did_you_mean
from tkit.planner.gpus import find_gpu
from tkit.planner.precision import kv_dtype, precision
from tkit.planner.record import Plan, as_record
from tkit.planner.text import table

COMPARISON_SCHEMA = "tkit.plan_comparison/1"
INTEGERS = ("tp", "pp", "num_gpus", "concurrency", "isl", "osl")
AXES = ("gpu", "quant", "kv_cache", *INTEGERS)


@dataclass(frozen=True, kw_only=True)
class ComparedRow:
    """`problem` says why there is no plan."""

    label: str
    plan: Plan | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    model: str
    model_source: str
    rows: tuple[ComparedRow, ...]


def parse_axes(axes: Sequence[str]) -> dict[str, list[Any]]:
    """`gpu=h100,h200` -> {"gpu": [Gpu, Gpu]}. Raises InputError with everything that is wrong."""
    parsed: dict[str, list[Any]] = {}
    problems = []
    for axis in axes:
        key, _, values = axis.partition("=")
        key = key.replace("-", "_")
        if key not in AXES or not values:
            near = did_you_mean(key, AXES) if key not in AXES else ""
            problems.append(f'"{axis}"{near}: expected one of {", ".join(AXES)}, then =a,b')
            continue
        try:
            parsed[key] = [_value(key, value) for value in values.split(",")]
        except InputError as error:
            problems.append(f"{error.message}")
        except ValueError:
            problems.append(f'"{axis}": expected whole numbers')
    if problems:
        raise InputError("--compare: not what can be compared", problems=problems)
    return parsed


def _value(key: str, value: str) -> Any:
    if key == "gpu":
        return find_gpu(value)
    if key == "quant":
        return precision(value).name
    if key == "kv_cache":
        kv_dtype(value, precision("none"))  # refuses what it does not know
        return value
    return int(value) if key in INTEGERS else value


def render(comparison: Comparison) -> str:
    plans = [row.plan for row in comparison.rows if row.plan is not None]
    has_cost = any(plan.cost for plan in plans)
    header = [
        "",
        "GPUs",
        "tp x pp",
        "fits",
        "weights/GPU",
        "max users",
        "TTFT ms",
        "TPOT ms",
        "= formula x",
        "tok/s [90 % band]",
        "tok/s/GPU",
        *(["$/M tok"] if has_cost else []),
    ]
    rows, problems = [], []
    for row in comparison.rows:
        plan = row.plan
        if plan is None:
            problems.append(f"{row.label}: {row.problem}")
            continue
        parallel = plan.chosen.parallel
        cells = [
            row.label,
            str(parallel.world_size),
            f"{parallel.tp_size} x {parallel.pp_size}",
            "yes" if plan.fits else f"no: {plan.chosen.binds}",
            f"{plan.chosen.ledger.weight_bytes / 1e9:.1f} GB",
            f"{plan.max_concurrency:,}",
            f"{plan.ttft_ms.value:.0f}",
            f"{plan.tpot_ms.value:.1f}",
            f"{plan.tpot_ms.factor:.2f}",
            f"{plan.tok_s.value:,.0f} [{plan.tok_s.low:,.0f}, {plan.tok_s.high:,.0f}]",
            f"{plan.tok_s.value / parallel.world_size:,.0f}",
        ]
        if has_cost:
            cells.append("{:.2f}-{:.2f}".format(*plan.cost.usd_per_million) if plan.cost else "-")
        rows.append(cells)
    lines = [f"{comparison.model}  [{comparison.model_source}]"]
    if rows:
        lines.append(table(header, rows))
    return "\n".join([*lines, *problems])


def comparison_record(comparison: Comparison) -> Mapping[str, Any]:
    return {
        "schema": COMPARISON_SCHEMA,
        "model": comparison.model,
        "model_source": comparison.model_source,
        "rows": [
            {"label": row.label, "problem": row.problem or None, "plan": as_record(row.plan) if row.plan else None}
            for row in comparison.rows
        ],
    }
