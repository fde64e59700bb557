"""Bodies of OpenAI's API -> what to generate; everything that is wrong with them, by its name."""

from __future__ import annotations

from typing import Any

import pytest

from tkit import demo
from tkit.gateway.chat import ChatTokenizer
from tkit.gateway.errors import ApiError
from tkit.gateway.requests import CHAT_TOKENS, ApiRequest, read_request
from tkit.specs.generation import GenerationRequest

TOKENIZER = ChatTokenizer(demo.MODEL_DIR)
HELLO = [{"role": "user", "content": "Hello"}]


def read(
    *, is_chat: bool = False, max_positions: int = 2048, tokenizer: ChatTokenizer = TOKENIZER, **body: Any
) -> ApiRequest:
    body = {"model": "ensemble", **({"messages": HELLO} if is_chat else {"prompt": "a"}), **body}
    return read_request(body, is_chat=is_chat, model="ensemble", max_positions=max_positions, tokenizer=tokenizer)


def test_defaults_are_openais() -> None:
    asked = read(seed=7)
    assert asked.generation == GenerationRequest(prompt="a", max_tokens=16, temperature=1, top_p=1, seed=7)
    assert (asked.stream, asked.include_usage) == (False, False)
    assert read().generation.seed != read().generation.seed  # OpenAI's answers differ from request to request


def test_everything_that_is_supported() -> None:
    asked = read(
        prompt=["a"], max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.9, top_k=-1, repetition_penalty=1.1, seed=-1,
        stop="end", ignore_eos=True, logprobs=0, stream=True, stream_options={"include_usage": True}, n=1, best_of=1,
        echo=False, presence_penalty=0.0, logit_bias={}, user="me", suffix=None,
    )  # fmt: skip
    assert asked.generation == GenerationRequest(
        prompt="a", max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.9, repetition_penalty=1.1, seed=2**64 - 1,
        stop_words=("end",), end_id=-1, return_log_probs=True,
    )  # fmt: skip
    assert (asked.stream, asked.include_usage) == (True, True)


def test_chat() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    asked = read(is_chat=True, messages=messages, logprobs=True, max_tokens=5, max_completion_tokens=4)
    assert asked.generation.prompt == "<s>user: Hel\nlo\n\nassistant:"
    assert (asked.generation.max_tokens, asked.generation.return_log_probs) == (4, True)
    assert not read(is_chat=True, logprobs=False).generation.return_log_probs


def test_a_chat_without_a_length_gets_what_is_left_up_to_a_bound() -> None:
    num_tokens = TOKENIZER.num_tokens("<s>user: Hello\n\nassistant:")
    assert read(is_chat=True, max_positions=100).generation.max_tokens == 100 - num_tokens
    assert read(is_chat=True, max_positions=100_000).generation.max_tokens == CHAT_TOKENS
    assert read(is_chat=True, max_positions=5).generation.max_tokens == 1  # the engine says that the prompt is too long


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"n": 2}, "n", "n is 2, this server supports only 1"),
        ({"echo": True}, "echo", "echo is true, this server supports only false"),
        ({"temprature": 0}, "temprature", 'unknown parameter "temprature" (did you mean "temperature"?)'),
        ({"max_tokens": "8"}, "max_tokens", "max_tokens is a string, expected an integer"),
        ({"max_tokens": True}, "max_tokens", "max_tokens is a boolean, expected an integer"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0, expected at least 1"),
        ({"max_tokens": 10**30}, "max_tokens", f"max_tokens is {10**30}, the model has 2048 positions"),
        ({"temperature": 1e400}, "temperature", "temperature is inf, expected 0 or more"),
        ({"top_p": 0, "top_k": -2}, "top_k", "top_k is -2, expected 0 (no limit) or more; top_p is 0, expected more than 0"),
        ({"stop": ["a", 1]}, "stop", "stop is expected to hold texts only"),
        ({"stop": [""]}, "stop", "stop holds an empty word"),
        ({"logprobs": 2}, "logprobs", "logprobs is 2, expected 0"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream: true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "unknown key in stream_options: x"),
        ({"prompt": ["a", "b"]}, "prompt", "send one request per prompt"),
        ({"prompt": [1, 2]}, "prompt", "send one request per prompt"),
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"prompt": ""}, "prompt", "prompt is empty"),
        ({"prompt": "\ud800"}, "prompt", "it holds half a character"),
        ({"messages": HELLO}, "messages", 'unknown parameter "messages"'),
        ({"is_chat": True, "messages": []}, "messages", "messages is empty"),
        ({"is_chat": True, "messages": ["Hello"]}, "messages", "messages[0] is a string, expected an object"),
        ({"is_chat": True, "messages": [{"content": "a"}]}, "messages", "messages[0].role is null, expected a string"),
        ({"is_chat": True, "messages": [{"role": "user"}]}, "messages", "messages[0].content is null, expected a string"),
        ({"is_chat": True, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages",
         "messages[0].content[0]: only parts of type text are supported"),
        ({"is_chat": True, "tools": [{"type": "function"}]}, "tools", "this server supports only []"),
        ({"n": 3, "best_of": 2}, "n", "n is 3, this server supports only 1; best_of is 2"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(body: dict[str, Any], param: str | None, message: str) -> None:
    with pytest.raises(ApiError) as error:
        read(**body)
    assert (error.value.status, error.value.param) == (400, param)
    assert message in error.value.message


@pytest.mark.parametrize("body", [None, [], "text", 3])
def test_a_body_that_is_no_object(body: Any) -> None:
    with pytest.raises(ApiError, match="expected an object"):
        read_request(body, is_chat=False, model="ensemble", max_positions=9, tokenizer=TOKENIZER)


def test_another_model_and_a_tokenizer_without_a_template(tmp_path) -> None:
    with pytest.raises(ApiError, match='the model "gpt-4" does not exist; this server has "ensemble"') as unknown:
        read(model="gpt-4")
    assert (unknown.value.status, unknown.value.code) == (404, "model_not_found")
    with pytest.raises(ApiError, match="no chat template; use /v1/completions") as plain:
        read(is_chat=True, tokenizer=ChatTokenizer(tmp_path))
    assert plain.value.status == 400
