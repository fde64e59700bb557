"""What the client does to its own measurement, and requests that do not end. Knows clocks; never sees a token."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

from tkit.loadgen.exchange import Exchange
from tkit.units import NS_PER_MS, NS_PER_S

TICK_S = 0.01
TICKS_PER_ROUND = 25  # every 0.25 s: who has been silent too long, and how far the work is
SWITCH_INTERVAL_S = 0.0005  # another thread of this process (a progress bar) may delay a timestamp by no more


@contextmanager
def quiet_interpreter() -> Iterator[None]:
    """No garbage collection, and short turns for other threads, while times are taken."""
    interval = sys.getswitchinterval()
    gc.collect()
    gc.disable()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.enable()


class Monitor:
    """Runs beside the load on the same event loop: how late a timer fires is how late any message may be seen."""

    def __init__(self, idle_timeout_s: float, total_timeout_s: float, on_round: Callable[[], None]):
        self.in_flight: set[Exchange] = set()
        self.tick_ns = array("q")
        self.lag_ns = array("q")
        self.cpu_ns = array("q")
        self._idle_ns = round(idle_timeout_s * NS_PER_S)
        self._total_ns = round(total_timeout_s * NS_PER_S)
        self._on_round = on_round

    async def run(self) -> None:
        """Until cancelled."""
        tick_ns = round(TICK_S * NS_PER_S)
        ticks = 0
        while True:
            due = time.monotonic_ns() + tick_ns
            await asyncio.sleep(TICK_S)
            now = time.monotonic_ns()
            self.tick_ns.append(now)
            self.lag_ns.append(max(now - due, 0))
            self.cpu_ns.append(time.process_time_ns())
            ticks += 1
            if ticks % TICKS_PER_ROUND == 0:
                self._abort_silent(now)
                self._on_round()

    def _abort_silent(self, now: int) -> None:
        for exchange in tuple(self.in_flight):
            if exchange.abort is None:
                continue
            last = exchange.times[-1] if exchange.times else exchange.sent_ns
            if now - last > self._idle_ns:
                exchange.fail("timeout", f"no message for {self._idle_ns / NS_PER_S:.3g} s")
            elif now - exchange.sent_ns > self._total_ns:
                exchange.fail("timeout", f"not complete after {self._total_ns / NS_PER_S:.3g} s")
            else:
                continue
            exchange.abort()

    def lags_ms(self, start_ns: int, end_ns: int) -> list[float]:
        """How late a message may have been seen, every 10 ms between two times.

        A timer fires once after a standstill, however long it was; the ticks that it swallowed are put back, each a tick
        less late than the one before. Otherwise two seconds of silence would be one sample among a thousand.
        """
        tick_ns = round(TICK_S * NS_PER_S)
        pairs = zip(self.tick_ns, self.lag_ns, strict=True)
        late = (range(lag, -1, -tick_ns) for when, lag in pairs if start_ns <= when <= end_ns)
        return [lag / NS_PER_MS for lags in late for lag in lags]

    def cpu_share(self, start_ns: int, end_ns: int) -> float:
        """CPU time of this process over time, between the first and the last tick within; 0 where there are none."""
        ticks = [i for i, when in enumerate(self.tick_ns) if start_ns <= when <= end_ns]
        if len(ticks) < 2:
            return 0.0
        first, last = ticks[0], ticks[-1]
        return (self.cpu_ns[last] - self.cpu_ns[first]) / (self.tick_ns[last] - self.tick_ns[first])


def rss_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
