"""Closed loop: C streams, each sending its next request when the last has ended. Knows counts and times, no protocol.

    start        steady_start                          steady_end       end
      |  warm-up  |  measured: sent and ended in here    |    drain      |
      first wave     concurrency is C all the way           no new ones
      spread out

Requests that reach over an edge of the steady window are sent and answered like any other, since without them the
concurrency would not be C, but their latencies do not count. A request that fails after the window began does count.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tkit.loadgen.board import ENDED, FAILURES, GAVE_UP, MEASURED, START, STARTED, STEADY_END, STEADY_START, Board
from tkit.loadgen.exchange import Exchange
from tkit.loadgen.live import Live, LiveCounter
from tkit.loadgen.load_trace import LoadTrace
from tkit.loadgen.monitor import Monitor, quiet_interpreter, rss_bytes
from tkit.loadgen.protocols import Client
from tkit.units import NS_PER_S

MIN_FAILURES = 3  # in a row, and at least one per stream, before a point is given up


@dataclass(frozen=True, kw_only=True)
class ClosedLoop:
    """One point's load. `spread_s` is the time over which the streams start: about one request's duration, so that they
    do not prefill in step."""

    concurrency: int
    num_warmup: int
    num_requests: int
    min_duration_s: float
    max_duration_s: float | None
    spread_s: float
    idle_timeout_s: float
    total_timeout_s: float


async def run_closed_loop(
    client: Client,
    exchanges: Sequence[Exchange],
    load: ClosedLoop,
    on_progress: Callable[[Live], None],
    board: Board | None = None,
) -> LoadTrace:
    """Sends from `exchanges` in order until the load is complete or they are used up. `on_progress` is called
    some times a second. Ends within `total_timeout_s` after the last request was sent.

    One of several workers has its part of the exchanges, runs its part of the streams, and shares the board.
    """
    with quiet_interpreter():
        return await _Run(client, exchanges, load, on_progress, board or Board()).run()


class _Run:
    def __init__(
        self,
        client: Client,
        exchanges: Sequence[Exchange],
        load: ClosedLoop,
        on_progress: Callable[[Live], None],
        board: Board,
    ):
        self.client = client
        self.exchanges = exchanges
        self.load = load
        self.on_progress = on_progress
        self.board = board
        self.monitor = Monitor(load.idle_timeout_s, load.total_timeout_s, self._report)
        self.counter = LiveCounter()
        self.next = 0
        self.failures_in_a_row = 0

    async def run(self) -> LoadTrace:
        board = self.board
        start = board.time(START) or time.monotonic_ns()
        monitor = asyncio.create_task(self.monitor.run())
        streams = [asyncio.create_task(self._stream(start, i)) for i in board.share(self.load.concurrency)]
        try:
            await asyncio.gather(*streams)
        finally:
            tasks = (monitor, *streams)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        end = time.monotonic_ns()
        steady_start, steady_end = board.time(STEADY_START) or end, board.time(STEADY_END) or end
        return LoadTrace(
            sent=self.exchanges[: self.next],
            start_ns=start,
            steady_start_ns=steady_start,
            steady_end_ns=steady_end,
            end_ns=end,
            cpu_shares=(self.monitor.cpu_share(steady_start, steady_end),),
            lags_ms=self.monitor.lags_ms(steady_start, steady_end),
            rss_bytes=rss_bytes(),
            gave_up=board.time(GAVE_UP) is not None,
        )

    @property
    def is_over(self) -> bool:
        return self.board.time(STEADY_END) is not None or self.board.time(GAVE_UP) is not None

    async def _stream(self, start_ns: int, index: int) -> None:
        delay_s = self.load.spread_s * index / self.load.concurrency
        scheduled_ns = start_ns + round(delay_s * NS_PER_S)
        await asyncio.sleep((scheduled_ns - time.monotonic_ns()) / NS_PER_S)
        self.board.add(STARTED)
        while not self.is_over:
            if self.next == len(self.exchanges):
                self._end_window(time.monotonic_ns())
                return
            exchange = self.exchanges[self.next]
            self.next += 1
            exchange.scheduled_ns = scheduled_ns
            self.monitor.in_flight.add(exchange)
            await self.client.perform(exchange)
            self.monitor.in_flight.discard(exchange)
            scheduled_ns = exchange.end_ns
            self._ended(exchange)

    def _ended(self, exchange: Exchange) -> None:
        load, board, now = self.load, self.board, exchange.end_ns
        board.add(ENDED)
        self.counter.ended(exchange)
        self.failures_in_a_row = self.failures_in_a_row + 1 if exchange.error else 0
        board.set(FAILURES, self.failures_in_a_row)
        steady_start = board.time(STEADY_START)
        if min(board.of_each(FAILURES)) >= max(load.concurrency / board.num_workers, MIN_FAILURES):
            board.set_time(GAVE_UP, now)
            self._end_window(now)
        elif steady_start is None:
            if board.total(ENDED) >= load.num_warmup and board.total(STARTED) == load.concurrency:
                board.set_time(STEADY_START, now)
        elif board.time(STEADY_END) is None and exchange.sent_ns >= steady_start:
            board.add(MEASURED)
            elapsed_s = (now - steady_start) / NS_PER_S
            is_enough = board.total(MEASURED) >= load.num_requests and elapsed_s >= load.min_duration_s
            if is_enough or (load.max_duration_s is not None and elapsed_s >= load.max_duration_s):
                self._end_window(now)

    def _end_window(self, now: int) -> None:
        if self.board.time(STEADY_END) is None and self.board.time(STEADY_START) is not None:
            self.board.set_time(STEADY_END, now)

    def _report(self) -> None:
        load, left_s = self.load, None
        now, num_measured = time.monotonic_ns(), self.board.total(MEASURED)
        elapsed_s = (now - (self.board.time(STEADY_START) or now)) / NS_PER_S
        if num_measured:
            by_count_s = elapsed_s * max(load.num_requests / num_measured - 1, 0.0)
            left_s = max(by_count_s, load.min_duration_s - elapsed_s, 0.0)
            if load.max_duration_s is not None:
                left_s = min(left_s, max(load.max_duration_s - elapsed_s, 0.0))
        done, total = num_measured, load.num_requests
        if load.min_duration_s:
            done, total = int(elapsed_s), int(load.min_duration_s)
        self.on_progress(self.counter.live(self.monitor.in_flight, min(done, total), total, left_s))
