"""What the workers of one load tell each other: a row of counters each, and the times that hold for all. Knows memory.

A worker alone has a board of its own. Several look at the same memory, and each acts on the sums: none of them leads, and a
steady window begins and ends with an answer, whichever worker got it. A cell is written whole; two workers that see the end
at the same moment write times a few microseconds apart, of which the last one holds for both.
"""

from __future__ import annotations

from array import array

MAX_WORKERS = 64
START, STEADY_START, STEADY_END, GAVE_UP = range(4)  # nanoseconds of the monotonic clock; 0 = not yet
STARTED, ENDED, PLANNED, MEASURED, FAILURES = range(4, 9)  # of a worker: streams, requests; failures in a row
COUNTERS = 5
BOARD_BYTES = 8 * (STARTED + MAX_WORKERS * COUNTERS)


class Board:
    def __init__(self, cells: memoryview[int] | array[int] | None = None, worker: int = 0, num_workers: int = 1):
        self.worker = worker
        self.num_workers = num_workers
        self._cells = array("q", bytes(BOARD_BYTES)) if cells is None else cells

    def time(self, cell: int) -> int | None:
        return self._cells[cell] or None

    def set_time(self, cell: int, now: int) -> None:
        self._cells[cell] = now

    def set(self, counter: int, count: int) -> None:
        self._cells[counter + self.worker * COUNTERS] = count

    def add(self, counter: int) -> None:
        self._cells[counter + self.worker * COUNTERS] += 1

    def of_each(self, counter: int) -> list[int]:
        return [self._cells[counter + worker * COUNTERS] for worker in range(self.num_workers)]

    def total(self, counter: int) -> int:
        return sum(self.of_each(counter))

    def share(self, total: int) -> range:
        """Which of so many streams or requests are this worker's."""
        return range(self.worker, total, self.num_workers)
