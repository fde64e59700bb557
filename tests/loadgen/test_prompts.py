"""Prompts: exact in tokens, equal for equal seeds, never alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tkit.errors import InputError
from tkit.loadgen.prompts import OPENING, PromptMaker

TEXT = [" ".join(f"{a}{b}{c}" for b in ("an", "ol", "ise", "u") for c in ("d", "ta", "m", "rk")) for a in "bcdfghklmn"]


def unigram() -> Tokenizer:
    """SentencePiece's way: a space becomes part of the word, one is put before the text, <s> opens it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXT * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's way: lower case, two special tokens around the text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    around = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    return tokenizer


def digits() -> Tokenizer:
    """Ten tokens that merge with their neighbours, so that most random texts come back shorter."""
    tokenizer = Tokenizer(models.BPE({**{str(i): i for i in range(10)}, "12": 10, "34": 11, "1212": 12},
                                     [("1", "2"), ("3", "4"), ("12", "12")]))  # fmt: skip
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.fixture(params=["byte_level", "unigram", "word_piece", "digits"])
def any_tokenizer_dir(request: pytest.FixtureRequest, tokenizer_dir: Path, tmp_path: Path) -> Path:
    if request.param == "byte_level":
        return tokenizer_dir
    tokenizer = {"unigram": unigram, "word_piece": word_piece, "digits": digits}[request.param]()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("isl", [4, 33, 400])
def test_the_count_is_what_the_tokenizer_gives_for_the_text(any_tokenizer_dir: Path, isl: int) -> None:
    tokenizer = Tokenizer.from_file(str(any_tokenizer_dir / "tokenizer.json"))
    maker = PromptMaker(any_tokenizer_dir, seed=1)
    prompts = [maker.prompt(isl, index) for index in range(20)]
    assert [len(tokenizer.encode(prompt).ids) for prompt in prompts] == [isl] * 20
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    assert not any(token in prompt for token in special for prompt in prompts)


def test_equal_seeds_give_equal_bytes(tokenizer_dir: Path) -> None:
    def prompts(seed: int, places: list[tuple[int, ...]]) -> list[str]:
        maker = PromptMaker(tokenizer_dir, seed)
        return [maker.prompt(24, *place) for place in places]

    places = [(64, 4, 1, i) for i in range(5)]
    assert prompts(3, places) == prompts(3, places)
    assert prompts(3, places)[2:3] == prompts(3, [places[2]]), "independent of the rest of the grid"
    assert not set(prompts(3, places)) & set(prompts(4, places))
    assert not set(prompts(3, places)) & set(prompts(3, [(64, 8, 1, i) for i in range(5)]))


def test_prompts_stay_what_they_are(tmp_path: Path) -> None:
    """A seed that gives another text would make old and new sweeps differ in what they sent."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert PromptMaker(tmp_path, 0).prompt(6, 64, 1, 1, 0) == "w30 w52 w61 w43 w14 w33"


def test_no_two_prompts_open_alike(tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    maker = PromptMaker(tokenizer_dir, seed=0)
    openings = [tuple(tokenizer.encode(maker.prompt(12, i)).ids[1 : 1 + OPENING]) for i in range(500)]
    assert len(set(openings)) == 500
    assert maker.prompt(12, 0) != maker.prompt(12, 0), "the same place twice would be a prefix hit"


def test_lengths_that_cannot_be(tokenizer_dir: Path) -> None:
    with pytest.raises(InputError, match="no prompt of 1 tokens: the tokenizer itself adds 1") as caught:
        PromptMaker(tokenizer_dir, 0).prompt(1)
    assert caught.value.hint == "ask for at least 2"
    assert PromptMaker(tokenizer_dir, 0).prompt(2)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer.json in it"):
        PromptMaker(tmp_path, 0)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not readable as a tokenizer"):
        PromptMaker(tmp_path, 0)


def test_token_ends(tokenizer_dir: Path) -> None:
    assert PromptMaker(tokenizer_dir, 0).token_ends(" word word word") == [5, 10, 15]
