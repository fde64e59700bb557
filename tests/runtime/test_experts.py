"""Quantized experts: what is stored, against a slow recomputation; what runs, against transformers with that by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tkit import demo
from tkit.quantize import int4
from tkit.runtime.load import load_model

TOKENS = torch.randint(0, 4096, (1, 32), generator=torch.Generator().manual_seed(7))
SIZES = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.1,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
MODELS = {
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
    "qwen2-moe": (transformers.Qwen2MoeConfig, QWEN | {"shared_expert_intermediate_size": 256}),
    "qwen3-moe": (transformers.Qwen3MoeConfig, QWEN | {"mlp_only_layers": [0], "norm_topk_prob": True}),
}
# source names of an expert's layers
NAMES = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.{}.{}",
    "qwen2-moe": "model.layers.1.mlp.experts.{}.{}",
    "qwen3-moe": "model.layers.1.mlp.experts.{}.{}",
}
PARTS = {"mixtral": ("w1", "w3", "w2")}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            config_class, overrides = MODELS[name]
            directory = made[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config_class(**{**SIZES, **overrides}))
            model.to(torch.bfloat16).save_pretrained(directory)
            for path in demo.MODEL_DIR.glob("tokenizer*"):
                shutil.copyfile(path, directory / path.name)
        return made[name]

    return make


@pytest.fixture
def build(tkit):
    def build(*options):
        result = tkit("build", *options, "--calib-samples", "4", "--calib-len", "64")
        assert result.exit_code == 0, result.output
        return Path(result.stdout.strip())

    return build


def logits(engine):
    with torch.no_grad():
        return load_model(engine, "cpu")[0](TOKENS).logits


def source_experts(name, directory):
    """[(gate, up, down)] of the second layer, float32."""
    stored = load_file(directory / "model.safetensors")
    parts = PARTS.get(name, ("gate_proj", "up_proj", "down_proj"))
    return [[stored[NAMES[name].format(e, part) + ".weight"].float() for part in parts] for e in range(4)]


@pytest.mark.parametrize("name", MODELS)
def test_fp8_experts_are_stored_with_a_scale_each(model_dir, build, name):
    directory = model_dir(name)
    rank = load_file(build(directory, "--quant", "fp8") / "checkpoint" / "rank0.safetensors")
    layer = "transformer.layers.1.mlp."
    assert rank[layer + "router.weight"].dtype == torch.float32
    for module, stacked in (
        ("fc", [torch.cat([up, gate]) for gate, up, _ in source_experts(name, directory)]),
        ("proj", [down for _, _, down in source_experts(name, directory)]),
    ):
        found = {part: rank[f"{layer}{module}.{part}"] for part in
                 ("weight", "weights_scaling_factor", "activation_scaling_factor")}  # fmt: skip
        assert found["weights_scaling_factor"].shape == (4, 1) and found["activation_scaling_factor"].shape == (1,)
        for expert, weight in enumerate(stacked):
            scale = weight.abs().max() / 448
            assert found["weights_scaling_factor"][expert, 0] == scale
            expected = (weight / scale).to(torch.float8_e4m3fn)
            assert torch.equal(found["weight"][expert].view(torch.uint8), expected.view(torch.uint8))
    if name == "qwen2-moe":
        assert rank[layer + "shared_expert.fc.weight"].dtype == torch.float8_e4m3fn
        assert rank[layer + "shared_expert_gate.weight"].dtype == torch.bfloat16


def test_int4_experts_are_stored_in_groups(model_dir, build):
    directory = model_dir("mixtral")
    rank = load_file(build(directory, "--quant", "int4") / "checkpoint" / "rank0.safetensors")
    stored = {part: rank[f"transformer.layers.1.mlp.fc.{part}"] for part in ("weight", "weights_scaling_factor")}
    assert stored["weight"].shape == (4, 512, 256) and stored["weights_scaling_factor"].shape == (4, 1024, 2)
    for expert, (gate, up, _) in enumerate(source_experts("mixtral", directory)):
        groups = torch.cat([up, gate]).reshape(1024, 2, 128)
        scale = (groups.abs().amax(-1) / 7).bfloat16().float()
        assert torch.equal(stored["weights_scaling_factor"][expert], scale)
        codes = (groups / scale[..., None]).round().clamp(-8, 7).reshape(1024, 256).to(torch.int8)
        assert torch.equal(int4.unpack(stored["weight"][expert]), codes)


@pytest.mark.parametrize(
    ("name", "quant", "layouts"),
    [
        *((name, "fp8", (["--tp", "4", "--moe-ep", "2"],)) for name in MODELS),
        ("mixtral", "int8", (["--tp", "4", "--moe-ep", "2"],)),
        ("mixtral", "int4", (["--tp", "2"], ["--tp", "2", "--moe-ep", "2"])),
        ("qwen2-moe", "int4_awq", (["--tp", "2"],)),
        ("mixtral", "int4_gptq", (["--tp", "2"],)),
    ],
)
def test_shards_of_experts_are_the_whole_model(model_dir, build, name, quant, layouts):
    whole, _ = load_model(build(model_dir(name), "--quant", quant), "cpu")
    for layout in layouts:
        split, _ = load_model(build(model_dir(name), "--quant", quant, *layout), "cpu")
        for (parameter, one), (_, two) in zip(whole.named_parameters(), split.named_parameters(), strict=True):
            assert torch.equal(one, two), (quant, layout, parameter)
    source = AutoModelForCausalLM.from_pretrained(model_dir(name), dtype=torch.float32)
    for parameter, one in whole.named_parameters():
        original = source.get_parameter(parameter)
        is_quantized = one.dim() > 1 and not any(
            kept in parameter for kept in ("embed", "lm_head", "mlp.gate.", "expert_gate")
        )
        assert torch.equal(one, original) != is_quantized, parameter
        bound = 0.2 if "int4" in quant else 0.05
        assert (one - original).abs().mean() <= bound * original.abs().mean(), parameter


@pytest.mark.parametrize("name", MODELS)
def test_fp8_rounds_what_enters_each_expert(model_dir, build, name):
    """transformers' own stacked experts, with weights and inputs rounded by hand."""
    engine = build(model_dir(name), "--quant", "fp8", "--format", "both")
    rank = load_file(engine / "checkpoint" / "rank0.safetensors")
    model, _ = load_model(engine, "cpu")
    experts = model.get_submodule("model.layers.1.mlp.experts")
    seen = {}
    experts.register_forward_pre_hook(lambda _, args: seen.update(args=args))
    experts.register_forward_hook(lambda _, args, output: seen.update(output=output))
    first = logits_of(model)

    def rounded(x, module):
        scale = rank[f"transformer.layers.1.mlp.{module}.activation_scaling_factor"]
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    hidden, chosen, shares = seen["args"]
    expected = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for place in range(chosen.shape[1]):
            expert = chosen[token, place]
            gate, up = (experts.gate_up_proj[expert] @ rounded(hidden[token], "fc")).chunk(2)
            result = experts.down_proj[expert] @ rounded(torch.nn.functional.silu(gate) * up, "proj")
            expected[token] += shares[token, place] * result
    # another order of summation moves a few values to the next point of the grid
    assert (seen["output"] - expected).abs().mean() < 1e-3 * expected.abs().mean()
    (engine / "checkpoint").rename(engine / "away")
    assert torch.equal(logits(engine), first)
    excluded = json.loads((engine / "hf" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    router = "block_sparse_moe.gate" if name == "mixtral" else "mlp.gate"
    assert f"model.layers.1.{router}" in excluded


def logits_of(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_experts_apart_from_attention(model_dir, build):
    engine = build(model_dir("mixtral"), "--quant", "int8", "--quant-override", "mlp=fp8", "--exclude", "layers.0")
    layers = json.loads((engine / "checkpoint" / "quant_cfg.json").read_text())["quantized_layers"]
    assert layers["transformer.layers.1.mlp"] == {"quant_algo": "FP8"}
    assert logits(engine).isfinite().all()


@pytest.mark.parametrize("options", [["--quant-override", "mlp=fp8"], ["--exclude", "mlp"]])
def test_attention_in_a_format_that_has_no_experts(model_dir, build, options):
    engine = build(model_dir("mixtral"), "--quant", "nvfp4", *options)
    assert logits(engine).isfinite().all()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--quant", "fp8_rowwise"], "fp8_rowwise has no experts: TensorRT-LLM's mixture of experts raises an error"),
        (["--quant", "int8_sq"], "int8_sq has no experts: TensorRT-LLM runs them in 16 bits; give them one of"),
        (["--quant", "int4_awq", "--format", "hf"], "no reader of this format has experts in int4_awq"),
        (["--quant", "w4a8_awq"], "w4a8_awq has no experts: TensorRT-LLM's loader makes one alpha of the scales"),
        (
            ["--quant", "int8", "--quant-override", "mlp=nvfp4"],
            "nvfp4 has no experts: TensorRT-LLM's loader takes block",
        ),
    ],
)
def test_what_no_kernel_has_is_refused(model_dir, tkit, options, problem):
    result = tkit("build", model_dir("mixtral"), *options)
    assert result.exit_code == 2 and problem in result.stderr, result.stderr
