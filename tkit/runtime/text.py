"""Token ids -> text as they come, cut at stop words. Knows a tokenizer; no model, no requests.

The deltas of a request concatenate to what the tokenizer makes of all its tokens at once, behind the prompt. What
stands in the way of decoding token by token:

    a token may end inside a character       decoders show the rest as U+FFFD; it waits for the bytes that are missing
    decoders drop the first token's space    every piece is decoded behind a fixed word, which is cut off again
    text may be the start of a stop word     it waits until it is, or is not

One difference remains. SentencePiece's byte fallback shows *every* byte of a run of byte tokens as U+FFFD when the run
as a whole is not valid UTF-8, also the characters in it that are complete; here those have left as what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REPLACEMENT = "\ufffd"
MAX_MISSING = 3  # bytes of an unfinished UTF-8 character, and so the replacement characters that may stand for them


@dataclass(frozen=True)
class Decoder:
    """A tokenizer, and the fixed word behind which pieces are decoded."""

    tokenizer: Any
    word_ids: tuple[int, ...]
    word: str

    @classmethod
    def of(cls, tokenizer: Any) -> Decoder:
        word_ids = tuple(tokenizer.encode("a", add_special_tokens=False))
        return cls(tokenizer, word_ids, decode(tokenizer, word_ids))

    def piece(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` in the middle of a text."""
        return decode(self.tokenizer, (*self.word_ids, *token_ids))[len(self.word) :]


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Special tokens left out; the tokenizer's own clean-up, which would take back spaces already sent, too."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """The text of one request. `feed` each token in turn, `flush` once at the end."""

    def __init__(self, decoder: Decoder, stop_words: Sequence[str] = (), min_tokens: int = 0):
        self.decoder = decoder
        self.stop_words = stop_words
        self.min_tokens = min_tokens
        self.is_stopped = False  # a stop word came; the text is complete
        self._num_tokens = 0
        self._pending: list[int] = []  # tokens since the last whole character
        self._num_sent = 0  # characters of the pending tokens' text that are out
        self._held = ""  # may be the start of a stop word

    def feed(self, token_id: int) -> str:
        """What this token settles."""
        self._num_tokens += 1
        self._pending.append(token_id)
        text = self.decoder.piece(self._pending)
        num_unsettled = 0
        while num_unsettled < MAX_MISSING and text[: len(text) - num_unsettled].endswith(REPLACEMENT):
            num_unsettled += 1
        settled = text[self._num_sent : len(text) - num_unsettled]
        if num_unsettled:
            self._num_sent += len(settled)
        else:
            self._pending.clear()
            self._num_sent = 0
        if self._num_tokens < self.min_tokens:
            return settled
        return self._before_stop_word(settled)

    def flush(self) -> str:
        """What was held back; nothing after a stop word."""
        if self.is_stopped:
            return ""
        unsettled = self.decoder.piece(self._pending)[self._num_sent :] if self._pending else ""
        text = self._before_stop_word(unsettled) + self._held
        self._pending.clear()
        self._held = ""
        return text

    def _before_stop_word(self, text: str) -> str:
        self._held += text
        # The one complete first, as if characters came one by one: where tokens end must not matter.
        found = [(start + len(word), start) for word in self.stop_words if (start := self._held.find(word)) >= 0]
        if found:
            self.is_stopped = True
            _, start = min(found)
            out, self._held = self._held[:start], ""
            return out
        num_held = next(
            (
                length
                for length in range(min(len(self._held), self._longest - 1), 0, -1)
                if any(word.startswith(self._held[-length:]) for word in self.stop_words)
            ),
            0,
        )
        cut = len(self._held) - num_held
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    @property
    def _longest(self) -> int:
        return max(map(len, self.stop_words), default=1)
