"""Layer-by-layer calibration against hooks on the whole model in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from tkit.architectures.config import spec_from_hf
from tkit.architectures.moves import plan_moves
from tkit.checkpoints.reader import open_source
from tkit.quantize.table import QUANTIZERS, Quantizer
from tkit.runtime import calibration
from tkit.runtime.bits import to_torch
from tkit.runtime.calibration import CalibratedQuantizer
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
GPT = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128, "bos_token_id": None, "eos_token_id": None}
FALCON = {"bos_token_id": None, "eos_token_id": None, "ffn_hidden_size": 128, "num_kv_heads": 4}
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
        (transformers.GPT2Config, GPT),
        (transformers.GPTJConfig, GPT | {"rotary_dim": 8}),
        (transformers.FalconConfig, FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
        (transformers.FalconConfig, FALCON | {"multi_query": True}),
        (
            transformers.FalconConfig,
            FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
        ),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_every_linear_sees_what_it_sees_in_the_whole_model(tmp_path, monkeypatch, config_class, overrides, dtype):
    torch.manual_seed(0)
    sizes = {
        name: size for name, size in SIZES.items() if name != "head_dim" or config_class != transformers.FalconConfig
    }
    config = config_class(**{**sizes, **overrides})
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tokens = torch.randint(0, 512, (6, 48), generator=torch.Generator().manual_seed(8))
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 2 * 48)  # several batches
    spec = spec_from_hf(json.loads((tmp_path / "config.json").read_text()), "config.json")
    moves = plan_moves(spec, Precision.of("fp8", kv_cache="int8"), Parallel())
    seen = {}
    watch = Quantizer(lambda weights, inputs, dtype: seen.update(dict.fromkeys(weights, inputs)) or {}, torch.clone)
    monkeypatch.setitem(QUANTIZERS, "fp8", watch)
    found = calibrated(CalibratedQuantizer(spec, tokens, dtype=dtype), moves, tmp_path)

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D):
            module.register_forward_pre_hook(lambda _, args, name=name: expected.update({name: args[0].flatten(0, 1)}))
    with torch.inference_mode():
        cache = model(tokens, past_key_values=transformers.DynamicCache()).past_key_values  # one that forgets nothing
    assert len(seen) == sum(move.format is not None for move in moves)
    # batches of another size may be summed in another order, which bfloat16 shows
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for move in (move for move in moves if move.format is not None):
        x, inputs = expected[move.sources[-1].removesuffix(".weight")].float(), seen[move.module]
        torch.testing.assert_close(inputs.abs_max, x.abs().amax(0), **tolerance)
        torch.testing.assert_close(inputs.abs_mean, x.abs().mean(0), **tolerance)
        torch.testing.assert_close(inputs.square_mean, x.square().mean(0), **tolerance)
    for index, layer in enumerate(cache.layers):
        scales = found[f"transformer.layers.{index}.attention.kv_cache"]
        for part, states in (("k_scale", layer.keys), ("v_scale", layer.values)):
            scale = to_torch(*scales[part])
            torch.testing.assert_close(scale, states.abs().max().float().reshape(1) / 127, **tolerance)
        larger = torch.maximum(to_torch(*scales["k_scale"]), to_torch(*scales["v_scale"]))
        assert torch.equal(to_torch(*scales["kv_cache_scaling_factor"]), larger)


MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("config_class", "overrides"),
    [
        (transformers.MixtralConfig, {"num_local_experts": 6, "sliding_window": 8}),
        (transformers.Qwen2MoeConfig, MOE | {"shared_expert_intermediate_size": 64}),
        (transformers.Qwen3MoeConfig, MOE | {"mlp_only_layers": [1], "norm_topk_prob": True}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_every_expert_sees_the_tokens_that_are_routed_to_it(tmp_path, monkeypatch, config_class, overrides):
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **overrides})
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tokens = torch.randint(0, 512, (6, 48), generator=torch.Generator().manual_seed(8))
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 2 * 48)  # several batches
    monkeypatch.setattr(calibration, "EXPERT_TOKENS", 96)
    spec = spec_from_hf(json.loads((tmp_path / "config.json").read_text()), "config.json")
    moves = plan_moves(spec, Precision.of("fp8"), Parallel())
    dense, sparse = {}, []
    watch = Quantizer(
        lambda weights, inputs, dtype: dense.update(dict.fromkeys(weights, inputs)) or {}, torch.clone,
        quantize_experts=lambda weights, pooled, each, dtype: sparse.append((weights, pooled, each)) or {},
    )  # fmt: skip
    monkeypatch.setitem(QUANTIZERS, "fp8", watch)
    quantizer = CalibratedQuantizer(spec, tokens, dtype=torch.float32)
    calibrated(quantizer, moves, tmp_path)

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    calls, shared = [], {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda module, args: calls.append((module, *args)))
        if "shared_expert." in name:
            module.register_forward_pre_hook(lambda _, args, name=name: shared.update({name: args[0].flatten(0, -2)}))
    with torch.inference_mode():
        model(tokens)
    assert len(sparse) == 2 * len(calls)
    num_starved = 0
    for index, (experts, hidden, chosen, _) in enumerate(calls):
        (fc_weights, fc_pooled, fc_each), (proj_weights, proj_pooled, proj_each) = sparse[2 * index : 2 * index + 2]
        middle = []
        for expert in range(6):
            x = hidden[(chosen == expert).any(dim=-1)]
            assert torch.equal(fc_weights[expert].float(), experts.gate_up_proj[expert])
            assert torch.equal(proj_weights[expert].float(), experts.down_proj[expert])
            gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            middle.append(torch.nn.functional.silu(gate) * up)
            is_starved = len(x) < 96
            num_starved += 2 * is_starved
            for inputs, pooled, expected in ((fc_each, fc_pooled, x), (proj_each, proj_pooled, middle[-1])):
                if is_starved:
                    assert inputs[expert] is pooled
                else:
                    assert inputs[expert].num_tokens == len(x)
                    torch.testing.assert_close(
                        inputs[expert].square_mean, expected.square().mean(0), rtol=1e-4, atol=1e-5
                    )
        torch.testing.assert_close(fc_pooled.abs_max, hidden.abs().amax(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(proj_pooled.abs_max, torch.cat(middle).abs().amax(0), rtol=1e-4, atol=1e-5)
        assert fc_pooled.num_tokens == proj_pooled.num_tokens == 2 * len(hidden)
    for name, x in shared.items():
        if name.endswith("down_proj"):
            layer = name.split(".")[2]
            inputs = dense[f"transformer.layers.{layer}.mlp.shared_expert.proj"]
            torch.testing.assert_close(inputs.abs_max, x.abs().amax(0), rtol=1e-4, atol=1e-5)
    assert 0 < num_starved < 12 * len(calls)
    assert quantizer.notes()[0].startswith(f"{num_starved} of {12 * len(calls)} expert layers saw fewer than 96")


def calibrated(quantizer, moves, model_dir):
    """What `convert` would ask of the quantizer."""
    found = {}
    with open_source(model_dir) as source:

        def read(step):
            return {name: (source.read(name), "BF16") for move in step for name in move.sources}

        first = [move for move in moves if move.module.endswith("_embedding")]
        quantizer.begin(read(first))
        for index in range(quantizer.spec.num_layers):
            step = [move for move in moves if move.layer == index]
            found |= quantizer.layer(index, read(step), [move for move in step if move.is_computed])
    return found


def test_activations_in_a_file_are_the_same_bits(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model_dir, spill = tmp_path / "model", tmp_path / "spill"
    spill.mkdir()
    config = transformers.LlamaConfig(**SIZES)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(model_dir)
    spec = spec_from_hf(json.loads((model_dir / "config.json").read_text()), "config.json")
    moves = plan_moves(spec, Precision.of("fp8", kv_cache="fp8"), Parallel())
    tokens = torch.randint(0, 512, (6, 48), generator=torch.Generator().manual_seed(8))
    in_memory = calibrated(CalibratedQuantizer(spec, tokens), moves, model_dir)
    monkeypatch.setattr(calibration, "SPILL_BYTES", 6 * 48 * 64 * 2 - 1)
    files = []
    monkeypatch.setattr(torch, "from_file", lambda name, *args, real=torch.from_file, **kwargs: (
        files.append(name) or real(name, *args, **kwargs)))  # fmt: skip
    spilled = calibrated(CalibratedQuantizer(spec, tokens, spill_directory=spill), moves, model_dir)
    assert [Path(name).parent for name in files] == [spill] and list(spill.iterdir()) == []
    assert spilled.keys() == in_memory.keys()
    for module, parts in in_memory.items():
        for part, (raw, _) in parts.items():
            assert (spilled[module][part][0] == raw).all(), (module, part)
