"""One request and its answer: first as bytes with times, then as tokens with times. Knows no protocol and no metric."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

# What a request's `error` may say -> in words.
ERRORS = {
    "refused":      "no connection to the server",
    "disconnected": "the connection broke before the answer was complete",
    "timeout":      "no message, or no end, within the limit",
    "truncated":    "the stream ended without a final response",
    "server":       "the server answered with an error",
    "overloaded":   "the server refused the request for now (HTTP 429, 503)",
    "rejected":     "the server refused the request (HTTP 4xx)",
    "short":        "fewer tokens than asked",
    "unreadable":   "an answer that the protocol does not allow",
}  # fmt: skip


@dataclass(slots=True, kw_only=True, eq=False)
class Exchange:
    """What the hot path writes: a time per message, its bytes untouched. Times are monotonic nanoseconds, 0 = not yet.

    Made before the load starts. `abort` ends the answer from outside; it is None while nothing is in flight.
    """

    index: int
    request: bytes
    isl: int | None  # asked; None where nobody can count the prompt's tokens before it is sent
    osl: int  # asked
    scheduled_ns: int = 0
    sent_ns: int = 0
    end_ns: int = 0
    times: array[int] = field(default_factory=lambda: array("q"))
    messages: list[bytes] = field(default_factory=list)
    is_uniform: bool = False  # one token per message: all messages but the last have been dropped
    error: str | None = None
    detail: str = ""
    abort: Callable[[], object] | None = None

    def fail(self, error: str, detail: str) -> None:
        """The first reason stays: what follows from it is not another."""
        if self.error is None:
            self.error, self.detail = error, detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A decoded exchange. Chunks that carry no token are not in it."""

    isl: int | None  # as the server counted, when it does
    token_ns: array[int]  # arrival of each chunk
    token_counts: array[int]  # tokens in each chunk

    @property
    def osl(self) -> int:
        return sum(self.token_counts)


@dataclass(slots=True, kw_only=True, eq=False)
class RequestRecord:
    """One row of requests.parquet, and the chunks behind it."""

    id: int
    phase: str = "warmup"
    scheduled_ns: int | None
    sent_ns: int
    first_byte_ns: int | None
    first_token_ns: int | None
    last_token_ns: int | None
    end_ns: int
    isl_asked: int | None
    isl: int | None
    osl_asked: int
    osl: int
    n_first: int | None
    chunks: int
    status: str
    error: str | None
    detail: str
    worker: int = 0
    token_ns: array[int]
    token_counts: array[int]

    @property
    def is_ok(self) -> bool:
        return self.error is None


def request_record(exchange: Exchange, answer: Answer) -> RequestRecord:
    """The row of one exchange that was sent. An answer that ended well with fewer tokens than asked is an error."""
    if answer.osl < exchange.osl:
        exchange.fail("short", f"{answer.osl} tokens, asked for {exchange.osl}")
    times = answer.token_ns
    return RequestRecord(
        id=exchange.index,
        scheduled_ns=exchange.scheduled_ns,
        sent_ns=exchange.sent_ns,
        first_byte_ns=exchange.times[0] if exchange.times else None,
        first_token_ns=times[0] if times else None,
        last_token_ns=times[-1] if times else None,
        end_ns=exchange.end_ns,
        isl_asked=exchange.isl,
        isl=exchange.isl if answer.isl is None else answer.isl,
        osl_asked=exchange.osl,
        osl=answer.osl,
        n_first=answer.token_counts[0] if times else None,
        chunks=len(times),
        status="ok" if exchange.error is None else "error",
        error=exchange.error,
        detail=exchange.detail,
        token_ns=times,
        token_counts=answer.token_counts,
    )
