"""Predicts every row of a published table as a plan would and says how far off it was, and for what.

The shipped rows correct each other; a row is never its own neighbour, nor is a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tkit.planner.calibration import GENERATIONS, GROUPS
from tkit.planner.engines import Engine, engine
from tkit.planner.holdout import predict_rows
from tkit.planner.neighbours import Correction, Floats, metric_of, published
from tkit.planner.published import Row, read_table
from tkit.planner.text import table

# rows of the shipped table stay below these; measured when the constants were fitted, plus a tenth
THRESHOLDS = {
    "throughput dense": 0.049,
    "throughput moe": 0.072,
    "tpot dense": 0.038,
    "tpot moe": 0.071,
    "idle ttft dense": 0.092,
}
MEDIAN_THRESHOLDS = {"ttft dense": 0.072, "ttft moe": 0.098}


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of ln(predicted / measured), as shares. `bias` > 0 = predicted too high. `inside`: share of rows within the band.
    `formula`: what `mape` would be without corrections."""

    by: str
    cell: str
    n: int
    formula: float
    mape: float
    median: float
    p90: float
    bias: float
    inside: float


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    table: str
    rows: int
    skipped: dict[str, int]  # reason -> rows
    scores: tuple[Score, ...]
    failed: tuple[str, ...]  # cells above their threshold; only of the shipped table


def selfcheck(path: Path) -> SelfCheck:
    rows, skipped = read_table(path)
    errors, formula, inside = np.zeros(0), np.zeros(0), np.zeros(0)
    if rows:
        predicted, corrections = predict(rows)
        errors = np.log(predicted) - np.log([row.value for row in rows])
        formula = errors - np.log([found.factor for found in corrections])
        inside = np.array(
            [c.low <= np.exp(-error) <= c.high for c, error in zip(corrections, errors, strict=True)], dtype=float
        )
    keys: dict[str, Callable[[Row], str]] = {
        "metric": lambda row: f"{metric_of(row.metric, row.load)} {'moe' if row.is_moe else 'dense'}",
        "regime": lambda row: f"{row.regime} {row.metric}",
        "GPU": lambda row: row.gpu,
        "dtype": lambda row: row.dtype,
        "kind": lambda row: "moe" if row.is_moe else "dense",
        "engine": lambda row: f"{row.engine} {row.version or '(version not stated)'}",
    }
    scores = [
        score for by, key in keys.items() for score in _scores(by, [key(row) for row in rows], errors, formula, inside)
    ]
    return SelfCheck(
        table=str(path), rows=len(rows), skipped=skipped, scores=tuple(scores), failed=tuple(_failed(scores))
    )


def predict(rows: Sequence[Row]) -> tuple[Floats, list[Correction]]:
    """What a plan says of every row, each without knowing the row itself."""
    corrections = [published().correction(row.run, row.value) for row in rows]
    return predict_rows(rows, shipped_values()) * [found.factor for found in corrections], corrections


def shipped_values() -> dict[str, Floats]:
    """The constants of every generation, as `calibration.predict` takes them."""
    found = [_engine_of(name, index).efficiencies for name, index in GROUPS]
    return {name: np.array([getattr(e, name) for e in found]) for name in vars(found[0])}


def _engine_of(name: str, generation: int) -> Engine:
    before = GENERATIONS[name][generation][1]
    if before is None:
        return engine(name)
    major, minor = (int(part) for part in before.split("."))
    return engine(name, f"{major}.{minor - 1}" if minor else f"{major - 1}.20")


def _scores(by: str, keys: Sequence[str], errors: Floats, formula: Floats, inside: Floats) -> list[Score]:
    result = []
    for cell in sorted(set(keys)):
        mask = np.array([key == cell for key in keys])
        size = np.abs(np.exp(errors[mask]) - 1)
        result.append(
            Score(
                by=by,
                cell=cell,
                n=int(mask.sum()),
                formula=float(np.abs(np.exp(formula[mask]) - 1).mean()),
                mape=float(size.mean()),
                median=float(np.median(size)),
                p90=float(np.quantile(size, 0.9)),
                bias=float(np.exp(np.mean(errors[mask])) - 1),
                inside=float(inside[mask].mean()),
            )
        )
    return result


def _failed(scores: Sequence[Score]) -> list[str]:
    by_metric = {score.cell: score for score in scores if score.by == "metric"}
    failed = []
    for limits, name in ((THRESHOLDS, "mape"), (MEDIAN_THRESHOLDS, "median")):
        for cell, limit in limits.items():
            if cell in by_metric and getattr(by_metric[cell], name) > limit:
                failed.append(f"{cell}: {name} {getattr(by_metric[cell], name):.1%} above {limit:.0%}")
    return failed


def render(check: SelfCheck) -> str:
    header = ["", "n", "formula", "MAPE", "median", "p90", "bias", "in 90 % band"]
    blocks = [
        f"{check.table}: {check.rows:,} rows predicted, {sum(check.skipped.values())} skipped\n"
        "each by the formulas and the shipped rows near to it, without the row itself and its copies; "
        '"formula": MAPE without those rows'
    ]
    for by in dict.fromkeys(score.by for score in check.scores):
        cells = [
            [
                s.cell,
                f"{s.n:,}",
                f"{s.formula:.1%}",
                f"{s.mape:.1%}",
                f"{s.median:.1%}",
                f"{s.p90:.1%}",
                f"{s.bias:+.1%}",
                f"{s.inside:.0%}",
            ]
            for s in check.scores
            if s.by == by
        ]
        blocks.append(table([f"by {by}", *header[1:]], cells))
    if check.skipped:
        blocks.append("\n".join(["skipped:", *(f"  {n:>5}  {reason}" for reason, n in sorted(check.skipped.items()))]))
    return "\n\n".join(blocks)
