"""Open loop: requests are sent when they are scheduled, whatever the server does. Knows times, no protocol.

    start     steady_start                       steady_end     all measured ended
      |  warm-up  |  measured: scheduled in here      |   drain      |
      the schedule goes on until the last measured request has ended: until then it sees the load that it should

A user does not wait for others before asking, so a latency counts from the *scheduled* time as well: a client that sends
late, because the server keeps all its connections busy, would otherwise leave out the waiting. At most `max_outstanding`
requests are in flight; those beyond wait, their lateness counts in the latencies from the schedule, and the trace
says how many there were.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tkit.loadgen.board import FAILURES, GAVE_UP, MEASURED, PLANNED, START, Board
from tkit.loadgen.exchange import Exchange
from tkit.loadgen.live import Live, LiveCounter
from tkit.loadgen.load_trace import LoadTrace
from tkit.loadgen.monitor import Monitor, quiet_interpreter, rss_bytes
from tkit.loadgen.protocols import Client
from tkit.units import NS_PER_MS, NS_PER_S

# The timers of an event loop count milliseconds and round either way: the last one before a request is waited out by
# looking at the clock, between turns of the loop, so that messages are seen meanwhile.
TIMER_S = 0.001
MIN_FAILURES = 10  # in a row before a point is given up; a server that refuses for now (HTTP 429, 503) is not failing


@dataclass(frozen=True, kw_only=True)
class OpenLoop:
    """One point's load. Each exchange brings its time, `scheduled_ns` after the start, which becomes one of the clock."""

    steady_start_s: float  # after the start
    steady_end_s: float
    max_outstanding: int
    idle_timeout_s: float
    total_timeout_s: float


async def run_open_loop(
    client: Client,
    exchanges: Sequence[Exchange],
    load: OpenLoop,
    on_progress: Callable[[Live], None],
    board: Board | None = None,
) -> LoadTrace:
    """Sends `exchanges`, ordered by schedule, until all that are measured have ended or nothing but failures comes back.

    Ends within `total_timeout_s` after the steady window. `on_progress` is called some times a second. One of several
    workers has its part of the exchanges and shares the board.
    """
    with quiet_interpreter():
        return await _Run(client, exchanges, load, on_progress, board or Board()).run()


class _Run:
    def __init__(
        self,
        client: Client,
        exchanges: Sequence[Exchange],
        load: OpenLoop,
        on_progress: Callable[[Live], None],
        board: Board,
    ):
        self.client = client
        self.exchanges = exchanges
        self.load = load
        self.board = board
        self.max_outstanding = max(len(board.share(load.max_outstanding)), 1)
        self.start_offset_ns = round(load.steady_start_s * NS_PER_S)
        self.end_offset_ns = round(load.steady_end_s * NS_PER_S)
        self.num_measured = sum(self._is_measured(exchange.scheduled_ns) for exchange in exchanges)
        board.set(PLANNED, self.num_measured)
        self.on_progress = on_progress
        self.monitor = Monitor(load.idle_timeout_s, load.total_timeout_s, self._report)
        self.tasks: set[asyncio.Task[None]] = set()
        self.slot_is_free = asyncio.Event()
        self.counter = LiveCounter()
        self.num_sent = 0
        self.num_held_back = 0
        self.num_unsent = 0
        self.late_ns = array("q")
        self.failures_in_a_row = 0
        self.start_ns = 0

    def _is_measured(self, offset_ns: int) -> bool:
        return self.start_offset_ns <= offset_ns < self.end_offset_ns

    async def run(self) -> LoadTrace:
        self.start_ns = self.board.time(START) or time.monotonic_ns()
        steady_start, steady_end = self.start_ns + self.start_offset_ns, self.start_ns + self.end_offset_ns
        monitor = asyncio.create_task(self.monitor.run())
        try:
            await self._send_all(steady_end)
            while self.tasks:
                await asyncio.wait(self.tasks)
        finally:
            tasks = (monitor, *self.tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        end = time.monotonic_ns()
        gave_up = self.board.time(GAVE_UP)
        if gave_up is not None:
            steady_end = min(steady_end, gave_up)
            steady_start = min(steady_start, steady_end)
        return LoadTrace(
            sent=self.exchanges[: self.num_sent],
            start_ns=self.start_ns,
            steady_start_ns=steady_start,
            steady_end_ns=steady_end,
            end_ns=end,
            cpu_shares=(self.monitor.cpu_share(steady_start, steady_end),),
            lags_ms=self.monitor.lags_ms(steady_start, steady_end),
            rss_bytes=rss_bytes(),
            gave_up=gave_up is not None,
            is_open=True,
            late_ms=[late / NS_PER_MS for late in self.late_ns],
            num_held_back=self.num_held_back,
            num_unsent=self.num_unsent,
        )

    async def _send_all(self, steady_end_ns: int) -> None:
        for exchange in self.exchanges:
            is_measured = self._is_measured(exchange.scheduled_ns)
            exchange.scheduled_ns += self.start_ns
            await self._wait_until(exchange.scheduled_ns)
            is_held_back = len(self.tasks) >= self.max_outstanding
            while len(self.tasks) >= self.max_outstanding and not self._is_over(steady_end_ns):
                self.slot_is_free.clear()
                await self.slot_is_free.wait()
            self.num_held_back += is_held_back and is_measured
            if self._is_over(steady_end_ns) or (is_held_back and time.monotonic_ns() >= steady_end_ns):
                self.num_unsent = self.num_measured - sum(map(self._was_measured, self.exchanges[: self.num_sent]))
                return
            if is_measured and not is_held_back:
                self.late_ns.append(time.monotonic_ns() - exchange.scheduled_ns)
            self.num_sent += 1
            task = asyncio.create_task(self._perform(exchange, is_measured))
            self.tasks.add(task)
            task.add_done_callback(self._ended)

    def _was_measured(self, exchange: Exchange) -> bool:
        return self._is_measured(exchange.scheduled_ns - self.start_ns)

    async def _wait_until(self, when_ns: int) -> None:
        while (left_s := (when_ns - time.monotonic_ns()) / NS_PER_S) > 0:
            await asyncio.sleep(left_s - TIMER_S if left_s > TIMER_S else 0)

    def _is_over(self, steady_end_ns: int) -> bool:
        board = self.board
        if board.time(GAVE_UP) is not None:
            return True
        return board.total(MEASURED) == board.total(PLANNED) and time.monotonic_ns() >= steady_end_ns

    async def _perform(self, exchange: Exchange, is_measured: bool) -> None:
        self.monitor.in_flight.add(exchange)
        await self.client.perform(exchange)
        self.monitor.in_flight.discard(exchange)
        if is_measured:
            self.board.add(MEASURED)
        self.counter.ended(exchange)
        is_failing = exchange.error is not None and exchange.error != "overloaded"
        self.failures_in_a_row = self.failures_in_a_row + 1 if is_failing else 0
        self.board.set(FAILURES, self.failures_in_a_row)
        if min(self.board.of_each(FAILURES)) >= MIN_FAILURES and self.board.time(GAVE_UP) is None:
            self.board.set_time(GAVE_UP, exchange.end_ns)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self.slot_is_free.set()

    def _report(self) -> None:
        board = self.board
        since_start_ns = time.monotonic_ns() - self.start_ns
        left_s = max(self.end_offset_ns - since_start_ns, 0) / NS_PER_S
        told_s = left_s if since_start_ns >= self.start_offset_ns else None
        live = self.counter.live(self.monitor.in_flight, board.total(MEASURED), board.total(PLANNED), told_s)
        self.on_progress(live)
