"""Prompts of an exact length, from a seed. Knows a tokenizer; never sees a server."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from tkit.errors import InputError
from tkit.loadgen.profiles import Shape

TOKENIZER_FILE = "tokenizer.json"
ALPHABET_SIZE = 4096  # enough that no two prompts look alike; small enough to be checked in milliseconds
BATCH = 256  # of the alphabet, checked at once: an encoding takes kilobytes
OPENING_CHARACTERS = 16
OPENING = 4  # tokens; no two prompts of a PromptMaker open alike, so no block of theirs can come from a prefix cache
MAX_REDRAWS = 50
MAX_REPAIRS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request: a text, and how many tokens it has and asks for."""

    prompt: str
    isl: int | None  # None where there is no tokenizer
    osl: int


def lengths(shape: Shape, seed: int, *place: object) -> tuple[int, int]:
    """The shape's own, or anywhere from `spread` times them up to them."""
    if shape.spread == 1:
        return shape.isl, shape.osl
    generator = random.Random("/".join(map(str, (seed, "lengths", *place))))
    isl, osl = (
        least + int(generator.random() * (most - least + 1))
        for most in (shape.isl, shape.osl)
        for least in (max(round(shape.spread * most), 1),)
    )
    return isl, osl


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
        self._sequences: dict[str, tuple[list[int], random.Random]] = {}

    def ask(self, shape: Shape, place: Sequence[object], index: int, template_tokens: int) -> Ask:
        """As RequestSource.ask."""
        isl, osl = lengths(shape, self._seed, *place, index)
        prompt = self.prompt(isl - template_tokens, *place, index, shared=shape.prefix_share)
        return Ask(prompt=prompt, isl=isl, osl=osl)

    def prompt(self, isl: int, *place: object, shared: float = 0.0) -> str:
        """A text of exactly `isl` tokens. The same seed, `isl` and `place` (numbers or names) give the same bytes.

        `shared`: the share of it, from the beginning, that all prompts of this seed have in common.
        """
        name = "/".join(map(str, (self._seed, isl, *place, *([f"shared{shared:g}"] if shared else []))))
        generator = random.Random(name)
        prefix = self._ids("shared", round(shared * (self._checked(isl) - self._num_special)))
        for _ in range(MAX_REDRAWS):
            text = self._settled_text(generator, isl, prefix)
            if text is None:
                continue
            opening = tuple(self._tokenizer.encode(text).ids[self._num_special + len(prefix) :][:OPENING])
            if opening in self._openings and self._num_special + len(prefix) + len(opening) < isl:
                continue
            self._openings.add(opening)
            return text
        raise InputError(f"{self._path}: no text found that it encodes to {isl} tokens", hint="use another --shape")

    def prompt_of_blocks(self, isl: int, blocks: Sequence[object], size: int, *place: object) -> str:
        """A text of exactly `isl` tokens. Prompts of one place whose first n blocks have the same names begin with the same
        n * `size` tokens; equal names and lengths give equal texts."""
        names = ["/".join(map(str, ("block", *place, block))) for block in blocks]
        whole = (self._checked(isl) - self._num_special) // size
        prefix = [token for name in names[:whole] for token in self._ids(name, size)]
        generator = random.Random(f"{self._seed}/{isl}/{names[min(whole, len(names) - 1)]}")
        for _ in range(MAX_REDRAWS):
            text = self._settled_text(generator, isl, prefix[: isl - self._num_special - 1])
            if text is not None:
                return text
        raise InputError(f"{self._path}: no text found that it encodes to {isl} tokens")

    def _checked(self, isl: int) -> int:
        if isl <= self._num_special:
            raise InputError(
                f"no prompt of {isl} tokens: the tokenizer itself adds {self._num_special}",
                hint=f"ask for at least {self._num_special + 1}",
            )
        return isl

    def _ids(self, name: str, count: int) -> list[int]:
        """The first tokens of a sequence of that name."""
        ids, generator = self._sequences.setdefault(name, ([], random.Random(f"{self._seed}/{name}")))
        ids += self._draw(generator, count - len(ids))
        return ids[:count]

    def encode(self, text: str) -> list[int]:
        """A prompt as the server encodes it."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def count_tokens(self, text: str) -> int:
        return len(self.encode(text))

    def token_ends(self, text: str) -> list[int]:
        """The end, in characters, of each token of a generated text."""
        return [end for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]

    def _draw(self, generator: random.Random, count: int) -> list[int]:
        # Not generator.choices: how it maps random numbers to items is not promised to stay.
        size = len(self._alphabet)
        return [self._alphabet[int(generator.random() * size)] for _ in range(count)]

    def _settled_text(self, generator: random.Random, isl: int, prefix: Sequence[int]) -> str | None:
        """Cuts or adds tokens after the prefix until the text has `isl`; None when that does not settle."""
        ids = [*prefix, *self._draw(generator, isl - self._num_special - len(prefix))]
        for _ in range(MAX_REPAIRS):
            text = self._tokenizer.decode(ids, skip_special_tokens=False)
            surplus = self.count_tokens(text) - isl
            if surplus == 0:
                return text
            ids = ids[: len(ids) - surplus] if surplus > 0 else ids + self._draw(generator, -surplus)
            if len(ids) <= len(prefix):
                return None
        return None

    def _stable_tokens(self) -> Sequence[int]:
        """Ids, in random order, that stay themselves beside each other, so that few prompts need repair."""
        special = set(self._tokenizer.get_added_tokens_decoder())
        generator = random.Random(f"alphabet/{self._seed}")
        ids = sorted(set(self._tokenizer.get_vocab(with_added_tokens=False).values()) - special)
        shuffled = sorted(ids, key=lambda _: generator.random())[:ALPHABET_SIZE]
        stable = [
            token
            for start in range(0, len(shuffled), BATCH)
            for token in self._unchanged(shuffled[start : start + BATCH])
        ]
        if not stable:
            raise InputError(f"{self._path}: none of its {len(ids)} tokens survives being rendered and encoded again")
        return stable

    def _unchanged(self, tokens: Sequence[int]) -> list[int]:
        pairs = [[token, token] for token in tokens]
        texts = self._tokenizer.decode_batch(pairs, skip_special_tokens=False)
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [pair[0] for pair, encoding in zip(pairs, encodings, strict=True) if encoding.ids == pair]


class CharacterPrompts:
    """Words of random letters, an exact number of characters long: for servers whose tokenizer is not at hand."""

    token_ends = None

    def __init__(self, seed: int):
        self._seed = seed
        self._openings: set[str] = set()

    def ask(self, shape: Shape, place: Sequence[object], index: int, template_tokens: int) -> Ask:
        """As RequestSource.ask."""
        num_characters, osl = lengths(shape, self._seed, *place, index)
        prompt = self.prompt(num_characters, *place, index, shared=shape.prefix_share)
        return Ask(prompt=prompt, isl=None, osl=osl)

    def prompt(self, num_characters: int, *place: object, shared: float = 0.0) -> str:
        """As PromptMaker.prompt, in characters."""
        prefix = _words(random.Random(f"{self._seed}/shared"), round(shared * num_characters))
        name = "/".join(map(str, (self._seed, "characters", num_characters, *place, f"shared{shared:g}")))
        generator = random.Random(name)
        for _ in range(MAX_REDRAWS):
            rest = _words(generator, num_characters - len(prefix))
            if rest[:OPENING_CHARACTERS] not in self._openings or len(rest) <= OPENING_CHARACTERS:
                break
        self._openings.add(rest[:OPENING_CHARACTERS])
        return prefix + rest


def _words(generator: random.Random, num_characters: int) -> str:
    """Never ends in a space, which some servers strip."""
    text = ""
    while len(text) < num_characters:
        text += (
            "".join(chr(ord("a") + int(generator.random() * 26)) for _ in range(2 + int(generator.random() * 8))) + " "
        )
    text = text[:num_characters]
    return f"{text[:-1]}z" if text.endswith(" ") else text
