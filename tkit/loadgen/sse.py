"""Server-sent events out of bytes with times. Knows the event-stream format of the HTML standard; no JSON and no token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Atomic groups: or backtracking would read one CR LF as two line ends.
BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)+")
TWO_LINE_ENDS = re.compile(rb"(?>\r\n|\n|\r){2}")
LINE_END = re.compile(rb"\r\n|\n|\r")
FIELDS = (b"data", b"event", b"id", b"retry", b"")  # the empty one is a comment, often a sign of life
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    when_ns: int  # arrival of the bytes that completed it
    data: bytes
    is_complete: bool = True  # False: the stream ended in the middle of it, or without the blank line that ends it


def sse_events(messages: Sequence[bytes], times: Sequence[int]) -> Iterator[Event]:
    """Events that carry data, in order. Raises ValueError at the first line that is none of the format's.

    Messages may be cut anywhere: in a character, in a line end, between events, or hold many.
    """
    body = b"".join(messages)
    index, reached = 0, len(messages[0]) if messages else 0
    start = len(BYTE_ORDER_MARK) if body.startswith(BYTE_ORDER_MARK) else 0
    for blank in BLANK_LINE.finditer(body, start):
        complete = _first_end(blank)
        while reached < complete:
            index += 1
            reached += len(messages[index])
        data = _data(body[start : blank.start()])
        start = blank.end()
        if data is not None:
            yield Event(when_ns=times[index], data=data)
    data = _data(body[start:]) if body[start:].strip() else None
    if data is not None:
        yield Event(when_ns=times[len(messages) - 1], data=data, is_complete=False)


def _first_end(blank: re.Match[bytes]) -> int:
    """Where the second line end is there: an event is complete, however many blank lines follow."""
    return blank.start() + len(TWO_LINE_ENDS.match(blank[0])[0])  # type: ignore[index]


def _data(block: bytes) -> bytes | None:
    """The data lines of one event, joined; None when it has none."""
    lines = []
    for line in LINE_END.split(block):
        if not line:
            continue
        field, _, value = line.partition(b":")
        if field not in FIELDS:
            raise ValueError(f"not a line of an event stream: {line[:60].decode('utf-8', 'replace')!r}")
        if field == b"data":
            lines.append(value.removeprefix(b" "))
    return b"\n".join(lines) if lines else None
