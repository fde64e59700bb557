"""Prompts of an exact length in tokens, from a seed. Knows a tokenizer; never sees a request or a server."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from tkit.errors import InputError

TOKENIZER_FILE = "tokenizer.json"
ALPHABET_SIZE = 4096  # enough that no two prompts look alike; small enough to be checked in milliseconds
OPENING = 4  # tokens; no two prompts of a PromptMaker open alike, so no block of theirs can come from a prefix cache
MAX_REDRAWS = 50
MAX_REPAIRS = 30


class PromptMaker:
    """Random tokens, rendered as text. The server encodes the text again, so what counts is what *that* gives:
    a beginning-of-sequence token that the tokenizer adds is one of the prompt's tokens."""

    def __init__(self, tokenizer_dir: Path, seed: int):
        path = tokenizer_dir / TOKENIZER_FILE
        if not path.is_file():
            raise InputError(
                f"{tokenizer_dir}: no {TOKENIZER_FILE} in it",
                hint="give the directory of the served model's tokenizer: --tokenizer DIR",
            )
        data = path.read_bytes()
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{path}: not readable as a tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.digest = hashlib.sha256(data).hexdigest()
        self._path = path
        self._seed = seed
        self._num_special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        self._alphabet = self._stable_tokens()
        self._openings: set[tuple[int, ...]] = set()

    def prompt(self, isl: int, *place: object) -> str:
        """A text of exactly `isl` tokens. The same seed, `isl` and `place` (numbers or names) give the same bytes."""
        if isl <= self._num_special:
            raise InputError(
                f"no prompt of {isl} tokens: the tokenizer itself adds {self._num_special}",
                hint=f"ask for at least {self._num_special + 1}",
            )
        generator = random.Random("/".join(map(str, (self._seed, isl, *place))))
        for _ in range(MAX_REDRAWS):
            text = self._settled_text(generator, isl)
            if text is None:
                continue
            opening = tuple(self._tokenizer.encode(text).ids[: self._num_special + OPENING])
            if opening in self._openings and len(opening) < isl:
                continue
            self._openings.add(opening)
            return text
        raise InputError(f"{self._path}: no text found that it encodes to {isl} tokens", hint="use another --shape")

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt as the server encodes it."""
        return len(self._tokenizer.encode(text).ids)

    def token_ends(self, text: str) -> list[int]:
        """The end, in characters, of each token of a generated text."""
        return [end for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]

    def _draw(self, generator: random.Random, count: int) -> list[int]:
        # Not generator.choices: how it maps random numbers to items is not promised to stay.
        size = len(self._alphabet)
        return [self._alphabet[int(generator.random() * size)] for _ in range(count)]

    def _settled_text(self, generator: random.Random, isl: int) -> str | None:
        """Cuts or adds tokens until the text has `isl`; None when that does not settle."""
        ids = self._draw(generator, isl - self._num_special)
        for _ in range(MAX_REPAIRS):
            text = self._tokenizer.decode(ids, skip_special_tokens=False)
            surplus = self.count_tokens(text) - isl
            if surplus == 0:
                return text
            ids = ids[: len(ids) - surplus] if surplus > 0 else ids + self._draw(generator, -surplus)
            if not ids:
                return None
        return None

    def _stable_tokens(self) -> Sequence[int]:
        """Ids, in random order, that stay themselves beside each other, so that few prompts need repair."""
        special = set(self._tokenizer.get_added_tokens_decoder())
        generator = random.Random(f"alphabet/{self._seed}")
        ids = sorted(set(self._tokenizer.get_vocab(with_added_tokens=False).values()) - special)
        shuffled = sorted(ids, key=lambda _: generator.random())[:ALPHABET_SIZE]
        pairs = [[token, token] for token in shuffled]
        encodings = self._tokenizer.encode_batch(
            self._tokenizer.decode_batch(pairs, skip_special_tokens=False), add_special_tokens=False
        )
        stable = [pair[0] for pair, encoding in zip(pairs, encodings, strict=True) if encoding.ids == pair]
        if not stable:
            raise InputError(f"{self._path}: none of its {len(ids)} tokens survives being rendered and encoded again")
        return stable
