"""Pieces of text -> the objects of OpenAI's API, whole or as events. Knows JSON and OpenAI's names; no server."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tkit.gateway.requests import ApiRequest
from tkit.gateway.triton import Piece

DONE = b"data: [DONE]\n\n"
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class Answer:
    """One answer of one or several choices, told piece by piece: `whole` at the end, or `events` for each."""

    def __init__(self, request: ApiRequest, model: str):
        self._request = request
        self._choices = [_Choice() for _ in request.generations]
        self._num_open = len(self._choices)
        self._head = {
            "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": _object(request),
            "created": int(time.time()),
            "model": model,
        }
        # All that an event says but its choice, written once: there is an event per token.
        self._event_start = b"data: " + to_json(self._head)[:-1] + b',"choices":['
        self._event_end = b'],"usage":null}\n\n' if request.include_usage else b"]}\n\n"

    @property
    def id(self) -> str:
        return str(self._head["id"])

    def add(self, index: int, piece: Piece) -> None:
        self._count(index, piece)
        self._choices[index].pieces.append(piece)

    def whole(self) -> dict[str, Any]:
        choices = [self._whole(index, choice.pieces) for index, choice in enumerate(self._choices)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def events(self, index: int, piece: Piece) -> Iterator[bytes]:
        """The server-sent events of one piece; with the last of all come the usage, if asked for, and the end."""
        choice = self._choices[index]
        self._count(index, piece)
        if choice.is_first and self._request.is_chat:
            yield self._event({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        choice.is_first = False
        told: dict[str, Any] = {"delta": {"content": piece.text}} if self._request.is_chat else {"text": piece.text}
        log_probs = self._log_probs(choice, [piece])
        yield self._event({"index": index, **told, "logprobs": log_probs, "finish_reason": piece.finish_reason})
        if piece.finish_reason is not None:
            self._num_open -= 1
            if not self._num_open:
                if self._request.include_usage:
                    yield _event({**self._head, "choices": [], "usage": self._usage()})
                yield DONE

    def _event(self, choice: dict[str, Any]) -> bytes:
        return self._event_start + to_json(choice) + self._event_end

    def _count(self, index: int, piece: Piece) -> None:
        choice = self._choices[index]
        choice.num_output_tokens += piece.num_tokens
        if piece.num_input_tokens is not None:
            choice.num_input_tokens = piece.num_input_tokens

    def _whole(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        if self._request.is_chat:
            told: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            told = {"text": text}
        log_probs = self._log_probs(self._choices[index], pieces)
        finish_reason = pieces[-1].finish_reason if pieces else None
        return {"index": index, **told, "logprobs": log_probs, "finish_reason": finish_reason}

    def _usage(self) -> dict[str, int]:
        """A prompt that several choices answer counts once, as OpenAI counts it."""
        num_input_tokens = sum(choice.num_input_tokens for choice in self._choices[:: self._request.n])
        num_output_tokens = sum(choice.num_output_tokens for choice in self._choices)
        return {
            "prompt_tokens": num_input_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": num_input_tokens + num_output_tokens,
        }

    def _log_probs(self, choice: _Choice, pieces: list[Piece]) -> dict[str, Any] | None:
        """A token's text is what it settled: nothing while a character or a possible stop word is incomplete."""
        if not self._request.generations[0].return_log_probs:
            return None
        tokens = [token for piece in pieces for token in _tokens(piece)]
        if self._request.is_chat:
            content = [
                {"token": text, "logprob": log_prob, "bytes": list(text.encode()), "top_logprobs": []}
                for text, log_prob in tokens
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for text, _ in tokens:
            offsets.append(choice.text_offset)
            choice.text_offset += len(text)
        texts, log_probs = [text for text, _ in tokens], [log_prob for _, log_prob in tokens]
        return {"tokens": texts, "token_logprobs": log_probs, "top_logprobs": None, "text_offset": offsets}


@dataclass(slots=True)
class _Choice:
    """How far one choice is."""

    is_first: bool = True  # nothing of it has been told
    pieces: list[Piece] = field(default_factory=list)  # of an answer that is told as a whole
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    text_offset: int = 0


def error_events(body: dict[str, Any]) -> Iterator[bytes]:
    """An error in the middle of a stream, whose status is long out."""
    yield _event(body)
    yield DONE


def _object(request: ApiRequest) -> str:
    if not request.is_chat:
        return "text_completion"
    return "chat.completion.chunk" if request.stream else "chat.completion"


def _tokens(piece: Piece) -> Iterator[tuple[str, float]]:
    """The text of a piece belongs to its last token."""
    for index, log_prob in enumerate(piece.log_probs, start=1):
        yield piece.text if index == len(piece.log_probs) else "", log_prob


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def to_json(value: Any) -> bytes:
    """A message may quote half a character that a client sent; no text holds it."""
    return ENCODER.encode(value).encode(errors="replace")
