"""Pieces of text -> the objects of OpenAI's API, whole or as events. Knows JSON and OpenAI's names; no server."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

from tkit.gateway.requests import ApiRequest
from tkit.gateway.triton import Piece

DONE = b"data: [DONE]\n\n"
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class Answer:
    """One answer, told piece by piece: `whole` at the end, or `events` for each."""

    def __init__(self, request: ApiRequest, model: str):
        self._request = request
        self._is_first = True
        self._pieces: list[Piece] = []  # of an answer that is told as a whole
        self._num_input_tokens = 0
        self._num_output_tokens = 0
        self._text_offset = 0
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

    def add(self, piece: Piece) -> None:
        self._count(piece)
        self._pieces.append(piece)

    def whole(self) -> dict[str, Any]:
        text = "".join(piece.text for piece in self._pieces)
        if self._request.is_chat:
            choice: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            choice = {"text": text}
        choice = {"index": 0, **choice, "logprobs": self._log_probs(self._pieces)}
        choice["finish_reason"] = self._pieces[-1].finish_reason if self._pieces else None
        return {**self._head, "choices": [choice], "usage": self._usage()}

    def events(self, piece: Piece) -> Iterator[bytes]:
        """The server-sent events of one piece; with the last come the usage, if asked for, and the end."""
        self._count(piece)
        if self._is_first and self._request.is_chat:
            yield self._event({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        self._is_first = False
        told: dict[str, Any] = {"delta": {"content": piece.text}} if self._request.is_chat else {"text": piece.text}
        log_probs = self._log_probs([piece])
        yield self._event({"index": 0, **told, "logprobs": log_probs, "finish_reason": piece.finish_reason})
        if piece.finish_reason is not None:
            if self._request.include_usage:
                yield _event({**self._head, "choices": [], "usage": self._usage()})
            yield DONE

    def _event(self, choice: dict[str, Any]) -> bytes:
        return self._event_start + to_json(choice) + self._event_end

    def _count(self, piece: Piece) -> None:
        self._num_output_tokens += piece.num_tokens
        if piece.num_input_tokens is not None:
            self._num_input_tokens = piece.num_input_tokens

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._num_input_tokens,
            "completion_tokens": self._num_output_tokens,
            "total_tokens": self._num_input_tokens + self._num_output_tokens,
        }

    def _log_probs(self, pieces: list[Piece]) -> dict[str, Any] | None:
        """A token's text is what it settled: nothing while a character or a possible stop word is incomplete."""
        if not self._request.generation.return_log_probs:
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
            offsets.append(self._text_offset)
            self._text_offset += len(text)
        texts, log_probs = [text for text, _ in tokens], [log_prob for _, log_prob in tokens]
        return {"tokens": texts, "token_logprobs": log_probs, "top_logprobs": None, "text_offset": offsets}


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
