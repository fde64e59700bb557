"""What a load tells of itself while it runs: a look at counters a few times a second, never at an answer's content.

Approximate where a point's own numbers are exact: chunks of requests in flight count as many tokens as those of requests
that have ended had on average.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tkit.loadgen.exchange import Exchange
from tkit.units import NS_PER_MS, NS_PER_S, format_seconds

RATE_OVER_NS = 3 * NS_PER_S
LATEST = 64  # requests whose first bytes are shown


@dataclass(frozen=True, kw_only=True)
class Live:
    """`done` of `total` requests or seconds. `left_s` is None until something was measured."""

    done: int
    total: int
    tok_s: float
    first_ms: float | None
    is_ttft: bool  # whether the first bytes brought a token, as far as is known
    in_flight: int
    errors: int
    left_s: float | None

    def __str__(self) -> str:
        name = "TTFT" if self.is_ttft else "first bytes"
        first = f"{name} {self.first_ms:.0f} ms, " if self.first_ms is not None else ""
        errors = f"{self.errors} error{'s' * (self.errors != 1)}"
        left = "warming up" if self.left_s is None else f"{format_seconds(round(self.left_s))} left"
        return f"{self.tok_s:.0f} tok/s, {first}{self.in_flight} in flight, {errors}, {left}"


class LiveCounter:
    """Told of every request that ends; asked for a Live now and then."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._num_chunks = 0
        self._num_errors = 0
        self._first_ms: deque[float] = deque(maxlen=LATEST)
        self._is_ttft = True
        self._totals: deque[tuple[int, float]] = deque()  # when, tokens so far

    def ended(self, exchange: Exchange) -> None:
        if exchange.error is not None:
            self._num_errors += 1
        elif exchange.times:
            self._num_tokens += exchange.osl
            self._num_chunks += len(exchange.times)
            self._first_ms.append((exchange.times[0] - exchange.sent_ns) / NS_PER_MS)
            self._is_ttft = exchange.is_uniform

    def live(self, in_flight: Collection[Exchange], done: int, total: int, left_s: float | None) -> Live:
        now = time.monotonic_ns()
        per_chunk = self._num_tokens / self._num_chunks if self._num_chunks else 1.0
        so_far = self._num_tokens + per_chunk * sum(len(exchange.times) for exchange in in_flight)
        self._totals.append((now, so_far))
        while now - self._totals[0][0] > RATE_OVER_NS:
            self._totals.popleft()
        since, before = self._totals[0]
        return Live(
            done=done,
            total=total,
            tok_s=max(so_far - before, 0.0) * NS_PER_S / (now - since) if now > since else 0.0,
            first_ms=statistics.median(self._first_ms) if self._first_ms else None,
            is_ttft=self._is_ttft,
            in_flight=len(in_flight),
            errors=self._num_errors,
            left_s=left_s,
        )


def joined(lives: Sequence[Live]) -> Live:
    """What the workers of one load say, as one. They count what is done, and what is left, together."""
    firsts = [live.first_ms for live in lives if live.first_ms is not None]
    lefts = [live.left_s for live in lives if live.left_s is not None]
    return Live(
        done=max(live.done for live in lives),
        total=max(live.total for live in lives),
        tok_s=sum(live.tok_s for live in lives),
        first_ms=statistics.median(firsts) if firsts else None,
        is_ttft=all(live.is_ttft for live in lives),
        in_flight=sum(live.in_flight for live in lives),
        errors=sum(live.errors for live in lives),
        left_s=max(lefts) if lefts else None,
    )
