"""Requests and chunks -> the numbers of a point, as `specs.record.METRICS` defines. Knows times and counts only."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tkit.loadgen.exchange import RequestRecord
from tkit.loadgen.load_trace import LoadTrace
from tkit.specs.record import SLO_TIERS, Distribution
from tkit.units import NS_PER_MS, NS_PER_S

Floats = np.ndarray
Z_95 = 1.959963984540054
BOUND_CONFIDENCE = 0.99
TAIL_PERCENTILES = (90, 95, 99)

# Two-sided 99 % points of Student's t by degrees of freedom; between rows the higher one holds.
T_99 = {1: 63.66, 2: 9.925, 3: 5.841, 4: 4.604, 5: 4.032, 6: 3.707, 8: 3.355, 10: 3.169, 15: 2.947, 20: 2.845,
        30: 2.750, 60: 2.660, 120: 2.617}  # fmt: skip


# The same at 95 %.
T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228, 15: 2.131, 20: 2.086,
        30: 2.042, 60: 2.000, 120: 1.980}  # fmt: skip


@functools.cache
def min_samples(percentile: int) -> int:
    """The fewest samples that can support a tail percentile: 64 for p90, 130 for p95, 662 for p99.

    MLPerf's early-stopping bound: that no more than one sample lies beyond the true percentile must have a chance of
    1 % at most, so that the second largest sample bounds the percentile at 99 % confidence:
    P(Binomial(n, 1 - p) <= 1) = p^n + n (1 - p) p^(n - 1) <= 0.01.
    """
    p = percentile / 100
    n = 1
    while p**n + n * (1 - p) * p ** (n - 1) > 1 - BOUND_CONFIDENCE:
        n += 1
    return n


def finest_percentile(num_samples: int) -> int:
    """The highest percentile that is printed for so many samples; the median always is."""
    return max([50, *(percentile for percentile in TAIL_PERCENTILES if num_samples >= min_samples(percentile))])


def distribution(values_ms: Sequence[float] | Floats) -> Distribution:
    """Percentiles by linear interpolation, each only where the number of samples supports it."""
    values = np.asarray(values_ms, dtype=np.float64)
    n = len(values)
    if n == 0:
        return Distribution(n=0, mean=None, min=None, p50=None, p90=None, p95=None, p99=None, max=None)
    tail = {p: float(np.percentile(values, p)) if n >= min_samples(p) else None for p in TAIL_PERCENTILES}
    return Distribution(
        n=n,
        mean=float(values.mean()),
        min=float(values.min()),
        p50=float(np.percentile(values, 50)),
        p90=tail[90],
        p95=tail[95],
        p99=tail[99],
        max=float(values.max()),
    )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson score, without continuity correction); (0, 1) when nothing was tried."""
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z_95**2
    centre = share + z2 / (2 * trials)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    scale = 1 + z2 / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def ttft_ms(record: RequestRecord) -> float | None:
    return None if record.first_token_ns is None else (record.first_token_ns - record.sent_ns) / NS_PER_MS


def ttfb_ms(record: RequestRecord) -> float | None:
    return None if record.first_byte_ns is None else (record.first_byte_ns - record.sent_ns) / NS_PER_MS


def e2e_ms(record: RequestRecord) -> float | None:
    return None if record.last_token_ns is None else (record.last_token_ns - record.sent_ns) / NS_PER_MS


def ttft_sched_ms(record: RequestRecord) -> float | None:
    return _since_schedule(record, record.first_token_ns)


def e2e_sched_ms(record: RequestRecord) -> float | None:
    return _since_schedule(record, record.last_token_ns)


def _since_schedule(record: RequestRecord, when_ns: int | None) -> float | None:
    return None if when_ns is None or record.scheduled_ns is None else (when_ns - record.scheduled_ns) / NS_PER_MS


def tpot_ms(record: RequestRecord) -> float | None:
    """None when every token came in the first chunk."""
    if record.first_token_ns is None or record.last_token_ns is None or record.n_first is None:
        return None
    later = record.osl - record.n_first
    return (record.last_token_ns - record.first_token_ns) / NS_PER_MS / later if later > 0 else None


def present(values: Iterable[float | None]) -> Floats:
    return np.array([value for value in values if value is not None], dtype=np.float64)


def chunk_gaps(records: Iterable[RequestRecord]) -> dict[str, Floats]:
    """The columns of chunks.parquet: per gap the request's id and the nanoseconds."""
    ids: list[Floats] = [np.empty(0, dtype=np.int64)]
    gaps: list[Floats] = [np.empty(0, dtype=np.int64)]
    for record in records:
        between = np.diff(np.asarray(record.token_ns, dtype=np.int64))
        gaps.append(between)
        ids.append(np.full(len(between), record.id, dtype=np.int64))
    return {"request": np.concatenate(ids), "gap_ns": np.concatenate(gaps)}


def assign_phases(records: Iterable[RequestRecord], trace: LoadTrace) -> None:
    """Measured: sent and answered within the steady window; failures after its begin too, however late they show.
    In open loop: scheduled within it."""
    for record in records:
        if trace.is_open:
            assert record.scheduled_ns is not None
            is_early, is_late = record.scheduled_ns < trace.steady_start_ns, record.scheduled_ns >= trace.steady_end_ns
            record.phase = "warmup" if is_early else "drain" if is_late else "measured"
        elif record.sent_ns < trace.steady_start_ns:
            record.phase = "warmup"
        elif record.is_ok and record.end_ns > trace.steady_end_ns:
            record.phase = "drain"
        else:
            record.phase = "measured"


def tokens_between(records: Iterable[RequestRecord], start_ns: int, end_ns: int) -> int:
    """Output tokens that arrived in (start, end], whosever they are."""
    total = 0
    for record in records:
        times = np.asarray(record.token_ns, dtype=np.int64)
        inside = (times > start_ns) & (times <= end_ns)
        total += int(np.asarray(record.token_counts, dtype=np.int64)[inside].sum())
    return total


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Over the steady window; `output_tok_s_whole` over everything that was sent."""

    window_s: float
    output_tok_s: float
    output_tok_s_whole: float
    input_tok_s: float | None  # None where no input was counted
    requests_s: float


def rates(records: Sequence[RequestRecord], trace: LoadTrace) -> Rates:
    """An input token counts when its request's first output token comes: then it has been worked through."""
    window_s = (trace.steady_end_ns - trace.steady_start_ns) / NS_PER_S
    last = max((record.last_token_ns for record in records if record.last_token_ns is not None), default=trace.end_ns)
    whole_s = (last - min((record.sent_ns for record in records), default=trace.start_ns)) / NS_PER_S
    start, end = trace.steady_start_ns, trace.steady_end_ns
    ended = sum(record.is_ok and start < record.end_ns <= end for record in records)
    prefilled = [
        record.isl for record in records if record.first_token_ns is not None and start < record.first_token_ns <= end
    ]
    return Rates(
        window_s=window_s,
        output_tok_s=_per_second(tokens_between(records, start, end), window_s),
        output_tok_s_whole=_per_second(sum(record.osl for record in records), whole_s),
        input_tok_s=None if None in prefilled else _per_second(sum(isl or 0 for isl in prefilled), window_s),
        requests_s=_per_second(ended, window_s),
    )


def _per_second(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def goodput(
    measured: Sequence[RequestRecord], requests_s: float, *, from_schedule: bool = False
) -> dict[str, dict[str, float]]:
    """Per tier the requests per second that meet every limit, and their share of all measured; failures meet none.

    Of the `requests_s` that are answered, as many as among those measured: counted over the window, the measured alone
    would miss the requests that reach over its beginning, one in ten where ten per stream are measured.
    """
    tiers, num_ok = {}, sum(record.is_ok for record in measured)
    for tier, limits in SLO_TIERS.items():
        good = sum(_meets(record, limits, from_schedule) for record in measured)
        low, high = wilson_interval(good, len(measured))
        tiers[tier] = {
            "requests_s": requests_s * good / num_ok if num_ok else 0.0,
            "attainment": good / len(measured) if measured else 0.0,
            "low": low,
            "high": high,
        }
    return tiers


_METRICS = {"ttft": ttft_ms, "tpot": tpot_ms, "e2e": e2e_ms}
_SCHED_METRICS = {"ttft": ttft_sched_ms, "tpot": tpot_ms, "e2e": e2e_sched_ms}


def _meets(record: RequestRecord, limits: Mapping[str, float], from_schedule: bool) -> bool:
    """A request without a second chunk has no tpot, so no tpot of its own to miss."""
    metrics = _SCHED_METRICS if from_schedule else _METRICS
    values = {name: metrics[name](record) for name in limits}
    return record.is_ok and all(value is None or value <= limits[name] for name, value in values.items())


def delivered_concurrency(records: Iterable[RequestRecord], trace: LoadTrace) -> float:
    """Requests in flight, averaged over the steady window."""
    start, end = trace.steady_start_ns, trace.steady_end_ns
    busy_ns = sum(max(0, min(record.end_ns, end) - max(record.sent_ns, start)) for record in records)
    return busy_ns / (end - start) if end > start else 0.0


def token_rates_by_slice(records: Sequence[RequestRecord], trace: LoadTrace, num_slices: int) -> list[float]:
    """Output tok/s in equal slices of the steady window."""
    edges = np.linspace(trace.steady_start_ns, trace.steady_end_ns, num_slices + 1)
    slice_s = (trace.steady_end_ns - trace.steady_start_ns) / num_slices / NS_PER_S
    totals = np.zeros(num_slices)
    for record in records:
        counts, _ = np.histogram(
            np.asarray(record.token_ns, dtype=np.int64), bins=edges, weights=np.asarray(record.token_counts)
        )
        totals += counts
    return [float(total / slice_s) for total in totals]


def mean_half_width(samples: Sequence[float]) -> float | None:
    """Half of the 95 % t-interval of the mean over the mean; None with fewer than four samples."""
    if len(samples) < 4 or np.mean(samples) <= 0:
        return None
    values = np.asarray(samples)
    t = T_95[max(row for row in T_95 if row < len(values))]
    return float(t * values.std(ddof=1) / math.sqrt(len(values)) / values.mean())


def median_half_width(values: Sequence[float] | Floats) -> float | None:
    """Half of the 95 % interval of the median over the median, from order statistics about n / 2 -+ 0.98 sqrt(n), which
    holds for any distribution; None with fewer than sixteen values."""
    n = len(values)
    if n < 16:
        return None
    ordered = np.sort(np.asarray(values))
    reach = Z_95 * math.sqrt(n) / 2
    low, high = math.floor(n / 2 - reach), math.ceil(n / 2 + reach) + 1  # ranks from 1, as in the sign test
    return float((ordered[high - 1] - ordered[max(low - 1, 0)]) / 2 / np.median(ordered))


def wave_medians(values: Sequence[float], wave: int) -> list[float]:
    """Medians of consecutive groups of `wave` values; what does not fill a group joins the last.

    Requests in flight together share the server's steps, so C of them are no more than one independent sample.
    """
    num_waves = max(len(values) // wave, 1)
    bounds = [*(i * wave for i in range(num_waves)), len(values)]
    groups = [values[first:last] for first, last in zip(bounds, bounds[1:], strict=False)]
    return [float(np.median(group)) for group in groups if group]


def drift(samples: Sequence[float]) -> tuple[float, bool]:
    """(median of the second half against that of the first, beyond chance?) of samples in order of time.

    Medians, as a short stall in one half is no drift; it shows among the chunk gaps. Beyond chance: a two-sided t-test at
    99 % with the spread inside the halves. With three samples or fewer there is no spread, and nothing is beyond chance.
    """
    half = len(samples) // 2
    if half == 0:
        return 0.0, False
    first, second = np.asarray(samples[:half]), np.asarray(samples[-half:])
    if np.median(first) == 0:
        return 0.0, False
    change = float(np.median(second) / np.median(first) - 1)
    freedom = 2 * (half - 1)
    if freedom == 0:
        return change, False
    spread = math.sqrt((first.var(ddof=1) + second.var(ddof=1)) / half)
    limit = T_99[max(row for row in T_99 if row <= freedom)]
    return change, bool(abs(second.mean() - first.mean()) > limit * spread)


def error_counts(measured: Iterable[RequestRecord]) -> dict[str, int]:
    return dict(Counter(record.error for record in measured if record.error is not None).most_common())
