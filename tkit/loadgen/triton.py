"""What a request to TensorRT-LLM's `ensemble` on Triton holds, whichever protocol carries it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tkit.errors import ServerError, did_you_mean

# name -> (Triton data type, value). Sent when the model lists them; the first two must be there.
REQUIRED_INPUTS = ("text_input", "max_tokens")
Values = dict[str, tuple[str, Any]]


def ensemble_inputs(prompt: str, osl: int, seed: int) -> Values:
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
    problems = [f'no input "{name}"{did_you_mean(name, inputs)}' for name in REQUIRED_INPUTS if name not in inputs]
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
