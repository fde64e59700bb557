"""Which request runs where, and what each step computes. Knows lengths and rows; no tensor, no text, no thread.

Requests are admitted in the order they came, when a row is free and the cache could hold every running request at the
full length it asked for (TensorRT-LLM calls this GUARANTEED_NO_EVICT): nothing that runs is ever preempted. The cache
is a rectangle, so what counts is rows x longest row. The first in line waits rather than be overtaken: none starves.

Rows 0..n-1 are in use. The one request whose prompt is still being read holds the last of them, so the rows that decode
lie at the front.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tkit.errors import TkitError
from tkit.specs.generation import QUEUE_FULL

KV_STEP = 128  # tokens; the cache is as long as a multiple of it


class QueueFull(TkitError):
    """Every row is busy and as many requests wait as may; the caller should try again later."""


@dataclass(eq=False, kw_only=True)
class Generation:
    """The tokens of one request: first its prompt, then what was generated for it."""

    prompt_ids: Sequence[int]
    max_tokens: int
    output_ids: list[int] = field(default_factory=list)
    num_cached: int = 0  # tokens whose keys and values lie in the cache
    is_cancelled: bool = False

    @property
    def max_length(self) -> int:
        return len(self.prompt_ids) + self.max_tokens

    @property
    def is_prefilled(self) -> bool:
        return self.num_cached >= len(self.prompt_ids)


G = TypeVar("G", bound=Generation)


@dataclass(frozen=True, kw_only=True)
class Prefill(Generic[G]):
    """Reads prompt tokens `start`..`end` of the request in `row`."""

    generation: G
    row: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class RowMove:
    """The first `length` tokens of `source` now belong in `target`."""

    source: int
    target: int
    length: int


class Scheduler(Generic[G]):
    def __init__(self, *, max_batch_size: int, max_queue_size: int, kv_budget_tokens: int):
        self.max_batch_size = max_batch_size
        self.max_queue_size = max_queue_size
        self.kv_budget_tokens = kv_budget_tokens
        self.waiting: deque[G] = deque()
        self.running: list[G] = []  # the index is the row

    def add(self, generation: G) -> None:
        if len(self.waiting) >= self.max_queue_size:
            raise QueueFull(
                f"{QUEUE_FULL}: {len(self.waiting)} requests wait and {len(self.running)} run; it holds {self.max_queue_size}",
                hint="try again when one has finished, or serve with a larger queue",
            )
        self.waiting.append(generation)

    def fits_alone(self, max_length: int) -> bool:
        """Whether a request of that many tokens could ever run."""
        return round_up(max_length) <= self.kv_budget_tokens

    def next_prefill(self, max_tokens: int) -> Prefill[G] | None:
        """The next piece of a prompt, at most `max_tokens` of it; admits the first in line when none is under way."""
        if not self.running or self.running[-1].is_prefilled:
            if not self.waiting or not self._has_room(self.waiting[0]):
                return None
            self.running.append(self.waiting.popleft())
        generation = self.running[-1]
        start = generation.num_cached
        end = min(start + max_tokens, len(generation.prompt_ids))
        return Prefill(generation=generation, row=len(self.running) - 1, start=start, end=end)

    def decoding(self) -> list[G]:
        """The requests that take one step of one token; the index is the row."""
        return [generation for generation in self.running if generation.is_prefilled]

    def cancelled(self) -> list[G]:
        return [generation for generation in (*self.running, *self.waiting) if generation.is_cancelled]

    def remove(self, generation: G) -> list[RowMove]:
        """Takes a request out, waiting or running; the moves, in order, close the gap in the rows."""
        if generation not in self.running:
            self.waiting.remove(generation)
            return []
        gap, last = self.running.index(generation), len(self.running) - 1
        # Filling the gap from the end moves one row, not all behind it; the row that prefills must stay the last.
        fillers = [last] if self.running[last].is_prefilled else [last - 1, last]
        moves = []
        for filler in fillers:
            if filler > gap:
                moved = self.running[filler]
                moves.append(RowMove(source=filler, target=gap, length=moved.num_cached))
                self.running[gap] = moved
                gap = filler
        self.running.pop()
        return moves

    def _has_room(self, generation: G) -> bool:
        if len(self.running) >= self.max_batch_size:
            return False
        longest = max(other.max_length for other in (*self.running, generation))
        return (len(self.running) + 1) * round_up(longest) <= self.kv_budget_tokens


def round_up(length: int) -> int:
    """`length` as the cache allocates it."""
    return -(-length // KV_STEP) * KV_STEP
