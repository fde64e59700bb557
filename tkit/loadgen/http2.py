"""gRPC calls over HTTP/2 on raw asyncio protocols: one request, a stream of messages, a time per arrival.

Frames are looked at only as far as tells whose message it is. Windows for what comes are opened as wide as the protocol
allows, so the server never waits for the client. Knows no protobuf, no model and no token.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
import struct
import time
from urllib.parse import unquote

from hpack import Decoder, Encoder, HPACKError

from tkit.loadgen.exchange import Exchange
from tkit.loadgen.http import HttpAddress

CONNECT_TIMEOUT_S = 10.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME = struct.Struct(">IBI")  # length (24 bits) and kind, flags, stream
FRAME_BYTES = 9
PREFIX = struct.Struct(">BI")  # of a gRPC message: compressed?, length
PREFIX_BYTES = 5
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 2, 3, 4, 5
REFUSED_STREAM, CANCEL = 7, 8
DEFAULT_WINDOW, MAX_WINDOW = 65535, 2**31 - 1
LAST_STREAM = 2**31 - 1
MAX_MESSAGE_BYTES = 1 << 28
STATUSES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
ERRORS = {"CANCELLED": "disconnected", "UNAVAILABLE": "disconnected", "DEADLINE_EXCEEDED": "timeout"}


class GrpcConnections:
    """Requests go round a fixed number of connections; one that has ended is opened again."""

    def __init__(self, address: HttpAddress, count: int):
        self.address = address
        self._tls = ssl.create_default_context() if address.is_tls else None
        if self._tls is not None:
            self._tls.set_alpn_protocols(["h2"])
        self._connections: list[_Connection | None] = [None] * count
        self._locks = [asyncio.Lock() for _ in range(count)]
        self._turns = itertools.cycle(range(count))
        self._heads: dict[str, bytes] = {}

    async def call(self, method: str, exchange: Exchange) -> None:
        """Fills in the exchange, a message each; what went wrong is its error. `method`: `/package.Service/Method`."""
        exchange.sent_ns = time.monotonic_ns()
        connection = await self._open(next(self._turns), exchange)
        if connection is None:
            exchange.end_ns = time.monotonic_ns()
            return
        await connection.call(self._head(method), exchange)

    def close(self) -> None:
        for connection in self._connections:
            if connection is not None:
                connection.close()

    async def _open(self, slot: int, exchange: Exchange) -> _Connection | None:
        async with self._locks[slot]:
            connection = self._connections[slot]
            if connection is None or not connection.is_usable:
                connection = self._connections[slot] = await self._connect(exchange)
            return connection

    async def _connect(self, exchange: Exchange) -> _Connection | None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    _Connection, self.address.host, self.address.port, ssl=self._tls
                )
                await connection.is_greeted
            return connection
        except TimeoutError:
            exchange.fail("timeout", f"no connection within {CONNECT_TIMEOUT_S:.3g} s")
        except OSError as error:
            exchange.fail("refused", str(error) or type(error).__name__)
        return None

    def _head(self, method: str) -> bytes:
        """The fields of a request. Marked as never to be indexed: the same bytes then serve every request."""
        if method not in self._heads:
            fields = {
                ":method": "POST", ":scheme": "https" if self.address.is_tls else "http", ":path": method,
                ":authority": self.address.authority, "te": "trailers", "content-type": "application/grpc",
                "user-agent": "tkit",
            }  # fmt: skip
            sensitive = [(name, value, True) for name, value in fields.items()]
            self._heads[method] = Encoder().encode(sensitive, huffman=False)
        return self._heads[method]


class _Call:
    """One request in flight on a connection."""

    __slots__ = ("ended", "exchange", "messages", "rest", "stream", "times", "unsent", "window")

    def __init__(self, stream: int, exchange: Exchange, window: int, ended: asyncio.Future[None]):
        self.stream = stream
        self.exchange = exchange
        self.times = exchange.times
        self.messages = exchange.messages
        self.window = window
        self.ended = ended
        self.rest = b""  # the beginning of a message whose end has not come
        self.unsent = PREFIX.pack(0, len(exchange.request)) + exchange.request


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.is_usable = False
        self.is_greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, _Call] = {}
        self._next_stream = 1
        self._rest = b""
        self._taken = 0  # bytes since the window of the connection was last opened
        self._window = self._initial_window = DEFAULT_WINDOW
        self._max_frame = 16384
        self._max_streams = LAST_STREAM
        self._room: asyncio.Event = asyncio.Event()
        self._decoder = Decoder()
        self._headers = b""  # of a field block whose end has not come
        self._headers_flags = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        settings = struct.pack(">HIHI", ENABLE_PUSH, 0, INITIAL_WINDOW_SIZE, MAX_WINDOW)
        self._write(PREFACE + _frame(SETTINGS, 0, 0, settings) + _window_update(0, MAX_WINDOW - DEFAULT_WINDOW))

    def close(self) -> None:
        self.is_usable = False
        if self._transport is not None:
            self._transport.abort()

    async def call(self, head: bytes, exchange: Exchange) -> None:
        while self.is_usable and len(self._calls) >= self._max_streams:
            self._room.clear()
            await self._room.wait()
        if not self.is_usable:
            exchange.fail("disconnected", "the server ended the connection")
            exchange.end_ns = time.monotonic_ns()
            return
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self.is_usable = self._next_stream < LAST_STREAM
        call = _Call(stream, exchange, self._initial_window, asyncio.get_running_loop().create_future())
        self._calls[stream] = call
        exchange.abort = lambda: self._cancel(call)
        exchange.sent_ns = time.monotonic_ns()
        self._write(_frame(HEADERS, END_HEADERS, stream, head) + self._sendable(call))
        try:
            await call.ended
        except BaseException:  # this task itself is to end
            self._cancel(call)
            raise
        finally:
            exchange.abort = None

    def _cancel(self, call: _Call) -> None:
        if call.stream in self._calls:
            self._write(_frame(RST_STREAM, 0, call.stream, struct.pack(">I", CANCEL)))
            self._end(call, time.monotonic_ns())

    def _end(self, call: _Call, now: int) -> None:
        del self._calls[call.stream]
        call.exchange.end_ns = now
        self._room.set()
        if not call.ended.done():
            call.ended.set_result(None)

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        if data:
            self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        if self._rest:
            data = self._rest + data
        position, size = 0, len(data)
        self._taken += size
        while size - position >= FRAME_BYTES:
            length_and_kind, flags, stream = FRAME.unpack_from(data, position)
            start = position + FRAME_BYTES
            end = start + (length_and_kind >> 8)
            if end > size:
                break
            position = end
            if length_and_kind & 0xFF == DATA and not flags:
                call = self._calls.get(stream)
                if call is None:
                    continue
                if not call.rest and end - start >= PREFIX_BYTES:
                    is_compressed, length = PREFIX.unpack_from(data, start)
                    if length == end - start - PREFIX_BYTES and not is_compressed:  # nearly always: one whole message
                        call.times.append(now)
                        call.messages.append(data[start + PREFIX_BYTES : end])
                        continue
                self._take_messages(call, data[start:end], now)
            elif not self._take_frame(length_and_kind & 0xFF, flags, stream & MAX_WINDOW, data[start:end], now):
                return
        self._rest = data[position:]
        if self._taken > MAX_WINDOW // 2:
            self._write(_window_update(0, self._taken))
            self._taken = 0

    def _take_messages(self, call: _Call, data: bytes, now: int) -> None:
        call.rest += data
        while len(call.rest) >= PREFIX_BYTES:
            is_compressed, length = PREFIX.unpack_from(call.rest)
            if is_compressed or length > MAX_MESSAGE_BYTES:
                what = "compressed, which was not offered" if is_compressed else f"{length} bytes long"
                call.exchange.fail("unreadable", f"a message is {what}")
                self._cancel(call)
                return
            end = PREFIX_BYTES + length
            if len(call.rest) < end:
                return
            call.times.append(now)
            call.messages.append(call.rest[PREFIX_BYTES:end])
            call.rest = call.rest[end:]

    def _take_frame(self, kind: int, flags: int, stream: int, payload: bytes, now: int) -> bool:
        """False when the connection is at its end."""
        try:
            if not self.is_greeted.done() and kind != SETTINGS:
                raise ValueError("not HTTP/2")
            self._take_known(kind, flags, stream, payload, now)
        except (ValueError, HPACKError, struct.error, IndexError) as error:
            if not self.is_greeted.done():
                self.is_greeted.set_exception(ConnectionError(f"what answers does not speak HTTP/2: {error}"))
            self._fail_all("unreadable", f"not an answer of HTTP/2: {error or type(error).__name__}", now)
            self.close()
            return False
        return True

    def _take_known(self, kind: int, flags: int, stream: int, payload: bytes, now: int) -> None:
        call = self._calls.get(stream)
        if kind == DATA:
            if call is not None:
                self._take_messages(call, _unpadded(flags, payload), now)
            if call is not None and flags & END_STREAM:
                call.exchange.fail("truncated", "ended without a status")
                self._end_if_open(call, now)
        elif kind in (HEADERS, CONTINUATION):
            self._take_headers(kind, flags, stream, payload, now)
        elif kind == RST_STREAM and call is not None:
            (code,) = struct.unpack(">I", payload)
            error = "overloaded" if code == REFUSED_STREAM else "disconnected"
            call.exchange.fail(error, f"the server reset the stream (HTTP/2 error {code})")
            self._end(call, now)
        elif kind == SETTINGS and not flags & ACK:
            self._take_settings(payload)
        elif kind == PING and not flags & ACK:
            self._write(_frame(PING, ACK, 0, payload))
        elif kind == GOAWAY:
            last, code = struct.unpack_from(">II", payload)
            self.is_usable = False
            refused = [call for call in self._calls.values() if call.stream > last]
            told = payload[8:].decode("utf-8", "replace")
            for call in refused:
                call.exchange.fail(
                    "disconnected", f"the server ends the connection (HTTP/2 error {code}) {told}".rstrip()
                )
                self._end(call, now)
        elif kind == WINDOW_UPDATE:
            (more,) = struct.unpack(">I", payload)
            if stream == 0:
                self._window += more
            elif call is not None:
                call.window += more
            self._send_waiting()

    def _take_settings(self, payload: bytes) -> None:
        for name, value in struct.iter_unpack(">HI", payload):
            if name == INITIAL_WINDOW_SIZE:
                for call in self._calls.values():
                    call.window += value - self._initial_window
                self._initial_window = value
            elif name == MAX_FRAME_SIZE:
                self._max_frame = value
            elif name == MAX_CONCURRENT_STREAMS:
                self._max_streams = value
        self._write(_frame(SETTINGS, ACK, 0, b""))
        if not self.is_greeted.done():
            self.is_usable = True
            self.is_greeted.set_result(None)
        self._send_waiting()

    def _take_headers(self, kind: int, flags: int, stream: int, payload: bytes, now: int) -> None:
        if kind == HEADERS:
            block = _unpadded(flags, payload)
            self._headers = block[5:] if flags & PRIORITY else block
            self._headers_flags = flags
        else:
            self._headers += payload
        if not flags & END_HEADERS:
            return
        # every block is decoded, also one that nobody waits for: later ones build on its table
        fields = {str(name): str(value) for name, value in self._decoder.decode(self._headers)}
        call = self._calls.get(stream)
        if call is None:
            return
        status = fields.get(":status")
        if status is not None and status != "200":
            call.exchange.fail("overloaded" if status in ("429", "503") else "server", f"HTTP {status}")
        if self._headers_flags & END_STREAM:
            _conclude(call, fields)
            self._end(call, now)

    def _end_if_open(self, call: _Call, now: int) -> None:
        if call.stream in self._calls:
            self._end(call, now)

    def _send_waiting(self) -> None:
        for call in [call for call in self._calls.values() if call.unsent]:
            self._write(self._sendable(call))

    def _sendable(self, call: _Call) -> bytes:
        """The frames of a request that the server's windows allow now."""
        frames = []
        while call.unsent and (size := min(len(call.unsent), self._window, call.window, self._max_frame)) > 0:
            part, call.unsent = call.unsent[:size], call.unsent[size:]
            self._window -= size
            call.window -= size
            frames.append(_frame(DATA, 0 if call.unsent else END_STREAM, call.stream, part))
        return b"".join(frames)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_usable = False
        if not self.is_greeted.done():
            self.is_greeted.set_exception(ConnectionError(f"closed without an answer{f': {error}' if error else ''}"))
        self._fail_all("disconnected", f"the connection broke{f': {error}' if error else ''}", time.monotonic_ns())

    def _fail_all(self, error: str, detail: str, now: int) -> None:
        for call in tuple(self._calls.values()):
            call.exchange.fail(error, detail)
            self._end(call, now)
        self._room.set()


def _conclude(call: _Call, trailers: dict[str, str]) -> None:
    code = trailers.get("grpc-status", "")
    if not code.isdecimal():
        call.exchange.fail("truncated", "ended without a status")
        return
    if code != "0":
        name = STATUSES[int(code)] if int(code) < len(STATUSES) else f"status {code}"
        told = unquote(trailers.get("grpc-message", ""))
        call.exchange.fail(ERRORS.get(name, "server"), f"{name}: {told}")
    elif call.rest:
        call.exchange.fail("truncated", "ended in the middle of a message")


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return FRAME.pack(len(payload) << 8 | kind, flags, stream) + payload


def _window_update(stream: int, more: int) -> bytes:
    return _frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", more))


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & PADDED:
        return payload
    padding = payload[0]
    if padding >= len(payload):
        raise ValueError(f"{padding} bytes of padding in a frame of {len(payload)}")
    return payload[1 : len(payload) - padding]
