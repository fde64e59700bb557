"""The unified Hugging Face checkpoint against transformers, and against the TensorRT-LLM checkpoint of the same build."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tkit.architectures import unified_hf
from tkit.quantize import int4

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
TOKENS = torch.randint(0, 4096, (1, 40), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("shape", [{"tie_word_embeddings": True}, {"dtype": "float32"}], ids=["tied", "float32"])
def test_plain_checkpoint_is_the_model_itself(make_llama, build, shape):
    model_dir = make_llama(**shape)
    hf = build(model_dir, "--format", "hf") / "hf"
    source, found = load_file(model_dir / "model.safetensors"), load_file(hf / "model.safetensors")
    dtype = torch.float16 if shape.get("dtype") == "float32" else torch.bfloat16
    assert found.keys() == source.keys()
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in source.items())
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)  # config and weights load together
    assert model.config.vocab_size == 4096
    assert not (hf / "hf_quant_config.json").exists()
    assert (hf / "tokenizer.json").exists()


def test_shards_and_index_follow_the_hubs_convention(make_llama, build, monkeypatch):
    monkeypatch.setattr(unified_hf, "MAX_SHARD_BYTES", 300_000)
    model_dir = make_llama()
    hf = build(model_dir, "--format", "hf", "--name", "sharded") / "hf"
    shards = sorted(path.name for path in hf.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(hf / file)
    expected = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


def test_fp8_projections_are_the_rows_of_the_fused_layer(make_llama, build):
    engine = build(make_llama(**WIDE), "--format", "both", "--quant", "fp8")
    ours = load_file(engine / "checkpoint" / "rank0.safetensors")
    hf = load_file(engine / "hf" / "model.safetensors")
    fused = ours["transformer.layers.1.attention.qkv.weight"].view(torch.uint8)
    prefix = "model.layers.1.self_attn."
    parts = [hf[f"{prefix}{part}_proj.weight"].view(torch.uint8) for part in "qkv"]
    assert torch.equal(torch.cat(parts), fused)
    for part in "qkv":
        assert hf[f"{prefix}{part}_proj.weight"].dtype == torch.float8_e4m3fn
        for ending, stored in (
            ("weight_scale", "weights_scaling_factor"),
            ("input_scale", "activation_scaling_factor"),
        ):
            scale = hf[f"{prefix}{part}_proj.{ending}"]
            assert scale.shape == () and scale.dtype == torch.float32
            assert scale == ours[f"transformer.layers.1.attention.qkv.{stored}"][0]
    config = json.loads((engine / "hf" / "hf_quant_config.json").read_text())
    assert config["quantization"] == {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    assert json.loads((engine / "hf" / "config.json").read_text())["quantization_config"]["quant_method"] == "modelopt"


def test_awq_with_folded_norms_computes_what_the_other_checkpoint_computes(make_llama, build):
    """Put the dequantized weights and the folded norms into transformers' own model and compare logits."""
    from tkit.runtime.load import load_model

    model_dir = make_llama(**WIDE)
    engine = build(model_dir, "--format", "both", "--quant", "int4_awq", "--tp", "2")
    stored = load_file(engine / "hf" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    state = model.state_dict()
    for name, tensor in stored.items():
        if tensor.dtype != torch.uint8:
            if name in state:
                state[name] = tensor.float()
            continue
        prefix = name.removesuffix("weight")
        weight = int4.dequantize(int4.unpack(tensor.view(torch.int8)), stored[prefix + "weight_scale"])
        has_factor = prefix + "pre_quant_scale" in stored
        assert has_factor == prefix.endswith(("o_proj.", "down_proj."))
        state[name] = weight * stored[prefix + "pre_quant_scale"].float() if has_factor else weight
    model.load_state_dict(state)
    reference, _ = load_model(engine, "cpu")
    with torch.no_grad():
        found, expected = model(TOKENS).logits, reference(TOKENS).logits
    # the folded norms are rounded to bfloat16 once more: 2^-9 relative, through three layers
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert (found - expected).abs().mean() < 0.01 * expected.abs().mean()
    source = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        quantization_error = (expected - source(TOKENS).logits).abs().mean()
    assert (found - expected).abs().mean() < 0.2 * quantization_error


ROUNDED_AGAIN = {"int4_awq": 0.01, "w4a8_awq": 0.03}  # folded norms are rounded to bfloat16, and FP8 inputs behind them


@pytest.mark.parametrize("quant", ["none", "fp8", "fp8_rowwise", "int4", "int4_awq", "w4a8_awq", "nvfp4"])
def test_the_runtime_reads_either_checkpoint(make_llama, build, quant):
    from tkit.runtime.load import load_model

    engine = build(make_llama(**WIDE), "--quant", quant, "--format", "both")
    trtllm, _ = load_model(engine, "cpu")
    shutil.rmtree(engine / "checkpoint")
    hf, _ = load_model(engine, "cpu")
    with torch.no_grad():
        one, two = trtllm(TOKENS).logits, hf(TOKENS).logits
        bare = load_model(engine / "hf", "cpu")[0](TOKENS).logits  # as a checkpoint that somebody else wrote
    assert (one - two).abs().mean() <= ROUNDED_AGAIN.get(quant, 0) * one.abs().mean()
    assert torch.equal(bare, two)


def test_a_checkpoint_with_a_layer_missing_is_not_run(make_llama, build):
    from tkit.errors import InputError
    from tkit.runtime.load import load_model

    engine = build(make_llama(**WIDE), "--quant", "fp8", "--format", "hf")
    (file,) = (engine / "hf").glob("*.safetensors")
    tensors = load_file(file)
    lost = [name for name in tensors if name.startswith("model.layers.1.mlp.up_proj.")]
    save_file({name: tensor for name, tensor in tensors.items() if name not in lost}, file)
    with pytest.raises(InputError) as raised:
        load_model(engine, "cpu")
    assert raised.value.problems == ("model.layers.1.mlp.up_proj.weight is missing",)


@pytest.mark.parametrize(
    ("quant", "algorithm", "weights", "inputs"),
    [
        ("w4a8_awq", {"quant_algo": "W4A8_AWQ", "group_size": 128, "has_zero_point": False, "pre_quant_scale": True},
         {"num_bits": 4, "type": "int", "group_size": 128}, {"num_bits": 8, "type": "float"}),
        ("nvfp4", {"quant_algo": "NVFP4", "group_size": 16},
         {"num_bits": 4, "type": "float", "group_size": 16}, {"num_bits": 4, "type": "float", "group_size": 16}),
    ],
)  # fmt: skip
def test_projections_that_readers_fuse_share_their_scales(make_llama, build, quant, algorithm, weights, inputs):
    hf = build(make_llama(**WIDE), "--quant", quant, "--format", "hf") / "hf"
    stored = load_file(hf / "model.safetensors")
    for fused in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
        for part in ("weight_scale_2", "input_scale"):
            values = [stored[f"model.layers.1.{name}.{part}"] for name in fused]
            assert all(value.shape == () and value.dtype == torch.float32 for value in values)
            assert len({value.item() for value in values}) == 1
    config = json.loads((hf / "hf_quant_config.json").read_text())["quantization"]
    assert config == {"kv_cache_quant_algo": None, "exclude_modules": ["lm_head"], **algorithm}
    (group,) = json.loads((hf / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert group["weights"] == {"dynamic": False, **weights}
    assert group["input_activations"] == {"dynamic": False, **inputs}


def test_both_from_one_pass_are_what_each_is_alone(make_llama, build):
    options = ["--quant", "fp8", "--tp", "2"]
    both = build(make_llama(**WIDE), *options, "--format", "both")
    for format, directory in (("trtllm", "checkpoint"), ("hf", "hf")):
        alone = build(make_llama(**WIDE), *options, "--format", format)
        for path in (alone / directory).iterdir():
            assert (both / directory / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("quant", "reason"),
    [
        ("int8", "int8 is quantized by trtllm-build itself"),
        ("int8_sq", "no reader of this format knows int8_sq"),
    ],
)
def test_what_no_reader_knows_is_refused_by_name(tkit, make_llama, quant, reason):
    result = tkit("build", make_llama(), "--quant", quant, "--format", "hf")
    assert result.exit_code == 2
    assert reason in result.stderr
