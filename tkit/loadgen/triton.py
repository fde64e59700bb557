"""What a request to TensorRT-LLM on Triton holds, whichever protocol carries it: to its `ensemble`, or to its model of the
LLM API, which calls some of it otherwise, has no way to ignore the end of a sequence, and counts no tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tkit.errors import ServerError, did_you_mean

# name -> (Triton data type, value). Sent when the model lists them; the first two must be there.
REQUIRED_INPUTS = ("text_input", "max_tokens")
Values = dict[str, tuple[str, Any]]
LLMAPI_NAMES: Mapping[str, str] = {
    "max_tokens":              "sampling_param_max_tokens",
    "stream":                  "streaming",
    "top_k":                   "sampling_param_top_k",
    "temperature":             "sampling_param_temperature",
    "seed":                    "sampling_param_seed",
    "exclude_input_in_output": "sampling_param_exclude_input_from_output",
}  # fmt: skip


def request_inputs(accepted: Collection[str], prompt: str, osl: int, seed: int) -> Values:
    """Those that the model lists, under its own names."""
    named = ((_name(accepted, name), value) for name, value in _ensemble_inputs(prompt, osl, seed).items())
    return {name: value for name, value in named if name in accepted}


def _name(accepted: Collection[str], name: str) -> str:
    return name if name in accepted else LLMAPI_NAMES.get(name, name)


def _ensemble_inputs(prompt: str, osl: int, seed: int) -> Values:
    return {
        "text_input":               ("BYTES", prompt),
        "max_tokens":               ("INT32", osl),
        "min_tokens":               ("INT32", osl),
        "end_id":                   ("INT32", -1),  # no token ends the text
        "stream":                   ("BOOL", True),
        "top_k":                    ("INT32", 1),  # greedy at any temperature; some releases refuse temperature 0
        "temperature":              ("FP32", 1.0),
        "seed":                     ("UINT64", seed),
        "exclude_input_in_output":  ("BOOL", True),
        "return_num_input_tokens":  ("BOOL", True),
        "return_num_output_tokens": ("BOOL", True),
    }  # fmt: skip


def refuse_unless_streaming(url: str, model: str, inputs: Collection[str], *, is_decoupled: bool) -> None:
    problems = [
        f'no input "{name}"{did_you_mean(name, inputs)}'
        for name in REQUIRED_INPUTS
        if _name(inputs, name) not in inputs
    ]
    if not is_decoupled:
        problems.append("not decoupled, so it cannot stream")
    if problems:
        raise ServerError(
            f'{url}: model "{model}" does not speak as TensorRT-LLM\'s ensemble does',
            problems=problems,
            hint=f"its inputs: {', '.join(inputs)}; name another model: --model NAME",
        )


def token_source(inputs: Collection[str], outputs: Collection[str]) -> str:
    is_counting = {"num_output_tokens", "return_num_output_tokens"} <= {*inputs, *outputs}
    return "server_usage" if is_counting else "tokenizer"
