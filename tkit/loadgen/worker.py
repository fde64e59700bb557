"""`python -m tkit.loadgen.worker`: a process that drives its part of a load, over a client of its own.

It lives as long as the sweep, so its start is paid once, and ends when the sweep's process does.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import signal
import sys
from dataclasses import replace
from multiprocessing.connection import Connection

from tkit.errors import TkitError
from tkit.loadgen.board import BOARD_BYTES, Board
from tkit.loadgen.exchange import request_record
from tkit.loadgen.live import Live
from tkit.loadgen.load import Outcome, Part, loop_factory, run_load
from tkit.loadgen.load_trace import LoadTrace
from tkit.loadgen.protocols import Client, make_client

SIGN_OF_LIFE = 256  # answers read


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on a terminal goes to every process: the sweep's answers it
    connection, memory = Connection(int(sys.argv[1])), mmap.mmap(int(sys.argv[2]), BOARD_BYTES)
    with contextlib.suppress(EOFError, OSError, asyncio.CancelledError):  # the sweep is over
        _serve(connection, memoryview(memory).cast("q"))


def _serve(connection: Connection, cells: memoryview) -> None:
    """Says hello with None, or with the error that keeps it from working; then an Outcome for every Part."""
    arguments, timeout_s = connection.recv()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        client = make_client(*arguments)
        try:
            runner.run(client.open(timeout_s))
        except TkitError as error:
            connection.send(error.message)
            return
        connection.send(None)
        while True:
            part: Part = connection.recv()
            connection.send(None)
            connection.recv()  # all workers have theirs, and the board has the start
            trace = runner.run(_drive(connection, client, part, Board(cells, part.worker, part.num_workers)))
            records = []
            for exchange in trace.sent:
                record = request_record(exchange, client.answer(exchange))
                record.worker = part.worker
                records.append(record)
                if len(records) % SIGN_OF_LIFE == 0:
                    connection.send(None)
            connection.send(Outcome(trace=replace(trace, sent=()), records=records, token_source=client.token_source))


async def _drive(connection: Connection, client: Client, part: Part, board: Board) -> LoadTrace:
    """Ends early when nobody is there any more to tell how far it is."""
    task = asyncio.current_task()
    assert task is not None

    def tell(live: Live) -> None:
        try:
            connection.send(live)
        except OSError:
            task.cancel()

    return await run_load(client, part.exchanges, part.load, tell, board)


if __name__ == "__main__":
    main()
