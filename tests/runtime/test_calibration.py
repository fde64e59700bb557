"""Layer-by-layer calibration against hooks on the whole model in transformers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tkit import demo
from tkit.architectures.config import spec_from_hf
from tkit.architectures.moves import plan_moves
from tkit.checkpoints.reader import open_source
from tkit.errors import InputError
from tkit.runtime import calibration
from tkit.runtime.calibration import CalibratedQuantizer, calibration_tokens
from tkit.specs.parallel import Parallel
from tkit.specs.quantization import QUANT_FORMATS

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def test_every_linear_sees_what_it_sees_in_the_whole_model(make_llama, monkeypatch):
    model_dir = make_llama(rope_parameters=LLAMA3_ROPE)
    tokens = torch.randint(0, 4096, (6, 48), generator=torch.Generator().manual_seed(8))
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 2 * 48)  # several batches
    spec = spec_from_hf(json.loads((model_dir / "config.json").read_text()), "config.json")
    moves = plan_moves(spec, QUANT_FORMATS["fp8"], Parallel())
    seen = {}
    monkeypatch.setattr(
        calibration, "quantize", lambda name, weights, inputs, dtype: seen.update(dict.fromkeys(weights, inputs)) or {}
    )
    quantizer = CalibratedQuantizer(spec, tokens)
    with open_source(model_dir) as source:
        quantizer.embedding((source.read("model.embed_tokens.weight"), "BF16"))
        for index in range(spec.num_layers):
            step = [move for move in moves if move.layer == index]
            sources = {name: (source.read(name), "BF16") for move in step for name in move.sources}
            quantizer.layer(index, sources, [move for move in step if move.format is not None])

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: expected.update({name: args[0].flatten(0, 1)}))
    with torch.inference_mode():
        model(tokens)
    pairs = {"attention.qkv": "self_attn.v_proj", "attention.dense": "self_attn.o_proj", "mlp.fc": "mlp.gate_proj",
             "mlp.gate": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}  # fmt: skip
    for layer in range(3):
        for ours, theirs in pairs.items():
            inputs = seen[f"transformer.layers.{layer}.{ours}"]
            x = expected[f"model.layers.{layer}.{theirs}"]
            torch.testing.assert_close(inputs.abs_max, x.abs().amax(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(inputs.abs_mean, x.abs().mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(inputs.square_mean, x.square().mean(0), rtol=1e-4, atol=1e-5)


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
