"""Layer-by-layer calibration against hooks on the whole model in transformers."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from tkit import demo
from tkit.architectures.config import spec_from_hf
from tkit.architectures.moves import plan_moves
from tkit.checkpoints.reader import open_source
from tkit.errors import InputError
from tkit.quantize.table import QUANTIZERS, Quantizer
from tkit.runtime import calibration
from tkit.runtime.calibration import CalibratedQuantizer, calibration_tokens
from tkit.specs.parallel import Parallel
from tkit.specs.precision import Precision

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
WINDOW = {"query_pre_attn_scalar": 16, "sliding_window": 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("config_class", "overrides"),
    [
        (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "attention_bias": True}),
        (transformers.MistralConfig, {"sliding_window": 8}),
        (transformers.Qwen2Config, {}),
        (transformers.Qwen3Config, {}),
        (transformers.GemmaConfig, {}),
        (transformers.Gemma2Config, WINDOW),
        (transformers.Gemma3TextConfig, {**WINDOW, "sliding_window_pattern": 2}),
        (transformers.Phi3Config, {}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_every_linear_sees_what_it_sees_in_the_whole_model(tmp_path, monkeypatch, config_class, overrides, dtype):
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **overrides})
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tokens = torch.randint(0, 512, (6, 48), generator=torch.Generator().manual_seed(8))
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 2 * 48)  # several batches
    spec = spec_from_hf(json.loads((tmp_path / "config.json").read_text()), "config.json")
    moves = plan_moves(spec, Precision.of("fp8"), Parallel())
    seen = {}
    watch = Quantizer(lambda weights, inputs, dtype: seen.update(dict.fromkeys(weights, inputs)) or {}, torch.clone)
    monkeypatch.setitem(QUANTIZERS, "fp8", watch)
    quantizer = CalibratedQuantizer(spec, tokens, dtype=dtype)
    with open_source(tmp_path) as source:
        quantizer.embedding((source.read("model.embed_tokens.weight"), "BF16"))
        for index in range(spec.num_layers):
            step = [move for move in moves if move.layer == index]
            sources = {name: (source.read(name), "BF16") for move in step for name in move.sources}
            quantizer.layer(index, sources, [move for move in step if move.format is not None])

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: expected.update({name: args[0].flatten(0, 1)}))
    with torch.inference_mode():
        model(tokens)
    assert len(seen) == sum(move.format is not None for move in moves)
    for move in (move for move in moves if move.format is not None):
        x, inputs = expected[move.sources[-1].removesuffix(".weight")].float(), seen[move.module]
        # batches of another size may be summed in another order, which bfloat16 shows
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
        torch.testing.assert_close(inputs.abs_max, x.abs().amax(0), **tolerance)
        torch.testing.assert_close(inputs.abs_mean, x.abs().mean(0), **tolerance)
        torch.testing.assert_close(inputs.square_mean, x.square().mean(0), **tolerance)


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(demo.MODEL_DIR / "tokenizer.json"))


def test_windows_come_from_the_text_and_from_the_seed(tokenizer, tmp_path):
    text = tmp_path / "calib.txt"
    text.write_text(" ".join(f"line {i} of the text" for i in range(400)))
    ids = tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    tokens = calibration_tokens(text, tokenizer, 5, 32, seed=1)
    assert tokens.shape == (5, 32)
    for window in tokens.tolist():
        assert any(ids[start : start + 32] == window for start in range(len(ids)))
    assert torch.equal(tokens, calibration_tokens(text, tokenizer, 5, 32, seed=1))
    assert not torch.equal(tokens, calibration_tokens(text, tokenizer, 5, 32, seed=2))


def test_jsonl_holds_the_same_texts(tokenizer, tmp_path):
    (tmp_path / "c.txt").write_text("one text, quite short. " * 50)
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "one text, quite short. " * 50}) + "\n\n")
    one, two = (calibration_tokens(tmp_path / name, tokenizer, 2, 16, seed=0) for name in ("c.txt", "c.jsonl"))
    assert torch.equal(one, two)


def test_a_text_that_is_too_short_is_refused_with_the_numbers(tokenizer, tmp_path):
    (tmp_path / "c.txt").write_text("short")
    with pytest.raises(InputError, match=r"c.txt: \d tokens, 16 samples of 256 need at least 272"):
        calibration_tokens(tmp_path / "c.txt", tokenizer, 16, 256, seed=0)


def test_broken_jsonl_lines_are_all_named(tokenizer, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\nnot json\n{"content": "b"}\n')
    with pytest.raises(InputError) as error:
        calibration_tokens(tmp_path / "c.jsonl", tokenizer, 1, 1, seed=0)
    assert [problem.split(":")[0] for problem in error.value.problems] == ["line 2", "line 3"]
