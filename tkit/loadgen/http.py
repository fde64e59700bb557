"""HTTP/1.1 on raw asyncio protocols: connections that are kept, and answers that get a time per arrival.

A message of an Exchange is what one arrival brought of the body, its time taken before anything is looked at. The chunk
framing is removed at once, since only it tells where an answer ends; the rest is bytes until the load is over. Knows
no JSON, no events and no token. Proxies are not spoken.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from tkit.errors import InputError
from tkit.loadgen.exchange import Exchange
from tkit.units import NS_PER_S

HOST_AND_PATH = r"(?P<host>\[[0-9a-fA-F:.]+\]|[^\s:/\[\]@]+)(:(?P<port>\d{1,5}))?(?P<path>(/[^\s?#@]*)?)"
ADDRESS = re.compile(rf"((?P<scheme>https?)://)?{HOST_AND_PATH}")
GRPC_ADDRESS = re.compile(rf"((?P<scheme>grpcs?|https)://)?{HOST_AND_PATH}")
PORTS = {"http": 80, "https": 443, "grpcs": 443}
# Servers close connections that nothing came over for 2 s or more (5 s is usual). One that is closed just when a
# request is sent would look like a failure of the server, so older ones are not used again.
MAX_IDLE_S = 1.0
CONNECT_TIMEOUT_S = 10.0
MAX_HEAD_BYTES = 65536
CRLF = b"\r\n"
MAX_LINE_BYTES = 4096  # of the chunk framing
CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,15}")


@dataclass(frozen=True, kw_only=True)
class HttpAddress:
    host: str
    port: int
    path: str  # "" or "/v1", without a slash at the end
    is_tls: bool

    def __str__(self) -> str:
        return f"{'https://' * self.is_tls}{self.authority}{self.path}"

    @property
    def authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def http_address(url: str) -> HttpAddress:
    """`host:port`, `http://host:port`, `https://host/v1`; InputError otherwise."""
    found = ADDRESS.fullmatch(url)
    if found is None or not 0 < _port(found) < 65536:
        raise InputError(f"--url is {url!r}, expected host:port or http://host:port")
    return _address(found)


def grpc_address(url: str) -> HttpAddress:
    """`host:port`, `grpc://host:port`; with TLS `grpcs://host` or `https://host`. InputError otherwise."""
    found = GRPC_ADDRESS.fullmatch(url)
    if found is None or not 0 < _port(found) < 65536 or found["path"].strip("/"):
        raise InputError(f"--url is {url!r}, expected host:port or, with TLS, grpcs://host:port")
    return _address(found)


def _port(found: re.Match[str]) -> int:
    return int(found["port"] or PORTS.get(found["scheme"], 0))


def _address(found: re.Match[str]) -> HttpAddress:
    host, path = found["host"].strip("[]"), found["path"].rstrip("/")
    return HttpAddress(host=host, port=_port(found), path=path, is_tls=found["scheme"] in ("https", "grpcs"))


def is_loopback(url: str) -> bool:
    """Whether a server at this address is on this machine; a name other than localhost is not looked up."""
    found = re.match(rf"(?:\w+://)?{HOST_AND_PATH}", url)
    host = found["host"].strip("[]") if found is not None else ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(slots=True, kw_only=True)
class Head:
    """The first line and the fields of an answer, names in lower case."""

    status: int
    is_http_1_1: bool
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def is_kept_alive(self) -> bool:
        words = self.fields.get("connection", "").lower()
        return "close" not in words and (self.is_http_1_1 or "keep-alive" in words)


@dataclass(frozen=True, kw_only=True)
class Reply:
    status: int
    fields: Mapping[str, str]
    body: bytes


class HttpConnections:
    """As many connections to one server as requests are in flight, each used again for the next."""

    def __init__(self, address: HttpAddress, headers: Mapping[str, str]):
        self.address = address
        self._headers = {"Host": address.authority, "User-Agent": "tkit", **headers}
        self._idle: list[_Connection] = []
        # Which authorities are trusted is the machine's to say: SSL_CERT_FILE or SSL_CERT_DIR name others.
        self._tls = ssl.create_default_context() if address.is_tls else None

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
        """The bytes of one request. `content_type="..."` becomes `Content-Type: ...`."""
        named = {name.replace("_", "-").title(): value for name, value in headers.items()}
        length = {"Content-Length": str(len(body))} if body else {}
        lines = [f"{name}: {value}" for name, value in {**self._headers, **named, **length}.items()]
        return "\r\n".join((f"{method} {path} HTTP/1.1", *lines, "", "")).encode("ascii") + body

    async def ask(self, path: str, timeout_s: float) -> Reply:
        """A small question outside the load. Raises ConnectionError or TimeoutError when it is not answered."""
        exchange = Exchange(index=0, request=self.request("GET", path), isl=0, osl=0)
        async with asyncio.timeout(timeout_s):
            head = await self.send(exchange)
        if head is None or exchange.error is not None:
            raise ConnectionError(exchange.detail)
        return Reply(status=head.status, fields=head.fields, body=b"".join(exchange.messages))

    async def send(self, exchange: Exchange) -> Head | None:
        """Fills in the exchange. None when no head of an answer came; what went wrong is the exchange's error."""
        exchange.sent_ns = time.monotonic_ns()
        connection = self._kept() or await self._connect(exchange)
        if connection is None:
            exchange.end_ns = time.monotonic_ns()
            return None
        try:
            await connection.answer(exchange)
        except BaseException:  # this task itself is to end
            connection.abort()
            raise
        finally:
            exchange.abort = None
        if connection.is_reusable:
            self._idle.append(connection)
        return connection.head

    def close(self) -> None:
        while self._idle:
            self._idle.pop().abort()

    def _kept(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable and time.monotonic_ns() - connection.idle_since_ns < MAX_IDLE_S * NS_PER_S:
                return connection
            connection.abort()
        return None

    async def _connect(self, exchange: Exchange) -> _Connection | None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    _Connection, self.address.host, self.address.port, ssl=self._tls
                )
            return connection
        except TimeoutError:
            exchange.fail("timeout", f"no connection within {CONNECT_TIMEOUT_S:.3g} s")
        except OSError as error:
            exchange.fail("refused", str(error) or type(error).__name__)
        return None


class _Connection(asyncio.Protocol):
    """One answer at a time."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.is_reusable = False
        self.idle_since_ns = 0
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._ended: asyncio.Future[None] | None = None
        self._head_bytes = b""
        self._body: _Body | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    async def answer(self, exchange: Exchange) -> None:
        assert self._transport is not None
        assert self._exchange is None
        self.head, self._head_bytes, self._body = None, b"", None
        self.is_reusable = False
        self._ended = asyncio.get_running_loop().create_future()
        self._exchange = exchange
        exchange.abort = self.abort
        exchange.sent_ns = time.monotonic_ns()
        self._transport.write(exchange.request)
        await self._ended

    def abort(self) -> None:
        self.is_reusable = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        exchange = self._exchange
        if exchange is None:  # bytes that nobody asked for
            self.abort()
            return
        start = self._body.starts.get(len(data)) if self._body is not None else None
        if start is not None and data.startswith(start) and data.endswith(CRLF):  # nearly always: one whole chunk
            exchange.times.append(now)
            exchange.messages.append(data[len(start) : -2])
            return
        try:
            if self._body is None:
                data = self._take_head(data)
                if self._body is None:
                    return
            body = self._body.feed(data)
        except ValueError as error:
            exchange.fail("unreadable", str(error))
            self._end(now)
            self.abort()
            return
        if body:
            exchange.times.append(now)
            exchange.messages.append(body)
        if self._body.is_complete:
            assert self.head is not None
            self.is_reusable = self.head.is_kept_alive
            self._end(now)
            if not self.is_reusable:
                self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_reusable = False
        exchange = self._exchange
        if exchange is None:
            return
        if error is not None or not isinstance(self._body, _UntilClosed):
            told = f"after {sum(map(len, exchange.messages))} bytes of the answer" if self.head else "without an answer"
            exchange.fail("disconnected", f"closed {told}{f': {error}' if error else ''}")
        self._end(time.monotonic_ns())

    def _end(self, now: int) -> None:
        assert self._exchange is not None
        assert self._ended is not None
        self._exchange.end_ns = self.idle_since_ns = now
        self._exchange = None
        if not self._ended.done():
            self._ended.set_result(None)

    def _take_head(self, data: bytes) -> bytes:
        """What follows the head, once it is there; interim answers (100 to 199) are skipped."""
        self._head_bytes += data
        while True:
            end = self._head_bytes.find(b"\r\n\r\n")
            if end < 0:
                if len(self._head_bytes) > MAX_HEAD_BYTES:
                    raise ValueError(f"no end of the head in {MAX_HEAD_BYTES} bytes")
                return b""
            head = _head(self._head_bytes[:end])
            self._head_bytes = self._head_bytes[end + 4 :]
            if head.status >= 200:
                self.head, self._body = head, _body_of(head)
                return self._head_bytes


def _head(data: bytes) -> Head:
    first, *lines = data.decode("latin-1").split("\r\n")
    found = re.fullmatch(r"HTTP/1\.([01]) (\d{3})(?: .*)?", first)
    if found is None:
        raise ValueError(f"not an answer of HTTP/1.1: {first[:60]!r}")
    pairs = (line.partition(":") for line in lines)
    return Head(
        status=int(found[2]),
        is_http_1_1=found[1] == "1",
        fields={name.strip().lower(): value.strip() for name, _, value in pairs},
    )


def _body_of(head: Head) -> _Body:
    if head.status in (204, 304):
        return _Sized(0)
    if "chunked" in head.fields.get("transfer-encoding", "").lower():
        return _Chunked()
    length = head.fields.get("content-length")
    if length is None:
        return _UntilClosed()
    if not re.fullmatch(r"\d{1,15}", length):
        raise ValueError(f"content-length is {length[:60]!r}")
    return _Sized(int(length))


NO_STARTS: Mapping[int, bytes] = {}


class _Sized:
    """A body whose length was told."""

    starts = NO_STARTS

    def __init__(self, length: int):
        self._left = length

    @property
    def is_complete(self) -> bool:
        return self._left == 0

    def feed(self, data: bytes) -> bytes:
        if len(data) > self._left:
            raise ValueError(f"{len(data) - self._left} bytes after the end of the answer")
        self._left -= len(data)
        return data


class _UntilClosed:
    """A body that ends with the connection."""

    starts = NO_STARTS
    is_complete = False

    def feed(self, data: bytes) -> bytes:
        return data


class _Chunked:
    """`size CR LF data CR LF`, again and again, then `0 CR LF`, trailers, CR LF.

    `starts` lets whoever receives tell a whole chunk at a glance: bytes of the chunk with its framing -> what it then
    begins with, of sizes that came before. Empty while a chunk is incomplete.
    """

    def __init__(self) -> None:
        self.starts = NO_STARTS
        self.is_complete = False
        self._left = 0
        self._line = b""  # the beginning of a line whose end has not come
        self._take_line = self._take_size
        self._known_starts: dict[int, bytes] = {}

    def feed(self, data: bytes) -> bytes:
        parts, position = [], 0
        while position < len(data):
            if self.is_complete:
                raise ValueError(f"{len(data) - position} bytes after the end of the answer")
            if self._left:
                part = data[position : position + self._left]
                parts.append(part)
                position += len(part)
                self._left -= len(part)
                continue
            end = data.find(b"\n", position)
            self._line += data[position:] if end < 0 else data[position:end]
            if len(self._line) > MAX_LINE_BYTES:
                raise ValueError(f"a line of the chunk framing is longer than {MAX_LINE_BYTES} bytes")
            if end < 0:
                break
            line, self._line = self._line.removesuffix(b"\r"), b""
            position = end + 1
            self._take_line(line)
        is_between = not self._left and not self._line and self._take_line == self._take_size
        self.starts = self._known_starts if is_between else NO_STARTS
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _take_size(self, line: bytes) -> None:
        size = line.partition(b";")[0].strip()
        if not CHUNK_SIZE.fullmatch(size):
            raise ValueError(f"a chunk's size is {line[:60].decode('latin-1')!r}")
        self._left = int(size, 16)
        self._take_line = self._take_end_of_chunk if self._left else self._take_trailer
        if self._left:
            self._known_starts[len(line) + self._left + 2 * len(CRLF)] = line + CRLF

    def _take_end_of_chunk(self, line: bytes) -> None:
        if line:
            raise ValueError(f"a chunk is followed by {line[:60].decode('latin-1')!r}")
        self._take_line = self._take_size

    def _take_trailer(self, line: bytes) -> None:
        self.is_complete = not line


_Body = _Sized | _UntilClosed | _Chunked
