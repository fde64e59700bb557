from __future__ import annotations

import dataclasses

import pytest

from tkit.architectures.formats import (
    module_formats,
    precision_from_trtllm,
    trtllm_quant_cfg,
    trtllm_quantization,
)
from tkit.architectures.moves import fitted_precision, plan_moves
from tkit.errors import InputError
from tkit.specs.model import ModelSpec
from tkit.specs.parallel import Parallel
from tkit.specs.precision import Precision

SPEC = ModelSpec(
    architecture="LlamaForCausalLM", dtype="bfloat16", num_layers=12, hidden_size=256, intermediate_size=768, num_heads=8,
    num_kv_heads=4, head_size=32, vocab_size=1001, max_position_embeddings=128, hidden_act="silu", norm_epsilon=1e-5,
    rope_theta=10000.0,
)  # fmt: skip
MIXTRAL = dataclasses.replace(
    SPEC, architecture="MixtralForCausalLM", num_experts=4, experts_per_token=2, expert_size=768
)
QWEN_MOE = dataclasses.replace(
    MIXTRAL, architecture="Qwen3MoeForCausalLM", extras={"mlp_only_layers": [0], "norm_topk_prob": True}
)
DEFAULTS = ["*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding", "*shared_expert_gate",
            "*fused_a"]  # fmt: skip


def formats(spec=SPEC, quant="int4", overrides=None, exclude=()):
    return {name: f.name for name, f in module_formats(spec, Precision.of(quant, overrides, exclude)).items()}


@pytest.mark.parametrize(
    "pattern",
    ["layers.1", "layers.1.*", "transformer.layers.1.*", "model.layers.1.*", "model.layers.1", "*.layers.1.*"],
)
def test_a_layer_may_be_named_in_any_of_the_usual_ways(pattern):
    found = formats(exclude=(pattern,))
    assert {name for name, format in found.items() if format == "none"} == {
        f"transformer.layers.1.{module}"
        for module in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
    }


def test_names_of_either_side_and_the_first_match_decide():
    found = formats(overrides={"*.self_attn.*": "int8", "layers.3.mlp": "none", "*.down_proj": "fp8", "mlp": "int8"})
    layer = {name.removeprefix("transformer.layers.3."): format for name, format in found.items() if ".3." in name}
    assert layer == {"attention.qkv": "int8", "attention.dense": "int8", "mlp.fc": "none", "mlp.gate": "none",
                     "mlp.proj": "none"}  # fmt: skip
    assert found["transformer.layers.4.mlp.proj"] == "fp8"
    assert found["transformer.layers.4.mlp.gate"] == "int8"


def test_what_is_never_quantized_may_be_excluded():
    assert set(formats(exclude=("lm_head", "*embed_tokens*", "*norm*", "transformer.vocab_embedding")).values()) == {
        "int4"
    }


@pytest.mark.parametrize(
    ("spec", "overrides", "problem"),
    [
        (SPEC, {"layers.12.*": "none"}, '"layers.12.*" matches no layer that can be quantized'),
        (SPEC, {"lm_head": "int8"}, '"lm_head" matches no layer that can be quantized'),
        (SPEC, {"*norm": "int8"}, '"*norm" matches no layer that can be quantized'),
        (SPEC, {"layers.0.self_attn.q_proj": "int8"},
         'layer 0: "layers.0.self_attn.q_proj" matches 1 of the 3 layers in attention.qkv, which has one format'),
        (SPEC, {"self_attn.q_proj": "int8"},
         '12 layers, 0 to 11: "self_attn.q_proj" matches 1 of the 3 layers in attention.qkv, which has one format'),
        (SPEC, {"layers.0.mlp.gate_proj": "none"},
         "layer 0: mlp.fc none, mlp.gate int4: they are fused, and have one format"),
        (MIXTRAL, {"layers.0.block_sparse_moe.experts.3.*": "none"},
         'layer 0: "layers.0.block_sparse_moe.experts.3.*" matches 2 of the 8 layers in mlp.fc, which has one format'),
        (MIXTRAL, {"layers.0.mlp.proj": "none"}, "layer 0: mlp.fc int4, mlp.proj none: they are fused, and have one format"),
    ],
)  # fmt: skip
def test_patterns_that_name_nothing_or_tear_a_fused_layer_are_refused(spec, overrides, problem):
    with pytest.raises(InputError) as error:
        formats(spec, overrides=overrides)
    assert problem in error.value.problems


def test_one_format_with_exceptions_is_a_list_that_repeats_the_defaults():
    precision = Precision.of("int4_awq", exclude=("layers.0.mlp",))
    quantization = trtllm_quantization(SPEC, precision, Parallel())
    assert quantization["quant_algo"] == "W4A16_AWQ" and quantization["pre_quant_scale"]
    assert quantization["exclude_modules"] == [
        *DEFAULTS, *(f"transformer.layers.0.mlp.{module}" for module in ("fc", "gate", "proj"))
    ]  # fmt: skip
    assert trtllm_quant_cfg(SPEC, precision, Parallel()) is None


def test_weight_only_int8_is_excluded_by_module_and_by_tensor():
    """The module class is chosen by the one, quantization at load time skips by the other."""
    patterns = trtllm_quantization(SPEC, Precision.of("int8", exclude=("layers.0.attention",)), Parallel())
    assert patterns["exclude_modules"][len(DEFAULTS) :] == [
        "transformer.layers.0.attention.qkv", "transformer.layers.0.attention.dense", "*shared_expert_gate.weight",
        "transformer.layers.0.attention.qkv.weight", "transformer.layers.0.attention.dense.weight",
    ]  # fmt: skip


def test_rowwise_fp8_is_excluded_by_block_with_the_norm_in_front():
    quantization = trtllm_quantization(SPEC, Precision.of("fp8_rowwise", exclude=("layers.0.attention",)), Parallel())
    assert {"*ln_f", "*ln_embed", "transformer.layers.0.attention", "transformer.layers.0.input_layernorm"} < set(
        quantization["exclude_modules"]
    )
    with pytest.raises(InputError, match=r"transformer.layers.0.attention: some of its layers are excluded"):
        trtllm_quantization(SPEC, Precision.of("fp8_rowwise", exclude=("layers.0.attention.dense",)), Parallel())


def test_several_formats_are_listed_module_by_module():
    precision = Precision.of("int4_awq", {"layers.0": "none", "*.attention.*": "int8", "layers.2.mlp": "int4"})
    assert trtllm_quantization(SPEC, precision, Parallel())["quant_algo"] == "MIXED_PRECISION"
    config = trtllm_quant_cfg(SPEC, precision, Parallel())
    assert config["quant_algo"] == "MIXED_PRECISION"
    layers = config["quantized_layers"]
    assert len(layers) == 11 * 5 and not any(".0." in name for name in layers)
    assert layers["transformer.layers.1.attention.qkv"] == {"quant_algo": "W8A16"}
    group = {"quant_algo": "W4A16_AWQ", "group_size": 128, "has_zero_point": False}
    assert layers["transformer.layers.1.mlp.fc"] == {**group, "pre_quant_scale": True}
    assert layers["transformer.layers.2.mlp.fc"] == {**group, "pre_quant_scale": False}


def test_experts_are_named_by_the_module_that_holds_them():
    layers = trtllm_quant_cfg(QWEN_MOE, Precision.of("int8", {"*.attention.*": "fp8"}), Parallel())["quantized_layers"]
    assert "transformer.layers.0.mlp" not in layers and layers["transformer.layers.1.mlp"] == {"quant_algo": "W8A16"}
    excluded = trtllm_quantization(QWEN_MOE, Precision.of("int8", exclude=("mlp",)), Parallel())["exclude_modules"]
    assert "transformer.layers.1.mlp" in excluded and "transformer.layers.0.mlp" not in excluded


def test_stages_that_would_share_a_name_must_share_the_format():
    by_kind = Precision.of("int4", {"*.attention.*": "int8"})
    layers = trtllm_quant_cfg(SPEC, by_kind, Parallel(pp_size=2))["quantized_layers"]
    assert len(layers) == 6 * 5
    for pp_size in (2, 3):
        with pytest.raises(InputError) as error:
            trtllm_quantization(SPEC, Precision.of("int4", exclude=("layers.0",)), Parallel(pp_size=pp_size))
        problem = (
            f"transformer.layers.{12 // pp_size}.mlp.fc is int4, transformer.layers.0.mlp.fc of another stage is none"
        )
        assert problem in error.value.problems


@pytest.mark.parametrize("pp_size", [1, 2, 5])
@pytest.mark.parametrize("spec", [SPEC, MIXTRAL, QWEN_MOE], ids=lambda spec: spec.architecture)
@pytest.mark.parametrize(
    "precision",
    [
        Precision.of("int8", {"*.attention.*": "none"}),
        Precision.of("int8", {"*.attention.*": "fp8"}),
        Precision.of("int8"),
        Precision.of("int8", exclude=("*",)),
    ],
)
def test_the_config_files_tell_the_same_formats(spec, precision, pp_size):
    parallel = Parallel(pp_size=pp_size)
    config = {"quantization": trtllm_quantization(spec, precision, parallel)}
    tensors = [f"0/{output.name}" for move in plan_moves(spec, precision, parallel) for output in move.outputs]
    read = precision_from_trtllm(config, trtllm_quant_cfg(spec, precision, parallel), spec, parallel, tensors)
    assert module_formats(spec, read) == module_formats(spec, precision)


def test_groups_are_halved_where_a_rank_holds_half_a_group():
    fits = dataclasses.replace(SPEC, intermediate_size=384)  # 3 x 128: not on two ranks
    for quant in ("int4", "int4_awq", "int4_gptq"):
        assert fitted_precision(fits, Precision.of(quant), Parallel()) == (Precision.of(quant), [])
        precision, notes = fitted_precision(fits, Precision.of(quant), Parallel(tp_size=2))
        assert precision.default.group_size == 64 and precision.default.name == quant
        assert precision.default.needs_calibration == Precision.of(quant).default.needs_calibration
        problem = "mlp.fc: out size 384 is not a multiple of 256 (128 x tp 2)"
        assert notes == [f"{quant} in groups of 64: {problem}, as {quant} kernels need"]
        assert trtllm_quantization(fits, precision, Parallel(tp_size=2))["group_size"] == 64
    for quant, spec in (("w4a8_awq", fits), ("int4", dataclasses.replace(SPEC, intermediate_size=352))):
        assert fitted_precision(spec, Precision.of(quant), Parallel(tp_size=2)) == (Precision.of(quant), [])


def test_only_the_format_that_does_not_fit_changes():
    fits = dataclasses.replace(SPEC, intermediate_size=384)
    precision = Precision.of("int8", {"mlp": "int4_awq", "attention": "int4"})
    precision, notes = fitted_precision(fits, precision, Parallel(tp_size=2))
    layers = trtllm_quant_cfg(fits, precision, Parallel(tp_size=2))["quantized_layers"]
    assert layers["transformer.layers.0.mlp.fc"]["group_size"] == 64
    assert layers["transformer.layers.0.attention.qkv"]["group_size"] == 128
    assert len(notes) == 1
