"""The shipped demo model is trained, small, and judged on text it has not seen."""

import json
import math
import re
from collections import Counter

import pytest

from tkit import demo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tkit.demo import train  # noqa: E402

README = (demo.MODEL_DIR.parent / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(demo.MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def held_out_ids(tokenizer):
    return tokenizer(demo.HELD_OUT.read_text("utf-8"), verbose=False)["input_ids"]


def paragraphs(path):
    return [" ".join(text.split()) for text in re.split(r"\n\s*\n", path.read_text("utf-8"))]


def readme_figure(name):
    (value,) = re.findall(rf"^\| {re.escape(name)} \| ([\d.]+)", README, re.MULTILINE)
    return float(value)


def test_tokenizer_returns_every_text_unchanged(tokenizer):
    for text in (demo.HELD_OUT.read_text("utf-8"), "naïve ☃ 漢字\t\r\n  \x00 end ", ""):
        ids = tokenizer(text, verbose=False)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_compresses_held_out_text(held_out_ids):
    bytes_per_token = demo.HELD_OUT.stat().st_size / len(held_out_ids)
    assert bytes_per_token == pytest.approx(readme_figure("bytes per token"), abs=0.01)
    assert bytes_per_token > 3


def test_chat_template_ends_where_the_model_answers(tokenizer):
    messages = [{"role": "user", "content": "What is a generator?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s>user: What is a generator?\n\nassistant:"


def test_held_out_perplexity_is_the_one_in_the_readme(model, held_out_ids):
    assert train.perplexity(model, held_out_ids, context=512, stride=512) == pytest.approx(
        readme_figure("held-out perplexity"), rel=0.03
    )


def test_the_model_uses_its_context(model, tokenizer, held_out_ids):
    counts = Counter(tokenizer(demo.CALIBRATION.read_text("utf-8"), verbose=False)["input_ids"])
    total = sum(counts.values()) + len(tokenizer)
    unigram = math.exp(-sum(math.log((counts[token] + 1) / total) for token in held_out_ids) / len(held_out_ids))
    ids = held_out_ids[: 8 * 512 + 1]
    assert train.perplexity(model, ids) < unigram / 8 < len(tokenizer) / 8


def test_contexts_of_2048_do_not_break(model, held_out_ids):
    ids = held_out_ids[: 8 * 512 + 1]
    # The README's 15 %, with room for the choice of text; positions never trained on would cost a multiple.
    assert train.perplexity(model, ids, context=2048, stride=1024) < 1.25 * train.perplexity(model, ids)


def test_perplexity_of_a_uniform_model_is_the_vocabulary_size():
    class Uniform(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            return transformers.modeling_outputs.CausalLMOutput(logits=torch.zeros(*input_ids.shape, 100))

    assert train.perplexity(Uniform(), list(range(50)), context=16, stride=8) == pytest.approx(100)
    with pytest.raises(ValueError, match="50 tokens hold no window of 50"):
        train.perplexity(Uniform(), list(range(50)), context=50)


def test_held_out_text_does_not_leak_into_calibration():
    long = [text for text in paragraphs(demo.HELD_OUT) if len(text) > 200]
    calibration = " ".join(paragraphs(demo.CALIBRATION))
    assert len(long) > 100
    assert [text for text in long if text in calibration] == []


def test_the_training_split_holds_no_held_out_paragraph():
    corpus = train.corpus()
    kept_back = {train._key(p) for document in corpus.held_out for p in train._paragraphs(document.text)} - {None}
    seen = {train._key(p) for document in corpus.train for p in train._paragraphs(document.text)}
    assert len(kept_back) > 500
    assert kept_back & seen == set()


def test_the_corpus_carries_no_notice_but_that_of_the_psf():
    text = demo.HELD_OUT.read_text("utf-8") + demo.CALIBRATION.read_text("utf-8")
    assert train.FOREIGN_NOTICE.search(text) is None
    assert train.FOREIGN_NOTICE.search("# Copyright (C) 2001 Somebody Else.")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in demo.MODEL_DIR.with_name("CORPUS_LICENSE").read_text(
        "utf-8"
    )


def test_windows_come_once_per_pass():
    stream = torch.arange(1000)
    source = train.windows(stream, 10, train.np.random.default_rng(0))
    first = [next(source) for _ in range(99)]
    assert all(len(window) == 11 and (window.diff() == 1).all() for window in first)
    assert len({int(window[0]) for window in first}) == 99


def test_model_files_are_small_and_describe_a_grouped_query_llama(model):
    assert sum(path.stat().st_size for path in demo.MODEL_DIR.iterdir()) < 12e6
    assert 3.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 4.5e6
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    config = json.loads((demo.MODEL_DIR / "config.json").read_text("utf-8"))
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]
    assert config["tie_word_embeddings"] and config["max_position_embeddings"] == 2048


def test_a_killed_run_continues_to_the_same_weights(tmp_path, monkeypatch, tokenizer):
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    monkeypatch.setattr(train, "MODEL", train.MODEL | small | dict(intermediate_size=32, vocab_size=64))
    for name, value in dict(TOKENS_PER_STEP=64, LENGTH=32, LATE_LENGTHS=(32, 64)).items():
        monkeypatch.setattr(train, name, value)
    stream = torch.arange(2000) * 7 % 61

    def weights(state=None):
        return train.train(stream, tokenizer, steps=130, seed=3, state=state).state_dict()

    def killed_at_125(message, **_):
        if message.startswith("step 125/"):
            raise KeyboardInterrupt

    expected, state = weights(), tmp_path / "state"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.click, "echo", killed_at_125)
        weights(state)
    assert torch.load(state, weights_only=True)["step"] == 100
    continued = weights(state)
    assert not state.exists()
    for name, value in expected.items():
        torch.testing.assert_close(continued[name], value, rtol=0, atol=0)
