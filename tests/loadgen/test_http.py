"""Streams over HTTP: times against the servers' own records, and answers that are cut, wrong, or do not come."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import ssl
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from servers import check_times, fake_http_server

from tkit.errors import InputError, ServerError, TkitError
from tkit.files import read_json, write_json
from tkit.loadgen.exchange import Exchange, RequestRecord, request_record
from tkit.loadgen.http import _Connection, http_address
from tkit.loadgen.load import loop_factory
from tkit.loadgen.monitor import Monitor
from tkit.loadgen.openai_http import OpenAIClient
from tkit.loadgen.point import Place
from tkit.loadgen.profiles import Profile, Shape, find_profile
from tkit.loadgen.prompts import PromptMaker
from tkit.loadgen.protocols import make_client
from tkit.loadgen.session import Measurement, Session
from tkit.loadgen.sse import sse_events
from tkit.loadgen.token_counts import tokens_of_total
from tkit.specs.engine import EngineCard
from tkit.specs.server import ServerRecord
from tkit.stages.servers import ServerLock, server_files

Tkit = Callable[..., Result]
MS = 1_000_000
SHAPE = Shape(isl=24, osl=16)
QUICK = dataclasses.replace(find_profile("quick"), shapes=(SHAPE,), max_duration_s=None)
KEY = "sk-secret-0123456789"


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Iterator[Any]:
    with fake_http_server(tmp_path_factory.mktemp("http") / "sent.jsonl", tokenizer_dir) as server:
        yield server


@functools.cache
def prompts(tokenizer_dir: Path) -> PromptMaker:
    return PromptMaker(tokenizer_dir, 0)


def measure(
    protocol: str, url: str, model: str | None, tokenizer_dir: Path, requests: int = 1, concurrency: int = 1,
    *, probes: bool = False, **settings: Any,
) -> Measurement:  # fmt: skip
    """Without probes a point whose every request fails is measured too."""
    used: Profile = dataclasses.replace(QUICK, requests=requests, min_warmup=1)
    with Session(protocol, url, model, prompts=prompts(tokenizer_dir), profile=used, **settings) as session:
        if probes:
            session.probe(SHAPE)
        else:
            session._e2e_s[SHAPE, 0] = 0.01
        return session.measure(Place(shape=SHAPE, concurrency=concurrency, repeat=1), lambda live: None)


def test_triton_http_against_a_real_triton(paced: Any) -> None:
    point = measure("triton-http", paced.http_url, "ensemble", paced.tokenizer_dir, 8, 4, probes=True)
    assert point.failures == []
    assert point.summary.token_source == "server_usage"
    assert {(r.isl, r.osl, r.chunks, r.n_first) for r in point.records} == {(24, 16, 16, 1)}
    sent = paced.sent()
    check_times(point, sent)
    assert sent[f"24x16-16-4-1-{point.records[0].id}"]["inputs"] == {
        "max_tokens": "16", "min_tokens": "16", "end_id": "-1", "stream": "True", "top_k": "1", "temperature": "1.0",
        "seed": "0", "exclude_input_in_output": "True", "return_num_input_tokens": "True",
        "return_num_output_tokens": "True",
    }  # fmt: skip


def test_openai_times_agree_with_the_servers_own(fake: Any, tokenizer_dir: Path) -> None:
    point = measure("openai", f"http://{fake.url}/one", None, tokenizer_dir, 8, 4, probes=True)
    assert point.failures == []
    assert point.summary.token_source == "server_usage"
    assert {(r.isl, r.osl, r.chunks, r.n_first) for r in point.records} == {(24, 16, 16, 1)}
    sent = fake.sent("plain")
    check_times(point, sent)
    lines = [sent[f"24x16-16-4-1-{record.id}"] for record in point.records]
    assert len({line["connection"] for line in lines}) <= 5, "connections are used again"
    body = lines[0]["body"]
    assert prompts(tokenizer_dir).count_tokens(body.pop("prompt")) == 24
    assert body == {
        "model": "plain", "max_tokens": 16, "min_tokens": 16, "ignore_eos": True, "temperature": 0, "seed": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert lines[0]["key"] is None


def test_chat_is_measured_with_prompts_that_leave_room_for_the_template(fake: Any, tokenizer_dir: Path) -> None:
    """The server counts 9 tokens more than it is sent; what it thinks before it answers are tokens too."""
    point = measure("openai-chat", f"{fake.url}/one", None, tokenizer_dir, 8, 4, probes=True)
    assert point.failures == []
    assert {(r.isl, r.osl, r.chunks, r.n_first) for r in point.records} == {(24, 16, 16, 1)}
    sent = fake.sent("plain")
    check_times(point, sent)
    (message,) = sent[f"24x16-16-4-1-{point.records[0].id}"]["body"]["messages"]
    assert message["role"] == "user"
    assert prompts(tokenizer_dir).count_tokens(message["content"]) == 24 - 9


def test_a_template_longer_than_the_prompts_is_named(fake: Any, tokenizer_dir: Path) -> None:
    session = Session("openai-chat", f"{fake.url}/one", None, prompts=prompts(tokenizer_dir), profile=QUICK)
    with session, pytest.raises(InputError, match="the server counts 9 tokens more than the 8 of 8/16"):
        session.probe(Shape(isl=8, osl=16))


def test_tls(certificate: tuple[Path, Path], fake: Any, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a relay that ends the TLS; a certificate that nobody vouches for is refused."""
    key, authority = certificate
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority, key)
    with relay(context, fake.url) as port:
        with pytest.raises(ServerError, match="certificate verify failed"):
            measure("openai", f"https://localhost:{port}/one", None, tokenizer_dir)
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        point = measure("openai", f"https://localhost:{port}/one", None, tokenizer_dir, 8, 4, probes=True)
    assert point.failures == []
    check_times(point, fake.sent("plain"))


@contextlib.contextmanager
def relay(context: ssl.SSLContext, url: str) -> Iterator[int]:
    """A port on which TLS is spoken, in front of `url`."""
    host, _, port = url.rpartition(":")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        starting = asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        server = asyncio.run_coroutine_threadsafe(starting, loop).result(10)
        yield server.sockets[0].getsockname()[1]
        loop.call_soon_threadsafe(server.close)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.2), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


WAYS = [
    ("openai", "role_first", 16, 1),
    ("openai", "split", 16, 1),
    ("openai", "coalescing", 4, None),
    ("openai", "until_closed", 16, 1),
    ("openai", "so_far", 16, 1),
    ("triton-http", "coalescing", 4, 4),
    ("triton-http", "split", 16, 1),
]
UNCOUNTED = [("openai", "no_usage"), ("triton-http", "bare"), ("triton-http", "so_far")]
FAILURES = [
    ("openai", "busy", "overloaded", "HTTP 429: too many requests"),
    ("openai", "full", "overloaded", "HTTP 503: Exceeds maximum queue size"),
    ("openai", "refusing", "rejected", "HTTP 400: ignore_eos is not known"),
    ("openai", "broken", "server", "HTTP 500: worker died"),
    ("openai", "error_200", "server", "generate expects exactly 1 response"),
    ("openai", "failing", "server", "out of memory"),
    ("openai", "garbled", "unreadable", "event 9 is '{not json'"),
    ("openai", "no_sse", "unreadable", "not a line of an event stream: '<html>'"),
    ("openai", "bad_chunk", "unreadable", "a chunk's size is 'xyz'"),
    ("openai", "truncated", "truncated", "ended after 8 events, without [DONE]"),
    ("openai", "cut_event", "truncated", "ended in the middle of event 9"),
    ("openai", "closed", "disconnected", "closed after "),
    ("openai", "reset", "disconnected", "closed after "),
    ("openai", "stalled", "timeout", "no message for 0.5 s"),
    ("openai", "silent", "timeout", "no message for 0.5 s"),
    ("openai", "short", "short", "8 tokens, asked for 16"),
    ("triton-http", "full", "overloaded", "HTTP 503: Exceeds maximum queue size"),
    ("triton-http", "error_200", "server", "generate expects exactly 1 response"),
    ("triton-http", "failing", "server", "out of memory"),
    ("triton-http", "garbled", "unreadable", "event 9 is '{not json'"),
    ("triton-http", "truncated", "short", "8 tokens, asked for 16"),
    ("triton-http", "closed", "disconnected", "closed after "),
]


@pytest.fixture(scope="module")
def outcomes(fake: Any, tokenizer_dir: Path) -> dict[tuple[str, str], tuple[RequestRecord, str]]:
    """Per protocol and model one request, all at the same time, and the token source in the end."""

    async def one(protocol: str, model: str, monitor: Monitor) -> tuple[RequestRecord, str]:
        client = make_client(protocol, fake.url, model, prompts(tokenizer_dir).token_ends)
        await client.open(10)
        request = client.request("alone", prompts(tokenizer_dir).prompt(24, protocol, model), 16, 0)
        exchange = Exchange(index=0, request=request, isl=24, osl=16)
        monitor.in_flight.add(exchange)
        await client.perform(exchange)
        monitor.in_flight.discard(exchange)
        await client.close()
        if model in ("failing", "error_200", "busy", "cut_event"):
            assert exchange.error is not None, "known at once, so that a point of nothing but failures is given up"
        return request_record(exchange, client.answer(exchange)), client.token_source

    async def every() -> dict[tuple[str, str], tuple[RequestRecord, str]]:
        cases = [*((way[0], way[1]) for way in WAYS), *UNCOUNTED, *((failure[0], failure[1]) for failure in FAILURES)]
        monitor = Monitor(0.5, 10, lambda: None)
        watching = asyncio.create_task(monitor.run())
        done = await asyncio.gather(*(one(protocol, model, monitor) for protocol, model in cases))
        watching.cancel()
        return dict(zip(cases, done, strict=True))

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(every())


@pytest.mark.parametrize(("protocol", "model", "chunks", "n_first"), WAYS)
def test_ways_to_stream(outcomes: Any, protocol: str, model: str, chunks: int, n_first: int | None) -> None:
    record, token_source = outcomes[protocol, model]
    assert (record.error, record.detail, token_source) == (None, "", "server_usage")
    assert (record.isl, record.osl, record.chunks) == (24, 16, chunks)
    assert n_first is None or record.n_first == n_first
    assert record.first_byte_ns is not None
    assert record.first_token_ns - record.sent_ns >= 29 * MS, "the role chunk before it is no token"


@pytest.mark.parametrize(("protocol", "model"), UNCOUNTED)
def test_servers_that_do_not_count_are_counted_by_the_tokenizer(
    outcomes: Any, tokenizer_dir: Path, protocol: str, model: str
) -> None:
    """The fake's word is several tokens to this tokenizer, the same number each time."""
    record, token_source = outcomes[protocol, model]
    each = len(prompts(tokenizer_dir).token_ends(" wörd"))
    assert (record.error, token_source) == (None, "tokenizer")
    assert (record.osl, record.chunks, record.n_first) == (16 * each, 16, each)


@pytest.mark.parametrize(("protocol", "model", "error", "detail"), FAILURES)
def test_failures_have_names(outcomes: Any, protocol: str, model: str, error: str, detail: str) -> None:
    record, _ = outcomes[protocol, model]
    assert (record.error, record.status) == (error, "error")
    assert record.detail.startswith(detail)
    if model in ("failing", "truncated", "closed", "stalled", "cut_event", "garbled"):
        assert record.chunks == 8, "what came before is kept"


def completion(text: str, count: int | None = None) -> bytes:
    usage = None if count is None else {"prompt_tokens": 24, "completion_tokens": count}
    return b"data: %s\n\n" % json.dumps({"choices": [{"text": text}] if text else [], "usage": usage}).encode()


ENDING = completion("", 3) + b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("messages", "is_uniform", "counts"),
    [
        ([completion("a"), completion("b"), completion("c"), ENDING], True, [1, 1, 1]),
        ([completion("a"), completion("b"), completion("c") + ENDING], True, [1, 1, 1]),
        ([m.replace(b"\n", b"\r\n") for m in (completion("a"), completion("b"), completion("c"), ENDING)], True, [1, 1, 1]),
        ([completion("a"), completion("b") + completion("c"), ENDING], False, [1, 1, 1]),
        ([completion("a") + b"da", completion("b")[2:], completion("c"), ENDING], False, [1, 1, 1]),
        ([b": alive\n\n", completion("a"), completion("b"), completion("c"), ENDING], False, [1, 1, 1]),
        ([completion("a"), b"data: {oops\n\n" + completion("b"), completion("c"), ENDING], False, [1]),
        ([completion("a"), completion("b"), completion("c"), completion("", 4) + b"data: [DONE]\n\n"], False, [1, 1, 2]),
    ],
)  # fmt: skip
def test_messages_are_dropped_only_where_each_is_one_token(
    messages: list[bytes], is_uniform: bool, counts: list[int]
) -> None:
    client = OpenAIClient("h:1", "m", lambda text: [1, 2, 3, 3])
    client.token_source = "server_usage"
    exchange = Exchange(index=0, request=b"", isl=24, osl=3)
    exchange.times, exchange.messages = array("q", range(10, 10 + len(messages))), messages
    client._conclude(exchange)
    answer = client.answer(exchange)
    assert (exchange.is_uniform, list(answer.token_counts)) == (is_uniform, counts)
    assert answer.token_ns[0] == (11 if messages[0].startswith(b":") else 10)
    assert exchange.error == ("unreadable" if len(counts) == 1 else None)
    assert answer.isl == (None if exchange.error else 24)


def test_failures_make_a_point_invalid(fake: Any, tokenizer_dir: Path) -> None:
    point = measure("openai", fake.url, "busy", tokenizer_dir)
    assert not point.summary.is_valid
    assert " overloaded), the first: HTTP 429: too many requests" in point.summary.invalid_reasons[0]


def test_a_server_that_goes_away_ends_the_point(tokenizer_dir: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        with fake_http_server(tmp_path / "log", tokenizer_dir) as server:
            used = dataclasses.replace(QUICK, requests=30)
            session = stack.enter_context(
                Session("openai", server.url, "plain", prompts=prompts(tokenizer_dir), profile=used)
            )
            session.probe(SHAPE)
            assert session.identity_now() == session.identity
        point = session.measure(Place(shape=SHAPE, concurrency=1, repeat=1), lambda live: None)
        assert session.identity_now() is None
    assert {record.error for record in point.records} == {"refused"}
    assert len(point.records) == 3, "given up, not run through"


@pytest.mark.parametrize("protocol", ["openai", "triton-http"])
def test_nobody_answers(tokenizer_dir: Path, protocol: str) -> None:
    with pytest.raises(ServerError, match="127.0.0.1:9: no server answers over HTTP: ") as caught:
        measure(protocol, "127.0.0.1:9", "plain", tokenizer_dir)
    assert "--url HOST:PORT" in (caught.value.hint or "")


EVENTS = (
    'data: {"text": "wörd"}\n'.encode(),
    b"\n",
    b': alive\r\n\r\nevent: x\r\ndata: {"a":\r\ndata:  1}\r\n\r\ndata: c\n\n',
)
ANSWER = (
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"".join(b"%X;x=1\r\n%s\r\n" % (len(part), part) for part in EVENTS)
    + b"0\r\nTrailer: 1\r\n\r\n"
)
DATA = ['{"text": "wörd"}'.encode(), b'{"a":\n 1}', b"c"]


class FakeTransport(asyncio.Transport):
    def write(self, data: Any) -> None:
        pass

    def abort(self) -> None:
        pass


def received(parts: list[bytes]) -> Exchange:
    """What a connection makes of parts of an answer."""

    async def receive() -> Exchange:
        exchange = Exchange(index=0, request=b"", isl=1, osl=1)
        connection = _Connection()
        connection.connection_made(FakeTransport())
        task = asyncio.create_task(connection.answer(exchange))
        await asyncio.sleep(0)
        for part in parts:
            connection.data_received(part)
        await asyncio.wait_for(task, 1)
        assert connection.is_reusable is (exchange.error is None)
        return exchange

    return asyncio.run(receive())


def test_an_answer_may_be_cut_anywhere() -> None:
    for cut in range(1, len(ANSWER)):
        exchange = received([ANSWER[:cut], ANSWER[cut:]])
        assert exchange.error is None
        assert [event.data for event in sse_events(exchange.messages, exchange.times)] == DATA, cut
    exchange = received([bytes([byte]) for byte in ANSWER])
    assert [event.data for event in sse_events(exchange.messages, exchange.times)] == DATA


def test_parts_as_long_as_a_chunk_that_came_before_may_be_something_else() -> None:
    """Two chunks in one part, or an end and a beginning, each as many bytes as the chunk before."""
    chunks = [b"5\r\nhello\r\n", b"1\r\na\r\n", b"1\r\nb\r\n", b"5\r\nworld\r\n", b"0\r\n\r\n"]
    head, rest = ANSWER[: ANSWER.index(b"\r\n\r\n", 30) + 4], b"".join(chunks[1:])
    for first in range(len(rest)):
        for second in range(first + 1, len(rest)):
            exchange = received([head, chunks[0], *filter(None, (rest[:first], rest[first:second], rest[second:]))])
            assert (exchange.error, b"".join(exchange.messages)) == (None, b"helloabworld"), (first, second)


def test_an_event_has_the_time_of_its_last_byte() -> None:
    messages = [b"da", b"ta: a\n", b"\nda", b"ta: b\n\ndata: c\n\n\n", b"\n", b"data: d"]
    events = [(event.when_ns, event.data, event.is_complete) for event in sse_events(messages, range(6))]
    assert events == [(2, b"a", True), (3, b"b", True), (3, b"c", True), (5, b"d", False)]


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (b"SSH-2.0-x\r\n\r\n", "not an answer of HTTP/1.1: 'SSH-2.0-x'"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "content-length is '-1'"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nabc", "2 bytes after the end of the answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n", "a chunk is followed by 'c'"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nHT", "2 bytes after the end of the answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 5000, "a line of the chunk framing is longer than"),
        (b"x" * 70000, "no end of the head in 65536 bytes"),
    ],
)  # fmt: skip
def test_what_is_no_http(answer: bytes, detail: str) -> None:
    exchange = received([answer])
    assert exchange.error == "unreadable"
    assert exchange.detail.startswith(detail)


@pytest.mark.parametrize(
    ("texts", "total", "expected"),
    [
        (["", "a", "b", "c"], 3, [0, 1, 1, 1]),  # one each, whatever the tokenizer thinks
        (["aaa", "b"], 4, [3, 1]),
        (["aa", "", "bb"], 5, [2, 0, 3]),  # a token that showed no text goes with a later one
        (["a", "b", "c", "d"], 2, [1, 0, 1, 0]),  # the first chunk brought a token
        (["", ""], 2, [0, 0]),
    ],
)
def test_a_total_is_spread_over_the_chunks(texts: list[str], total: int, expected: list[int]) -> None:
    counts = tokens_of_total(texts, total, lambda text: list(range(1, len(text) + 1)))
    assert counts == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("h:1", "h:1"),
        ("http://h:80/", "h:80"),
        ("http://[::1]:8000/v1/", "[::1]:8000/v1"),
        ("127.0.0.1:8000/v1", "127.0.0.1:8000/v1"),
        ("http://h/v1", "h:80/v1"),
        ("https://api.example.com/v1", "https://api.example.com:443/v1"),
        ("https://h:8443", "https://h:8443"),
    ],
)
def test_addresses(url: str, expected: str) -> None:
    assert str(http_address(url)) == expected


@pytest.mark.parametrize("url", ["h", "h:0", "h:99999", "http://user:pass@h:1", "ftp://h:1", "h:1/v1?key=1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InputError, match="expected host:port or http://host:port"):
        http_address(url)


@pytest.mark.parametrize(
    ("protocol", "path", "model", "message"),
    [
        ("openai", "/two", None, "serves 2 models (plain, other)"),
        ("openai", "/two", "plian", 'no model "plian" (did you mean "plain"?)'),
        ("openai", "/v1", None, "does not say which models it serves"),
        ("triton-http", "", "not_ready", 'model "not_ready" is not ready'),
        ("triton-http", "", "unary", "not decoupled, so it cannot stream"),
        ("triton-http", "/v1", "ensemble", "expected host:port for Triton, without a path"),
    ],
)
def test_models_that_cannot_be_measured(
    fake: Any, tokenizer_dir: Path, protocol: str, path: str, model: str | None, message: str
) -> None:
    with pytest.raises(TkitError) as caught:
        measure(protocol, fake.url + path, model, tokenizer_dir)
    assert message in str(caught.value)


SMALL = ("--shape", "16/8", "--concurrency", "1", "--requests", "2", "--name", "run")


def test_the_key_is_sent_and_written_nowhere(tkit: Tkit, fake: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    arguments = ("sweep", "--protocol", "openai", "--url", f"http://{fake.url}/locked", "--tokenizer", tokenizer_dir)
    result = tkit(*arguments, "--api-key-file", "key", *SMALL)
    assert result.exit_code == 0, result.stderr
    assert {line["key"] for id, line in fake.sent("plain").items() if id.startswith("16x8-8")} == {f"Bearer {KEY}"}
    manifest = read_json(tmp_path / "reports/run/manifest.json")
    assert (manifest["protocol"], manifest["model"], manifest["label"]) == ("openai", "plain", "plain")
    assert manifest["url"] == f"{fake.url}/locked"
    assert "--api-key-file key" in manifest["command"]
    identity = manifest["identity"]
    assert identity["token_source"] == "server_usage"
    assert identity["server"] == {
        "server": "fake",
        "version": "0.9",
        "model": "plain",
        "models": ["plain"],
        "root": None,
    }
    result_of_wrong = tkit(*arguments, "--api-key-file", "wrong", *SMALL)
    assert (result_of_wrong.exit_code, "wrong: No such file" in result_of_wrong.stderr) == (2, True)
    written = [path.read_bytes() for path in (tmp_path / "reports").rglob("*") if path.is_file()]
    assert len(written) > 5
    assert all(KEY.encode() not in data for data in [*written, result.output.encode(), result.stderr.encode()])


def test_a_key_that_the_server_repeats_is_not_shown(tkit: Tkit, fake: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "other").write_text("sk-other")
    arguments = ("sweep", "--protocol", "openai", "--tokenizer", tokenizer_dir, *SMALL)
    result = tkit(*arguments, "--url", fake.url, "--model", "locked", "--api-key-file", "key")
    assert result.exit_code == 1
    assert "the server refused the request (HTTP 4xx): HTTP 401: Incorrect API key provided: ***" in result.stderr
    result = tkit(*arguments, "--url", f"{fake.url}/locked", "--api-key-file", "other")
    assert result.exit_code == 2
    assert "HTTP 401: not Bearer ***" in result.stderr
    assert "hint: give the file that holds the key: --api-key-file FILE" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "triton-http", "--url", "h"], "--url is 'h', expected host:port or http://host:port"),
        (["--api-key-file", "f"], "--api-key-file is given, but triton-grpc sends no key"),
        (["--protocol", "openai", "--url", "h:1", "--api-key-file", "two"], "two holds 2 words, expected one"),
    ],
)
def test_what_was_typed_is_wrong(tkit: Tkit, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "two").write_text("a b")
    result = tkit("sweep", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_triton_http_finds_the_running_servers_port(tkit: Tkit, fake: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engines/toy"
    card = EngineCard(
        name="toy", key="0" * 64, created="2026-01-01T00:00:00Z", backend="reference", architecture="LlamaForCausalLM",
        dtype="float32", quant="int8", quant_algo="W8A16", tp_size=1, pp_size=1, num_params=1, weight_bytes=4,
        max_position_embeddings=256, vocab_size=256, recipe={}, source={}, files={}, versions={}, command="tkit build",
        build={},
    )  # fmt: skip
    write_json(engine / "engine.json", card)
    (engine / "tokenizer").symlink_to(tokenizer_dir)
    files = server_files("toy", tmp_path / "engines")
    lock = ServerLock(files)
    record = ServerRecord(
        engine=str(engine), pid=os.getpid(), host="127.0.0.1", http_port=int(fake.url.rpartition(":")[2]), grpc_port=1,
        metrics_port=2, openai_port=3, model_pids=(), openai_pid=4, api_key_file=None,
        started="2026-01-01T00:00:00Z", log=str(files.log),
    )  # fmt: skip
    write_json(files.record, record)
    try:
        result = tkit("sweep", "--protocol", "triton-http", *SMALL)
    finally:
        lock.release()
    assert result.exit_code == 0, result.stderr
    assert read_json(tmp_path / "reports/run/manifest.json")["url"] == fake.url
    assert read_json(tmp_path / "reports/run/points/16x8-c1-r1/point.json")["errors"] == {}
