"""KV caches in 8 bits, against transformers' own attention with the rounding written into it by hand."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tkit.quantize.kv_cache import KvStatistics, rounded, scales
from tkit.runtime.cache import SlotCache
from tkit.runtime.forward import forward
from tkit.runtime.load import load_model

TOKENS = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(7))


def slowly_rounded(x, scale, dtype):
    values = x.double() / float(scale)
    if dtype == "fp8":
        grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        grid = grid[grid.isfinite()].sort().values
        near = grid[(values.reshape(-1, 1) - grid).abs().argmin(dim=1)].reshape(values.shape)
        return near * float(scale)
    return values.round().clamp(-128, 127) * float(scale)


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_rounding_is_to_the_nearest_value_of_the_grid(dtype):
    x = 40 * torch.randn(2, 3, 50, 4, generator=torch.Generator().manual_seed(0))
    seen = KvStatistics()
    seen.update(x[:, :, :25], x[:, :, 25:] / 8)
    seen.update(x[:, :, 25:], x[:, :, :25] / 8)
    found = scales(dtype, seen)
    largest = 448 if dtype == "fp8" else 127
    torch.testing.assert_close(found["k_scale"], (x.abs().max() / largest).reshape(1))
    assert torch.equal(found["kv_cache_scaling_factor"], found["k_scale"]) and found["v_scale"] < found["k_scale"] / 7
    torch.testing.assert_close(rounded(x, found["k_scale"], dtype).double(), slowly_rounded(x, found["k_scale"], dtype))
    nothing = scales(dtype, KvStatistics())["k_scale"]
    assert nothing == 1 and (rounded(torch.zeros(3), nothing, dtype) == 0).all()


@pytest.mark.parametrize(("dtype", "algo"), [("fp8", "FP8"), ("int8", "INT8")])
def test_the_runtime_attends_to_what_the_cache_would_hold(make_llama, build, dtype, algo):
    engine = build(make_llama(), "--kv-cache", dtype, "--tp", "2", "--pp", "2")
    config = json.loads((engine / "checkpoint" / "config.json").read_text())["quantization"]
    assert (config["quant_algo"], config["kv_cache_quant_algo"]) == (None, algo)
    ranks = [load_file(engine / "checkpoint" / f"rank{rank}.safetensors") for rank in range(4)]
    name = "transformer.layers.{}.attention.kv_cache_scaling_factor"
    layers = [ranks[0][name.format(0)], ranks[0][name.format(1)], ranks[2][name.format(0)]]  # 3 layers on 2 stages
    assert torch.equal(ranks[1][name.format(1)], layers[1]) and torch.equal(ranks[3][name.format(0)], layers[2])
    assert all(scale.shape == (1,) and scale.dtype == torch.float32 and 0 < scale < 1 for scale in layers)

    plain, expected = logits_by_hand(make_llama(), [(scale, scale) for scale in layers], dtype)
    with torch.no_grad():
        found = load_model(engine, "cpu")[0](TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 0.01


def logits_by_hand(model_dir, scales, dtype):
    """transformers' model as it is, and with keys and values rounded in front of its attention."""

    def attention(module, query, key, value, *args, **kwargs):
        states = (
            slowly_rounded(*pair, dtype).float() for pair in zip((key, value), scales[module.layer_idx], strict=True)
        )
        return sdpa_attention_forward(module, query, *states, *args, **kwargs)

    AttentionInterface.register("sdpa_rounded_by_hand", attention)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        plain = model(TOKENS).logits
        model.set_attn_implementation("sdpa_rounded_by_hand")
        return plain, model(TOKENS).logits


def test_tokens_one_by_one_see_what_the_prompt_saw(make_llama, build):
    """The serving engine's cache holds rounded values as well."""
    model, spec = load_model(build(make_llama(), "--kv-cache", "int8"), "cpu")
    plain = AutoModelForCausalLM.from_pretrained(make_llama(), dtype=torch.float32)
    cache = SlotCache(num_layers=spec.num_layers, max_rows=2, budget_tokens=2 * 128)
    cache.reserve(2, 40)
    with torch.inference_mode():
        step_by_step = [
            forward(model, cache, TOKENS[:, i : i + 1], torch.full((2, 1), i), first_row=0, length=i + 1)
            for i in range(40)
        ]
        whole, unrounded = model(TOKENS).logits, plain(TOKENS).logits
    # another order of summation moves a few values to the next point of the grid, the rounding itself moves them all
    difference = (torch.stack(step_by_step, dim=1) - whole).abs().mean()
    assert difference < 0.05 * (whole - unrounded).abs().mean()


def test_the_other_checkpoint_has_a_scale_each(make_llama, build):
    engine = build(make_llama(), "--kv-cache", "fp8", "--format", "both")
    hf = load_file(engine / "hf" / "model.safetensors")
    common = load_file(engine / "checkpoint" / "rank0.safetensors")
    scales = []
    for layer in range(3):
        keys, values = (hf[f"model.layers.{layer}.self_attn.{part}"] for part in ("k_proj.k_scale", "v_proj.v_scale"))
        assert keys.dim() == values.dim() == 0 and keys != values
        assert max(keys, values) == common[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"][0]
        scales.append((keys, values))
    quantization = json.loads((engine / "hf" / "hf_quant_config.json").read_text())["quantization"]
    assert quantization == {"quant_algo": None, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    assert json.loads((engine / "hf" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"] == {
        "dynamic": False, "num_bits": 8, "type": "float"
    }  # fmt: skip
    (engine / "checkpoint").rename(engine / "away")
    with torch.no_grad():
        found = load_model(engine, "cpu")[0](TOKENS).logits
    torch.testing.assert_close(found, logits_by_hand(make_llama(), scales, "fp8")[1], rtol=1e-4, atol=1e-4)


def test_the_card_says_how_the_cache_is_stored(make_llama, build):
    card = json.loads((build(make_llama(), "--kv-cache", "int8", "--quant", "int8") / "engine.json").read_text())
    plain = json.loads((build(make_llama()) / "engine.json").read_text())
    assert card["recipe"]["kv_cache"] == "int8" and "--kv-cache int8" in card["command"]
    assert "-int8-kv_int8-" in card["name"]
    assert card["build"]["kv_bytes_per_token"] * 2 == plain["build"]["kv_bytes_per_token"]
    assert any("--use_paged_context_fmha disable" in note for note in card["notes"])


def test_mixed_precision_names_the_cache_in_both_files(make_llama, build):
    engine = build(
        make_llama(), "--quant", "int8", "--quant-override", "mlp=fp8", "--exclude", "layers.0", "--kv-cache", "fp8"
    )
    for name, key in (("config.json", "quantization"), ("quant_cfg.json", None)):
        content = json.loads((engine / "checkpoint" / name).read_text())
        assert (content[key] if key else content)["kv_cache_quant_algo"] == "FP8"
    assert load_model(engine, "cpu")


def test_an_int8_cache_has_no_reader_in_the_other_format(make_llama, tkit):
    result = tkit("build", make_llama(), "--kv-cache", "int8", "--format", "hf")
    assert result.exit_code == 2 and "int8 is no KV cache of the readers of this format" in result.stderr
