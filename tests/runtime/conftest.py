"""Tokenizers of both kinds, trained here on a page of text, and a tiny random Llama that goes with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CORPUS = [
    "The king said to the people that he would go down to the river and the river would rise.",
    "In the beginning was the word,  and the word was written down twice. Don't stop, he said.",
    "日本語の文章と中文的句子。東京は大きい。北京很大。",
    "A smile 😀, a wave 👋🏽, a family 👨‍👩‍👧 and a flag 🇯🇵 \n\n\tthen café, naïve, Ωmega.",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>"]


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's and Llama 3's: every token is a run of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrapped(tokenizer)


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is U+2581, one stands before the text, unknown characters become byte tokens."""
    trained = Tokenizer(models.BPE())
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.normalizer = spaces
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    trained.train_from_iterator([line for line in CORPUS if line.isascii()], trainer)
    learned = json.loads(trained.to_str())["model"]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    merges = [tuple(merge) for merge in learned["merges"]]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return _wrapped(tokenizer)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As T5's and XLNet's: Unigram over words that begin with U+2581."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrapped(tokenizer)


TOKENIZERS = {
    "byte_level": byte_level_tokenizer,
    "byte_fallback": byte_fallback_tokenizer,
    "metaspace": metaspace_tokenizer,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """These models are too small for two, and two spin when the machine does anything else."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Each kind in turn."""
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="session")
def byte_level() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def byte_fallback() -> PreTrainedTokenizerFast:
    return byte_fallback_tokenizer()


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return CORPUS[:4]


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """make_model(**config) -> a tiny random Llama; make_model(MistralConfig, ...) -> of that family."""

    def make(config_class: type[PreTrainedConfig] = LlamaConfig, **overrides: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        sizes = {
            "vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
            "initializer_range": 0.2,  # large enough that logits differ from token to token
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        }  # fmt: skip
        attention = overrides.pop("attn_implementation", "sdpa")
        config = config_class(**{**sizes, **overrides})
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()

    return make


@pytest.fixture(scope="session")
def llama(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Shared; whoever hooks into it unhooks."""
    return make_model()
