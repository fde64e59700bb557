"""The reference runtime against transformers on the source: same weights, same logits."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tkit.quantize import int4, int8
from tkit.runtime.load import load_model
from tkit.specs.quantization import QUANT_FORMATS

READER = Path(__file__).parents[2] / "benchmarks" / "_trtllm_reader.py"

SHORT = ("--calib-samples", 2, "--calib-len", 32)
TOKENS = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(7))
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def build(tkit, tmp_path):
    def build(model_dir, quant, tp_size, pp_size=1, *options):
        result = tkit("build", model_dir, "--quant", quant, "--tp", tp_size, "--pp", pp_size, *options)
        assert result.exit_code == 0, result.output
        return tmp_path / result.stdout.splitlines()[-1]

    return build


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize(
    "shape",
    [
        {"tie_word_embeddings": True},
        {"rope_parameters": LLAMA3_ROPE},
        {"attention_bias": True, "mlp_bias": True},
        {"vocab_size": 4099, "head_dim": 32},
        {"num_key_value_heads": 1},
    ],
    ids=["tied", "llama3-rope", "biases", "odd-vocab", "one-kv-head"],
)
def test_plain_checkpoint_gives_transformers_own_logits(make_llama, build, shape):
    model_dir = make_llama(**shape)
    source = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model, _ = load_model(build(model_dir, "none", 2, 2), "cpu")
    assert torch.equal(logits(model), logits(source))


def test_int8_is_rounded_as_the_build_on_the_gpu_will(make_llama, build):
    model_dir = make_llama()
    source = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for module in source.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = int8.rounded(module.weight.data.to(torch.bfloat16))
    engine = build(model_dir, "int8", 1)
    torch.testing.assert_close(logits(load_model(engine, "cpu")[0]), logits(source), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_int4_awq_runs_the_stored_codes(make_llama, build, tp_size):
    """Rebuild the model by hand from the rank files and compare."""
    model_dir = make_llama(**SIZES)
    engine = build(model_dir, "int4_awq", tp_size, 1, *SHORT)
    ranks = [load_file(engine / "checkpoint" / f"rank{rank}.safetensors") for rank in range(tp_size)]
    source = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    def weight(rank, name):
        scale = rank[name + ".weights_scaling_factor"]
        return (
            int4.dequantize(int4.unpack(rank[name + ".weight"]), scale)
            * rank[name + ".prequant_scaling_factor"].float()
        )

    for index, layer in enumerate(source.model.layers):
        name = f"transformer.layers.{index}."
        q, k = 256 // tp_size, 128 // tp_size
        qkv = [weight(rank, name + "attention.qkv").split((q, k, k)) for rank in ranks]
        layer.self_attn.q_proj.weight.data = torch.cat([part[0] for part in qkv])
        layer.self_attn.k_proj.weight.data = torch.cat([part[1] for part in qkv])
        layer.self_attn.v_proj.weight.data = torch.cat([part[2] for part in qkv])
        layer.self_attn.o_proj.weight.data = torch.cat(
            [weight(rank, name + "attention.dense") for rank in ranks], dim=1
        )
        layer.mlp.gate_proj.weight.data = torch.cat([weight(rank, name + "mlp.fc") for rank in ranks])
        layer.mlp.up_proj.weight.data = torch.cat([weight(rank, name + "mlp.gate") for rank in ranks])
        layer.mlp.down_proj.weight.data = torch.cat([weight(rank, name + "mlp.proj") for rank in ranks], dim=1)
    torch.testing.assert_close(logits(load_model(engine, "cpu")[0]), logits(source), rtol=1e-5, atol=1e-5)


WIDE = SIZES | {"hidden_size": 512, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}
STORED = [name for name, format in QUANT_FORMATS.items() if not format.is_stored_plain and name != "int4_gptq"]


@pytest.mark.parametrize(("quant", "kv_cache"), [*((quant, "auto") for quant in ("int8", *STORED)), ("fp8", "fp8")])
def test_every_format_computes_what_another_reader_makes_of_it_on_any_number_of_ranks(
    make_llama, build, quant, kv_cache
):
    """The benchmarks' reader shares no code with tkit."""
    model_dir = make_llama(**WIDE)
    engines = [build(model_dir, quant, tp_size, 1, "--kv-cache", kv_cache, *SHORT) for tp_size in (1, 2, 4)]
    models = [load_model(engine, "cpu")[0] for engine in engines]
    for split in models[1:]:
        for (name, one), (_, two) in zip(models[0].named_parameters(), split.named_parameters(), strict=True):
            assert torch.equal(one, two), name
        assert torch.equal(logits(models[0]), logits(split))  # the rounding of inputs included
    other = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    runpy.run_path(str(READER))["load"](other, engines[0] / "checkpoint")
    found, expected = logits(models[0]), logits(other)
    assert (found - expected).abs().mean() < 1e-3 * expected.abs().mean()  # a rounded input may fall on the other side


def test_fp8_rounds_weights_and_inputs(make_llama, build):
    model_dir = make_llama(**SIZES)
    source = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    engine = build(model_dir, "fp8", 2, 1, *SHORT)
    model, _ = load_model(engine, "cpu")
    layer, original = model.model.layers[0], source.model.layers[0]
    qkv = torch.cat([original.self_attn.get_submodule(f"{part}_proj").weight for part in "qkv"])
    scale = (qkv.abs().max() / 448).reshape(1)
    rounded = (original.self_attn.k_proj.weight / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(layer.self_attn.k_proj.weight, rounded)  # one scale for the fused weight
    down, before = layer.mlp.down_proj, {}
    stored = load_file(engine / "checkpoint" / "rank0.safetensors")
    input_scale = stored["transformer.layers.0.mlp.proj.activation_scaling_factor"]
    down.register_forward_pre_hook(lambda _, args: before.update(x=args[0]), prepend=True)
    down.register_forward_hook(lambda _, args, output: before.update(y=output))
    logits(model)
    x = (before["x"] / input_scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * input_scale
    torch.testing.assert_close(before["y"], x @ down.weight.T, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before["y"], before["x"] @ down.weight.T, rtol=1e-3)
