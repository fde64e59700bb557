"""The `ensemble` surface without a server: what clients send, what they get, what they are told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tkit.backends.requests import Answer, EnsembleRequest, read_request
from tkit.errors import InputError
from tkit.specs.generation import GenerationChunk, GenerationRequest

DTYPES = {
    "max_tokens": np.int32, "min_tokens": np.int32, "top_k": np.int32, "end_id": np.int32, "pad_id": np.int32,
    "beam_width": np.int32, "num_return_sequences": np.int32, "seed": np.uint64, "top_p": np.float32,
    "temperature": np.float32, "repetition_penalty": np.float32, "presence_penalty": np.float32,
    "frequency_penalty": np.float32, "length_penalty": np.float32,
}  # fmt: skip


def arrays(**values: Any) -> dict[str, np.ndarray]:
    """As Triton hands them over: batch dimension first, text as bytes."""
    inputs = {}
    for name, value in {"text_input": b"hello world", "max_tokens": 8, **values}.items():
        if isinstance(value, bytes):
            value = [value]
        dtype = np.object_ if isinstance(value, list) else DTYPES.get(name, np.bool_)
        inputs[name] = np.array([value if isinstance(value, list) else [value]], dtype=dtype)
    return inputs


def problems(**values: Any) -> tuple[str, ...]:
    with pytest.raises(InputError) as error:
        read_request(arrays(**values))
    return error.value.problems


def test_shortest_request_is_greedy_as_in_tensorrt_llm() -> None:
    request = read_request(arrays())
    assert request == EnsembleRequest(
        generation=GenerationRequest(prompt="hello world", max_tokens=8, top_k=1), stream=False
    )
    assert request.generation.is_greedy


def test_every_field_arrives() -> None:
    request = read_request(
        arrays(
            text_input="häuser".encode(), min_tokens=2, temperature=0.5, top_k=7, top_p=0.25, repetition_penalty=1.5,
            seed=2**64 - 1, stop_words=[b"a", b"", b"b c"], end_id=-1, exclude_input_in_output=False,
            return_log_probs=True, stream=True, return_num_input_tokens=True, return_num_output_tokens=True,
            return_perf_metrics=True,
        )
    )  # fmt: skip
    assert request == EnsembleRequest(
        generation=GenerationRequest(
            prompt="häuser", max_tokens=8, min_tokens=2, temperature=0.5, top_k=7, top_p=0.25, repetition_penalty=1.5,
            seed=2**64 - 1, stop_words=("a", "b c"), end_id=-1, exclude_input_in_output=False, return_log_probs=True,
        ),
        stream=True, return_num_input_tokens=True, return_num_output_tokens=True, return_perf_metrics=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "top_k", "top_p"),
    [
        ({}, 1, 1.0),
        ({"top_k": 0, "top_p": 0.0}, 1, 1.0),
        ({"top_k": 5}, 5, 1.0),
        ({"top_k": 5, "top_p": 0.0}, 5, 1.0),
        ({"top_p": 1.0}, 0, 1.0),
        ({"top_k": 5, "top_p": 0.5}, 5, 0.5),
    ],
)
def test_top_k_and_top_p_left_out_or_zero(given: dict[str, Any], top_k: int, top_p: float) -> None:
    generation = read_request(arrays(**given)).generation
    assert (generation.top_k, generation.top_p) == (top_k, top_p)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"max_tokens": -5, "min_tokens": 0}, "max_tokens is -5, expected at least 1"),
        ({"min_tokens": 9}, "min_tokens is 9, expected 0 to max_tokens (8)"),
        ({"temperature": -1.0}, "temperature is -1.0, expected 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan, expected 0 or more"),
        ({"top_p": 1.5}, "top_p is 1.5, expected more than 0, at most 1"),
        ({"top_k": -1, "top_p": 0.5}, "top_k is -1, expected 0 (no limit) or more"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected more than 0"),
        ({"end_id": -2}, "end_id is -2, expected a token id, or -1 for none"),
        ({"beam_width": 4}, "beam_width is 4, this server supports only 1"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2, this server supports only 1"),
        ({"presence_penalty": 0.5}, "presence_penalty is 0.5, this server supports only 0.0"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is 0.5, this server supports only 0.0"),
        ({"return_context_logits": True}, "return_context_logits is True, this server supports only False"),
        ({"return_generation_logits": True}, "return_generation_logits is True, this server supports only False"),
        ({"bad_words": [b"x"]}, "bad_words is not supported by this server"),
        ({"text_input": b"\xff"}, "text_input is not UTF-8: invalid start byte at byte 0"),
        ({"stop_words": [b"ok", b"\xe4"]}, "stop_words is not UTF-8: unexpected end of data at byte 0"),
    ],
)
def test_a_bad_value_is_named(given: dict[str, Any], problem: str) -> None:
    assert problem in problems(**given)


def test_everything_wrong_is_listed_at_once() -> None:
    assert len(problems(max_tokens=0, beam_width=2, temperature=-1.0, bad_words=[b"x"])) == 4


def test_what_common_clients_always_send_asks_for_nothing() -> None:
    neutral = arrays(bad_words=[b""], stop_words=[b""], pad_id=2, beam_width=1, length_penalty=1.0, presence_penalty=0)
    assert read_request(neutral, ["id", "triton_enable_empty_final_response"]) == read_request(arrays())


def test_unknown_parameter_is_refused() -> None:
    with pytest.raises(InputError) as error:
        read_request(arrays(), ["temprature"])
    assert error.value.problems == ('unknown parameter "temprature" (did you mean "temperature"?)',)


def chunk(text: str, *token_ids: int, total: int, log_probs: tuple[float, ...] = (), reason: str | None = None) -> Any:
    return GenerationChunk(
        text=text, token_ids=token_ids, log_probs=log_probs, num_input_tokens=2, num_output_tokens=total,
        arrival_ns=1, first_scheduled_ns=2, first_token_ns=3, last_token_ns=4, finish_reason=reason,
    )  # fmt: skip


def plain(outputs: dict[str, np.ndarray] | None) -> dict[str, Any] | None:
    return None if outputs is None else {name: array.tolist() for name, array in outputs.items()}


def test_a_stream_answers_each_chunk_with_its_own_part() -> None:
    answer = Answer(read_request(arrays(stream=True, return_num_output_tokens=True, return_log_probs=True)))
    first = plain(answer.outputs(chunk("he", 5, 6, total=2, log_probs=(-0.5, -0.25))))
    last = plain(answer.outputs(chunk("llo", 7, total=3, log_probs=(-1.0,), reason="length")))
    assert first == {
        "text_output": [[b"he"]],
        "cum_log_probs": [[-0.75]],
        "output_log_probs": [[[-0.5, -0.25]]],
        "num_output_tokens": [[2]],
    }
    assert last == {
        "text_output": [[b"llo"]],
        "cum_log_probs": [[-1.75]],
        "output_log_probs": [[[-1.0]]],
        "num_output_tokens": [[1]],
    }


def test_without_a_stream_one_response_holds_the_whole() -> None:
    flags = dict(return_num_input_tokens=True, return_num_output_tokens=True, return_perf_metrics=True)
    answer = Answer(read_request(arrays(**flags)))
    assert answer.outputs(chunk("hé", 5, total=1)) is None
    assert plain(answer.outputs(chunk("llo", 6, total=2, reason="stop"))) == {
        "text_output": [["héllo".encode()]],
        "num_input_tokens": [[2]],
        "num_output_tokens": [[2]],
        "arrival_time_ns": [[1]],
        "first_scheduled_time_ns": [[2]],
        "first_token_time_ns": [[3]],
        "last_token_time_ns": [[4]],
    }
