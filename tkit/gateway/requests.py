"""A body of /v1/completions or /v1/chat/completions -> what to generate and how to answer. Knows OpenAI's names and
the additions of vLLM that clients rely on; sees no server.

What is not supported is refused by name, unless it asks for nothing: an answer that silently lacks what was asked for
is worse than none. Everything that is wrong is listed at once.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tkit.errors import InputError, did_you_mean
from tkit.gateway.chat import ChatTokenizer
from tkit.gateway.errors import ApiError
from tkit.specs.generation import GenerationRequest

# fmt: off
COMMON: dict[str, tuple[type, ...]] = {
    "model":              (str,),
    "max_tokens":         (int,),
    "min_tokens":         (int,),
    "temperature":        (int, float),
    "top_p":              (int, float),
    "top_k":              (int,),
    "repetition_penalty": (int, float),
    "seed":               (int,),
    "stop":               (str, list),
    "ignore_eos":         (bool,),
    "stream":             (bool,),
    "stream_options":     (dict,),
}
COMPLETION = {**COMMON, "prompt": (str, list), "logprobs": (int,)}
CHAT = {**COMMON, "messages": (list,), "max_completion_tokens": (int,), "logprobs": (bool,), "chat_template_kwargs": (dict,)}
# Understood and refused, unless they ask for nothing: name -> the values that ask for nothing. null always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n":                 (1,),
    "best_of":           (1,),
    "echo":              (False,),
    "suffix":            ("",),
    "presence_penalty":  (0,),
    "frequency_penalty": (0,),
    "logit_bias":        ({},),
    "top_logprobs":      (0,),
    "tools":             ([],),
    "tool_choice":       ("none", "auto"),
    "functions":         ([],),
    "response_format":   ({"type": "text"},),
    "modalities":        (["text"],),
}
# For OpenAI's own books; they change no answer.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
# fmt: on
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
# For a chat that does not say: what is left of the context, but no more than this. The KV cache is reserved for all the
# tokens that a request may take, so the whole of a long context would shut the others out.
CHAT_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class ApiRequest:
    generation: GenerationRequest
    is_chat: bool
    stream: bool
    include_usage: bool


def read_request(body: Any, *, is_chat: bool, model: str, max_positions: int, tokenizer: ChatTokenizer) -> ApiRequest:
    """Raises ApiError: 404 for another model, 400 with everything that is wrong."""
    if not isinstance(body, Mapping):
        raise ApiError(400, f"the body is {_kind(body)}, expected an object")
    fields = CHAT if is_chat else COMPLETION
    values = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    problems = _problems(values, fields)
    if isinstance(values.get("model"), str) and values["model"] != model:
        message = f'the model "{values["model"]}" does not exist; this server has "{model}"'
        raise ApiError(404, message, param="model", code="model_not_found")
    stop = values.get("stop", [])
    stop_words = [stop] if isinstance(stop, str) else stop
    if isinstance(stop_words, list) and not all(isinstance(word, str) and _is_text(word) for word in stop_words):
        problems["stop"] = "stop is expected to hold texts only"
    options = values.get("stream_options", {})
    if isinstance(options, Mapping) and (unknown := options.keys() - {"include_usage"}):
        problems["stream_options"] = f"unknown key in stream_options: {', '.join(sorted(unknown))}"
    if options and not values.get("stream"):
        problems["stream_options"] = "stream_options needs stream: true"
    prompt = ""
    if "messages" not in problems and "prompt" not in problems:
        try:
            prompt = _chat_prompt(values, tokenizer) if is_chat else _prompt(values)
        except InputError as error:
            problems["messages" if is_chat else "prompt"] = error.message
    _refuse(problems)
    max_tokens = values.get("max_completion_tokens", values.get("max_tokens"))
    if max_tokens is None:
        left = max_positions - tokenizer.num_tokens(prompt) if is_chat else COMPLETION_TOKENS
        max_tokens = max(1, min(left, CHAT_TOKENS))
    if max_tokens > max_positions:
        problems["max_tokens"] = f"max_tokens is {max_tokens}, the model has {max_positions} positions"
        _refuse(problems, code="context_length_exceeded")
    generation = _generation(values, prompt, max_tokens, stop_words, is_chat=is_chat)
    return ApiRequest(
        generation=generation,
        is_chat=is_chat,
        stream=values.get("stream", False),
        include_usage=options.get("include_usage", False),
    )


def _generation(
    values: Mapping[str, Any], prompt: str, max_tokens: int, stop_words: list[str], *, is_chat: bool
) -> GenerationRequest:
    numbers = ("min_tokens", "temperature", "top_p", "repetition_penalty")
    given = {name: values[name] for name in numbers if name in values}
    top_k = values.get("top_k", 0)
    try:
        return GenerationRequest(
            prompt=prompt,
            max_tokens=max_tokens,
            top_k=0 if top_k == -1 else top_k,  # vLLM says -1 for no limit as well
            seed=values.get("seed", random.getrandbits(64)) % 2**64,
            stop_words=tuple(stop_words),
            end_id=-1 if values.get("ignore_eos") else None,
            return_log_probs=bool(values.get("logprobs")) if is_chat else "logprobs" in values,
            **given,
        )
    except InputError as error:
        # The specification's field of the stop words is called otherwise.
        problems = [problem.replace("stop_words", "stop") for problem in error.problems]
        raise ApiError(400, "; ".join(problems), param=problems[0].split()[0]) from error


def _problems(values: Mapping[str, Any], fields: Mapping[str, tuple[type, ...]]) -> dict[str, str]:
    """By parameter."""
    problems = {}
    for name, value in values.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                problems[name] = f"{name} is {_short(value)}, this server supports only {_short(NEUTRAL[name][0])}"
        elif name not in fields:
            problems[name] = f'unknown parameter "{name}"{did_you_mean(name, fields)}'
        elif not isinstance(value, fields[name]) or (isinstance(value, bool) and bool not in fields[name]):
            expected = " or ".join(_kind(kind()) for kind in fields[name])
            problems[name] = f"{name} is {_kind(value)}, expected {expected}"
    if fields is COMPLETION and values.get("logprobs", 0) != 0:
        problems.setdefault(
            "logprobs", f"logprobs is {values['logprobs']}, expected 0: those of the chosen tokens only"
        )
    return problems


def _refuse(problems: Mapping[str, str], code: str | None = None) -> None:
    if problems:
        raise ApiError(400, "; ".join(problems.values()), param=next(iter(problems)), code=code)


def _prompt(values: Mapping[str, Any]) -> str:
    prompt = values.get("prompt")
    if isinstance(prompt, list):
        if len(prompt) != 1 or not isinstance(prompt[0], str):
            raise InputError("prompt is a list; only a list of one text is supported: send one request per prompt")
        prompt = prompt[0]
    if not prompt:
        raise InputError("prompt is empty" if prompt == "" else "prompt is missing")
    return _text(prompt, "prompt")


def _chat_prompt(values: Mapping[str, Any], tokenizer: ChatTokenizer) -> str:
    messages = values.get("messages")
    if not messages:
        raise InputError("messages is empty" if messages == [] else "messages is missing")
    if not tokenizer.has_template:
        raise InputError("this model's tokenizer has no chat template; use /v1/completions")
    plain = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    return _text(tokenizer.render(plain, values.get("chat_template_kwargs", {})), "messages")


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is {_kind(message)}, expected an object")
    if not isinstance(message.get("role"), str):
        raise InputError(f"{where}.role is {_kind(message.get('role'))}, expected a string")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise InputError(f"{where}.content is {_kind(content)}, expected a string")
    return {**message, "content": content}


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InputError(f"{where}: only parts of type text are supported")
    text: str = part["text"]
    return text


def _text(text: str, name: str) -> str:
    if not _is_text(text):
        raise InputError(f"{name} is not valid Unicode: it holds half a character")
    return text


def _is_text(text: str) -> bool:
    """JSON can escape half of a character, which no text holds."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    kinds = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), "null")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
