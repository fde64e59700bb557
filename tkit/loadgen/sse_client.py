"""What clients that stream over HTTP share: sending, naming what went wrong, counting tokens. Knows no server's paths."""

from __future__ import annotations

import json
import operator
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, ClassVar

from tkit.errors import ServerError
from tkit.loadgen.exchange import Answer, Exchange
from tkit.loadgen.http import HttpConnections, Reply, http_address
from tkit.loadgen.sse import Event, sse_events
from tkit.loadgen.token_counts import TokenEnds, added_tokens, tokens_of_texts, tokens_of_total

DONE = b"[DONE]"
EVENT_START = b"data:"
LINE_ENDS = (b"\n", b"\r")
MARK = b"\0"  # in no JSON
ERROR_KEY = b'"error"'  # in a generated text the quotes would be escaped
ERROR_STARTS = (b'{"detail"', b'{"message"')
EMPTY = (b'""', b' ""')
MAX_DETAIL = 200
STATUS_ERRORS = {429: "overloaded", 503: "overloaded"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One event. Counts are None where it carries none."""

    text: str = ""
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None  # of the event, or so far
    total_output_tokens: int | None = None  # of the whole answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    chunks: list[Chunk]
    times: list[int]
    problem: tuple[str, str] | None  # error and detail; the chunks before it are sound


class SseClient:
    """Subclasses say how to open, what to send, and how to read one event."""

    text_key: ClassVar[bytes]  # as in `"text":"word"`
    count_pattern: ClassVar[re.Pattern[bytes]]  # of a count of output tokens
    ends_with_done: ClassVar[bool]  # whether an answer without `[DONE]` is cut short

    def __init__(self, url: str, model: str | None, token_ends: TokenEnds | None, api_key: str | None = None):
        self.model = model or ""
        self.token_source = "tokenizer"
        self.identity: dict[str, Any] = {}
        self._address = http_address(url)
        self._url = str(self._address)
        self._token_ends = token_ends
        self._api_key = api_key
        self._http = HttpConnections(self._address, {"Authorization": f"Bearer {api_key}"} if api_key else {})

    def _chunk(self, event: Any) -> Chunk:
        """Raises TypeError, KeyError, IndexError or ValueError for an event that the protocol does not allow."""
        raise NotImplementedError

    def _adds_up(self, counts: Sequence[int], osl: int) -> bool:
        """Whether the counts of the first event and of the last ones tell of a token per event."""
        raise NotImplementedError

    async def close(self) -> None:
        self._http.close()

    async def _ask(self, path: str, timeout_s: float) -> Reply:
        try:
            return await self._http.ask(path, timeout_s)
        except (OSError, TimeoutError) as error:
            reason = str(error) or f"no answer within {timeout_s:.3g} s"
            raise ServerError(
                f"{self._url}: no server answers over HTTP: {reason}",
                hint="start one with tkit serve, or give its HTTP address: --url HOST:PORT",
            ) from error

    async def _ask_json(self, path: str, timeout_s: float) -> Any:
        reply = await self._ask(path, timeout_s)
        if reply.status != 200:
            raise ServerError(f"{self._url}: GET {path}: {self._told(reply.status, reply.body)}")
        try:
            return json.loads(reply.body)
        except ValueError as error:
            raise ServerError(f"{self._url}: GET {path}: not JSON: {self._told(200, reply.body)}") from error

    async def perform(self, exchange: Exchange) -> None:
        head = await self._http.send(exchange)
        if head is not None and head.status != 200:
            error = STATUS_ERRORS.get(head.status, "rejected" if 400 <= head.status < 500 else "server")
            exchange.fail(error, self._told(head.status, b"".join(exchange.messages)))
            exchange.messages, exchange.times = [], array("q")
        elif exchange.error is None:
            self._conclude(exchange)

    def _conclude(self, exchange: Exchange) -> None:
        """Names what went wrong in an answer that the transport calls complete. Reads events only where a look at the
        bytes gives a reason to, since that delays other requests."""
        body = b"".join(exchange.messages)
        looks_whole = body.startswith(EVENT_START) and body.endswith(LINE_ENDS) and ERROR_KEY not in body
        if self.ends_with_done:
            looks_whole = looks_whole and body.rstrip().endswith(DONE)
        problem = None if looks_whole else self._decode(exchange.messages, exchange.times).problem
        if problem is not None:
            exchange.fail(*problem)
        elif self.token_source == "server_usage":
            self._drop_uniform(exchange, body)

    def _drop_uniform(self, exchange: Exchange, body: bytes) -> None:
        """Forgets the messages of a request that streamed token by token: times alone hold a long point in memory.

        Told by counting keys, and from the counts in the first and last events: reading them would delay other requests.
        """
        messages, osl = exchange.messages, exchange.osl
        if len(messages) < osl or body.count(self.text_key) != osl or any(self.text_key + e in body for e in EMPTY):
            return
        if not all(map(operator.contains, messages[:osl], repeat(self.text_key))):
            return
        if not _are_events(messages[: osl - 1]):  # usage and the end often come with the last token
            return
        kept = [messages[0], *messages[max(osl - 1, 1) :]]
        counts = [int(count) for count in self.count_pattern.findall(b"".join(kept))]
        if counts and self._adds_up(counts, osl):
            exchange.messages = kept
            exchange.is_uniform = True

    def answer(self, exchange: Exchange) -> Answer:
        if exchange.is_uniform:
            decoded = self._decode(exchange.messages, [0] * len(exchange.messages))
            times, counts = list(exchange.times[: exchange.osl]), [1] * exchange.osl
        else:
            decoded = self._decode(exchange.messages, exchange.times)
            times, counts = decoded.times, self._token_counts(exchange, decoded.chunks)
        if decoded.problem is not None:
            exchange.fail(*decoded.problem)
        carrying = [(when, count) for when, count in zip(times, counts, strict=True) if count]
        isl = [chunk.num_input_tokens for chunk in decoded.chunks if chunk.num_input_tokens is not None]
        return Answer(
            isl=isl[-1] if isl else None,
            token_ns=array("q", [when for when, _ in carrying]),
            token_counts=array("q", [count for _, count in carrying]),
        )

    def _token_counts(self, exchange: Exchange, chunks: list[Chunk]) -> list[int]:
        """Tokens that each chunk adds."""
        texts = [chunk.text for chunk in chunks]
        totals = [chunk.total_output_tokens for chunk in chunks if chunk.total_output_tokens is not None]
        if self.token_source == "server_usage":
            if chunks and all(chunk.num_output_tokens is not None for chunk in chunks if chunk.text):
                return added_tokens([chunk.num_output_tokens for chunk in chunks], exchange.osl)
            if totals:
                return tokens_of_total(texts, totals[-1], self._token_ends)
            if exchange.error is None:
                self.token_source = "tokenizer"
        return tokens_of_texts(texts, self._token_ends) if any(texts) else [0] * len(texts)

    def _decode(self, messages: Sequence[bytes], times: Sequence[int]) -> Decoded:
        chunks: list[Chunk] = []
        arrivals: list[int] = []
        try:
            for event in sse_events(messages, times):
                if event.data.strip() == DONE:
                    return Decoded(chunks=chunks, times=arrivals, problem=None)
                problem = self._read(event, chunks)
                if problem is not None:
                    return Decoded(chunks=chunks, times=arrivals, problem=problem)
                arrivals.append(event.when_ns)
        except ValueError as error:
            told = _error_in(b"".join(messages))
            problem = ("server", self._excerpt(told)) if told else ("unreadable", self._excerpt(str(error)))
            return Decoded(chunks=chunks, times=arrivals, problem=problem)
        problem = None
        if self.ends_with_done or not chunks:
            problem = ("truncated", f"ended after {len(chunks)} events" + ", without [DONE]" * self.ends_with_done)
        return Decoded(chunks=chunks, times=arrivals, problem=problem)

    def _read(self, event: Event, chunks: list[Chunk]) -> tuple[str, str] | None:
        """Appends one chunk, or says why not."""
        told = _error_in(event.data)
        if told:
            return "server", self._excerpt(told)
        try:
            chunks.append(self._chunk(json.loads(event.data)))
        except (TypeError, KeyError, IndexError, AttributeError, ValueError):
            if not event.is_complete:
                return "truncated", f"ended in the middle of event {len(chunks) + 1}"
            return "unreadable", f"event {len(chunks) + 1} is {self._excerpt(event.data.decode('utf-8', 'replace'))!r}"
        return None

    def _told(self, status: int, body: bytes) -> str:
        told = _error_in(body) or body.decode("utf-8", "replace").strip()
        return self._excerpt(f"HTTP {status}: {told}" if told else f"HTTP {status}")

    def _excerpt(self, text: str) -> str:
        """Servers repeat what they were sent, the key too."""
        text = text.replace(self._api_key, "***") if self._api_key else text
        return text if len(text) <= MAX_DETAIL else f"{text[:MAX_DETAIL]}..."


def count_of(value: Any) -> int | None:
    """A count of tokens as JSON has it; a tensor of one element may come as a list."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is not None and (not isinstance(value, int) or value < 0):
        raise ValueError(f"not a count: {value!r}")
    return value


def _are_events(messages: Sequence[bytes]) -> bool:
    """Whether each is one event of one line and nothing more. Counts in all at once, as a look at each takes five times
    as long."""
    body = MARK.join((*messages, EVENT_START))
    end = b"}\r\n\r\n" if b"\r" in body else b"}\n\n"
    num_ends = body.count(end + MARK + EVENT_START)
    return body.startswith(EVENT_START) and num_ends == len(messages) and body.count(b"\n") == 2 * len(messages)


def _error_in(data: bytes) -> str | None:
    """The message of a JSON object that tells an error in one of the ways servers do; None for anything else."""
    if ERROR_KEY not in data and not data.lstrip().startswith(ERROR_STARTS):
        return None
    try:
        value = json.loads(data)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    error = value.get("error") or (value.get("object") == "error" and value.get("message"))
    error = error or value.get("detail") or value.get("message")
    if isinstance(error, dict):
        error = error.get("message") or json.dumps(error)
    return None if not error else error if isinstance(error, str) else json.dumps(error)
