"""Texts as token ids: what is read of a file, and what is said of one that holds no text."""

from __future__ import annotations

import json

import pytest

from tkit import demo
from tkit.errors import InputError
from tkit.runtime import corpus
from tkit.runtime.corpus import calibration_tokens, token_ids


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(demo.MODEL_DIR / "tokenizer.json"))


def test_windows_come_from_the_text_and_from_the_seed(tokenizer, tmp_path):
    text = tmp_path / "calib.txt"
    text.write_text(" ".join(f"line {i} of the text" for i in range(400)))
    ids = tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    tokens = calibration_tokens(text, tokenizer, 5, 32, seed=1, vocab_size=4096)
    assert [len(window) for window in tokens] == [32] * 5
    for window in tokens:
        assert any(ids[start : start + 32] == window for start in range(len(ids)))
    assert tokens == calibration_tokens(text, tokenizer, 5, 32, seed=1, vocab_size=4096)
    assert tokens != calibration_tokens(text, tokenizer, 5, 32, seed=2, vocab_size=4096)


def test_jsonl_holds_the_same_texts(tokenizer, tmp_path):
    text = "one text, quite\u2028short. " * 50  # a line's end to some, but not in JSON lines
    (tmp_path / "c.txt").write_text(text)
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n\n")
    one, two = (
        calibration_tokens(tmp_path / name, tokenizer, 2, 16, seed=0, vocab_size=4096) for name in ("c.txt", "c.jsonl")
    )
    assert one == two


def test_long_texts_are_read_in_blocks_and_no_further_than_asked(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 1000)
    text = "eins, zw\u00f6lf, \u6f22\u5b57,\r\n" * 200  # no divisor of 1000 bytes long: characters are cut
    data = text.encode()
    (tmp_path / "c.txt").write_bytes(data + b"\xff")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": text}) + "\nno JSON\n")
    for name in ("c.txt", "c.jsonl"):
        ids = token_ids(tmp_path / name, tokenizer, 2000)
        assert len(ids) == 2000
        found = tokenizer.decode(ids.tolist())
        assert found == (text if name == "c.jsonl" else text.replace("\r\n", "\n"))[: len(found)] and len(found) > 1500
    with pytest.raises(InputError, match=f"not UTF-8 text: byte {len(data)} is 0xff"):
        token_ids(tmp_path / "c.txt", tokenizer, 10**9)
    with pytest.raises(InputError, match="not JSON lines of texts"):
        token_ids(tmp_path / "c.jsonl", tokenizer, 10**9)
    (tmp_path / "d.txt").write_bytes(data)
    assert tokenizer.decode(token_ids(tmp_path / "d.txt", tokenizer, 10**9).tolist()) == text.replace("\r\n", "\n")


def test_a_text_that_is_too_short_is_refused_with_the_numbers(tokenizer, tmp_path):
    (tmp_path / "c.txt").write_text("short")
    with pytest.raises(InputError, match=r"c.txt: \d tokens, 16 samples of 256 need at least 272"):
        calibration_tokens(tmp_path / "c.txt", tokenizer, 16, 256, seed=0, vocab_size=4096)


def test_broken_jsonl_lines_are_all_named(tokenizer, tmp_path):
    lines = ['{"text": "a"}', "not json", '{"content": "b"}', '{"text": 5}', '["text"]', "[" * 100_000]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError) as error:
        calibration_tokens(tmp_path / "c.jsonl", tokenizer, 1, 1, seed=0, vocab_size=4096)
    assert [problem.split(":")[0] for problem in error.value.problems] == [f"line {number}" for number in range(2, 7)]
    (tmp_path / "c.jsonl").write_text("{}\n" * 1000)
    with pytest.raises(InputError) as error:
        calibration_tokens(tmp_path / "c.jsonl", tokenizer, 1, 1, seed=0, vocab_size=4096)
    assert len(error.value.problems) == 21


def test_what_is_not_text_is_named(tokenizer, tmp_path):
    for name in ("c.txt", "c.jsonl"):
        (tmp_path / name).write_bytes(b'{"text": "\xff"}')
        with pytest.raises(InputError, match=rf"{name}: not UTF-8 text: byte 10 is 0xff"):
            calibration_tokens(tmp_path / name, tokenizer, 1, 1, seed=0, vocab_size=4096)


def test_tokens_that_the_model_does_not_embed_are_named(tokenizer):
    with pytest.raises(InputError, match=r"the tokenizer makes token \d+ of .*calibration.txt, the model embeds 1000"):
        calibration_tokens(demo.CALIBRATION, tokenizer, 1, 1, seed=0, vocab_size=1000)
