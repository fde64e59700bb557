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
    cpu_share: float  # of one core, over the steady window
    lags_ms: Sequence[float]  # of the event loop, over the steady window
    rss_bytes: int
    gave_up: bool  # nothing but failures
    is_open: bool = False
    # Open loop only: how late the measured requests were taken up, those apart that had to wait for others to end.
    late_ms: Sequence[float] = ()
    num_held_back: int = 0  # measured requests that had to wait
    num_unsent: int = 0  # measured requests that still waited when the window was over
