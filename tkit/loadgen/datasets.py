"""Files of requests: conversations in ShareGPT's manner, and traces in Mooncake's. Knows formats; draws and sends nothing.

    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}     also "messages" of role, content
    {"prompt": "...", "completion": "..."}                                                     or "output_tokens": 128
    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ...]}  a trace; milliseconds

One JSON object per line, or one array of them. A hash id names BLOCK_TOKENS tokens of the input: requests that begin with
the same ids begin with the same tokens. The last id covers what is left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tkit.errors import InputError

BLOCK_TOKENS = 512
MAX_PROBLEMS = 5  # that are listed one by one
ASKING, ANSWERING = ("human", "user"), ("gpt", "assistant", "chatgpt", "bing", "bard")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    prompt: str
    answer: str | None  # whose tokens are the output asked for, where `output_tokens` is not told
    output_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class TraceEntry:
    timestamp_s: float
    isl: int
    osl: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetFile:
    """Either conversations or a trace."""

    name: str  # the file's, without its ending
    sha256: str
    conversations: tuple[Conversation, ...] = ()
    trace: tuple[TraceEntry, ...] = ()
    num_left_out: int = 0  # conversations without a question and an answer


def read_dataset(path: Path) -> DatasetFile:
    """Raises InputError that names the lines which cannot be read; conversations that nobody answers are left out."""
    try:
        data = path.read_bytes()
        rows = _rows(data.decode("utf-8"))
    except OSError as error:
        raise InputError(f"--dataset: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--dataset: {path}: not UTF-8: {error}") from error
    problems: list[str] = []
    conversations: list[Conversation | None] = []
    trace: list[TraceEntry] = []
    for number, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            if "timestamp" in row:
                trace.append(_trace_entry(row))
            else:
                conversations.append(_conversation(row))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            problems.append(f"entry {number}: {reason}")
    if trace and conversations:
        problems.append(f"{len(trace)} entries of a trace and {len(conversations)} conversations, expected one kind")
    times = [entry.timestamp_s for entry in trace]
    problems += [
        f"entry {i + 2}: earlier than the one before" for i in range(len(times) - 1) if times[i + 1] < times[i]
    ]
    answered = [conversation for conversation in conversations if conversation is not None]
    if not problems and not trace and not answered:
        problems.append("no request in it")
    if problems:
        more = len(problems) - MAX_PROBLEMS
        raise InputError(
            f"--dataset: {path}: {len(problems)} problem{'s' * (len(problems) > 1)}",
            problems=problems[:MAX_PROBLEMS] + ([f"and {more} more"] if more > 0 else []),
            hint="one JSON object per line: conversations (ShareGPT), prompt and completion, or a trace (Mooncake)",
        )
    return DatasetFile(
        name=path.stem,
        sha256=hashlib.sha256(data).hexdigest(),
        conversations=tuple(answered),
        trace=tuple(trace),
        num_left_out=len(conversations) - len(answered),
    )


def _rows(text: str) -> list[tuple[int, Any]]:
    """Number and value of each entry, from 1; a ValueError stands for one that is not JSON."""
    if text.lstrip().startswith("["):
        try:
            return list(enumerate(json.loads(text), start=1))
        except ValueError as error:
            return [(1, ValueError(f"not JSON: {error}"))]
    rows: list[tuple[int, Any]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except ValueError as error:
                rows.append((number, ValueError(f"not JSON: {error}")))
    return rows


def _trace_entry(row: Mapping[str, Any]) -> TraceEntry:
    isl, osl = _count(row, "input_length"), _count(row, "output_length")
    blocks = tuple(row.get("hash_ids") or ())
    if not all(isinstance(block, int) for block in blocks):
        raise ValueError(f"hash_ids is {str(blocks)[:60]}, expected whole numbers")
    expected = -(-isl // BLOCK_TOKENS)
    if blocks and len(blocks) != expected:
        raise ValueError(f"{len(blocks)} hash_ids for {isl} tokens, expected {expected} of {BLOCK_TOKENS} tokens each")
    return TraceEntry(timestamp_s=float(row["timestamp"]) / 1000, isl=isl, osl=osl, blocks=blocks)


def _count(row: Mapping[str, Any], name: str) -> int:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
    return value


def _conversation(row: Mapping[str, Any]) -> Conversation | None:
    """The first question and its answer; None when there is none."""
    if "prompt" in row:
        prompt, answer = row["prompt"], row.get("completion")
        tokens = _count(row, "output_tokens") if "output_tokens" in row else None
        if answer is None and tokens is None:
            raise ValueError("a prompt with neither completion nor output_tokens")
    else:
        turns = [_turn(turn) for turn in row["conversations" if "conversations" in row else "messages"]]
        first = next((i for i, (who, _) in enumerate(turns) if who in ASKING), len(turns))
        if first + 1 >= len(turns) or turns[first + 1][0] not in ANSWERING:
            return None
        prompt, answer, tokens = turns[first][1], turns[first + 1][1], None
    if not isinstance(prompt, str) or not isinstance(answer, str | None):
        raise ValueError("prompt and completion are texts")
    return Conversation(prompt=prompt, answer=answer, output_tokens=tokens) if prompt and answer != "" else None


def _turn(turn: Mapping[str, Any]) -> tuple[str, Any]:
    return (turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn["content"])
