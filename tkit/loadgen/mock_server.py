"""A server whose tokens come at known times: the truth that the client is measured against. Knows nothing of the client.

`python -m tkit.loadgen.mock_server --ttft-ms 50 --itl-ms 10` prints its port and serves until its standard input closes:
OpenAI's completions and chat, Triton's generate_stream and, on the same port, ModelStreamInfer over HTTP/2. The model's
name chooses the behaviour. `GET /record` gives, as JSON, every answer that ended since it was last asked.

One thread, one heap of due times and plain sockets: as a load of asyncio callbacks it could not keep up with the client.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import heapq
import json
import random
import re
import select
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tkit.units import NS_PER_MS, NS_PER_S

HOST = "127.0.0.1"
DEFAULT_TTFT_MS, DEFAULT_ITL_MS = 50.0, 10.0
TEXT = " word"
RECEIVE_BYTES = 1 << 18
MAX_WAIT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    tokens_per_chunk: int = 1
    opens_with_role: bool = False  # an empty chunk at once, as chat servers send it
    slots: int | None = None  # answers at a time; the others wait
    stall_every_s: float = 0.0  # in each period its last `stall_s` are silent, for all answers
    stall_s: float = 0.0
    jitter: float = 0.0  # gaps are drawn from itl * [1 - jitter, 1 + jitter]


BEHAVIOURS = {
    "exact":      Behaviour(),
    "role_first": Behaviour(opens_with_role=True),
    "four":       Behaviour(tokens_per_chunk=4),
    "stalling":   Behaviour(stall_every_s=5.0, stall_s=1.0),
    "slots":      Behaviour(slots=4),
    "jittery":    Behaviour(jitter=0.5),
}  # fmt: skip


class Answer:
    """One request being answered. A token is due one gap after the one before it was due, however late that was sent."""

    __slots__ = ("asked", "behaviour", "chunk", "connection", "done", "due_ns", "end", "id", "jitter", "log", "model")

    def __init__(self, id: str, model: str, asked: int, connection: Connection, arrived_ns: int, seed: int):
        self.id = id
        self.model = model
        self.asked = asked
        self.connection = connection
        self.behaviour = BEHAVIOURS.get(model, BEHAVIOURS["exact"])
        self.done = 0
        self.due_ns = 0
        self.jitter = random.Random(f"{seed}/{id}")
        self.chunk: Callable[[Answer, int], bytes] = _openai_chunk
        self.end: Callable[[Answer], bytes] = _openai_end
        self.log: dict[str, Any] = {
            "id": id,
            "model": model,
            "arrived_ns": arrived_ns,
            "due_ns": [],
            "sent_ns": [],
            "tokens": [],
        }


class MockServer:
    def __init__(self, ttft_ms: float, itl_ms: float, seed: int, port: int = 0):
        self.ttft_ns, self.itl_ns = round(ttft_ms * NS_PER_MS), round(itl_ms * NS_PER_MS)
        self.seed = seed
        self.started_ns = time.monotonic_ns()
        self.record: list[dict[str, Any]] = []
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server((HOST, port), backlog=4096)
        self.listener.setblocking(False)
        self.port: int = self.listener.getsockname()[1]
        self._due: list[tuple[int, int, Answer]] = []
        self._number = 0
        self._num_busy: collections.Counter[str] = collections.Counter()
        self._waiting: collections.defaultdict[str, collections.deque[Answer]] = collections.defaultdict(
            collections.deque
        )

    @property
    def num_in_flight(self) -> int:
        return sum(self._num_busy.values())

    def serve(self, stop: int) -> None:
        """Until the file `stop` can be read."""
        self.selector.register(self.listener, selectors.EVENT_READ)
        with contextlib.suppress(PermissionError):  # /dev/null and files have no end to wait for
            self.selector.register(stop, selectors.EVENT_READ)
        while True:
            wait_s = max(self._due[0][0] - time.monotonic_ns(), 0) / NS_PER_S if self._due else MAX_WAIT_S
            # epoll waits in whole milliseconds; select, on the epoll's own file, does not.
            select.select([self.selector], [], [], wait_s)
            for key, events in self.selector.select(0):
                if key.fd == stop:
                    return
                if key.fileobj is self.listener:
                    self._accept()
                else:
                    key.data.handle(events)
            self._send_due()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                accepted, _ = self.listener.accept()
                accepted.setblocking(False)
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.selector.register(accepted, selectors.EVENT_READ, Connection(accepted, self))

    def begin(self, answer: Answer) -> None:
        slots = answer.behaviour.slots
        if slots is not None and self._num_busy[answer.model] >= slots:
            self._waiting[answer.model].append(answer)
            return
        self._num_busy[answer.model] += 1
        self._plan(answer, time.monotonic_ns() + self.ttft_ns)

    def _plan(self, answer: Answer, due_ns: int) -> None:
        behaviour = answer.behaviour
        if behaviour.stall_s:
            period = round(behaviour.stall_every_s * NS_PER_S)
            phase = (due_ns - self.started_ns) % period
            if phase > period - round(behaviour.stall_s * NS_PER_S):
                due_ns += period - phase
        answer.due_ns = due_ns
        self._number += 1
        heapq.heappush(self._due, (due_ns, self._number, answer))

    def _send_due(self) -> None:
        due = self._due
        while due and due[0][0] <= time.monotonic_ns():
            answer = heapq.heappop(due)[2]
            tokens = min(answer.behaviour.tokens_per_chunk, answer.asked - answer.done)
            answer.done += tokens
            log = answer.log
            log["due_ns"].append(answer.due_ns)
            log["tokens"].append(tokens)
            log["sent_ns"].append(time.monotonic_ns())  # before: the client may have it before `send` returns
            answer.connection.send(answer, answer.chunk(answer, tokens))
            if answer.connection.is_closed:
                self._end(answer)
            elif answer.done < answer.asked:
                gap_ns = self.itl_ns * answer.behaviour.tokens_per_chunk
                if answer.behaviour.jitter:
                    gap_ns = round(gap_ns * (1 + answer.behaviour.jitter * answer.jitter.uniform(-1, 1)))
                self._plan(answer, answer.due_ns + gap_ns)
            else:
                answer.connection.finish(answer)
                self._end(answer)

    def _end(self, answer: Answer) -> None:
        self.record.append(answer.log)
        self._num_busy[answer.model] -= 1
        if self._waiting[answer.model]:
            self.begin(self._waiting[answer.model].popleft())


class Connection:
    """HTTP/1.1, or HTTP/2 when the client says so first."""

    def __init__(self, accepted: socket.socket, server: MockServer):
        self.socket = accepted
        self.server = server
        self.is_closed = False
        self.received = b""
        self.unsent = bytearray()
        self.http2: Http2 | None = None

    def handle(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self.write(b"")
        if not events & selectors.EVENT_READ:
            return
        try:
            data = self.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self.received += data
        if self.http2 is None and self.received.startswith(PREFACE):
            self.received = self.received[len(PREFACE) :]
            self.http2 = Http2(self)
        if self.http2 is not None:
            self.received = self.http2.take(self.received)
        else:
            while self._take_request():
                pass

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.server.selector.unregister(self.socket)
            self.socket.close()

    def write(self, data: bytes) -> None:
        """Keeps what the client is too slow to take."""
        if self.is_closed:
            return
        was_behind = bool(self.unsent)
        if was_behind:
            self.unsent += data
            data = bytes(self.unsent)
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        if sent < len(data) or was_behind:
            self.unsent = bytearray(data[sent:])
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.unsent else 0)
            self.server.selector.modify(self.socket, events, self)

    def send(self, answer: Answer, payload: bytes) -> None:
        if self.http2 is not None:
            self.http2.send(answer.id, payload)
        else:
            self.write(_framed(payload))

    def finish(self, answer: Answer) -> None:
        if self.http2 is not None:
            self.http2.finish(answer.id)
        else:
            self.write(answer.end(answer))

    def _take_request(self) -> bool:
        """Begins the answer to one whole request; False when there is none."""
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = self.received[:end].decode("latin-1")
        found = re.search(r"(?i)\r\ncontent-length: *(\d+)", head)
        length = int(found[1]) if found else 0
        if len(self.received) < end + 4 + length:
            return False
        body = self.received[end + 4 : end + 4 + length]
        self.received = self.received[end + 4 + length :]
        method, path, _ = head.split("\r\n")[0].split()
        if method == "GET" and path == "/metrics":
            self.write(_metrics(self.server))
            return True
        if method == "GET":
            self.write(_reply(*_told(path, self.server)))
            return True
        named = re.search(r"(?i)\r\nx-request-id: *(\S+)", head)
        try:
            self._begin(path, json.loads(body), named[1] if named else "")
        except (ValueError, KeyError, IndexError, AttributeError):
            self.write(_reply(400, {"error": f"{method} {path} is no request that this server knows"}))
        return True

    def _begin(self, path: str, body: dict[str, Any], id: str) -> None:
        is_triton = path.startswith("/v2/")
        model = path.split("/")[3] if is_triton else body["model"]
        asked = int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)
        answer = Answer(id or body.get("id", ""), model, asked, self, time.monotonic_ns(), self.server.seed)
        if is_triton:
            answer.chunk, answer.end = _triton_chunk, _triton_end
        elif path.endswith("/chat/completions"):
            answer.chunk = _chat_chunk
        self.write(STREAM_HEAD)
        if answer.behaviour.opens_with_role:
            self.write(_framed(ROLE_CHUNK))
        self.server.begin(answer)


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: tkit-mock\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
COMPLETION = b'{"id":"mock","object":"text_completion","created":0,"model":"mock","choices":['
CHAT = b'{"id":"mock","object":"chat.completion.chunk","created":0,"model":"mock","choices":['
ROLE_CHUNK = b'data: %s{"index":0,"delta":{"role":"assistant","content":""}}],"usage":null}\n\n' % CHAT


def _framed(payload: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(payload), payload)


def _text(tokens: int) -> bytes:
    return (TEXT * tokens).encode()


def _openai_chunk(answer: Answer, tokens: int) -> bytes:
    return b'data: %s{"index":0,"text":"%s","finish_reason":null}],"usage":null}\n\n' % (COMPLETION, _text(tokens))


def _chat_chunk(answer: Answer, tokens: int) -> bytes:
    return b'data: %s{"index":0,"delta":{"content":"%s"},"finish_reason":null}],"usage":null}\n\n' % (
        CHAT,
        _text(tokens),
    )


def _openai_end(answer: Answer) -> bytes:
    kind = CHAT if answer.chunk is _chat_chunk else COMPLETION
    usage = b'data: %s],"usage":{"completion_tokens":%d}}\n\n' % (kind, answer.done)
    return _framed(usage) + _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def _triton_chunk(answer: Answer, tokens: int) -> bytes:
    text = b'data: {"model_name":"%s","text_output":"%s","num_output_tokens":%d}\n\n'
    return text % (answer.model.encode(), _text(tokens), answer.done)


def _triton_end(answer: Answer) -> bytes:
    return b"0\r\n\r\n"


def _reply(status: int, value: Any) -> bytes:
    body = json.dumps(value).encode()
    return b"HTTP/1.1 %d X\r\nServer: tkit-mock\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def _metrics(server: MockServer) -> bytes:
    """In Prometheus' text format."""
    text = f"# TYPE mock_answers_in_flight gauge\nmock_answers_in_flight {server.num_in_flight}\n"
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text.encode())


INPUTS = ("text_input", "max_tokens", "stream", "return_num_output_tokens")
OUTPUTS = ("text_output", "num_output_tokens")


def _told(path: str, server: MockServer) -> tuple[int, Any]:
    match path.strip("/").split("/"):
        case ["record"]:
            record, server.record = server.record, []
            return 200, record
        case ["v1", "models"]:
            return 200, {"data": [{"id": name, "root": f"seed-{server.seed}"} for name in BEHAVIOURS]}
        case ["v2"]:
            return 200, {"name": "tkit-mock", "version": "1", "extensions": []}
        case ["v2", "models", _, "ready"]:
            return 200, {}
        case ["v2", "models", _, "config"]:
            return 200, {"model_transaction_policy": {"decoupled": True}}
        case ["v2", "models", _]:
            return 200, {"inputs": [{"name": name} for name in INPUTS], "outputs": [{"name": name} for name in OUTPUTS]}
    return 404, {"error": "not found"}


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
HEADER_TABLE_SIZE, INITIAL_WINDOW_SIZE = 1, 4
DEFAULT_WINDOW = 65535
METHOD = re.compile(rb"/inference\.GRPCInferenceService/(\w+)")
# Header fields as they stand on the wire: `:status: 200` has number 8 in HPACK's static table, the others are spelt out.
RESPONSE_HEAD = b"\x88\x00\x0ccontent-type\x10application/grpc"
TRAILERS = b"\x00\x0bgrpc-status\x010"


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload


class Http2:
    """As much of HTTP/2 and gRPC as one request per call needs.

    The header table is set to size 0, so that every request spells its path out, where a search finds it.
    """

    def __init__(self, connection: Connection):
        self.connection = connection
        self.window = self.initial_window = DEFAULT_WINDOW
        self.windows: dict[int, int] = {}  # stream -> bytes that the client takes
        self.methods: dict[int, bytes] = {}
        self.bodies: dict[int, bytes] = {}
        self.streams: dict[str, int] = {}  # request id -> stream
        self.templates: dict[int, bytes] = {}
        self.blocked: collections.deque[tuple[int, bytes]] = collections.deque()  # (stream, payload; empty = the end)
        connection.write(_frame(SETTINGS, 0, 0, struct.pack(">HI", HEADER_TABLE_SIZE, 0)))

    def take(self, data: bytes) -> bytes:
        """Works through the whole frames; returns the beginning of the next."""
        position = 0
        while len(data) - position >= 9:
            length_kind, flags, stream = struct.unpack_from(">IBI", data, position)
            end = position + 9 + (length_kind >> 8)
            if len(data) < end:
                break
            self._frame(length_kind & 0xFF, flags, stream, data[position + 9 : end])
            position = end
        return data[position:]

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        write = self.connection.write
        if kind == SETTINGS and not flags & ACK:
            for at in range(0, len(payload), 6):
                name, value = struct.unpack_from(">HI", payload, at)
                if name == INITIAL_WINDOW_SIZE:
                    self.initial_window = value
            write(_frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            write(_frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            (more,) = struct.unpack(">I", payload)
            if stream == 0:
                self.window += more
            elif stream in self.windows:
                self.windows[stream] += more
            self._send_blocked()
        elif kind in (HEADERS, CONTINUATION):
            found = METHOD.search(payload)
            if found is not None:
                self.methods[stream] = found[1]
                self.bodies[stream] = b""
                self.windows[stream] = self.initial_window
        elif kind == DATA and stream in self.bodies:
            self.bodies[stream] += payload
            if payload:
                more_bytes = struct.pack(">I", len(payload))
                write(_frame(WINDOW_UPDATE, 0, 0, more_bytes) + _frame(WINDOW_UPDATE, 0, stream, more_bytes))
            body = self.bodies[stream]
            if len(body) >= 5 and len(body) - 5 >= struct.unpack_from(">I", body, 1)[0]:
                del self.bodies[stream]
                self._call(stream, self.methods.pop(stream), body[5:])
        elif kind == RST_STREAM:
            self.windows.pop(stream, None)

    def _call(self, stream: int, method: bytes, message: bytes) -> None:
        self.connection.write(_frame(HEADERS, END_HEADERS, stream, RESPONSE_HEAD))
        if method != b"ModelStreamInfer":
            self._send(stream, _told_over_grpc(method.decode()))
            self._send(stream, b"")
            return
        id, model, asked = _infer_request(message)
        server = self.connection.server
        answer = Answer(id, model, asked, self.connection, time.monotonic_ns(), server.seed)
        answer.chunk = self._message
        self.streams[id] = stream
        self.templates[stream] = b""
        server.begin(answer)

    def _message(self, answer: Answer, tokens: int) -> bytes:
        """One ModelStreamInferResponse. All but the last are alike to the last four bytes, the number of tokens so far."""
        stream = self.streams[answer.id]
        is_last = answer.done == answer.asked
        if is_last or not self.templates[stream] or tokens != answer.behaviour.tokens_per_chunk:
            self.templates[stream] = _template(tokens, is_final=is_last)
        return self.templates[stream] + struct.pack("<i", answer.done)

    def send(self, id: str, message: bytes) -> None:
        self._send(self.streams[id], message)

    def finish(self, id: str) -> None:
        stream = self.streams.pop(id)
        self.templates.pop(stream)
        self._send(stream, b"")

    def _send(self, stream: int, message: bytes) -> None:
        """A message, or with b"" the end of the call, as soon as the client's windows allow."""
        if self.blocked or not self._is_open(stream, message):
            self.blocked.append((stream, message))
        else:
            self._write(stream, message)

    def _is_open(self, stream: int, message: bytes) -> bool:
        size = len(message) + 5 if message else 0
        return size <= self.window and size <= self.windows.get(stream, size)

    def _send_blocked(self) -> None:
        while self.blocked and self._is_open(*self.blocked[0]):
            self._write(*self.blocked.popleft())

    def _write(self, stream: int, message: bytes) -> None:
        if stream not in self.windows:  # the client has cancelled
            return
        if not message:
            del self.windows[stream]
            self.connection.write(_frame(HEADERS, END_HEADERS | END_STREAM, stream, TRAILERS))
            return
        self.window -= len(message) + 5
        self.windows[stream] -= len(message) + 5
        prefix = struct.pack(">BI", 0, len(message))  # gRPC: not compressed, length
        self.connection.write(_frame(DATA, 0, stream, prefix + message))


# ---- Triton's protobuf messages, as far as they are needed: importing tritonclient takes longer than a first token ------


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each field that has a length; varints are passed over."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        value, position = _varint(message, position)
        if key & 7 == 2:
            yield key >> 3, message[position : position + value]
            position += value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position


def _field(number: int, *contents: bytes) -> bytes:
    """A message, a text or bytes. Field numbers are those of Triton's grpc_service.proto and model_config.proto."""
    content = b"".join(contents)
    size, rest = b"", len(content)
    while rest > 0x7F:
        size, rest = size + bytes([rest & 0x7F | 0x80]), rest >> 7
    return _key(number, 2) + size + bytes([rest]) + content


def _flag(number: int, value: bool) -> bytes:
    return _key(number, 0) + bytes([value])


def _key(number: int, wire_type: int) -> bytes:
    key = number << 3 | wire_type
    return bytes([key]) if key < 0x80 else bytes([key & 0x7F | 0x80, key >> 7])


def _infer_request(message: bytes) -> tuple[str, str, int]:
    """Id, model and max_tokens of a ModelInferRequest."""
    texts = {number: content.decode() for number, content in _fields(message) if number in (1, 3)}
    names = [dict(_fields(content))[1] for number, content in _fields(message) if number == 5]
    raw = [content for number, content in _fields(message) if number == 7]
    (asked,) = struct.unpack("<i", raw[names.index(b"max_tokens")])
    return texts.get(3, ""), texts[1], asked


def _template(tokens: int, *, is_final: bool) -> bytes:
    """A ModelStreamInferResponse but for its last four bytes, which are the number of tokens so far."""
    text = _text(tokens)
    is_last = _field(4, _field(1, b"triton_final_response"), _field(2, _flag(1, is_final)))
    outputs = (
        _field(5, _field(1, name), _field(2, kind), _field(3, b"\1\1"))
        for name, kind in ((b"text_output", b"BYTES"), (b"num_output_tokens", b"INT32"))
    )
    contents = _field(6, struct.pack("<I", len(text)), text), _field(6, bytes(4))
    return _field(2, is_last, *outputs, *contents)[:-4]


def _told_over_grpc(method: str) -> bytes:
    """The answer to a question about the server or its model, whichever that is."""
    match method:
        case "ModelReady":
            return _flag(1, True)
        case "ServerMetadata":
            return _field(1, b"tkit-mock") + _field(2, b"1")
        case "ModelMetadata":
            inputs = (_field(4, _field(1, name.encode()), _field(3, b"\1\1")) for name in INPUTS)
            return b"".join((*inputs, *(_field(5, _field(1, name.encode())) for name in OUTPUTS)))
        case "ModelConfig":
            return _field(1, _field(19, _flag(1, True)))
    return b""


@contextlib.contextmanager
def running_mock(*, ttft_ms: float = DEFAULT_TTFT_MS, itl_ms: float = DEFAULT_ITL_MS, seed: int = 0) -> Iterator[str]:
    """The address, host:port, of a mock server in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "tkit.loadgen.mock_server",
        f"--ttft-ms={ttft_ms}",
        f"--itl-ms={itl_ms}",
        f"--seed={seed}",
    ]
    with child_server(command) as url:
        yield url


@contextlib.contextmanager
def child_server(command: Sequence[str]) -> Iterator[str]:
    """The address, host:port, of a process that prints its port and serves until its standard input closes."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield f"{HOST}:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()
            process.wait(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ttft-ms", type=float, default=DEFAULT_TTFT_MS)
    parser.add_argument("--itl-ms", type=float, default=DEFAULT_ITL_MS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    server = MockServer(given.ttft_ms, given.itl_ms, given.seed, given.port)
    print(server.port, flush=True)
    server.serve(sys.stdin.fileno())


if __name__ == "__main__":
    main()
