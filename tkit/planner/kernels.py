"""Chooses the kernels of `neighbours.py` by cross-validation, and says how much their corrections are worth.

The constants are refitted without each fold, and what they leave of every row is its residual in that fold; rows of the fold
are then predicted from the residuals of all others. One coordinate at a time is moved as long as that gets better.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tkit.planner.neighbours import Columns, Floats, Kernel, Run, Width, columns, covariance, noise

START = Kernel(
    scale=0.4, noise=0.07, level=0.2, version=0.7, generation=0.5, gpu=0.7, arch=0.5, format=0.5, attention_dp=0.5, model=1.0,
    tp=2.0, pp=1.0, isl=2.0, osl=2.0, requests=2.0,
)  # fmt: skip
FACTORS = ("level", "version", "generation", "gpu", "arch", "format", "attention_dp")
MAX_ROWS = 800  # of a group, while searching
WORST = 2.0  # an error beyond 200 % counts as that
PENALTY = 3.0  # of a way of leaving out that gets worse than the formula alone
DOUBTFUL = 9.0  # medians of what is usually left
NUM_WIDTHS = 5
FARTHEST = 100.0  # any deviation
# of the held-out errors beyond either end of a band: 5 % would do if folds were alike; left-out folds are covered less often
TAIL = 0.035


@dataclass(frozen=True)
class Fold:
    """`residuals`: ln(measured / formula) of every row, by constants that have not seen the rows of `out`."""

    out: NDArray[np.bool_]
    residuals: Floats


Folds = Mapping[str, Sequence[Fold]]  # way of leaving out -> its folds; every row is in one of each


def predicted(
    kernel: Kernel, runs: Sequence[Run], folds: Sequence[Fold], doubtful: NDArray[np.bool_] | None = None
) -> tuple[Floats, Floats]:
    """(what is left of the residual, the process' deviation) of every row, each from the rows outside its fold."""
    left, deviation = np.full(len(runs), np.nan), np.full(len(runs), np.nan)
    doubts = np.zeros(len(runs), dtype=bool) if doubtful is None else doubtful
    for index in _groups(runs):
        left[index], deviation[index] = _predicted(
            columns([runs[i] for i in index]),
            kernel,
            noise(kernel, doubts[index]),
            [Fold(fold.out[index], fold.residuals[index]) for fold in folds],
        )
    return left, deviation


def _groups(runs: Sequence[Run]) -> list[NDArray[np.int64]]:
    groups: dict[tuple[str, str, str], list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(run.group, []).append(index)
    return [np.array(members) for members in groups.values()]


def _predicted(own: Columns, kernel: Kernel, variances: Floats, folds: Sequence[Fold]) -> tuple[Floats, Floats]:
    """With P the inverse of the covariance, leaving out a block o leaves inv(P_oo) (P r)_o of it, with variance inv(P_oo)."""
    inverse = np.linalg.inv(covariance(kernel, own, own) + np.diag(variances))
    left, variance = np.zeros(len(variances)), np.zeros(len(variances))
    for fold in folds:
        out = np.flatnonzero(fold.out)
        if len(out):
            block = np.linalg.inv(inverse[np.ix_(out, out)])
            left[out] = block @ (inverse @ fold.residuals)[out]
            variance[out] = np.diag(block) - variances[out] + kernel.noise**2
    return left, np.sqrt(variance)


def bare(folds: Sequence[Fold]) -> Floats:
    """ln(measured / formula) of every row, by constants that have not seen its fold."""
    result = np.full(len(folds[0].out), np.nan)
    for fold in folds:
        result[fold.out] = fold.residuals[fold.out]
    return result


def doubtful(kernel: Kernel, runs: Sequence[Run], folds: Sequence[Fold]) -> NDArray[np.bool_]:
    """Rows that their own neighbours contradict: misprints, cold starts, clients that were the bottleneck. A second look
    clears those that only a doubtful row contradicts."""
    found = np.zeros(len(runs), dtype=bool)
    for _ in range(3):
        size = np.abs(predicted(kernel, runs, folds, found)[0])
        found = size > DOUBTFUL * np.median(size)
    return found


def mape(left: Floats) -> Floats:
    """|predicted / measured - 1|, of ln(measured / predicted)."""
    return np.asarray(np.abs(np.exp(-left) - 1))


def loss(kernel: Kernel, runs: Sequence[Run], ways: Folds) -> float:
    total = 0.0
    for folds in ways.values():
        error = np.minimum(mape(predicted(kernel, runs, folds)[0]), WORST)
        worse = max(0.0, float(error.mean() - np.minimum(mape(bare(folds)), WORST).mean()))
        total += float(0.5 * error.mean() + 0.5 * np.median(error)) + PENALTY * worse
    return total


def choose(runs: Sequence[Run], ways: Folds, sweeps: int = 3) -> Kernel:
    """The kernel whose predictions of left-out rows are best, over all ways of leaving out."""
    sample = _sample(runs)
    chosen = [runs[index] for index in sample]
    smaller = {name: [Fold(fold.out[sample], fold.residuals[sample]) for fold in folds] for name, folds in ways.items()}
    kernel, best = START, loss(START, chosen, smaller)
    steps = dict.fromkeys((field.name for field in dataclasses.fields(Kernel)), 0.7)
    for _ in range(sweeps):
        for name in steps:
            for sign in (1, -1):
                moved = False
                while (tried := _moved(kernel, name, sign * steps[name])) != kernel:
                    value = loss(tried, chosen, smaller)
                    if value > best - 1e-4:
                        break
                    kernel, best, moved = tried, value, True
                if moved:
                    break
            else:
                steps[name] /= 2
    return kernel


def _moved(kernel: Kernel, name: str, step: float) -> Kernel:
    """Factors move in their logit, everything else in its logarithm; both within what makes a difference."""
    value = getattr(kernel, name)
    if name in FACTORS:
        logit = np.clip(np.log(value / (1 - value)) + step, -6, 6)
        value = 1 / (1 + np.exp(-logit))
    else:
        value = np.exp(np.clip(np.log(value) + step, np.log(0.01), np.log(100.0)))
    return dataclasses.replace(kernel, **{name: float(f"{value:.4g}")})


def _sample(runs: Sequence[Run]) -> NDArray[np.int64]:
    """At most MAX_ROWS of every group, evenly."""
    kept = [
        members[np.linspace(0, len(members) - 1, min(len(members), MAX_ROWS)).round().astype(int)]
        for members in _groups(runs)
    ]
    return np.sort(np.concatenate(kept))


def widths(left: Floats, deviation: Floats) -> list[Width]:
    """By nearness: an equal number of held-out rows for each."""
    edges = [*np.quantile(deviation, np.arange(1, NUM_WIDTHS) / NUM_WIDTHS), FARTHEST]
    step = np.searchsorted(edges, deviation)
    found = []
    for index, edge in enumerate(edges):
        shares = (left / deviation)[step == index]
        if len(shares):
            low, high = np.quantile(shares, [TAIL, 1 - TAIL])
            found.append(Width(deviation=_rounded(edge), low=_rounded(low), high=_rounded(high), n=len(shares)))
    return found


def is_held(left: Mapping[str, Floats], deviation: Mapping[str, Floats], ways: Folds, way: str) -> Floats:
    """1 or 0: whether the band of each row of one way held it. A fold's bands come from the rows outside it, in all ways."""
    inside = np.zeros(len(left[way]))
    for fold in ways[way]:
        rest = ~fold.out
        if not fold.out.any() or not rest.any():
            inside[fold.out] = np.nan
            continue
        made = widths(
            np.concatenate([values[rest] for values in left.values()]),
            np.concatenate([values[rest] for values in deviation.values()]),
        )
        edges = [width.deviation for width in made]
        step = np.minimum(np.searchsorted(edges, deviation[way][fold.out]), len(made) - 1)
        low, high = np.array([(width.low, width.high) for width in made])[step].T
        share = left[way][fold.out] / deviation[way][fold.out]
        inside[fold.out] = (np.minimum(low, 0) <= share) & (share <= np.maximum(high, 0))
    return inside


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
