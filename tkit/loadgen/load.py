"""One load, driven by the loop that it needs, in this process or shared out among several. Knows loops and clients."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tkit.loadgen.board import Board
from tkit.loadgen.closed_loop import ClosedLoop, run_closed_loop
from tkit.loadgen.exchange import Exchange, RequestRecord
from tkit.loadgen.live import Live
from tkit.loadgen.load_trace import LoadTrace
from tkit.loadgen.open_loop import OpenLoop, run_open_loop
from tkit.loadgen.protocols import Client


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one worker does of a point: its part of the requests, of a load that is told whole."""

    worker: int
    num_workers: int
    load: ClosedLoop | OpenLoop
    exchanges: list[Exchange]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    trace: LoadTrace
    records: list[RequestRecord]
    token_source: str


async def run_load(
    client: Client,
    exchanges: Sequence[Exchange],
    load: ClosedLoop | OpenLoop,
    on_progress: Callable[[Live], None],
    board: Board | None = None,
) -> LoadTrace:
    if isinstance(load, ClosedLoop):
        return await run_closed_loop(client, exchanges, load, on_progress, board)
    return await run_open_loop(client, exchanges, load, on_progress, board)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes the fastest loop there is."""
    if sys.platform == "win32":
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop
