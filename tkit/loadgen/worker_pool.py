"""Worker processes for loads that are more than one core can follow. Knows processes; never sees a point."""

from __future__ import annotations

import contextlib
import mmap
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from tkit.errors import TkitError
from tkit.loadgen.board import BOARD_BYTES, START
from tkit.loadgen.closed_loop import ClosedLoop
from tkit.loadgen.exchange import Exchange
from tkit.loadgen.live import Live
from tkit.loadgen.live import joined as joined_lives
from tkit.loadgen.load import Outcome, Part
from tkit.loadgen.load_trace import joined as joined_traces
from tkit.loadgen.open_loop import OpenLoop
from tkit.units import NS_PER_S

SILENCE_S = 120.0  # a worker that is alive tells something several times a second
UNTIL_START_S = 0.02  # from the word to all workers to the first request
END_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection


class WorkerPool:
    """Workers are started when a load first needs them, each with a client of its own, made by make_client(*arguments)."""

    def __init__(self, arguments: tuple[Any, ...], timeout_s: float):
        self._hello = (arguments, timeout_s)
        self._workers: list[_Worker] = []
        self._board_file = tempfile.TemporaryFile()  # noqa: SIM115
        self._board_file.truncate(BOARD_BYTES)
        weakref.finalize(self, self._board_file.close)  # close() is not the end: workers may be started again

    def run(
        self,
        num_workers: int,
        exchanges: Sequence[Exchange],
        load: ClosedLoop | OpenLoop,
        on_progress: Callable[[Live], None],
    ) -> Outcome:
        """One load, driven together. Request i goes to worker i modulo their number. Raises TkitError when a worker is
        lost."""
        self._start(num_workers - len(self._workers))
        workers = self._workers[:num_workers]
        with (
            mmap.mmap(self._board_file.fileno(), BOARD_BYTES) as board,
            memoryview(board) as view,
            view.cast("q") as cells,
        ):
            for index in range(len(cells)):
                cells[index] = 0
            for number, worker in enumerate(workers):
                part = Part(
                    worker=number, num_workers=num_workers, load=load, exchanges=list(exchanges[number::num_workers])
                )
                self._send(worker, part)
            for worker in workers:
                self._receive([worker])
            cells[START] = time.monotonic_ns() + round(UNTIL_START_S * NS_PER_S)
        for worker in workers:
            self._send(worker, None)
        outcomes = self._outcomes(workers, on_progress)
        records = sorted((record for one in outcomes for record in one.records), key=lambda record: record.id)
        sources = [one.token_source for one in outcomes]
        return Outcome(
            trace=joined_traces([one.trace for one in outcomes]),
            records=records,
            token_source=next((source for source in sources if source != sources[0]), sources[0]),
        )

    def close(self) -> None:
        """The workers end by themselves once nobody is at the other end."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            try:
                worker.process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()

    def _start(self, count: int) -> None:
        new = [self._started() for _ in range(count)]
        self._workers += new
        for worker in new:
            self._send(worker, self._hello)
        for worker in new:
            _, problem = self._receive([worker])
            if problem is not None:
                raise TkitError(f"{self._name(worker)} cannot start: {problem}")

    def _started(self) -> _Worker:
        ours, theirs = Pipe()
        files = (theirs.fileno(), self._board_file.fileno())
        command = [sys.executable, "-m", "tkit.loadgen.worker", *map(str, files)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=files)
        theirs.close()
        return _Worker(process=process, connection=ours)

    def _outcomes(self, workers: Sequence[_Worker], on_progress: Callable[[Live], None]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        lives: dict[int, Live] = {}
        while len(outcomes) < len(workers):
            worker, message = self._receive([worker for worker in workers if worker.process.pid not in outcomes])
            if isinstance(message, Outcome):
                outcomes[worker.process.pid] = message
            elif isinstance(message, Live):
                lives[worker.process.pid] = message
                on_progress(joined_lives(list(lives.values())))
        return [outcomes[worker.process.pid] for worker in workers]

    def _send(self, worker: _Worker, message: object) -> None:
        try:
            worker.connection.send(message)
        except OSError as error:
            raise self._lost(worker) from error

    def _receive(self, workers: Sequence[_Worker]) -> tuple[_Worker, Any]:
        """The next message of any of them."""
        ready = wait([worker.connection for worker in workers], SILENCE_S)
        if not ready:
            raise self._lost(workers[0])
        worker = next(worker for worker in workers if worker.connection is ready[0])
        try:
            return worker, worker.connection.recv()
        except (EOFError, OSError) as error:
            raise self._lost(worker) from error

    def _lost(self, worker: _Worker) -> TkitError:
        """Whoever is left cannot go on with the load alone."""
        name = self._name(worker)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(1)
        code = worker.process.poll()
        told = f"said nothing for {SILENCE_S:g} s" if code is None else f"ended with exit code {code}"
        if code is None:
            worker.process.kill()
        self.close()
        return TkitError(f"{name} {told}: the point is lost", hint="measure the rest: the same command with --resume")

    def _name(self, worker: _Worker) -> str:
        return f"worker {self._workers.index(worker)} of the load generator (pid {worker.process.pid})"
