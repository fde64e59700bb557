from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tkit.runtime.text import Decoder, TextStream

PROMPT = "The king said"
MIXED = "A smile 😀 and a wave 👋🏽,  then 日本語 café\n\n\t👨‍👩‍👧  the end"

many = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def deltas(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int], stop_words: Sequence[str] = ()) -> list[str]:
    stream = TextStream(Decoder.of(tokenizer), stop_words)
    texts = []
    for token_id in token_ids:
        texts.append(stream.feed(token_id))
        if stream.is_stopped:
            break
    return [*texts, stream.flush()]


def behind_prompt(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int]) -> str:
    """The truth: everything decoded at once."""
    prompt_ids = tokenizer.encode(PROMPT)
    prompt = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    return tokenizer.decode([*prompt_ids, *token_ids], skip_special_tokens=True)[len(prompt) :]


def output_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Tokens that continue the prompt with `text`."""
    prompt_ids, all_ids = tokenizer.encode(PROMPT), tokenizer.encode(PROMPT + text)
    assert all_ids[: len(prompt_ids)] == prompt_ids
    return all_ids[len(prompt_ids) :]


def test_deltas_are_the_whole_text_and_none_ends_inside_a_character(tokenizer: PreTrainedTokenizerFast) -> None:
    token_ids = output_ids(tokenizer, " " + MIXED)
    texts = deltas(tokenizer, token_ids)
    assert "".join(texts) == behind_prompt(tokenizer, token_ids)
    assert not any("\ufffd" in text for text in texts)


def test_byte_tokens_give_the_very_text_that_was_encoded(
    byte_level: PreTrainedTokenizerFast, byte_fallback: PreTrainedTokenizerFast
) -> None:
    for tokenizer in (byte_level, byte_fallback):
        assert "".join(deltas(tokenizer, output_ids(tokenizer, " " + MIXED))) == " " + MIXED


def test_characters_leave_as_soon_as_their_last_byte_comes(byte_fallback: PreTrainedTokenizerFast) -> None:
    token_ids = output_ids(byte_fallback, " 日本😀")
    assert deltas(byte_fallback, token_ids)[-11:-1] == ["", "", "日", "", "", "本", "", "", "", "😀"]


@many
@given(st.data())
def test_any_tokens_at_all_give_what_decoding_them_at_once_gives(
    tokenizer: PreTrainedTokenizerFast, data: st.DataObject
) -> None:
    """Special tokens, stray bytes and spaces in any order; of byte fallback only runs that are valid (see below)."""
    candidates = [index for token, index in tokenizer.get_vocab().items() if not token.startswith("<0x")]
    token_ids = data.draw(st.lists(st.sampled_from(sorted(candidates)), max_size=25))
    assert "".join(deltas(tokenizer, token_ids)) == behind_prompt(tokenizer, token_ids)


@many
@given(st.text(max_size=15), st.integers(0, 40))
@example("日本", 100)
def test_any_text_cut_anywhere_gives_what_decoding_it_at_once_gives(
    byte_level: PreTrainedTokenizerFast, text: str, num_tokens: int
) -> None:
    token_ids = byte_level.encode(text, add_special_tokens=False)[:num_tokens]
    assert "".join(deltas(byte_level, token_ids)) == behind_prompt(byte_level, token_ids)


def byte_tokens(tokenizer: PreTrainedTokenizerFast, data: bytes) -> list[int]:
    return tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in data])


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("日".encode() + "本".encode()[:2], "日\ufffd\ufffd"),
        (b"\x80" * 6, "\ufffd" * 6),
        (b"\xf0\x9f", "\ufffd" * 2),
    ],
)
def test_invalid_byte_tokens_show_as_replacements_behind_the_characters_that_were_complete(
    byte_fallback: PreTrainedTokenizerFast, data: bytes, text: str
) -> None:
    assert "".join(deltas(byte_fallback, byte_tokens(byte_fallback, data))) == text


def test_endless_invalid_bytes_do_not_dam_up_the_text(
    byte_level: PreTrainedTokenizerFast, byte_fallback: PreTrainedTokenizerFast
) -> None:
    stray = byte_level.convert_tokens_to_ids("Ģ")  # byte 0x80
    for tokenizer, token_ids in ((byte_level, [stray] * 20), (byte_fallback, byte_tokens(byte_fallback, b"\x80" * 20))):
        stream = TextStream(Decoder.of(tokenizer))
        assert len("".join(stream.feed(token_id) for token_id in token_ids)) >= 17
        assert len(stream.flush()) <= 3


@pytest.mark.parametrize(
    ("text", "stop_words", "expected"),
    [
        (" the river Don and more", ["Don"], " the river "),
        (" the river Don and more", ["river Don and"], " the "),
        (" no such word", ["river"], " no such word"),
        (" the river D", ["Don"], " the river D"),
        (" one two three", ["three", "two"], " one "),
        (" smile 😀😀 end", ["😀😀"], " smile "),
        (" smile 😀日本", ["日本"], " smile 😀"),
        (" aab", ["ab"], " a"),
    ],
)
def test_text_ends_before_the_first_stop_word_however_tokens_cut_it(
    tokenizer: PreTrainedTokenizerFast, text: str, stop_words: list[str], expected: str
) -> None:
    token_ids = output_ids(tokenizer, text)
    assert behind_prompt(tokenizer, token_ids) == text
    assert "".join(deltas(tokenizer, token_ids, stop_words)) == expected


@many
@given(st.text("ab ", max_size=12), st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3), st.data())
def test_where_tokens_end_does_not_matter_to_stop_words(
    byte_level: PreTrainedTokenizerFast, text: str, stop_words: list[str], data: st.DataObject
) -> None:
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(word) for word in stop_words)]
    expected = text
    if ends:  # character by character: the first word to be complete, the longest if several are
        longest = max((word for word in stop_words if text[: ends[0]].endswith(word)), key=len)
        expected = text[: ends[0] - len(longest)]
    for _ in range(3):
        cuts = sorted(data.draw(st.sets(st.integers(1, max(len(text) - 1, 1)))))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        stream = TextStream(_Pieces(pieces), stop_words)  # type: ignore[arg-type]
        out = ""
        for index in range(len(pieces)):
            out += stream.feed(index)
            if stream.is_stopped:
                break
        assert (out + stream.flush(), stream.is_stopped) == (expected, bool(ends))


class _Pieces:
    """A decoder whose tokens are given pieces of text."""

    def __init__(self, pieces: Sequence[str]):
        self.pieces = pieces

    def piece(self, token_ids: Sequence[int]) -> str:
        return "".join(self.pieces[index] for index in token_ids)


def test_text_waits_only_while_it_may_be_a_stop_word(byte_level: PreTrainedTokenizerFast) -> None:
    stream = TextStream(_Pieces(["x\n", "\n", "U", "n", "\nUser", ":", "y"]), ["\nUser:"])  # type: ignore[arg-type]
    assert [stream.feed(index) for index in range(4)] == ["x", "\n", "", "\nUn"]
    assert (stream.feed(4), stream.feed(5), stream.is_stopped, stream.flush()) == ("", "", True, "")


@pytest.mark.parametrize(("min_tokens", "num_fed"), [(0, 2), (2, 2), (3, 4), (4, 4), (5, 6)])
def test_stop_words_before_min_tokens_are_text(min_tokens: int, num_fed: int) -> None:
    pieces = ["a", "STOP"] * 3
    stream = TextStream(_Pieces(pieces), ["STOP"], min_tokens)  # type: ignore[arg-type]
    text = "".join(stream.feed(index) for index in range(num_fed))
    assert (text, stream.is_stopped) == ("".join(pieces[: num_fed - 1]), True)


def test_nothing_follows_a_stop_word_not_even_half_a_character() -> None:
    stream = TextStream(_Pieces(["a STOP b\ufffd"]), ["STOP"])  # type: ignore[arg-type]
    assert (stream.feed(0), stream.flush()) == ("a ", "")
