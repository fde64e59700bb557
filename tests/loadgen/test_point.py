"""Every reason for which a point is not to be believed, one at a time."""

from __future__ import annotations

from array import array

import pytest

from tkit.loadgen.exchange import RequestRecord
from tkit.loadgen.load_trace import LoadTrace
from tkit.loadgen.monitor import Monitor
from tkit.loadgen.point import Place, summarise
from tkit.loadgen.profiles import HealthLimits, Shape, find_profile
from tkit.specs.client import ClientCalibration
from tkit.specs.record import PointSummary

MS = 1_000_000
PLACE = Place(shape=Shape(isl=8, osl=10), concurrency=2, repeat=1)


def request(
    id: int, sent_ms: float, *, ttft: float = 50, itl: float = 10, osl: int = 10, isl: int = 8
) -> RequestRecord:
    times = array("q", [round((sent_ms + ttft + i * itl) * MS) for i in range(osl)])
    return RequestRecord(
        id=id, scheduled_ns=round(sent_ms * MS), sent_ns=round(sent_ms * MS), first_byte_ns=times[0],
        first_token_ns=times[0], last_token_ns=times[-1], end_ns=times[-1], isl_asked=8, isl=isl, osl_asked=10, osl=osl,
        n_first=1, chunks=osl, status="ok", error=None, detail="", token_ns=times, token_counts=array("q", [1] * osl),
    )  # fmt: skip


def steady_records(count: int = 40, **changes: float) -> list[RequestRecord]:
    """Two streams, each sending every 140 ms, the second half a turn later."""
    return [request(i, (i // 2) * 140 + (i % 2) * 70, **changes) for i in range(count)]  # type: ignore[arg-type]


def steady_trace(records: list[RequestRecord], **changes: object) -> LoadTrace:
    end = min(record.end_ns for record in records[-PLACE.concurrency :])  # where the first stream runs dry
    values = dict(
        sent=(), start_ns=0, steady_start_ns=70 * MS, steady_end_ns=end, end_ns=records[-1].end_ns, cpu_shares=(0.1,),
        lags_ms=[0.1] * 100, rss_bytes=1, gave_up=False,
    )  # fmt: skip
    return LoadTrace(**{**values, **changes})  # type: ignore[arg-type]


def point(records: list[RequestRecord], limits: HealthLimits | None = None, **changes: object) -> PointSummary:
    return summarise(
        PLACE, records, steady_trace(records, **changes), limits=limits or HealthLimits(), token_source="server_usage",
        num_gpus=2, started="2026-01-01T00:00:00Z",
    )  # fmt: skip


def fail(record: RequestRecord, error: str, detail: str) -> RequestRecord:
    record.status, record.error, record.detail = "error", error, detail
    return record


def test_a_steady_point_is_valid() -> None:
    summary = point(steady_records())
    assert summary.invalid_reasons == ()
    assert summary.is_valid
    assert summary.requests == 38
    assert summary.ttft.p50 == 50
    assert summary.tpot.p50 == pytest.approx(10)
    assert summary.chunk_gap.n == 38 * 9
    assert summary.tok_s_user == pytest.approx(100)
    assert summary.output_tok_s == pytest.approx(10 * 2 / 0.140, rel=0.01)
    assert summary.tok_s_gpu == pytest.approx(summary.output_tok_s / 2)
    window_s = (summary.requests + 1) / summary.requests_s  # one reaches over its beginning: answered, not measured
    assert window_s == pytest.approx(summary.window_s)
    assert {tier["requests_s"] for tier in summary.goodput.values()} == {summary.requests_s}


def test_failed_requests() -> None:
    records = steady_records()
    fail(records[20], "server", "out of memory")
    summary = point(records)
    assert summary.errors == {"server": 1}
    assert summary.ttft.n == 37
    assert summary.invalid_reasons == ("1 of 38 requests failed (1 server), the first: out of memory",)


def test_failures_in_warm_up_are_not_hidden() -> None:
    records = steady_records()
    fail(records[0], "timeout", "no message for 60 s")
    summary = point(records)
    assert summary.errors == {}
    assert summary.invalid_reasons == ("1 of 1 warm-up requests failed (1 timeout), the first: no message for 60 s",)


def test_wrong_lengths() -> None:
    (reason,) = point(steady_records(isl=9)).invalid_reasons
    assert reason == "9.0 input tokens per request, asked for 8 (limit 1% off)"
    records = [request(i, (i // 2) * 150 + (i % 2) * 75, osl=11) for i in range(40)]
    (reason,) = point(records).invalid_reasons
    assert reason == "11.0 output tokens per request, asked for 10 (limit 1% off)"


def test_concurrency_that_was_not_delivered() -> None:
    records = [request(i, (i // 2) * 150 + (i % 2) * 75) for i in range(40)]
    (reason,) = point(records).invalid_reasons
    assert reason.startswith("delivered concurrency 1.8")
    assert reason.endswith("limit 98%)")


def test_a_late_client() -> None:
    records = steady_records()
    for record in records:
        record.scheduled_ns = record.sent_ns - 2 * MS
    assert point(records).invalid_reasons == ("requests were sent 2.0 ms late at p99 (limit 1.0 ms)",)
    (reason,) = point(steady_records(), lags_ms=[0.1] * 95 + [3.0] * 5).invalid_reasons
    assert reason == "messages were seen 3.0 ms late at p99 (limit 2.0 ms)"


def test_quick_judges_lags_at_the_percentiles_it_prints() -> None:
    quick = find_profile("quick").limits
    assert point(steady_records(), quick, lags_ms=[0.1] * 60 + [9.0] * 40).is_valid, "38 requests print a median only"
    (reason,) = point(steady_records(), quick, lags_ms=[0.1] * 40 + [9.0] * 60).invalid_reasons
    assert reason == "messages were seen 9.0 ms late at p50 (limit 2.5 ms)"
    (reason,) = point(steady_records(140), quick, lags_ms=[0.1] * 90 + [9.0] * 10).invalid_reasons
    assert reason == "messages were seen 9.0 ms late at p95 (limit 2.5 ms)"


def test_a_busy_client() -> None:
    assert point(steady_records(), cpu_shares=(0.8,)).invalid_reasons == (
        "the client used 80% of its core (limit 70%)",
    )


def test_more_than_the_client_was_calibrated_for() -> None:
    def judged(max_tok_s: float | None, error_ms: float) -> tuple[str, ...]:
        errors = {"p50": error_ms, "p99": error_ms}
        calibration = ClientCalibration(
            protocol="openai", ttft_error_ms=errors, gap_error_ms=errors, cpu_us_per_token=9, max_streams=None,
            max_tok_s=max_tok_s, limit="",
        )  # fmt: skip
        records = steady_records()
        trace, limits = steady_trace(records), HealthLimits()
        return summarise(
            PLACE, records, trace, limits=limits, token_source="server_usage", num_gpus=None, calibration=calibration,
            started="2026-01-01T00:00:00Z",
        ).invalid_reasons  # fmt: skip

    assert judged(144, 4.9) == judged(None, 4.9) == ()
    assert judged(100, 0.1) == ("143 tok/s are more than this client was seen to follow (100)",)
    assert judged(144, 5.5) == ("the client adds 5.50 ms to a TTFT of 50.00 ms (limit 10%)",)


def test_a_client_that_stood_still() -> None:
    (reason,) = point(steady_records(), lags_ms=[0.1] * 199 + [2000.0]).invalid_reasons
    assert reason == "the client stood still for 2.00 s (limit 5% of the 2.7 s measured)"


def test_a_standstill_is_as_many_late_samples_as_it_swallowed() -> None:
    monitor = Monitor(1, 1, lambda: None)
    monitor.tick_ns, monitor.lag_ns = array("q", [10, 20, 30]), array("q", [0, 35 * MS, 1 * MS])
    assert monitor.lags_ms(0, 30) == [0, 35, 25, 15, 5, 1]
    assert monitor.lags_ms(20, 20) == [35, 25, 15, 5]


def drifting(count: int, factor: float) -> list[RequestRecord]:
    """The second half takes `factor` times as long per token; the streams still send back to back."""
    records, free_ms = [], [0.0, 70.0]
    for i in range(count):
        itl = 10 * (factor if i >= count // 2 else 1)
        records.append(request(i, free_ms[i % 2], itl=itl))
        free_ms[i % 2] += 50 + 9 * itl
    return records


def test_drift_between_the_halves() -> None:
    reasons = point(drifting(80, 1.2)).invalid_reasons
    assert [reason.split(" drifted ")[0] for reason in reasons] == ["tok/s", "tpot"]
    assert "+20.0% between the halves (limit 5%)" in reasons[1]
    assert point(drifting(80, 1.03)).is_valid


def test_a_dozen_requests_are_invalid_only_for_a_gross_drift() -> None:
    assert point(drifting(8, 1.15)).is_valid
    assert "tpot drifted" in " ".join(point(drifting(8, 2.0)).invalid_reasons)


def test_nothing_measured() -> None:
    records = [fail(request(0, 0), "refused", "connection refused")]
    end = records[0].end_ns
    summary = point(records, steady_start_ns=end, steady_end_ns=end)
    assert (summary.requests, summary.output_tok_s, summary.ttft.p50) == (0, 0.0, None)
    assert summary.invalid_reasons == ("1 of 1 warm-up requests failed (1 refused), the first: connection refused",)
