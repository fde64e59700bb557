"""Estimates with intervals, and when two of them differ. Knows arrays and seeds; never sees a run or a file.

An estimate carries the standard error of its logarithm, so that ratios of latencies and of rates are treated alike.

    within a repeat    w: circular block bootstrap over the requests in the order they were sent. Requests that ran
                       together share the server's slow moments, so whole blocks are drawn, never single requests.
    between repeats    s: standard deviation of the repeats' logarithms. A few repeats do not pin it down, so it is
                       moderated (Smyth 2004) by what a repeat is expected to scatter, REPEAT_NOISE and w, which counts
                       as much as PRIOR_DOF further repeats:
                       variance = (PRIOR_DOF * (REPEAT_NOISE^2 + repeats * w^2) + (repeats - 1) * s^2) / dof
                       dof      = PRIOR_DOF + repeats - 1
    standard error     sqrt(variance / repeats)

Intervals are Student's; a difference has Welch's degrees of freedom. A difference is *called* when its interval
excludes zero and its size exceeds PRACTICAL: with many requests every difference is significant, and few of them matter.

Simulated, a server against itself and against one 10 % slower, 160 requests per repeat, 2 % noise between repeats:

                                         called though equal    called when 10 % slower
    1 repeat                              1 %                   67 %
    2 repeats                             2 %                   97 %
    3 repeats                             1 %                   99 %
    3 repeats, all requests pooled as    10 %                  100 %
    if they were independent (1 repeat: 32 %)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], Floats]  # (..., requests, columns) -> (...)

PRACTICAL = 0.03  # smaller differences are not called, however sure: two deployments of one engine differ by as much
DRAWS = 100  # the standard error itself is then known to 7 %
MAX_DRAWN = 2_000_000  # numbers in memory at a time
MIN_BLOCKS = 8  # fewer cannot show a spread; more would cut through moments that requests shared
SEED = 20
REPEAT_NOISE = 0.025  # expected of one deployment measured again; more would hide a loss of 10 % measured once
PRIOR_DOF = 3  # more repeats than this outweigh the expectation

# fmt: off
# Student's t, two-sided 95 %, by degrees of freedom 1..30; above, the next row down in the tables: never too narrow
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
          2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
          2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
T_975_ABOVE = ((1000, 1.962), (120, 1.980), (60, 2.000), (30, 2.042))
# standard error of a median over that of a mean, normal samples of this size
MEDIAN_OVER_MEAN = {1: 1.0, 2: 1.0, 3: 1.160, 4: 1.092, 5: 1.197}
MEDIAN_OVER_MEAN_LARGE = 1.253
# fmt: on

Z_975 = 1.959964


def t_quantile(dof: float) -> float:
    """The 97.5 % quantile of Student's distribution; never too small."""
    if dof < 1:
        return T_975[0]
    if dof < len(T_975):
        row = int(dof)
        return T_975[row - 1] + (dof - row) * (T_975[row] - T_975[row - 1])
    return next(quantile for above, quantile in T_975_ABOVE if dof >= above)


def min_requests(percentile: float) -> int:
    """Fewest requests that support a percentile, 662 for p99: MLPerf's early-stopping bound.

    Smallest n with P(at most one of n requests lies beyond the percentile) <= 1 %.
    """
    beyond = 1 - percentile / 100
    n = 2
    while (1 - beyond) ** n + n * beyond * (1 - beyond) ** (n - 1) > 0.01:
        n += 1
    return n


def supported_tail(num_requests: int) -> int | None:
    """The highest of p99, p95, p90 that so many requests support."""
    return next((percentile for percentile in (99, 95, 90) if num_requests >= min_requests(percentile)), None)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    center = share + Z_975**2 / (2 * n)
    half = Z_975 * math.sqrt(share * (1 - share) / n + Z_975**2 / (4 * n * n))
    scale = 1 + Z_975**2 / n
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A positive number with its 95 % interval; without one when the requests are too few to tell."""

    value: float
    low: float | None = None
    high: float | None = None
    log_se: float | None = None
    dof: float = 0.0
    n: int = 0  # requests behind it


@dataclass(frozen=True, kw_only=True)
class Change:
    """candidate / baseline - 1 and its 95 % interval. `is_called`: the interval excludes zero and the size matters."""

    relative: float
    low: float | None
    high: float | None
    is_called: bool


def percentile_of(percentile: float) -> Statistic:
    """Percentile of column 0."""
    return lambda rows: np.percentile(rows[..., 0], percentile, axis=-1)


def mean(rows: Floats) -> Floats:
    """Of column 0."""
    return rows[..., 0].mean(axis=-1)


def ratio_of_sums(rows: Floats) -> Floats:
    """sum of column 0 / sum of column 1: in a closed loop, tokens over request time is the output rate per stream."""
    return rows[..., 0].sum(axis=-1) / rows[..., 1].sum(axis=-1)


def estimate(
    repeats: Sequence[Floats],
    statistic: Statistic,
    *,
    block: int,
    reported: Sequence[float] | None = None,
    seed: int = SEED,
) -> Estimate | None:
    """`statistic` over the requests of all repeats, each (requests, columns) in the order they were sent.

    `reported`: the value each repeat is known by, when it is measured otherwise than `statistic` (a rate over a time
    window); the estimate is then their median, and `statistic` only tells how much a repeat could have varied.
    None when there is no request, or the value is zero or not a number.
    """
    repeats = [rows for rows in repeats if len(rows)]
    if not repeats:
        return None
    pooled = np.concatenate(repeats)
    center = float(np.median(reported)) if reported is not None else float(statistic(pooled))
    if not math.isfinite(center) or center <= 0:
        return None
    within = _bootstrap_log_se(repeats, statistic, block, seed)
    values = np.array(reported if reported is not None else [float(statistic(rows)) for rows in repeats])
    if within is None or not (values > 0).all():
        return Estimate(value=center, n=len(pooled))
    dof = PRIOR_DOF + len(values) - 1
    expected = REPEAT_NOISE**2 + len(values) * within**2
    between = float(np.log(values).var(ddof=1)) if len(values) > 1 else 0.0
    log_se = math.sqrt((PRIOR_DOF * expected + (len(values) - 1) * between) / dof / len(values))
    if reported is not None:
        log_se *= MEDIAN_OVER_MEAN.get(len(values), MEDIAN_OVER_MEAN_LARGE)
    spread = math.exp(t_quantile(dof) * log_se)
    return Estimate(value=center, low=center / spread, high=center * spread, log_se=log_se, dof=dof, n=len(pooled))


def _bootstrap_log_se(repeats: Sequence[Floats], statistic: Statistic, block: int, seed: int) -> float | None:
    """Standard error of log(statistic) over all repeats from resampled blocks; None with fewer than two blocks each."""
    lengths = [max(1, min(block, len(rows) // MIN_BLOCKS)) for rows in repeats]
    num_blocks = sum(len(rows) // length for rows, length in zip(repeats, lengths, strict=True))
    if any(len(rows) < 2 for rows in repeats):
        return None
    pooled = np.concatenate(repeats)
    generator = np.random.default_rng(seed)
    batch = max(1, min(DRAWS, MAX_DRAWN // pooled.size))
    draws = []
    for start in range(0, DRAWS, batch):
        count = min(batch, DRAWS - start)
        draws.append(np.atleast_1d(statistic(pooled[_block_indices(repeats, lengths, count, generator)])))
    values = np.concatenate(draws)
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) < DRAWS // 2:
        return None
    correction = num_blocks / (num_blocks - len(repeats))  # resampling m blocks shows (m - 1) / m of the variance
    return float(np.log(values).std(ddof=1)) * math.sqrt(correction)


def _block_indices(
    repeats: Sequence[Floats], lengths: Sequence[int], draws: int, generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    """(draws, requests) indices into the concatenated repeats; each repeat is resampled within itself."""
    indices, offset = [], 0
    for rows, length in zip(repeats, lengths, strict=True):
        starts = generator.integers(0, len(rows), size=(draws, math.ceil(len(rows) / length)))
        drawn = (starts[:, :, None] + np.arange(length)) % len(rows)
        indices.append(drawn.reshape(draws, -1)[:, : len(rows)] + offset)
        offset += len(rows)
    return np.concatenate(indices, axis=1)


def change(candidate: Estimate, baseline: Estimate, threshold: float = PRACTICAL) -> Change:
    """How far `candidate` is from `baseline`; not called when either has no interval."""
    relative = candidate.value / baseline.value - 1
    if candidate.log_se is None or baseline.log_se is None:
        return Change(relative=relative, low=None, high=None, is_called=False)
    variances = (candidate.log_se**2, baseline.log_se**2)
    total = sum(variances)
    dof = total**2 / sum(
        variance**2 / side.dof for variance, side in zip(variances, (candidate, baseline), strict=True)
    )
    half = t_quantile(dof) * math.sqrt(total)
    center = math.log(candidate.value / baseline.value)
    low, high = math.expm1(center - half), math.expm1(center + half)
    is_called = (low > 0 or high < 0) and abs(relative) > threshold
    return Change(relative=relative, low=low, high=high, is_called=is_called)
