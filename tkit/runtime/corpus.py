"""A text file as token ids: what calibration and validation read. Knows a tokenizer; no model. Loads no torch.

A text is encoded in blocks and read no further than asked, because the tokenizers package takes 170 bytes of memory and 1.4 us
for each of its characters: 5 GB and 45 s for a file of 30 MB.
"""

from __future__ import annotations

import codecs
import io
import json
import random
from array import array
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from tkit.errors import InputError

BLOCK = 1 << 18  # bytes, and characters of a longer text
SPREAD = 100  # windows are drawn from the first so many times as many tokens as they hold
MAX_PROBLEMS = 20


def calibration_tokens(
    file: Path, tokenizer: Tokenizer, num_samples: int, length: int, seed: int, vocab_size: int
) -> list[list[int]]:
    """`num_samples` windows of `length` tokens at random places of the text, the same for the same seed. Raises InputError
    when the text is too short, or has tokens that the model does not embed."""
    ids = token_ids(file, tokenizer, SPREAD * num_samples * length)
    if len(ids) < length + num_samples:
        raise InputError(
            f"{file}: {len(ids)} tokens, {num_samples} samples of {length} need at least {length + num_samples}",
            hint="give a longer --calib text, or lower --calib-samples or --calib-len",
        )
    if max(ids) >= vocab_size:
        raise InputError(
            f"the tokenizer makes token {max(ids)} of {file}, the model embeds {vocab_size}",
            hint="put the model's own tokenizer beside its weights",
        )
    starts = sorted(random.Random(seed).sample(range(len(ids) - length + 1), num_samples))
    return [ids[start : start + length].tolist() for start in starts]


def token_ids(file: Path, tokenizer: Tokenizer, enough: int) -> array[int]:
    """The ids of the text in `file`, from its beginning until there are `enough`. `.jsonl` holds a text under "text" in each
    line, everything else is one text. Raises InputError where it holds no such thing."""
    ids = array("I")
    for text in _jsonl_texts(file) if file.suffix == ".jsonl" else _blocks(file):
        for start in range(0, len(text), BLOCK):
            ids.extend(tokenizer.encode(text[start : start + BLOCK], add_special_tokens=False).ids)
            if len(ids) >= enough:
                return ids[:enough]
    return ids


def _blocks(file: Path) -> Iterator[str]:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    offset = 0  # of the first byte that is not decoded yet
    with file.open("rb") as stream:
        while True:
            data = stream.read(BLOCK)
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise _not_text(file, error, offset) from error
            if not data:
                return
            offset = stream.tell() - len(decoder.getstate()[0])


def _jsonl_texts(file: Path) -> Iterator[str]:
    """Up to the first line without a text; then reads on for others to name."""
    problems: list[str] = []
    offset = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                row = json.loads(line) if line.strip() else {"text": ""}
            except UnicodeDecodeError as error:
                raise _not_text(file, error, offset) from error
            except (ValueError, RecursionError):
                row = None
            offset += len(line)
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str):
                found = line[:200].decode("utf-8", errors="ignore").strip()[:60]
                problems.append(f'line {number}: expected {{"text": "..."}}, found {found!r}')
            elif not problems:
                yield text
            if len(problems) == MAX_PROBLEMS:
                problems.append("and maybe more")
                break
    if problems:
        raise InputError(f"{file}: not JSON lines of texts", problems=problems)


def _not_text(file: Path, error: UnicodeDecodeError, offset: int) -> InputError:
    return InputError(f"{file}: not UTF-8 text: byte {offset + error.start} is {error.object[error.start]:#04x}")
