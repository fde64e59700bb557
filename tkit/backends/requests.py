"""One Triton request of the `ensemble` surface -> GenerationRequest, and chunks of the answer -> output arrays.

Knows names, types and TensorRT-LLM's meanings; never sees Triton or the engine. Every array has the batch dimension 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tkit.errors import InputError, did_you_mean
from tkit.specs.generation import INVALID_REQUEST, GenerationChunk, GenerationRequest
from tkit.triton.ensemble import INPUTS

# Optional inputs that are understood and refused unless they ask for nothing: name -> the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "beam_width":               (1,),
    "num_return_sequences":     (1,),
    "presence_penalty":         (0.0,),
    "frequency_penalty":        (0.0,),
    "return_context_logits":    (False,),
    "return_generation_logits": (False,),
}  # fmt: skip
# `pad_id` and `length_penalty` change nothing for one sequence without beams, whatever their value.
NUMBERS = ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "end_id")
FLAGS = ("stream", "return_num_input_tokens", "return_num_output_tokens", "return_perf_metrics", "return_log_probs")
IGNORE_END = -1  # end_id: no token ends the text
ONE_TOKEN = np.array([[1]], dtype=np.int32)  # num_output_tokens of nearly every response of a stream
Arrays = dict[str, np.ndarray]  # by output name


@dataclass(frozen=True, kw_only=True)
class EnsembleRequest:
    """What to generate and how to answer: as a stream or as one response, with which extra outputs."""

    generation: GenerationRequest
    stream: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False
    return_perf_metrics: bool = False


def read_request(inputs: Mapping[str, np.ndarray], parameters: Iterable[str] = ()) -> EnsembleRequest:
    """Raises InputError with everything that is wrong with the request, by input name.

    `parameters` are the names of Triton's request parameters: /generate turns JSON keys that are no input into them,
    so an unknown one is a misspelt or missing feature.
    """
    problems = [_unknown(name) for name in parameters if name != "id" and not name.startswith("triton_")]
    values: dict[str, Any] = {}
    for name, array in inputs.items():
        try:
            values[name] = _value(name, array)
        except ValueError as error:
            problems.append(str(error))
    problems += [
        f"{name} is {values[name]}, this server supports only {' or '.join(map(str, neutral))}"
        for name, neutral in UNSUPPORTED.items()
        if name in values and values[name] not in neutral
    ]
    if any(values.get("bad_words", ())):
        problems.append("bad_words is not supported by this server")
    if values.get("end_id", 0) < IGNORE_END:
        problems.append(f"end_id is {values['end_id']}, expected a token id, or {IGNORE_END} for none")
    generation = None
    try:
        generation = _generation(values)
    except InputError as error:
        problems += error.problems
    if problems or generation is None:
        raise InputError(INVALID_REQUEST, problems=problems)
    flags = {name: values[name] for name in FLAGS if name in values and name != "return_log_probs"}
    return EnsembleRequest(generation=generation, **flags)


def _unknown(name: str) -> str:
    return f'unknown parameter "{name}"{did_you_mean(name, [tensor.name for tensor in INPUTS])}'


def _value(name: str, array: np.ndarray) -> Any:
    """A plain Python value: str, a tuple of words, bool, int or float."""
    if name in ("stop_words", "bad_words"):
        return tuple(_text(name, item) for item in array.reshape(-1))
    if array.size != 1:
        raise ValueError(f"{name} has {array.size} values, expected one")
    item = array.reshape(-1)[0]
    return _text(name, item) if array.dtype == np.object_ else item.item()


def _text(name: str, item: Any) -> str:
    try:
        return item if isinstance(item, str) else bytes(item).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error


def _generation(values: Mapping[str, Any]) -> GenerationRequest:
    """TensorRT-LLM's defaults for what was left out: without top_k and top_p it decodes greedily."""
    given = {name: values[name] for name in NUMBERS if name in values}
    top_k, top_p = values.get("top_k", 0), values.get("top_p", 0.0)
    if top_p == 0:  # `regularizeTopKTopP` in TensorRT-LLM's samplingTopKKernels.h
        given["top_k"], given["top_p"] = top_k or 1, 1.0
    return GenerationRequest(
        prompt=values.get("text_input", ""),
        stop_words=tuple(word for word in values.get("stop_words", ()) if word),
        exclude_input_in_output=values.get("exclude_input_in_output", True),
        return_log_probs=values.get("return_log_probs", False),
        **{"max_tokens": 0, **given},
    )


class Answer:
    """Turns the chunks of one answer into output arrays, one set per response: deltas for a stream, else the whole."""

    def __init__(self, request: EnsembleRequest):
        self._request = request
        self._text: list[str] = []
        self._log_probs: list[float] = []
        self._num_tokens = 0
        self._cum_log_prob = 0.0
        self._num_input_tokens: np.ndarray | None = None  # the same array for every response

    def outputs(self, chunk: GenerationChunk) -> Arrays | None:
        """The next response, or None while there is nothing to send."""
        self._text.append(chunk.text)
        self._log_probs += chunk.log_probs
        self._num_tokens += len(chunk.token_ids)
        self._cum_log_prob += sum(chunk.log_probs)
        if not self._request.stream and chunk.finish_reason is None:
            return None
        arrays = self._arrays(chunk)
        self._text, self._log_probs, self._num_tokens = [], [], 0
        return arrays

    def _arrays(self, chunk: GenerationChunk) -> Arrays:
        """Counts and log probabilities are those of this response, as TensorRT-LLM's; cum_log_probs runs on."""
        request = self._request
        arrays: Arrays = {"text_output": np.array([["".join(self._text).encode("utf-8")]], dtype=np.object_)}
        if request.generation.return_log_probs:
            arrays["cum_log_probs"] = np.array([[self._cum_log_prob]], dtype=np.float32)
            arrays["output_log_probs"] = np.array([[self._log_probs]], dtype=np.float32)
        if request.return_num_input_tokens:
            if self._num_input_tokens is None:
                self._num_input_tokens = np.array([[chunk.num_input_tokens]], dtype=np.int32)
            arrays["num_input_tokens"] = self._num_input_tokens
        if request.return_num_output_tokens:
            is_one = self._num_tokens == 1
            arrays["num_output_tokens"] = ONE_TOKEN if is_one else np.array([[self._num_tokens]], dtype=np.int32)
        if request.return_perf_metrics:
            arrays["arrival_time_ns"] = np.array([[chunk.arrival_ns]], dtype=np.int64)
            arrays["first_scheduled_time_ns"] = np.array([[chunk.first_scheduled_ns]], dtype=np.int64)
            arrays["first_token_time_ns"] = np.array([[chunk.first_token_ns]], dtype=np.int64)
            arrays["last_token_time_ns"] = np.array([[chunk.last_token_ns]], dtype=np.int64)
        return arrays
