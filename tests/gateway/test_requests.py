"""Bodies of OpenAI's API -> what to generate; everything that is wrong with them, by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tkit import demo
from tkit.gateway.errors import ApiError
from tkit.gateway.prompts import PromptTokenizer
from tkit.gateway.requests import CHAT_TOKENS, ApiRequest, read_request
from tkit.specs.generation import GenerationRequest

TOKENIZER = PromptTokenizer(demo.MODEL_DIR)
HELLO = [{"role": "user", "content": "Hello"}]


def read(
    *, is_chat: bool = False, max_positions: int = 2048, tokenizer: PromptTokenizer = TOKENIZER, **body: Any
) -> ApiRequest:
    body = {"model": "ensemble", **({"messages": HELLO} if is_chat else {"prompt": "a"}), **body}
    return read_request(body, is_chat=is_chat, model="ensemble", max_positions=max_positions, tokenizer=tokenizer)


def test_defaults_are_openais() -> None:
    asked = read(seed=7)
    assert asked.generations == (GenerationRequest(prompt="a", max_tokens=16, temperature=1, top_p=1, seed=7),)
    assert (asked.stream, asked.include_usage) == (False, False)
    assert read().generations[0].seed != read().generations[0].seed  # OpenAI's answers differ from request to request


def test_everything_that_is_supported() -> None:
    asked = read(
        prompt=["a"], max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.9, top_k=-1, repetition_penalty=1.1, seed=-1,
        stop="end", ignore_eos=True, logprobs=0, stream=True, stream_options={"include_usage": True}, n=1, best_of=1,
        echo=False, presence_penalty=0.0, logit_bias={}, user="me", suffix=None,
    )  # fmt: skip
    [generation] = asked.generations
    assert generation == GenerationRequest(
        prompt="a", max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.9, repetition_penalty=1.1, seed=2**64 - 1,
        stop_words=("end",), end_id=-1, return_log_probs=True,
    )  # fmt: skip
    assert (asked.stream, asked.include_usage) == (True, True)


def test_several_prompts_and_several_choices_of_each() -> None:
    hello = TOKENIZER.text_of([1, 5])
    asked = read(prompt=["a", [1, 5]], n=2, seed=2**64 - 1, top_p=0.5)
    told = [(one.prompt, one.seed, one.top_p) for one in asked.generations]
    assert told == [("a", 2**64 - 1, 0.5), ("a", 0, 0.5), (hello, 2**64 - 1, 0.5), (hello, 0, 0.5)]
    assert [one.prompt for one in read(prompt=[1, 5]).generations] == [hello]
    assert [one.prompt for one in read(prompt="<s>a").generations] == ["a"]
    chat = read(is_chat=True, n=3)
    assert len({one.seed for one in chat.generations}) == 3 and len({one.prompt for one in chat.generations}) == 1


def test_chat() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    asked = read(is_chat=True, messages=messages, logprobs=True, max_tokens=5, max_completion_tokens=4)
    [generation] = asked.generations
    assert generation.prompt == "user: Hel\nlo\n\nassistant:"  # the tokenizer puts <s> before it
    assert (generation.max_tokens, generation.return_log_probs) == (4, True)
    assert not read(is_chat=True, logprobs=False).generations[0].return_log_probs


def test_a_chat_without_a_length_gets_what_is_left_up_to_a_bound() -> None:
    num_tokens = TOKENIZER.num_tokens("user: Hello\n\nassistant:")
    assert read(is_chat=True, max_positions=100).generations[0].max_tokens == 100 - num_tokens
    assert read(is_chat=True, max_positions=100_000).generations[0].max_tokens == CHAT_TOKENS
    assert (
        read(is_chat=True, max_positions=5).generations[0].max_tokens == 1
    )  # the engine says that the prompt is too long


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"n": 0}, "n", "n is 0, expected 1 to 256"),
        ({"n": 1.5}, "n", "n is a number, expected an integer"),
        ({"n": 2, "prompt": ["a"] * 129}, "prompt", "n = 2 for each of 129 prompts, at most 256 choices"),
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
        ({"stop": ["a"] * 129}, "stop", "stop holds 129 words, at most 128 are looked for"),
        ({"logprobs": 2}, "logprobs", "logprobs is 2, expected 0"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream: true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "unknown key in stream_options: x"),
        ({"prompt": ["a", 1]}, "prompt", "prompt[1] is an integer, expected a string or a list of token ids"),
        ({"prompt": [[1, True]]}, "prompt", "prompt[0] is a list, expected a string or a list of token ids"),
        ({"prompt": ["a", ""]}, "prompt", "prompt[1] is empty"),
        ({"prompt": []}, "prompt", "prompt is empty"),
        ({"prompt": [[1, 5], [5]]}, "prompt", "prompt[1]: the model puts token id 1 (BOS) before every text"),
        ({"prompt": [5] * 2049}, "prompt", "prompt has 2049 tokens, the model has 2048 positions"),
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
        ({"suffix": "x", "best_of": 2}, "suffix", 'suffix is "x", this server supports only ""; best_of is 2'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(body: dict[str, Any], param: str | None, message: str) -> None:
    with pytest.raises(ApiError) as error:
        read(**body)
    assert (error.value.status, error.value.param) == (400, param)
    assert message in error.value.message


@pytest.mark.parametrize(
    "body", [{"prompt": "x" * 100_000}, {"is_chat": True, "messages": [{"role": "user", "content": "x" * 100_000}]}]
)
def test_what_is_far_too_long_is_refused_without_being_encoded(
    monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    monkeypatch.setattr(PromptTokenizer, "num_tokens", lambda *_: pytest.fail("encoded"))
    with pytest.raises(ApiError, match=r"the prompt has 1000\d\d characters, the model has 2048 positions") as error:
        read(**body)
    assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize("body", [None, [], "text", 3])
def test_a_body_that_is_no_object(body: Any) -> None:
    with pytest.raises(ApiError, match="expected an object"):
        read_request(body, is_chat=False, model="ensemble", max_positions=9, tokenizer=TOKENIZER)


def test_another_model_and_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match='the model "gpt-4" does not exist; this server has "ensemble"') as unknown:
        read(model="gpt-4")
    assert (unknown.value.status, unknown.value.code) == (404, "model_not_found")
    with pytest.raises(ApiError, match="no chat template; use /v1/completions") as plain:
        read(is_chat=True, tokenizer=PromptTokenizer(tmp_path))
    assert plain.value.status == 400
