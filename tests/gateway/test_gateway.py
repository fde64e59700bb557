"""The front as its clients see it, with a real Triton behind: the official client, raw sockets, clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_backend import OPEN, ROWS, metrics, write_engine
from transformers import AutoTokenizer
from waiting import wait_until

from tkit import demo
from tkit.backends.table import BACKENDS
from tkit.gateway.app import LARGE_BYTES, MAX_BODY_BYTES
from tkit.gateway.triton import TritonModel
from tkit.specs.server import ServeOptions, ServerRecord
from tkit.stages.serve import running_server

KEY = "sk-canary"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerRecord]:
    """The fake engine, for eight requests at once, with the demo model's tokenizer; it wants a key."""
    directory = tmp_path_factory.mktemp("engines; what's $HOME")  # which no shell is to read
    key_file = directory / "key"
    key_file.write_text(KEY + "\n")
    options = ServeOptions(
        http_port=0, grpc_port=0, metrics_port=0, openai_port=0, api_key_file=key_file, max_batch_size=4,
        max_queue_size=4, timeout_s=120, exit_timeout_s=1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "fake", ROWS["fake"])
        write_engine(directory / "tiny", max_position_embeddings=5000)
        shutil.copytree(
            demo.MODEL_DIR, directory / "tiny" / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors")
        )
        with running_server(directory / "tiny", options, engines_dir=directory) as record:
            yield record


@pytest.fixture(scope="module")
def client(server: ServerRecord) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{server.openai_port}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


def complete(client: openai.OpenAI, prompt: Any = "a b c", max_tokens: int = 4, **more: Any) -> Any:
    return client.completions.create(model="ensemble", prompt=prompt, max_tokens=max_tokens, **more)


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.owned_by, model.root, model.max_model_len) == ("ensemble", "tkit", "tiny", 5000)  # type: ignore[attr-defined]
    assert client.models.retrieve("ensemble").id == "ensemble"
    with pytest.raises(openai.NotFoundError, match='the model "other" does not exist'):
        client.models.retrieve("other")


def test_a_completion_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = complete(client)
    assert (whole.object, whole.choices[0].text, whole.choices[0].finish_reason) == (
        "text_completion",
        "a b c a ",
        "length",
    )
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (3, 4, 7)
    events = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert [event.choices[0].text for event in events[:-1]] == ["a ", "b ", "c ", "a "]
    assert [event.choices[0].finish_reason for event in events[:-1]] == [None, None, None, "length"]
    assert events[-1].choices == [] and events[-1].usage == whole.usage
    assert {event.id for event in events} == {events[0].id}
    assert all(event.usage is None for event in complete(client, stream=True))


def test_a_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    ask = dict(model="ensemble", messages=[{"role": "user", "content": "Hello"}], max_completion_tokens=3)
    whole: Any = client.chat.completions.create(**ask)  # type: ignore[call-overload]
    # what the template makes of it: "user: Hello", "", "assistant:", whose words the fake engine repeats
    assert (whole.object, whole.choices[0].message.role) == ("chat.completion", "assistant")
    assert whole.choices[0].message.content == "user: Hello assistant: "
    events: Any = list(client.chat.completions.create(stream=True, **ask))  # type: ignore[call-overload]
    assert events[0].object == "chat.completion.chunk"
    assert [event.choices[0].delta.role for event in events] == ["assistant", None, None, None]
    assert [event.choices[0].delta.content for event in events] == ["", "user: ", "Hello ", "assistant: "]
    assert events[-1].choices[0].finish_reason == "length"


def test_several_prompts_and_choices_whole_and_streamed(client: openai.OpenAI) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    expected = ["a b ", "a b ", "c c ", "c c "]
    for prompt in (["a b", "c"], [tokenizer.encode("a b"), tokenizer.encode("c")]):
        whole = complete(client, prompt, 2, n=2, logprobs=0)
        assert [(choice.index, choice.text) for choice in whole.choices] == list(enumerate(expected))
        assert [choice.logprobs.text_offset for choice in whole.choices] == [[0, 2]] * 4
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 8)  # each prompt once
        events = list(complete(client, prompt, 2, n=2, stream=True, stream_options={"include_usage": True}))
        texts, reasons = [""] * 4, [""] * 4
        for event in events[:-1]:
            [choice] = event.choices
            texts[choice.index] += choice.text
            reasons[choice.index] += choice.finish_reason or "."
        assert (texts, reasons) == (expected, [".length"] * 4)
        assert events[-1].usage == whole.usage
    chat = client.chat.completions.create(
        model="ensemble", messages=[{"role": "user", "content": "x"}], n=3, max_tokens=2, stream=True
    )
    roles = [event.choices[0].index for event in chat if event.choices[0].delta.role]
    assert sorted(roles) == [0, 1, 2]


def test_one_prompt_that_fails_ends_the_others(server: ServerRecord, client: openai.OpenAI) -> None:
    def num_ended() -> float:
        return sum(value for name, value in metrics(server).items() if name.startswith("tkit_requests_total"))

    before = num_ended()
    with pytest.raises(openai.InternalServerError, match="the fake engine was asked to fail"):
        complete(client, ["!silent", "!error", "a b"], 4000)
    assert wait_until(lambda: num_ended() == before + 3)
    with pytest.raises(openai.RateLimitError, match="queue full"):
        complete(client, "a b", 4000, n=9)
    assert wait_until(lambda: num_ended() == before + 12)


def test_large_bodies_are_read_beside_the_event_loop_with_the_same_answers(client: openai.OpenAI) -> None:
    long = "word " * (LARGE_BYTES // 4)
    assert complete(client, long, 2).choices[0].text == "word word "
    with pytest.raises(openai.BadRequestError, match="n is 0") as refused:
        complete(client, long, n=0)
    assert refused.value.param == "n"


def test_log_probabilities(client: openai.OpenAI) -> None:
    logprobs = complete(client, logprobs=0).choices[0].logprobs
    assert (logprobs.tokens, logprobs.token_logprobs) == (["a ", "b ", "c ", "a "], [-0.5] * 4)
    assert logprobs.text_offset == [0, 2, 4, 6]
    streamed = [event.choices[0].logprobs for event in complete(client, logprobs=0, stream=True)]
    assert [part.text_offset for part in streamed] == [[0], [2], [4], [6]]
    chat = client.chat.completions.create(
        model="ensemble", messages=[{"role": "user", "content": "x"}], max_tokens=1, logprobs=True
    )
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    [token] = chat.choices[0].logprobs.content
    assert (token.token, token.logprob, token.bytes) == ("user: ", -0.5, list(b"user: "))


def test_stop_words_end_of_sequence_and_ignoring_it(client: openai.OpenAI) -> None:
    stopped = complete(client, stop=["b"]).choices[0]
    assert (stopped.text, stopped.finish_reason) == ("a b ", "stop")  # the fake engine does not cut it off
    assert complete(client, "a </s>").choices[0].finish_reason == "stop"
    assert complete(client, "a </s>", extra_body={"ignore_eos": True}).choices[0].text == "a </s> a </s> "


@pytest.mark.parametrize(
    ("error", "body", "message"),
    [
        (openai.BadRequestError, {"best_of": 2}, "best_of is 2, this server supports only 1"),
        (openai.BadRequestError, {"max_tokens": 4500}, "max_tokens is 4500, at most 4096"),  # says the engine
        (openai.BadRequestError, {"extra_body": {"repetition_penalty": 1e39}}, "too large for FP32"),
        (openai.NotFoundError, {"model": "gpt-4"}, 'the model "gpt-4" does not exist'),
        (openai.InternalServerError, {"prompt": "!error"}, "the fake engine was asked to fail"),
    ],
)
def test_errors_have_their_status_and_say_why(
    client: openai.OpenAI, error: type[openai.APIStatusError], body: dict[str, Any], message: str
) -> None:
    for stream in (False, True):
        if stream and error is openai.InternalServerError:
            continue  # it comes after the first tokens; see below
        with pytest.raises(error, match=message):
            client.completions.create(**{"model": "ensemble", "prompt": "a", "stream": stream, **body})


def test_many_refusals_at_once_do_no_harm(client: openai.OpenAI) -> None:
    """Triton 2.51 dies of them when it is asked for the codes of its errors."""

    def refused(_: int) -> str:
        with pytest.raises(openai.BadRequestError) as error:
            complete(client, max_tokens=4500)
        return str(error.value.body["message"])  # type: ignore[index]

    with ThreadPoolExecutor(64) as pool:
        told = set(pool.map(refused, range(500)))
    assert told == {"invalid request: max_tokens is 4500, at most 4096"}
    assert complete(client).choices[0].text == "a b c a "


def test_an_error_in_the_middle_of_a_stream_is_told_in_it(client: openai.OpenAI) -> None:
    texts = []
    with pytest.raises(openai.APIError, match="the fake engine was asked to fail"):
        for event in complete(client, "!error b", stream=True):
            texts.append(event.choices[0].text)
    assert texts == ["!error ", "b "]


def test_a_full_server_says_so_and_has_room_later(server: ServerRecord, client: openai.OpenAI) -> None:
    with contextlib.ExitStack() as waiting:
        for _ in range(8):
            waiting.enter_context(raw(server, body={"prompt": "!silent", "max_tokens": 4}))
        assert wait_until(lambda: metrics(server)[OPEN] == 8)
        with pytest.raises(openai.RateLimitError, match="queue full: 8 requests") as full:
            complete(client)
        assert full.value.response.headers["retry-after"] == "1"
    assert wait_until(lambda: metrics(server)[OPEN] == 0)
    assert complete(client).choices[0].text == "a b c a "


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("prompt", ["a b", "!silent", ["a b", "!silent"]])
def test_a_client_that_leaves_frees_its_slots(server: ServerRecord, stream: bool, prompt: str | list[str]) -> None:
    cancelled = 'tkit_requests_total{outcome="cancelled"}'
    before, num_prompts = metrics(server).get(cancelled, 0), 1 if isinstance(prompt, str) else len(prompt)
    with raw(server, body={"prompt": prompt, "max_tokens": 4000, "stream": stream}):
        assert wait_until(lambda: metrics(server)[OPEN] == num_prompts)
    assert wait_until(lambda: metrics(server)[OPEN] == 0)
    assert wait_until(lambda: metrics(server)[cancelled] == before + num_prompts)


def raw(server: ServerRecord, body: Any = b"", head: str = "", path: str = "/v1/completions") -> socket.socket:
    """A connection over which one request has gone, or its beginning."""
    if isinstance(body, dict):
        body = json.dumps({"model": "ensemble", **body}).encode()
    head = head or f"Content-Length: {len(body)}\r\n"
    connection = socket.create_connection(("127.0.0.1", server.openai_port), timeout=60)
    connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n{head}\r\n".encode() + body)
    return connection


def answer(connection: socket.socket) -> tuple[int, Any]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    body = response.read()
    return response.status, json.loads(body) if body.startswith(b"{") else body.decode()


def test_a_request_that_comes_byte_by_byte(server: ServerRecord) -> None:
    body = json.dumps({"model": "ensemble", "prompt": "wörld", "max_tokens": 1}, ensure_ascii=False).encode()
    with raw(server, head=f"Content-Length: {len(body)}\r\n") as connection:
        for index in range(len(body)):
            connection.sendall(body[index : index + 1])
        status, completion = answer(connection)
    assert (status, completion["choices"][0]["text"]) == (200, "wörld ")


def test_a_stream_byte_by_byte_is_made_of_whole_events(server: ServerRecord) -> None:
    body = {"prompt": "ä ö", "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    with raw(server, body) as connection:
        status, text = answer(connection)
    events = text.split("\n\n")
    assert (status, events[-2:]) == (200, ["data: [DONE]", ""])
    parsed = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert [choice["text"] for event in parsed for choice in event["choices"]] == ["ä ", "ö "]
    assert parsed[-1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not readable as JSON"),
        (b"\xff", "the body is not readable as JSON"),
        (b'{"prompt": NaN}', "NaN is no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"model": "ensemble", "prompt": "\\ud800"}', "it holds half a character"),
        (b'{"model": "ensemble", "prompt": "a", "stop": "\\ud800"}', "stop is expected to hold texts only"),
        (b'{"\\ud800": 1}', 'unknown parameter "?"'),
        (b"[]", "the body is a list, expected an object"),
    ],
)
def test_bodies_that_are_no_request(server: ServerRecord, body: bytes, message: str) -> None:
    with raw(server, body) as connection:
        status, told = answer(connection)
    assert (status, told["error"]["type"]) == (400, "invalid_request_error")
    assert message in told["error"]["message"]


@pytest.mark.parametrize("head", [f"Content-Length: {MAX_BODY_BYTES + 1}\r\n", "Transfer-Encoding: chunked\r\n"])
def test_a_body_that_is_too_large_is_refused_before_all_of_it_is_read(server: ServerRecord, head: str) -> None:
    with raw(server, head=head) as connection:
        if "chunked" in head:
            for _ in range(MAX_BODY_BYTES // 1_000_000 + 1):
                connection.sendall(b"%x\r\n%s\r\n" % (1_000_000, b" " * 1_000_000))
        status, told = answer(connection)
    assert (status, told["error"]["code"]) == (413, "request_too_large")


def test_the_key_guards_what_costs_and_nothing_else(server: ServerRecord) -> None:
    def get(path: str, **headers: str) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", server.openai_port, timeout=30)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        told = response.status, json.loads(response.read())
        connection.close()
        assert (response.getheader("www-authenticate") == "Bearer") is (response.status == 401)
        return told

    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": KEY}, {"Authorization": f"Bearer {KEY}é"}):
        status, told = get("/v1/models", **headers)
        assert (status, told["error"]["code"]) == (401, "invalid_api_key")
    assert get("/v1/models", Authorization=f"Bearer {KEY}")[0] == 200
    assert get("/health")[1]["ready"] is True
    assert get("/v2")[1]["error"]["message"] == "no such path: /v2"
    assert KEY not in Path(f"/proc/{server.openai_pid}/cmdline").read_text()


def test_it_connects_to_the_model_of_its_own_start_only(server: ServerRecord) -> None:
    async def connect() -> None:
        model = TritonModel(f"127.0.0.1:{server.grpc_port}", "ensemble", "another start")
        try:
            await asyncio.wait_for(model.connect(), 1)
        finally:
            await model.close()

    with pytest.raises(TimeoutError):
        asyncio.run(connect())


def test_many_at_once_get_their_own_answers(server: ServerRecord, client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda n: complete(client, f"x{n} y{n}", 20).choices[0].text, range(16)))
    assert texts == [f"x{n} y{n} " * 10 for n in range(16)]
