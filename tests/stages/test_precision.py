"""Mixed precision and excluded modules, built as a user builds them, against models put together by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tkit.quantize import int8
from tkit.runtime.load import load_model

TOKENS = torch.randint(0, 4096, (1, 40), generator=torch.Generator().manual_seed(11))
WIDE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def rounded_to_int4(weight):
    """Slowly: one group after the other."""
    rounded = weight.float().clone()
    for row in rounded:
        for start in range(0, len(row), 128):
            scale = (row[start : start + 128].abs().max() / 7).to(torch.bfloat16).float()
            row[start : start + 128] = (row[start : start + 128] / scale).round().clamp(-8, 7) * scale
    return rounded


@pytest.fixture(scope="module")
def by_hand(make_llama):
    """Attention as int8, MLP as int4, the first layer as it was."""
    model = AutoModelForCausalLM.from_pretrained(make_llama(**WIDE), dtype=torch.float32)
    for layer in model.model.layers[1:]:
        for module in layer.self_attn.children():
            module.weight.data = int8.rounded(module.weight.data.to(torch.bfloat16))
        for module in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            module.weight.data = rounded_to_int4(module.weight.data)
    return model


MIXED = ["--quant", "int4", "--exclude", "layers.0", "--quant-override", "*.self_attn.*=int8"]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_each_module_has_the_format_that_was_asked_for(make_llama, build, by_hand, tp_size):
    engine = build(make_llama(**WIDE), *MIXED, "--tp", str(tp_size))
    torch.testing.assert_close(logits(load_model(engine, "cpu")[0]), logits(by_hand), rtol=1e-5, atol=1e-5)
    card = json.loads((engine / "engine.json").read_text())
    assert (card["quant"], card["quant_algo"]) == ("int4", "MIXED_PRECISION")
    assert "-int4-mixed-" in engine.name
    assert "--exclude layers.0 --quant-override '*.self_attn.*=int8'" in card["command"]
    assert "checkpoint/quant_cfg.json" in card["files"]


def test_formats_by_kind_are_the_same_on_every_stage(make_llama, build):
    mixed = ["--quant", "int4", "--quant-override", "attention=fp8"]
    one = build(make_llama(**WIDE), *mixed)
    split = build(make_llama(**WIDE), *mixed, "--tp", "2", "--pp", "2")
    assert torch.equal(logits(load_model(one, "cpu")[0]), logits(load_model(split, "cpu")[0]))


def test_excluded_modules_are_the_sources(make_llama, build):
    """Against the engine that quantizes everything, whose weights are put back where they were excluded."""
    source = AutoModelForCausalLM.from_pretrained(make_llama(**WIDE), dtype=torch.float32)
    for quant in ("int8", "int4", "fp8_rowwise"):
        whole, _ = load_model(build(make_llama(**WIDE), "--quant", quant), "cpu")
        engine = build(
            make_llama(**WIDE), "--quant", quant, "--exclude", "layers.3", "--exclude", "attention", "--tp", "2"
        )
        model, _ = load_model(engine, "cpu")
        for name, parameter in model.named_parameters():
            is_excluded = ".layers.3." in name or ".self_attn." in name
            original = (source if is_excluded else whole).get_parameter(name)
            assert torch.equal(parameter, original), (quant, name)
        config = json.loads((engine / "checkpoint" / "config.json").read_text())
        assert "*lm_head" in config["quantization"]["exclude_modules"]


def test_both_checkpoints_say_and_hold_the_same(make_llama, build):
    options = ["--quant", "int4_awq", "--quant-override", "mlp=fp8", "--exclude", "layers.0", "--format", "both"]
    engine = build(make_llama(**WIDE), *options)
    trtllm, _ = load_model(engine, "cpu")
    (engine / "checkpoint").rename(engine / "away")
    hf, _ = load_model(engine, "cpu")
    # AWQ's factor is folded into the norms of three layers there, and rounded once more
    assert (logits(trtllm) - logits(hf)).abs().mean() < 0.01 * logits(trtllm).abs().mean()
    config = json.loads((engine / "hf" / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"]["model.layers.1.self_attn.q_proj"] == {
        "quant_algo": "W4A16_AWQ", "group_size": 128, "has_zero_point": False, "pre_quant_scale": True
    }  # fmt: skip
    assert config["quantized_layers"]["model.layers.1.mlp.down_proj"] == {"quant_algo": "FP8"}
    assert config["exclude_modules"][0] == "lm_head"
    assert set(config["exclude_modules"][1:]) == {
        f"model.layers.0.{name}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                     "mlp.up_proj", "mlp.down_proj")
    }  # fmt: skip
    groups = json.loads((engine / "hf" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(len(group["targets"]) for group in groups.values()) == [3 * 3, 3 * 4]


def test_a_recipe_spells_it_as_the_options_do(make_llama, build):
    Path("mixed.yaml").write_text(
        f"model: {make_llama(**WIDE)}\n"
        'engines: [{quant: int4, exclude: [layers.0], quant_overrides: {"*.self_attn.*": int8}}]\n'
    )
    recipe = build("mixed.yaml")
    options = build(make_llama(**WIDE), *MIXED)
    assert recipe.name.rpartition("-")[2] == options.name.rpartition("-")[2]


def test_the_card_names_what_is_there(make_llama, build):
    """Reports compare with the engine whose card says `none`."""
    for options, quant in ((["--quant-override", "mlp=int8"], "int8"), (["--quant", "int8", "--exclude", "*"], "none")):
        card = json.loads((build(make_llama(**WIDE), *options) / "engine.json").read_text())
        assert card["quant"] == quant
        assert card["quant_algo"] == ("W8A16" if quant == "int8" else None)


def test_the_order_of_overrides_is_part_of_the_name(make_llama, tkit):
    overrides = ["--quant-override", "attention=int8", "--quant-override", "layers.0=none"]
    names = [
        json.loads(tkit("build", make_llama(**WIDE), *order, "--dry-run", "--json").stdout)["name"]
        for order in (overrides, overrides[2:] + overrides[:2])
    ]
    assert names[0] != names[1]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--quant", "int8", "--exclude", "layers.99"], '"layers.99" matches no layer that can be quantized'),
        (["--quant-override", "mlp"], '"mlp"'),
        (["--quant-override", "mlp=int5"], '"mlp": unknown quantization "int5" (did you mean "int8"?)'),
        (["--quant", "int8", "--quant-override", "attention=fp8_rowwise"],
         "FP8_PER_CHANNEL_PER_TOKEN replaces whole attention and MLP modules"),
        (["--quant", "fp8", "--exclude", "layers.0", "--pp", "2"], "transformer.layers.2.mlp.fc is fp8"),
        (["--quant", "int4", "--quant-override", "mlp=int8", "--format", "hf"], "int8 is quantized by trtllm-build itself"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(make_llama, tkit, options, problem):
    result = tkit("build", make_llama(**WIDE), *options)
    assert result.exit_code == 2, result.output
    assert problem in result.stderr
    assert not Path("engines").exists()


@pytest.mark.parametrize("quant", ["int4", "int4_awq"])
def test_groups_of_64_where_128_do_not_divide(make_llama, build, quant):
    """320 = 5 x 64."""
    model_dir = make_llama(**{**WIDE, "num_hidden_layers": 1, "intermediate_size": 320})
    engine = build(model_dir, "--quant", quant, "--calib-samples", "4")
    card = json.loads((engine / "engine.json").read_text())
    assert any(note.startswith(f"{quant} in groups of 64: mlp.fc: out size 320") for note in card["notes"])
    stored = load_file(engine / "checkpoint" / "rank0.safetensors")
    assert stored["transformer.layers.0.mlp.proj.weights_scaling_factor"].shape == (256, 5)
    source = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model, _ = load_model(engine, "cpu")
    for name, parameter in model.model.layers.named_parameters():
        if parameter.dim() > 1:
            original = source.model.layers.get_parameter(name)
            assert (parameter - original).abs().mean() < 0.15 * original.abs().mean(), name
            if quant == "int4":
                groups = original.reshape(len(original), -1, 64)
                scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
                assert torch.equal(parameter, ((groups / scale).round().clamp(-8, 7) * scale).reshape(original.shape))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--quant", "fp8", "--gpu", "A30"], "--quant fp8 needs SM 89, A30 has SM 80"),
        (["--quant", "int8", "--quant-override", "mlp=nvfp4", "--gpu", "H100-SXM"], "--quant nvfp4 needs SM 100"),
        (["--quant", "int8", "--kv-cache", "fp8", "--gpu", "A100-SXM-80"], "--kv-cache fp8 needs SM 89"),
    ],
)
def test_a_format_without_kernels_on_the_gpu_is_named(tkit, options, problem):
    result = tkit("build", *options, "--dry-run")
    assert result.exit_code == 2 and problem in result.stderr
    assert tkit("build", *options[:-1], "B200", "--dry-run").exit_code == 0


def test_a_calibration_that_the_model_cannot_read_is_named(tkit, make_llama):
    result = tkit("build", make_llama(), "--quant", "fp8", "--calib-len", "513")
    assert result.exit_code == 2 and "--calib-len 513: the model has 512 positions" in result.stderr
    Path("empty.txt").write_text("")
    result = tkit("build", make_llama(), "--quant", "fp8", "--calib", "empty.txt", "--dry-run")
    assert result.exit_code == 2 and "empty.txt: 0 tokens, 16 samples of 256 need at least 272" in result.stderr
    assert not list(Path("engines").glob("*"))
