"""What a load leaves behind, whichever loop drove it. Knows times; no protocol and no metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tkit.loadgen.exchange import Exchange


@dataclass(frozen=True, kw_only=True)
class LoadTrace:
    """What happened, in nanoseconds of the monotonic clock. Without a steady window both its ends are the end.

    Closed loop: the window is between two answers. Open loop: it is a piece of the schedule, and the requests that are
    scheduled in it are measured however long they take; leaving out those that outlast it would hide the slow ones.
    """

    sent: Sequence[Exchange]
    start_ns: int
    steady_start_ns: int
    steady_end_ns: int
    end_ns: int
    cpu_shares: Sequence[float]  # of one core, over the steady window, by worker
    lags_ms: Sequence[float]  # of the event loop, over the steady window; of the worker that lagged most
    rss_bytes: int  # of all workers
    gave_up: bool  # nothing but failures
    is_open: bool = False
    # Open loop only: how late the measured requests were taken up, those apart that had to wait for others to end; of the
    # worker that was latest.
    late_ms: Sequence[float] = ()
    num_held_back: int = 0  # measured requests that had to wait
    num_unsent: int = 0  # measured requests that still waited when the window was over


def joined(traces: Sequence[LoadTrace]) -> LoadTrace:
    """One load out of what its workers say. The health is that of the worst of them: an average would hide it."""
    return LoadTrace(
        sent=[exchange for trace in traces for exchange in trace.sent],
        start_ns=min(trace.start_ns for trace in traces),
        steady_start_ns=max(trace.steady_start_ns for trace in traces),
        steady_end_ns=max(trace.steady_end_ns for trace in traces),
        end_ns=max(trace.end_ns for trace in traces),
        cpu_shares=[share for trace in traces for share in trace.cpu_shares],
        lags_ms=_worst([trace.lags_ms for trace in traces]),
        rss_bytes=sum(trace.rss_bytes for trace in traces),
        gave_up=any(trace.gave_up for trace in traces),
        is_open=traces[0].is_open,
        late_ms=_worst([trace.late_ms for trace in traces]),
        num_held_back=sum(trace.num_held_back for trace in traces),
        num_unsent=sum(trace.num_unsent for trace in traces),
    )


def _worst(samples: Sequence[Sequence[float]]) -> Sequence[float]:
    """Those whose 99th percentile is the largest."""
    return max(samples, key=lambda values: sorted(values)[int(0.99 * len(values))] if values else -1.0)
