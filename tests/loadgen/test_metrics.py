"""The numbers of a point against records whose numbers can be worked out by hand."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from tkit.loadgen.exchange import RequestRecord
from tkit.loadgen.load_trace import LoadTrace
from tkit.loadgen.metrics import (
    assign_phases,
    chunk_gaps,
    delivered_concurrency,
    distribution,
    drift,
    finest_percentile,
    goodput,
    mean_half_width,
    median_half_width,
    min_samples,
    rates,
    tpot_ms,
    wave_medians,
    wilson_interval,
)

MS = 1_000_000


def record(sent_ms: float, token_ms: list[float], *, counts: list[int] | None = None, error: str = "", id: int = 0):
    counts = counts or [1] * len(token_ms)
    times = array("q", [round(when * MS) for when in token_ms])
    return RequestRecord(
        id=id, scheduled_ns=round(sent_ms * MS), sent_ns=round(sent_ms * MS), first_byte_ns=times[0] if times else None,
        first_token_ns=times[0] if times else None, last_token_ns=times[-1] if times else None,
        end_ns=(times[-1] if times else round(sent_ms * MS)) + 1, isl_asked=8, isl=8, osl_asked=sum(counts),
        osl=sum(counts), n_first=counts[0] if times else None, chunks=len(times), status="error" if error else "ok",
        error=error or None, detail=error, token_ns=times, token_counts=array("q", counts),
    )  # fmt: skip


def trace(start_ms: float, steady_start_ms: float, steady_end_ms: float, end_ms: float) -> LoadTrace:
    times = [round(when * MS) for when in (start_ms, steady_start_ms, steady_end_ms, end_ms)]
    return LoadTrace(
        sent=(), start_ns=times[0], steady_start_ns=times[1], steady_end_ns=times[2], end_ns=times[3],
        cpu_shares=(0.1,), lags_ms=[0.1] * 100, rss_bytes=1, gave_up=False,
    )  # fmt: skip


@pytest.mark.parametrize(("percentile", "samples"), [(90, 64), (95, 130), (99, 662)])
def test_a_tail_percentile_needs_the_samples_of_mlperfs_bound(percentile: int, samples: int) -> None:
    def chance_of_at_most_one(n: int) -> float:
        p = percentile / 100
        return p**n + n * (1 - p) * p ** (n - 1)

    assert min_samples(percentile) == samples
    assert chance_of_at_most_one(samples) <= 0.01 < chance_of_at_most_one(samples - 1)


def test_percentiles_that_the_samples_do_not_support_are_absent() -> None:
    assert distribution([]).p50 is None
    few = distribution(range(1, 64))
    assert (few.n, few.p50, few.p90, few.p99, few.max) == (63, 32.0, None, None, 63.0)
    assert distribution(range(64)).p90 == pytest.approx(56.7)
    assert distribution(range(661)).p99 is None
    assert distribution(range(662)).p99 == pytest.approx(654.39)
    assert [finest_percentile(n) for n in (1, 63, 64, 130, 661, 662)] == [50, 50, 90, 95, 95, 99]


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    """81 of 263 is Newcombe's example (1998), the others are the closed form."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_tpot_leaves_out_every_token_of_the_first_chunk() -> None:
    assert tpot_ms(record(0, [50, 60, 70, 80])) == pytest.approx(10.0)
    assert tpot_ms(record(0, [50, 90], counts=[4, 4])) == pytest.approx(10.0)
    assert tpot_ms(record(0, [50], counts=[4])) is None
    assert tpot_ms(record(0, [])) is None


def test_rates_count_what_arrives_in_the_steady_window() -> None:
    records = [
        record(0, [50, 100, 150]),  # sent before the window; two of its tokens arrive in it
        record(100, [150, 200, 300]),
        record(200, [250, 350, 450]),  # its last token comes after the window
    ]
    rate = rates(records, trace(0, 90, 400, 460))
    assert rate.window_s == pytest.approx(0.310)
    assert rate.output_tok_s == pytest.approx(7 / 0.310)
    assert rate.output_tok_s_whole == pytest.approx(9 / 0.450)
    assert rate.requests_s == pytest.approx(2 / 0.310)
    assert rate.input_tok_s == pytest.approx(2 * 8 / 0.310)


def test_phases() -> None:
    records = [
        record(0, [50]), record(100, [200]), record(300, [450]), record(310, [450], error="timeout"),
        record(20, [], error="refused"),
    ]  # fmt: skip
    assign_phases(records, trace(0, 90, 400, 460))
    assert [r.phase for r in records] == ["warmup", "measured", "drain", "measured", "warmup"]


def test_delivered_concurrency_is_the_share_of_the_window_with_requests_in_flight() -> None:
    records = [record(0, [200]), record(100, [300]), record(250, [500])]
    assert delivered_concurrency(records, trace(0, 100, 300, 500)) == pytest.approx((100 + 200 + 50) / 200, rel=1e-6)


def test_goodput_needs_every_limit_and_counts_failures_against_attainment() -> None:
    measured = [
        record(0, [400, 420]),  # interactive
        record(0, [600, 620]),  # TTFT too long for interactive
        record(0, [400, 450]),  # TPOT too long for interactive
        record(0, [], error="timeout"),
    ]
    tiers = goodput(measured, 6.0)  # requests answered per second
    assert tiers["interactive"]["requests_s"] == pytest.approx(2.0)
    assert tiers["batch"]["requests_s"] == 6.0
    assert tiers["interactive"]["attainment"] == 0.25
    assert tiers["conversational"]["attainment"] == tiers["batch"]["attainment"] == 0.75
    assert (tiers["batch"]["low"], tiers["batch"]["high"]) == pytest.approx(wilson_interval(3, 4))


def test_chunk_gaps_keep_their_request() -> None:
    gaps = chunk_gaps([record(0, [10, 25], id=7), record(0, [], id=8), record(0, [10, 11, 14], id=9)])
    assert gaps["request"].tolist() == [7, 9, 9]
    assert gaps["gap_ns"].tolist() == [15 * MS, 1 * MS, 3 * MS]


def test_half_widths_hold_the_truth_as_often_as_they_say() -> None:
    """2000 samples from known distributions: about 95 % of the intervals hold the true value."""
    generator = np.random.default_rng(0)
    rates, latencies = generator.normal(100, 10, (2000, 12)), generator.lognormal(4, 0.5, (2000, 100))
    means = [(row.mean(), mean_half_width(row.tolist()) or 0) for row in rates]
    assert np.mean([abs(mean - 100) <= half * mean for mean, half in means]) == pytest.approx(0.95, abs=0.015)
    medians = []
    for row in latencies:
        half = (median_half_width(row) or 0) * np.median(row)
        ordered = np.sort(row)  # ranks 40 and 61 of 100: the 95 % interval of the sign test
        assert half == pytest.approx((ordered[60] - ordered[39]) / 2)
        medians.append(ordered[39] <= np.exp(4) <= ordered[60])
    assert np.mean(medians) == pytest.approx(0.96, abs=0.015)
    assert mean_half_width([1.0, 2.0, 3.0]) is None and median_half_width([1.0] * 15) is None


def test_wave_medians() -> None:
    assert wave_medians([1, 2, 9, 4, 5, 6, 7], wave=3) == [2, 5.5]
    assert wave_medians([1, 2], wave=4) == [1.5]


def test_drift_is_told_apart_from_chance() -> None:
    noise = np.random.default_rng(0).normal(0, 3, 40)
    assert drift([100.0] * 20 + [110.0] * 20) == (pytest.approx(0.1), True)
    assert drift(100 + noise)[1] is False
    change, is_real = drift(np.concatenate([100 + noise[:20], 110 + noise[20:]]))
    assert change == pytest.approx(0.1, abs=0.02)
    assert is_real
    assert drift([100, 130]) == (pytest.approx(0.3), False), "two samples say nothing about chance"
    assert drift([100, 90, 115, 105]) == (pytest.approx(220 / 190 - 1), False)
    assert drift([100]) == (0.0, False)
    assert drift([100, 100, 100, 100, 100, 20])[0] == 0, "a stall is no drift"
