"""gRPC calls against grpc's own server, and answers that are cut anywhere or are no HTTP/2."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from hpack import Encoder

from tkit.errors import InputError
from tkit.loadgen.exchange import Exchange
from tkit.loadgen.http import grpc_address
from tkit.loadgen.http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    RST_STREAM,
    SETTINGS,
    GrpcConnections,
    _Connection,
    _frame,
)

METHOD = "/test.Service/"


def exchange(request: bytes = b"", index: int = 0) -> Exchange:
    return Exchange(index=index, request=request, isl=1, osl=1)


async def repeat(request: bytes, context: Any) -> AsyncIterator[bytes]:
    for _ in range(3):
        yield request


async def refuse(request: bytes, context: Any) -> AsyncIterator[bytes]:
    yield b"one"
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "tøo many, 100 %")


async def hang(request: bytes, context: Any) -> AsyncIterator[bytes]:
    yield b"one"
    await asyncio.sleep(3600)


@contextlib.asynccontextmanager
async def grpc_server(certificate: tuple[Path, Path] | None = None, **options: int) -> AsyncIterator[int]:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), *options.items()])
    methods = {
        name: grpc.unary_stream_rpc_method_handler(function)
        for name, function in {"Repeat": repeat, "Refuse": refuse, "Hang": hang}.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", methods),))
    if certificate is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        key, authority = (path.read_bytes() for path in certificate)
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, authority)]))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


def against_grpc(talk: Callable[[GrpcConnections], Any], **options: int) -> Any:
    async def run() -> Any:
        async with grpc_server(**options) as port, asyncio.timeout(60):
            connections = GrpcConnections(grpc_address(f"127.0.0.1:{port}"), 1)
            try:
                return await talk(connections)
            finally:
                connections.close()

    return asyncio.run(run())


@pytest.mark.parametrize("size", [0, 1, 16_379, 16_384, 70_000, 3_000_000])
def test_messages_of_any_size(size: int) -> None:
    """More than a frame (16 kB) and more than the server's first window (64 kB), on the way there and back."""
    sent = exchange(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    against_grpc(lambda connections: connections.call(METHOD + "Repeat", sent))
    assert sent.error is None, sent.detail
    assert sent.messages == [sent.request] * 3
    assert sent.sent_ns < sent.times[0] <= sent.times[2] <= sent.end_ns


def test_tls(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate that nobody vouches for is refused, as is one for another name."""

    async def call(host: str) -> Exchange:
        sent = exchange(b"x" * 100_000)
        async with grpc_server(certificate) as port, asyncio.timeout(60):
            connections = GrpcConnections(grpc_address(f"grpcs://{host}:{port}"), 1)
            await connections.call(METHOD + "Repeat", sent)
            connections.close()
        return sent

    refused = asyncio.run(call("localhost"))
    assert (refused.error, refused.messages) == ("refused", [])
    assert "certificate verify failed" in refused.detail
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[1]))
    assert "IP address mismatch" in asyncio.run(call("127.0.0.1")).detail
    answered = asyncio.run(call("localhost"))
    assert answered.error is None, answered.detail
    assert answered.messages == [answered.request] * 3


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("h:8001", "h:8001"),
        ("grpc://[::1]:8001", "[::1]:8001"),
        ("grpcs://h", "https://h:443"),
        ("https://h:8001/", "https://h:8001"),
        ("grpc.example.com:8001", "grpc.example.com:8001"),
        ("http://h:8000", None),
        ("h", None),
        ("grpcs://h/path", None),
        ("h:99999", None),
    ],
)
def test_addresses(url: str, address: str | None) -> None:
    if address is None:
        with pytest.raises(InputError, match=r"expected host:port or, with TLS, grpcs://host:port"):
            grpc_address(url)
    else:
        assert str(grpc_address(url)) == address


def test_many_calls_share_a_connection_in_turn() -> None:
    """The server allows two at a time, and may think that the one before has not ended yet."""
    sent = [exchange(b"%d" % i, i) for i in range(40)]

    async def talk(connections: GrpcConnections) -> None:
        await asyncio.gather(*(connections.call(METHOD + "Repeat", one) for one in sent))

    against_grpc(talk, **{"grpc.max_concurrent_streams": 2})
    refused = [one for one in sent if one.error]
    assert {one.error for one in refused} <= {"overloaded"}
    assert len(refused) < 10
    assert all(one.messages == [one.request] * 3 for one in sent if not one.error)


@pytest.mark.parametrize(
    ("method", "error", "detail", "messages"),
    [
        ("Refuse", "server", "RESOURCE_EXHAUSTED: tøo many, 100 %", [b"one"]),
        ("Missing", "server", "UNIMPLEMENTED: Method not found!", []),
    ],
)
def test_a_status_is_an_error(method: str, error: str, detail: str, messages: list[bytes]) -> None:
    sent = exchange()
    against_grpc(lambda connections: connections.call(METHOD + method, sent))
    assert (sent.error, sent.detail, sent.messages) == (error, detail, messages)


def test_a_call_that_is_aborted_leaves_the_connection_usable() -> None:
    hung, after = exchange(), exchange(b"after")

    async def talk(connections: GrpcConnections) -> None:
        call = asyncio.create_task(connections.call(METHOD + "Hang", hung))
        while not hung.messages:
            await asyncio.sleep(0.01)
        hung.fail("timeout", "too long")
        assert hung.abort is not None
        hung.abort()
        await call
        await connections.call(METHOD + "Repeat", after)

    against_grpc(talk)
    assert (hung.error, hung.messages) == ("timeout", [b"one"])
    assert after.messages == [b"after"] * 3


def test_a_server_that_ends_is_connected_to_again() -> None:
    """GOAWAY after every second or so; calls in flight then still end well."""
    sent = [exchange(b"x", i) for i in range(8)]

    async def talk(connections: GrpcConnections) -> None:
        for one in sent:
            await connections.call(METHOD + "Repeat", one)
            await asyncio.sleep(0.25)

    against_grpc(talk, **{"grpc.max_connection_age_ms": 500, "grpc.max_connection_age_grace_ms": 10_000})
    assert [(one.error, one.detail) for one in sent] == [(None, "")] * 8


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        self.written = b""
        self.is_aborted = False

    def write(self, data: Any) -> None:
        self.written += data

    def abort(self) -> None:
        self.is_aborted = True


def received(parts: list[bytes]) -> tuple[Exchange, Transport]:
    """What a connection makes of parts of an answer to its first call, after the server's settings."""

    async def receive() -> tuple[Exchange, Transport]:
        connection, transport, sent = _Connection(), Transport(), exchange(b"request")
        connection.connection_made(transport)
        connection.data_received(_frame(SETTINGS, 0, 0, b""))
        task = asyncio.create_task(connection.call(b"", sent))
        await asyncio.sleep(0)
        for part in parts:
            connection.data_received(part)
        connection.connection_lost(None)
        await asyncio.wait_for(task, 10)
        return sent, transport

    return asyncio.run(receive())


def message(data: bytes) -> bytes:
    return struct.pack(">BI", 0, len(data)) + data


HEAD = Encoder().encode([(":status", "200"), ("content-type", "application/grpc"), ("x-long", "y" * 50)])
TRAILERS = Encoder().encode([("grpc-status", "0")])
ANSWER = (
    _frame(HEADERS, 0, 1, HEAD[:5])
    + _frame(CONTINUATION, END_HEADERS, 1, HEAD[5:])
    + _frame(DATA, 0, 1, message(b"one"))
    + _frame(PING, 0, 0, b"12345678")
    + _frame(DATA, PADDED, 1, b"\x03" + message(b"two") + bytes(3))
    + _frame(DATA, 0, 1, message(b"three") + message(b"")[:2])
    + _frame(DATA, 0, 1, message(b"")[2:] + message(b"five"))
    + _frame(99, 0, 1, b"a kind that nobody knows")
    + _frame(HEADERS, END_STREAM | END_HEADERS, 1, TRAILERS)
)


def test_an_answer_may_be_cut_anywhere() -> None:
    for cut in range(1, len(ANSWER)):
        sent, transport = received([ANSWER[:cut], ANSWER[cut:]])
        assert (sent.error, sent.messages) == (None, [b"one", b"two", b"three", b"", b"five"]), cut
        assert _frame(PING, 1, 0, b"12345678") in transport.written
    sent, _ = received([bytes([byte]) for byte in ANSWER])
    assert (sent.error, len(sent.messages)) == (None, 5)


@pytest.mark.parametrize(
    ("answer", "error", "detail"),
    [
        (_frame(RST_STREAM, 0, 1, struct.pack(">I", 2)), "disconnected", "the server reset the stream (HTTP/2 error 2)"),
        (_frame(RST_STREAM, 0, 1, struct.pack(">I", 7)), "overloaded", "the server reset the stream (HTTP/2 error 7)"),
        (_frame(GOAWAY, 0, 0, struct.pack(">II", 0, 1) + b"why"), "disconnected",
         "the server ends the connection (HTTP/2 error 1) why"),
        (_frame(DATA, END_STREAM, 1, message(b"one")), "truncated", "ended without a status"),
        (_frame(DATA, 0, 1, b"\x00\x00") + _frame(HEADERS, 5, 1, TRAILERS), "truncated", "ended in the middle of a message"),
        (_frame(DATA, 0, 1, b"\x01" + message(b"one")[1:]), "unreadable", "a message is compressed, which was not offered"),
        (_frame(DATA, PADDED, 1, b"\x09abc"), "unreadable", "not an answer of HTTP/2: 9 bytes of padding"),
        (_frame(HEADERS, 4, 1, b"\xff\xff\xff\xff\xff"), "unreadable", "not an answer of HTTP/2: "),
        (_frame(HEADERS, 5, 1, Encoder().encode([(":status", "503")])), "overloaded", "HTTP 503"),
        (b"", "disconnected", "the connection broke"),
    ],
)  # fmt: skip
def test_what_goes_wrong_has_a_name(answer: bytes, error: str, detail: str) -> None:
    sent, _ = received([answer])
    assert sent.error == error
    assert sent.detail.startswith(detail)


def test_a_server_of_another_protocol() -> None:
    async def run() -> Exchange:
        gone = asyncio.Event()

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(_frame(PING, 0, 0, b"!"))
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
            gone.set()

        async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
            sent = exchange()
            port = server.sockets[0].getsockname()[1]
            connections = GrpcConnections(grpc_address(f"127.0.0.1:{port}"), 1)
            await connections.call(METHOD + "Repeat", sent)
            connections.close()
            await gone.wait()
            await asyncio.sleep(0)
            return sent

    sent = asyncio.run(run())
    assert (sent.error, sent.detail) == ("refused", "what answers does not speak HTTP/2: not HTTP/2")
