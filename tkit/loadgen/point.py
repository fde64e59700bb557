"""One point: what was sent and what came back -> the summary and its validity in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tkit.loadgen.exchange import RequestRecord
from tkit.loadgen.load_trace import LoadTrace
from tkit.loadgen.metrics import (
    TAIL_PERCENTILES,
    assign_phases,
    chunk_gaps,
    delivered_concurrency,
    distribution,
    drift,
    e2e_ms,
    e2e_sched_ms,
    error_counts,
    finest_percentile,
    goodput,
    mean_half_width,
    median_half_width,
    present,
    rates,
    token_rates_by_slice,
    tpot_ms,
    ttfb_ms,
    ttft_ms,
    ttft_sched_ms,
    wave_medians,
)
from tkit.loadgen.profiles import HealthLimits, Shape
from tkit.specs.client import ClientCalibration
from tkit.specs.record import Load, PointSummary
from tkit.units import NS_PER_MS, NS_PER_S


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a point stands in the grid: a closed loop of `concurrency`, or an open one at `rate` requests/s."""

    shape: Shape
    concurrency: int | None = None
    rate: float | None = None
    repeat: int  # from 1

    @property
    def load(self) -> Load:
        return Load(concurrency=self.concurrency, rate=self.rate)

    @property
    def slug(self) -> str:
        return f"{self.shape.slug}-{self.load.slug}-r{self.repeat}"


def summarise(
    place: Place,
    records: Sequence[RequestRecord],
    trace: LoadTrace,
    *,
    limits: HealthLimits,
    token_source: str,
    num_gpus: int | None,
    arrivals: str | None = None,
    started: str,
    calibration: ClientCalibration | None = None,
) -> PointSummary:
    """The numbers of a point and whether they may be believed. Sets the phase of every record."""
    assign_phases(records, trace)
    measured = [record for record in records if record.phase == "measured"]
    ok = [record for record in measured if record.is_ok]
    rate = rates(records, trace)
    tpot = distribution(present(map(tpot_ms, ok)))
    client = _client_numbers(place, records, ok, trace)
    reasons = _invalid_reasons(place, records, measured, trace, client, limits)
    ttft = distribution(present(map(ttft_ms, ok)))
    if calibration is not None:
        reasons += _beyond_calibration(rate.output_tok_s, len(trace.cpu_shares), ttft.p50, calibration, limits)
    # in open loop those that were due in the window are the measured ones, whenever they ended
    answered_s = len(ok) / rate.window_s if trace.is_open and rate.window_s else rate.requests_s
    return PointSummary(
        shape=str(place.shape),
        isl=place.shape.isl,
        osl=place.shape.osl,
        isl_unit=place.shape.unit,
        concurrency=place.concurrency,
        arrivals=arrivals if trace.is_open else None,
        rate=place.rate,
        repeat=place.repeat,
        requests=len(measured),
        errors=error_counts(measured),
        token_source=token_source,
        window_s=rate.window_s,
        output_tok_s=rate.output_tok_s,
        output_tok_s_whole=rate.output_tok_s_whole,
        input_tok_s=rate.input_tok_s,
        requests_s=rate.requests_s,
        offered_requests_s=(len(measured) + trace.num_unsent) / rate.window_s
        if trace.is_open and rate.window_s
        else None,
        tok_s_user=1000 / tpot.p50 if tpot.p50 else None,
        tok_s_gpu=rate.output_tok_s / num_gpus if num_gpus else None,
        goodput=goodput(measured, answered_s, from_schedule=trace.is_open),
        ttft=ttft,
        ttfb=distribution(present(map(ttfb_ms, ok))),
        tpot=tpot,
        chunk_gap=distribution(chunk_gaps(ok)["gap_ns"] / NS_PER_MS),
        e2e=distribution(present(map(e2e_ms, ok))),
        ttft_sched=distribution(present(map(ttft_sched_ms, ok))) if trace.is_open else None,
        e2e_sched=distribution(present(map(e2e_sched_ms, ok))) if trace.is_open else None,
        half_width=_half_widths(place, records, ok, trace),
        client={name: float(value) for name, value in client.items()},
        is_valid=not reasons,
        invalid_reasons=tuple(reasons),
        started=started,
        duration_s=(trace.end_ns - trace.start_ns) / NS_PER_S,
    )


def _half_widths(
    place: Place, records: Sequence[RequestRecord], ok: Sequence[RequestRecord], trace: LoadTrace
) -> dict[str, float]:
    """Rates by slices of the window that are as long as a wave of C requests: shorter ones are no independent samples."""
    slices = len(ok) // (place.concurrency or max(round(delivered_concurrency(records, trace)), 1))
    found = {
        "output_tok_s": mean_half_width(token_rates_by_slice(records, trace, slices)) if slices else None,
        "ttft_p50": median_half_width(present(map(ttft_ms, ok))),
    }
    return {name: value for name, value in found.items() if value is not None}


def _client_numbers(
    place: Place, records: Sequence[RequestRecord], ok: Sequence[RequestRecord], trace: LoadTrace
) -> dict[str, float]:
    sent_lags = [np.asarray(trace.late_ms)]
    if not trace.is_open:
        sent_lags = [
            present(
                (record.sent_ns - record.scheduled_ns) / NS_PER_MS if record.scheduled_ns is not None else None
                for record in records
                if record.phase == "measured" and record.worker == worker
            )
            for worker in range(len(trace.cpu_shares))
        ]
    numbers = {
        "workers": len(trace.cpu_shares),
        "cpu_share": max(trace.cpu_shares),
        "cpu_cores": sum(trace.cpu_shares),
        "rss_bytes": trace.rss_bytes,
        "standstill_s": max(trace.lags_ms, default=0.0) / 1000,
        "delivered_concurrency": delivered_concurrency(records, trace),
        **{f"schedule_lag_p{p}_ms": max(_percentile(lags, p) for lags in sent_lags) for p in (50, *TAIL_PERCENTILES)},
        **{f"loop_lag_p{p}_ms": _percentile(np.asarray(trace.lags_ms), p) for p in (50, *TAIL_PERCENTILES)},
    }
    # Waves of C requests: fewer than four say nothing about drift, and with few of them only a clear one is told apart
    # from chance. A run of a dozen requests is therefore judged by gross_drift alone.
    wave = place.concurrency or max(round(numbers["delivered_concurrency"]), 1)
    num_slices = len(ok) // wave // 2 * 2
    if trace.is_open:
        numbers |= {"num_held_back": trace.num_held_back, "num_unsent": trace.num_unsent}
    if num_slices >= 2:
        by_sending = sorted(ok, key=lambda record: record.sent_ns)
        tpots = [value for value in map(tpot_ms, by_sending) if value is not None]
        for name, samples in (
            ("tok_s", token_rates_by_slice(records, trace, num_slices)),
            ("tpot", wave_medians(tpots, wave) if tpots else []),
        ):
            numbers[f"{name}_drift"], is_real = drift(samples)
            numbers[f"{name}_drift_is_beyond_chance"] = is_real
    return numbers


def _percentile(values: np.ndarray, percentile: int) -> float:
    return float(np.percentile(values, percentile)) if len(values) else 0.0


def _invalid_reasons(
    place: Place,
    records: Sequence[RequestRecord],
    measured: Sequence[RequestRecord],
    trace: LoadTrace,
    client: dict[str, float],
    limits: HealthLimits,
) -> list[str]:
    """In words and numbers, each with the limit that it breaks."""
    ok = [record for record in measured if record.is_ok]
    warmup = [record for record in records if record.phase == "warmup"]
    reasons = _failures("", measured, limits) + _failures("warm-up ", warmup, limits)
    if not ok:
        return reasons or ["no request was measured"]
    lengths = {
        "output": [(record.osl, record.osl_asked) for record in ok],
        "input": [(record.isl, record.isl_asked) for record in ok if record.isl is not None and record.isl_asked],
    }
    for name, pairs in lengths.items():
        got, asked = np.mean(pairs, axis=0) if pairs else (1, 1)
        if abs(got / asked - 1) > limits.length_error:
            limit = f"limit {limits.length_error:.0%} off"
            reasons.append(f"{got:.1f} {name} tokens per request, asked for {asked:.4g} ({limit})")
    if place.concurrency is not None:
        share = client["delivered_concurrency"] / place.concurrency
        if share < limits.delivered_concurrency:
            reasons.append(
                f"delivered concurrency {client['delivered_concurrency']:.2f} of {place.concurrency} "
                f"({share:.1%}, limit {limits.delivered_concurrency:.0%})"
            )
    if trace.num_held_back:
        unsent = f", {trace.num_unsent} of them to the end of the window" if trace.num_unsent else ""
        reasons.append(
            f"{trace.num_held_back} of {len(measured) + trace.num_unsent} requests waited in the client, as many in "
            f"flight as --max-outstanding allows{unsent}: their latencies from the schedule hold, those from the send do not"
        )
    ttfts = present(map(ttft_ms, ok))
    reasons += _lag_reasons(client, ttfts, limits, finest_percentile(len(ok)))
    window_s = (trace.steady_end_ns - trace.steady_start_ns) / NS_PER_S
    if client["standstill_s"] > limits.standstill_share * window_s:
        limit = f"limit {limits.standstill_share:.0%} of the {window_s:.1f} s measured"
        reasons.append(f"the client stood still for {client['standstill_s']:.2f} s ({limit})")
    if client["cpu_share"] > limits.cpu_share:
        its_core = "its core" if len(trace.cpu_shares) == 1 else f"a core in one of its {len(trace.cpu_shares)} workers"
        reasons.append(f"the client used {client['cpu_share']:.0%} of {its_core} (limit {limits.cpu_share:.0%})")
    for name, words in (("tok_s", "tok/s"), ("tpot", "tpot")):
        change = client.get(f"{name}_drift", 0.0)
        is_real = bool(client.get(f"{name}_drift_is_beyond_chance"))
        if trace.is_open and name == "tok_s":  # follows the arrivals, which chance or a ramp makes uneven
            continue
        is_gross = abs(change) > limits.gross_drift and not trace.is_open
        if is_gross or (abs(change) > limits.drift and is_real):
            reasons.append(f"{words} drifted {change:+.1%} between the halves (limit {limits.drift:.0%})")
    return reasons


def _beyond_calibration(
    tok_s: float, num_workers: int, ttft_p50_ms: float | None, calibration: ClientCalibration, limits: HealthLimits
) -> list[str]:
    reasons = []
    if calibration.max_tok_s is not None and tok_s > num_workers * calibration.max_tok_s:
        each = f"{calibration.max_tok_s:.0f}" + f" in each of {num_workers} workers" * (num_workers > 1)
        reasons.append(f"{tok_s:.0f} tok/s are more than this client was seen to follow ({each})")
    error_ms = calibration.ttft_error_ms["p50"]
    if ttft_p50_ms is not None and error_ms > limits.ttft_error_share * ttft_p50_ms:
        limit = f"limit {limits.ttft_error_share:.0%}"
        reasons.append(f"the client adds {error_ms:.2f} ms to a TTFT of {ttft_p50_ms:.2f} ms ({limit})")
    return reasons


def _failures(phase: str, records: Sequence[RequestRecord], limits: HealthLimits) -> list[str]:
    failed = [record for record in records if not record.is_ok]
    if len(failed) <= limits.error_share * len(records):
        return []
    counts = ", ".join(f"{count} {name}" for name, count in error_counts(failed).items())
    return [f"{len(failed)} of {len(records)} {phase}requests failed ({counts}), the first: {failed[0].detail}"]


def _lag_reasons(client: dict[str, float], ttfts: np.ndarray, limits: HealthLimits, finest: int) -> list[str]:
    percentile = limits.lag_percentile or finest
    ttft = float(np.percentile(ttfts, percentile))
    reasons = []
    for name, words, limit_ms, share in (
        ("schedule", "requests were sent", limits.schedule_lag_ms, limits.schedule_lag_share),
        ("loop", "messages were seen", limits.loop_lag_ms, limits.loop_lag_share),
    ):
        lag, limit = client[f"{name}_lag_p{percentile}_ms"], max(limit_ms, share * ttft)
        if lag > limit:
            reasons.append(f"{words} {lag:.1f} ms late at p{percentile} (limit {limit:.1f} ms)")
    return reasons
