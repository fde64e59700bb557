"""A body of /v1/completions or /v1/chat/completions -> what to generate and how to answer. Knows OpenAI's names and
the additions of vLLM that clients rely on; sees no server.

What is not supported is refused by name, unless it asks for nothing: an answer that silently lacks what was asked for
is worse than none. Everything that is wrong is listed at once.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tkit.errors import InputError, did_you_mean
from tkit.gateway.errors import TOO_LONG, ApiError
from tkit.gateway.prompts import PromptTokenizer
from tkit.specs.generation import GenerationRequest

# fmt: off
COMMON: dict[str, tuple[type, ...]] = {
    "model":              (str,),
    "n":                  (int,),
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
MAX_CHOICES = 256  # each is a request to the model, whose queue holds as many by default


@dataclass(frozen=True, kw_only=True)
class ApiRequest:
    generations: tuple[GenerationRequest, ...]  # one per choice: n of each prompt, one after the other
    n: int
    is_chat: bool
    stream: bool
    include_usage: bool


def read_request(body: Any, *, is_chat: bool, model: str, max_positions: int, tokenizer: PromptTokenizer) -> ApiRequest:
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
    n = values.get("n", 1)
    if "n" not in problems and not 1 <= n <= MAX_CHOICES:
        problems["n"] = f"n is {n}, expected 1 to {MAX_CHOICES}"
    name = "messages" if is_chat else "prompt"
    prompts: list[str] = []
    if not problems.keys() & {name, "n"}:
        try:
            prompts = [_chat_prompt(values, tokenizer)] if is_chat else _prompts(values, n, max_positions, tokenizer)
            _refuse_too_long(prompts, max_positions, tokenizer)
        except InputError as error:
            problems[name] = error.message
    _refuse(problems)
    max_tokens = values.get("max_completion_tokens", values.get("max_tokens"))
    if max_tokens is None:
        left = max_positions - tokenizer.num_tokens(prompts[0]) if is_chat else COMPLETION_TOKENS
        max_tokens = max(1, min(left, CHAT_TOKENS))
    if max_tokens > max_positions:
        problems["max_tokens"] = f"max_tokens is {max_tokens}, the model has {max_positions} positions"
        _refuse(problems, code=TOO_LONG)
    return ApiRequest(
        generations=_generations(values, prompts, n, max_tokens, stop_words, is_chat=is_chat),
        n=n,
        is_chat=is_chat,
        stream=values.get("stream", False),
        include_usage=options.get("include_usage", False),
    )


def _generations(
    values: Mapping[str, Any], prompts: list[str], n: int, max_tokens: int, stop_words: list[str], *, is_chat: bool
) -> tuple[GenerationRequest, ...]:
    """With a seed each prompt's choices have that, the next and so on; without, each choice has one of its own."""
    numbers = ("min_tokens", "temperature", "top_p", "repetition_penalty")
    given = {name: values[name] for name in numbers if name in values}
    top_k, seed = values.get("top_k", 0), values.get("seed")
    try:
        shared = GenerationRequest(
            prompt="",
            max_tokens=max_tokens,
            top_k=0 if top_k == -1 else top_k,  # vLLM says -1 for no limit as well
            stop_words=tuple(stop_words),
            end_id=-1 if values.get("ignore_eos") else None,
            return_log_probs=bool(values.get("logprobs")) if is_chat else "logprobs" in values,
            **given,
        )
    except InputError as error:
        # The specification's field of the stop words is called otherwise.
        problems = [problem.replace("stop_words", "stop") for problem in error.problems]
        raise ApiError(400, "; ".join(problems), param=problems[0].split()[0]) from error
    return tuple(
        replace(shared, prompt=prompt, seed=random.getrandbits(64) if seed is None else (seed + choice) % 2**64)
        for prompt in prompts
        for choice in range(n)
    )


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


def _prompts(values: Mapping[str, Any], n: int, max_positions: int, tokenizer: PromptTokenizer) -> list[str]:
    """Of a text, token ids, or a list of either."""
    prompt = values.get("prompt")
    if not prompt:
        raise InputError("prompt is missing" if prompt is None else "prompt is empty")
    if isinstance(prompt, str) or all(type(item) is int for item in prompt):
        return [_prompt(prompt, "prompt", max_positions, tokenizer)]
    if n * len(prompt) > MAX_CHOICES:
        raise InputError(f"n = {n} for each of {len(prompt)} prompts, at most {MAX_CHOICES} choices are given at once")
    return [_prompt(one, f"prompt[{index}]", max_positions, tokenizer) for index, one in enumerate(prompt)]


def _prompt(prompt: Any, name: str, max_positions: int, tokenizer: PromptTokenizer) -> str:
    if prompt in ("", []):
        raise InputError(f"{name} is empty")
    if isinstance(prompt, str):
        return tokenizer.without_bos(_text(prompt, name)) or prompt
    if not isinstance(prompt, list) or not all(type(item) is int for item in prompt):
        raise InputError(f"{name} is {_kind(prompt)}, expected a string or a list of token ids")
    if len(prompt) > max_positions:
        raise _too_long(f"{name} has {len(prompt)} tokens", max_positions)
    try:
        return tokenizer.text_of(prompt)
    except InputError as error:
        raise InputError(f"{name}: {error.message}") from error


def _refuse_too_long(prompts: Sequence[str], max_positions: int, tokenizer: PromptTokenizer) -> None:
    """What is far too long is refused without being encoded, which takes a second per megabyte."""
    length = max(map(len, prompts))
    if length > max_positions and length > max_positions * tokenizer.longest_token:
        raise _too_long(f"the prompt has {length} characters", max_positions)


def _too_long(what: str, max_positions: int) -> ApiError:
    return ApiError(400, f"{what}, the model has {max_positions} positions", param="prompt", code=TOO_LONG)


def _chat_prompt(values: Mapping[str, Any], tokenizer: PromptTokenizer) -> str:
    messages = values.get("messages")
    if not messages:
        raise InputError("messages is empty" if messages == [] else "messages is missing")
    if not tokenizer.has_template:
        raise InputError("this model's tokenizer has no chat template; use /v1/completions")
    plain = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    prompt = tokenizer.render(plain, values.get("chat_template_kwargs", {}))
    return tokenizer.without_bos(_text(prompt, "messages"))


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
