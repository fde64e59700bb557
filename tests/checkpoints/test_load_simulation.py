"""The load simulation: silent on everything that tkit writes, and by name on everything that is spoiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import MODELS, write_checkpoint
from safetensors.torch import load_file, save_file

from tkit.architectures.config import spec_from_hf, trtllm_config
from tkit.architectures.formats import trtllm_quant_cfg
from tkit.architectures.moves import plan_moves
from tkit.architectures.table import ARCHITECTURES
from tkit.checkpoints.load_simulation.config import config_problems, with_layer_config
from tkit.checkpoints.load_simulation.families import FAMILIES
from tkit.checkpoints.load_simulation.load import preprocess, rank_problems, required_tensors, simulate_load
from tkit.checkpoints.load_simulation.modules import Form
from tkit.errors import InputError
from tkit.specs.parallel import Parallel
from tkit.specs.precision import Precision
from tkit.specs.quantization import QUANT_FORMATS

# as MODELS, but large enough for the kernels' multiples; only headers are ever made of them
LARGE = {
    "hidden_size": 1024, "intermediate_size": 1536, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 64, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 1024, "n_embd": 1024,
    "n_head": 16, "num_kv_heads": 8, "ffn_hidden_size": 1536, "rotary_dim": 32,
}  # fmt: skip
LAYOUTS = [Parallel(tp_size=tp, pp_size=pp) for tp in (1, 2, 4) for pp in (1, 2)]
EXPERT_LAYOUTS = [Parallel(tp_size=4, pp_size=pp, moe_ep_size=ep) for pp in (1, 2) for ep in (2, 4)]
NO_EXPERTS = {"fp8_rowwise", "int8_sq", "w4a8_awq", "nvfp4"}
Headers = dict[int, dict[str, Form]]


def headers(
    name: str,
    quant: str,
    parallel: Parallel,
    overrides: dict[str, str] | None = None,
    exclude: tuple[str, ...] = (),
    kv_cache: str = "auto",
) -> tuple[dict[str, Any], Headers]:
    """config.json and the header of every rank file that tkit would write."""
    architecture, arguments = MODELS[name]
    changes = {key: value for key, value in LARGE.items() if key in arguments}
    if arguments.get("num_kv_heads") == 4:  # multi-head Falcon
        changes["num_kv_heads"] = 16
    if "longrope" in name:
        changes = {}  # its factors fit one head size
    config = getattr(transformers, architecture).config_class(**{**arguments, **changes}).to_dict()
    spec = spec_from_hf({**config, "architectures": [architecture], "dtype": "bfloat16"}, "config.json")
    precision = Precision.of(quant, overrides, exclude, kv_cache)
    forms: Headers = {}
    for output in (output for move in plan_moves(spec, precision, parallel) for output in move.outputs):
        dtype = "BF16" if output.dtype == "model" else output.dtype
        forms.setdefault(output.rank, {})[output.name] = Form(dtype, output.shape)
    config = with_layer_config(trtllm_config(spec, precision, parallel), trtllm_quant_cfg(spec, precision, parallel))
    return config, forms


def all_problems(config: dict[str, Any], forms: Headers) -> list[str]:
    return [*config_problems(config), *(line for rank in forms for line in rank_problems(config, rank, forms[rank]))]


@pytest.mark.parametrize("quant", QUANT_FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_everything_that_tkit_builds_would_load(name, quant):
    num_built = 0
    for parallel in (*LAYOUTS, *EXPERT_LAYOUTS):
        try:
            config, forms = headers(name, quant, parallel)
        except InputError:
            continue  # refused before a byte is written
        num_built += 1
        assert set(forms) == set(range(parallel.world_size))
        assert all_problems(config, forms) == [], (quant, parallel)
    has_experts = "moe" in name or name == "mixtral"
    assert bool(num_built) != (has_experts and quant in NO_EXPERTS) or name == "phi3-longrope"


@pytest.mark.parametrize(
    ("quant", "overrides", "exclude"),
    [
        ("int8", {}, ("layers.0",)),
        ("fp8", {}, ("mlp",)),
        ("int4", {}, ("attention",)),
        ("fp8_rowwise", {}, ("layers.1",)),
        ("int4_awq", {"layers.0": "none", "transformer.layers.*.attention.*": "int8"}, ("layers.2",)),
        ("int8", {"transformer.layers.*.attention.*": "fp8"}, ()),
        ("none", {"layers.1.mlp": "int8", "transformer.layers.1.attention.*": "int4"}, ()),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_mixed_precision_and_excluded_modules_would_load(name, quant, overrides, exclude):
    built = set()
    for parallel in (Parallel(tp_size=2), Parallel(tp_size=2, pp_size=2), Parallel(tp_size=4, moe_ep_size=2)):
        try:
            config, forms = headers(name, quant, parallel, overrides, exclude)
        except InputError:
            continue  # refused before a byte is written
        assert all_problems(config, forms) == [], (quant, parallel)
        built.add(config["quantization"]["quant_algo"])
        # the layers that the config does not name are not what the files hold
        plain = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"none": {"quant_algo": "FP8"}}}
        if overrides:
            assert config["quantization"]["quant_algo"] == "MIXED_PRECISION"
            assert all_problems(config | {"quantization": plain}, forms) or quant in ("int8", "none")
        else:
            assert config["quantization"]["exclude_modules"]
            everything = config["quantization"] | {"exclude_modules": None}
            assert all_problems(config | {"quantization": everything}, forms) or quant == "int8"
    if name in ("llama", "qwen3", "gemma2"):
        assert built


@pytest.mark.parametrize(
    ("quant", "overrides", "kv_cache"),
    [("none", {}, "fp8"), ("int8", {}, "int8"), ("none", {"layers.0": "int8", "layers.1.mlp": "int4"}, "fp8")],
)
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_every_rank_has_the_scale_of_its_cache(name, quant, overrides, kv_cache):
    for parallel in (Parallel(tp_size=2), Parallel(tp_size=2, pp_size=2)):
        try:
            config, forms = headers(name, quant, parallel, overrides, kv_cache=kv_cache)
        except InputError:
            continue
        assert all_problems(config, forms) == []
        scale = "transformer.layers.0.attention.kv_cache_scaling_factor"
        del forms[1][scale]
        assert all_problems(config, forms) == [f"{scale} is missing, expected F32 (1,)"]


def test_weight_only_layers_are_skipped_by_the_name_of_their_tensor():
    defaults = ["*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding",
                "*shared_expert_gate", "*fused_a"]  # fmt: skip
    module, tensor = "transformer.layers.0.mlp.proj", "transformer.layers.0.mlp.proj.weight"
    config = LLAMA | {"quantization": {"quant_algo": "W8A16", "exclude_modules": [*defaults, module]}}
    problem = f"{tensor} F16 (512, 1024) is loaded as I8 (1024, 512), its module has F16 (512, 1024)"
    assert rank_problems(config, 0, required_tensors(config, 0)) == [problem]
    config["quantization"]["exclude_modules"].append(tensor)
    assert rank_problems(config, 0, required_tensors(config, 0)) == []


@pytest.mark.parametrize(
    ("layer_config", "problem"),
    [
        (None, "quantization: MIXED_PRECISION needs quant_cfg.json with quantized_layers"),
        ({"quantized_layers": {"a": {"quant_algo": "FP9"}}}, "quant_cfg.json: quant_algo is 'FP9', expected one of"),
        ({"quantized_layers": {"a": {"quant_algo": "FP8", "bits": 8}}}, 'quant_cfg.json: unknown key "bits" is refused'),
        ({"quantized_layers": {"a": {"quant_algo": "W4A8_AWQ", "group_size": 64}}},
         "quant_cfg.json: group_size is 64, W4A8_AWQ knows (128,)"),
        ({"exclude_modules": [], "quantized_layers": {"a": {"quant_algo": "FP8"}}},
         'quant_cfg.json: unknown key "exclude_modules"'),
        ({"quantized_layers": {"a": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}}},
         "FP8_PER_CHANNEL_PER_TOKEN replaces whole attention and MLP modules and their norms, not layers"),
    ],
)  # fmt: skip
def test_a_layer_config_that_the_loader_cannot_read_is_named(layer_config, problem):
    config = LLAMA | {"quantization": {"quant_algo": "MIXED_PRECISION"}}
    if layer_config is not None:
        layer_config = {"quant_algo": "MIXED_PRECISION", **layer_config}
    (line,) = config_problems(with_layer_config(config, layer_config))
    assert line.startswith(problem)


def test_mixtral_takes_the_format_of_its_layers_for_the_mixture():
    layers = {f"transformer.layers.0.mlp.{part}": {"quant_algo": "FP8"} for part in ("fc", "proj")}
    layer_config = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    config = with_layer_config(MIXTRAL | {"quantization": {"quant_algo": "MIXED_PRECISION"}}, layer_config)
    assert required_tensors(config, 0)["transformer.layers.0.mlp.fc.weight"].dtype == "F8_E4M3"
    assert required_tensors(config, 0)["transformer.layers.0.attention.qkv.weight"].dtype == "F16"


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_every_rank_is_checked(name):
    config, forms = headers(name, "none", Parallel(tp_size=2, pp_size=2 if "phi3" not in name else 1))
    for rank, tensors in forms.items():
        for tensor, form in tensors.items():
            others = {other: tensors[other] for other in tensors if other != tensor}
            longer = Form(form.dtype, (form.shape[0] + 1, *form.shape[1:]))
            assert rank_problems(config, rank, others) == [f"{tensor} is missing, expected {form}"]
            assert rank_problems(config, rank, {**tensors, tensor: longer}) == [
                f"{tensor} is {longer}, expected {form}"
            ]
            other_dtype = Form("F16", form.shape)
            assert rank_problems(config, rank, {**tensors, tensor: other_dtype}) == [
                f"{tensor} is {other_dtype}, expected {form}"
            ]
            assert rank_problems(config, rank, {**others, f"{tensor}_": form}) == [
                f"{tensor} is missing, expected {form}",
                f"{tensor}_ {form} is in no module of {config['architecture']}",
            ]


@pytest.mark.parametrize("quant", [quant for quant, format in QUANT_FORMATS.items() if not format.is_stored_plain])
def test_every_quantized_tensor_is_checked(quant):
    config, forms = headers("llama", quant, Parallel(tp_size=2))
    for tensor, form in forms[1].items():
        others = {other: forms[1][other] for other in forms[1] if other != tensor}
        longer = Form(form.dtype, (form.shape[0] + 2, *form.shape[1:]))
        assert rank_problems(config, 1, others) == [f"{tensor} is missing, expected {form}"]
        assert rank_problems(config, 1, {**others, tensor: longer}) == [f"{tensor} is {longer}, expected {form}"]


LLAMA: dict[str, Any] = {
    "architecture": "LlamaForCausalLM", "dtype": "float16", "hidden_size": 512, "num_hidden_layers": 1,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_size": 64, "intermediate_size": 2048, "vocab_size": 1001,
    "max_position_embeddings": 128, "hidden_act": "silu", "norm_epsilon": 1e-5, "rotary_base": 1e4,
    "rotary_scaling": None, "position_embedding_type": "rope_gpt_neox", "attn_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False, "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1},
}  # fmt: skip
MIXTRAL = LLAMA | {
    "architecture": "MixtralForCausalLM", "hidden_act": "swiglu",
    "moe": {"num_experts": 8, "top_k": 2, "normalization_mode": 1},
    "mapping": {"world_size": 4, "tp_size": 4, "pp_size": 1, "moe_tp_size": 2, "moe_ep_size": 2},
}  # fmt: skip
AROUND = {
    "transformer.vocab_embedding.weight": Form("F16", (1001, 512)),
    "transformer.layers.0.input_layernorm.weight": Form("F16", (512,)),
    "transformer.layers.0.post_layernorm.weight": Form("F16", (512,)),
    "transformer.ln_f.weight": Form("F16", (512,)),
}
LM_HEAD = {"lm_head.weight": Form("F16", (501, 512))}
INT4 = {"quant_algo": "W4A16_AWQ", "group_size": 128, "has_zero_point": False, "pre_quant_scale": True}

SCALAR = ("F32", (1,))
# quantization -> what each algorithm ships for qkv (512 -> 512 on each of two ranks) and proj (1024 per rank -> 512)
DENSE = {
    "none, FP8 cache": (
        {"quant_algo": None, "kv_cache_quant_algo": "FP8"},
        {"weight": ("F16", (512, 512))},
        {"weight": ("F16", (512, 1024))},
    ),
    "W8A16": ({"quant_algo": "W8A16"}, {"weight": ("F16", (512, 512))}, {"weight": ("F16", (512, 1024))}),
    "FP8": (
        {"quant_algo": "FP8"},
        {"weight": ("F8_E4M3", (512, 512)), "weights_scaling_factor": SCALAR, "activation_scaling_factor": SCALAR},
        {"weight": ("F8_E4M3", (512, 1024)), "weights_scaling_factor": SCALAR, "activation_scaling_factor": SCALAR},
    ),
    "FP8 rowwise": (
        {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        {"weight": ("F8_E4M3", (512, 512)), "per_channel_scale": ("F32", (512,))},
        {"weight": ("F8_E4M3", (512, 1024)), "per_channel_scale": ("F32", (512,))},
    ),
    "AWQ": (
        INT4,
        {"weight": ("I8", (256, 512)), "weights_scaling_factor": ("F32", (512, 4)),
         "prequant_scaling_factor": ("F16", (512,))},
        {"weight": ("I8", (256, 1024)), "weights_scaling_factor": ("F32", (512, 8)),
         "prequant_scaling_factor": ("F16", (1024,))},
    ),
    "int4 with zeros": (
        INT4 | {"group_size": 64, "pre_quant_scale": False, "has_zero_point": True},
        {"weight": ("I8", (256, 512)), "weights_scaling_factor": ("F32", (512, 8)), "zero": ("F16", (8, 512))},
        {"weight": ("I8", (256, 1024)), "weights_scaling_factor": ("F32", (512, 16)), "zero": ("F16", (16, 512))},
    ),
    "W4A8": (
        INT4 | {"quant_algo": "W4A8_AWQ"},
        {"weight": ("I8", (256, 512)), "weights_scaling_factor": ("F32", (512, 4)), "weights_scaling_factor_2": SCALAR,
         "prequant_scaling_factor": ("F16", (512,)), "activation_scaling_factor": SCALAR},
        {"weight": ("I8", (256, 1024)), "weights_scaling_factor": ("F32", (512, 8)), "weights_scaling_factor_2": SCALAR,
         "prequant_scaling_factor": ("F16", (1024,)), "activation_scaling_factor": SCALAR},
    ),
    "SmoothQuant": (
        {"quant_algo": "W8A8_SQ_PER_CHANNEL"},
        {"weight": ("I8", (512, 512)), "weights_scaling_factor": ("F32", (512,)),
         "prequant_scaling_factor": ("F16", (512,)), "activation_scaling_factor": SCALAR},
        {"weight": ("I8", (512, 1024)), "weights_scaling_factor": ("F32", (512,)),
         "prequant_scaling_factor": ("F16", (1024,)), "activation_scaling_factor": SCALAR},
    ),
    "NVFP4": (
        {"quant_algo": "NVFP4", "group_size": 16},
        {"weight": ("U8", (512, 256)), "weights_scaling_factor": ("F8_E4M3", (512, 32)),
         "weights_scaling_factor_2": SCALAR, "activation_scaling_factor": SCALAR},
        {"weight": ("U8", (512, 512)), "weights_scaling_factor": ("F8_E4M3", (512, 64)),
         "weights_scaling_factor_2": SCALAR, "activation_scaling_factor": SCALAR},
    ),
}  # fmt: skip


@pytest.mark.parametrize("algorithm", DENSE)
def test_tensors_of_each_algorithm_are_those_written_by_hand(algorithm):
    quantization, qkv, proj = DENSE[algorithm]
    config = LLAMA | {"quantization": quantization}
    assert config_problems(config) == []
    tensors = required_tensors(config, 1)
    layer = "transformer.layers.0."
    for module, expected in (("attention.qkv", qkv), ("mlp.proj", proj)):
        prefix = f"{layer}{module}."
        found = {name.removeprefix(prefix): form for name, form in tensors.items() if name.startswith(prefix)}
        assert found == {name: Form(*form) for name, form in expected.items()}
    outside = {
        name: form
        for name, form in tensors.items()
        if not any(module in name for module in (".qkv.", ".dense.", ".fc.", ".gate.", ".proj."))
    }
    kv_scale = {f"{layer}attention.kv_cache_scaling_factor": Form("F32", (1,))}
    assert outside == AROUND | LM_HEAD | (kv_scale if quantization.get("kv_cache_quant_algo") else {})


@pytest.mark.parametrize(
    ("quantization", "fc"),
    [
        ({"quant_algo": None}, {"weight": ("F16", (4, 2048, 512))}),
        ({"quant_algo": "W8A16"}, {"weight": ("F16", (4, 2048, 512))}),
        ({"quant_algo": "W8A8_SQ_PER_CHANNEL"}, {"weight": ("F16", (4, 2048, 512))}),
        ({"quant_algo": "FP8"}, {"weight": ("F8_E4M3", (4, 2048, 512)), "weights_scaling_factor": ("F32", (4, 1)),
                                 "activation_scaling_factor": ("F32", (1,))}),
        (INT4, {"weight": ("I8", (4, 1024, 512)), "weights_scaling_factor": ("F32", (4, 2048, 4)),
                "prequant_scaling_factor": ("F16", (512,))}),
    ],
)  # fmt: skip
def test_tensors_of_experts_are_those_written_by_hand(quantization, fc):
    tensors = required_tensors(MIXTRAL | {"quantization": quantization}, 3)
    prefix = "transformer.layers.0.mlp."
    assert tensors[prefix + "router.weight"] == Form("F32", (8, 512))
    found = {n.removeprefix(prefix + "fc."): form for n, form in tensors.items() if n.startswith(prefix + "fc.")}
    assert found == {name: Form(*form) for name, form in fc.items()}
    assert "transformer.layers.0.mlp.gate.weight" not in tensors


def test_the_loader_turns_int4_into_what_its_kernel_takes():
    config = LLAMA | {"dtype": "bfloat16", "quantization": INT4}
    shipped = {"a.fc.weight": Form("I8", (128, 256)), "a.fc.weights_scaling_factor": Form("F32", (256, 2)),
               "a.fc.prequant_scaling_factor": Form("F16", (256,)), "norm.weight": Form("BF16", (256,))}  # fmt: skip
    assert {name: form for name, (form, _) in preprocess(shipped, config).items()} == {
        "a.fc.weight": Form("BF16", (256, 64)),
        "a.fc.weights_scaling_factor": Form("BF16", (2, 256)),
        "a.fc.prequant_scaling_factor": Form("F16", (1, 256)),  # not cast: a wrong dtype stays wrong
        "norm.weight": Form("BF16", (256,)),
    }


def test_the_loader_quantizes_plain_weights_and_takes_finished_ones():
    config = LLAMA | {"quantization": {"quant_algo": "W8A16"}}
    tensors = required_tensors(config, 0)
    name = "transformer.layers.0.mlp.fc.weight"
    finished = {
        **tensors,
        name: Form("I8", (512, 1024)),
        name.replace("weight", "per_channel_scale"): Form("F16", (1024,)),
    }
    assert rank_problems(config, 0, finished) == []
    without_scale = {**tensors, name: Form("I8", (512, 1024))}
    assert rank_problems(config, 0, without_scale) == [f"{name} is missing, expected F16 (1024, 512)"]


def test_the_loader_accepts_scales_and_bits_in_either_dtype():
    config = LLAMA | {"quantization": INT4}
    tensors = required_tensors(config, 0)
    name = "transformer.layers.0.mlp.fc.weights_scaling_factor"
    assert rank_problems(config, 0, {**tensors, name: Form("F16", tensors[name].shape)}) == []
    config = LLAMA | {"quantization": {"quant_algo": "FP8"}}
    tensors = required_tensors(config, 0)
    name = "transformer.layers.0.mlp.fc."
    changed = {name + "weight": Form("I8", (1024, 512)), name + "weights_scaling_factor": Form("F32", ()),
               "lm_head.weights_scaling_factor": Form("F32", (1,))}  # fmt: skip
    assert rank_problems(config, 0, {**tensors, **changed}) == []


def test_separate_key_and_value_scales_are_joined():
    config = LLAMA | {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "INT8"}}
    tensors = required_tensors(config, 0)
    del tensors["transformer.layers.0.attention.kv_cache_scaling_factor"]
    for part in "kv":
        tensors[f"transformer.layers.0.attention.{part}_cache_scaling_factor"] = Form("F32", (1,))
    assert rank_problems(config, 0, tensors) == []


def test_a_module_that_its_kernel_pads_refuses_the_unpadded_tensor():
    """3 x 128 rows of q/k/v at tp 2: groups of 128 need multiples of 256, groups of 64 do not."""
    name = "transformer.layers.0.attention.qkv.weight"
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    groups = {size: LLAMA | heads | {"quantization": INT4 | {"group_size": size}} for size in (64, 128)}
    assert required_tensors(groups[64], 0)[name] == Form("I8", (96, 512))
    assert required_tensors(groups[128], 0)[name] == Form("I8", (128, 512))
    unpadded = required_tensors(groups[64], 0)[name]
    forms = {**required_tensors(groups[128], 0), name: unpadded}
    assert rank_problems(groups[128], 0, forms) == [f"{name} is I8 (96, 512), expected I8 (128, 512)"]


def test_lm_head_may_be_left_out_only_where_the_embedding_is_the_same():
    tied = LLAMA | {"quantization": {"quant_algo": None}, "tie_word_embeddings": True}
    one = tied | {"mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1}}
    for config, problems in (
        (one, []),
        (tied, ["lm_head.weight is missing, expected F16 (501, 512)"]),
        (one | {"tie_word_embeddings": False}, ["lm_head.weight is missing, expected F16 (1001, 512)"]),
    ):
        tensors = required_tensors(config, 0)
        del tensors["lm_head.weight"]
        assert rank_problems(config, 0, tensors) == problems


# --- files ---


@pytest.fixture
def checkpoint(family_model, tmp_path) -> Path:
    return write_checkpoint(family_model("llama"), tmp_path, tp_size=2, pp_size=2)


def spoil(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_what_was_written_would_load(checkpoint):
    assert simulate_load(checkpoint) == []


NORM = "transformer.layers.0.post_layernorm.weight"
DAMAGE = {
    "dropped": (
        lambda tensors: tensors.pop(NORM),
        [f"{NORM} is missing, expected BF16 (32,)"],
    ),
    "renamed": (
        lambda tensors: tensors.update({NORM.replace("post_", ""): tensors.pop(NORM)}),
        [f"{NORM} is missing, expected BF16 (32,)",
         f"{NORM.replace('post_', '')} BF16 (32,) is in no module of LlamaForCausalLM"],
    ),
    "reshaped": (
        lambda tensors: tensors.update({NORM: tensors[NORM].reshape(2, 16)}),
        [f"{NORM} is BF16 (2, 16), expected BF16 (32,)"],
    ),
    "retyped": (
        lambda tensors: tensors.update({NORM: tensors[NORM].view(torch.float16)}),
        [f"{NORM} is F16 (32,), expected BF16 (32,)"],
    ),
    "two at once": (
        lambda tensors: tensors.update({NORM: tensors[NORM][:31].clone(), "lm_head.weight": torch.ones(49, 32)}),
        [f"{NORM} is BF16 (31,), expected BF16 (32,)", "lm_head.weight is F32 (49, 32), expected BF16 (49, 32)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_with_rank_and_tensor(checkpoint, damage):
    change, problems = DAMAGE[damage]
    spoil(checkpoint / "rank3.safetensors", change)
    assert simulate_load(checkpoint) == [f"rank 3, rank3.safetensors: {problem}" for problem in problems]


def test_a_rank_too_few_and_one_too_many_are_named(checkpoint):
    (checkpoint / "rank1.safetensors").rename(checkpoint / "rank4.safetensors")
    assert simulate_load(checkpoint) == [
        "rank4.safetensors: no place among the 4 ranks of config.json",
        "rank 1: rank1.safetensors is missing",
    ]


def test_a_file_that_is_no_safetensors_is_named(checkpoint):
    (checkpoint / "rank2.safetensors").write_bytes(b"nonsense")
    (line,) = simulate_load(checkpoint)
    assert line.startswith("rank 2: ") and "not a safetensors file" in line


def rewrite(checkpoint: Path, change: Any) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c["mapping"].update(world_size=8), "mapping: world_size is 8, tp_size x pp_size x cp_size is 4"),
        (lambda c: c["mapping"].update(rank=0), 'mapping: unknown key "rank" is refused'),
        (lambda c: c["mapping"].pop("tp_size"), 'mapping: key "tp_size" is missing'),
        (lambda c: c["quantization"].update(mamba_ssm_cache_dtype=None),
         'quantization: unknown key "mamba_ssm_cache_dtype" is refused'),
        (lambda c: c["quantization"].update(quant_algo="W4A16_GPTQ"), "quantization: quant_algo is 'W4A16_GPTQ'"),
        (lambda c: c["quantization"].update(kv_cache_quant_algo="FP4"), "quantization: kv_cache_quant_algo is 'FP4'"),
        (lambda c: c["quantization"].update(quant_algo="W4A8_AWQ", group_size=64),
         "quantization: group_size is 64, W4A8_AWQ knows (128,)"),
        (lambda c: c["quantization"].update(quant_algo="FP8", exclude_modules=["transformer.layers.0.mlp.*"]),
         "quantization: exclude_modules replaces the defaults and leaves out lm_head"),
        (lambda c: c["quantization"].update(quant_algo="W8A16", exclude_modules=["lm_head"]),
         "quantization: exclude_modules replaces the defaults and leaves out transformer.vocab_embedding"),
        (lambda c: c["quantization"].update(quant_algo="FP8_PER_CHANNEL_PER_TOKEN", exclude_modules=["lm_head"]),
         "quantization: exclude_modules replaces the defaults and leaves out transformer.ln_f"),
        (lambda c: [c["quantization"].update(quant_algo="FP8", exclude_modules=["lm_head"]),
                    c.update(moe={"num_experts": 4, "top_k": 2})],
         "quantization: exclude_modules replaces the defaults and leaves out transformer.layers.0.mlp.router"),
        (lambda c: c.update(architecture="LlamaForCausallM"), "architecture is 'LlamaForCausallM', expected one of"),
        (lambda c: c.update(hidden_act="swish"), "hidden_act is 'swish', expected one of"),
        (lambda c: c.update(dtype="float64"), "dtype is 'float64', expected one of"),
        (lambda c: c.update(hidden_size="32"), "hidden_size is '32', expected int"),
        (lambda c: c.update(num_attention_heads=True), "num_attention_heads is True, expected int"),
        (lambda c: c.update(rotary_scaling={"rope_type": "llama4"}), "rotary_scaling.rope_type is 'llama4'"),
        (lambda c: c.update(num_attention_heads=3), "num_attention_heads 3 is not a multiple of tp_size 2"),
    ],
)  # fmt: skip
def test_a_config_that_the_loader_refuses_is_named(checkpoint, change, problem):
    rewrite(checkpoint, change)
    (line,) = simulate_load(checkpoint)
    assert line.startswith(f"config.json: {problem}")


def test_a_config_that_is_absent_or_no_mapping_is_named(checkpoint):
    (checkpoint / "config.json").write_text("[]")
    assert simulate_load(checkpoint) == ["config.json: expected a mapping of keys, found list"]
    (checkpoint / "config.json").unlink()
    assert simulate_load(checkpoint) == [f"{checkpoint}/config.json: no such file"]


COMMON = ["architecture", "dtype", "hidden_size", "max_position_embeddings", "num_attention_heads",
          "num_hidden_layers", "vocab_size"]  # fmt: skip
QWEN = ["qwen_type", "seq_length", "attn_bias", "head_size"]
MANDATORY = {
    "llama": ["rotary_base", "hidden_act", "norm_epsilon", "position_embedding_type", "num_key_value_heads"],
    "mistral": ["rotary_base"],
    "mixtral": ["moe", "hidden_act"],
    "qwen2": QWEN,
    "qwen3": QWEN,
    "qwen2-moe": [*QWEN, "moe", "hidden_act", "moe_intermediate_size", "moe_shared_expert_intermediate_size"],
    "qwen3-moe": [*QWEN, "moe", "hidden_act", "moe_intermediate_size"],
    "gemma": ["rotary_base"],
    "gemma2": ["query_pre_attn_scalar", "attn_logit_softcapping"],
    "gemma3": ["query_pre_attn_scalar", "_sliding_window_pattern", "rope_local_base_freq"],
    "phi3": ["rotary_pct", "tie_word_embeddings"],
    "phi3-longrope": ["rotary_pct", "original_max_position_embeddings", "longrope_scaling_short_factors",
                      "longrope_scaling_long_factors"],
    "gpt2": ["gpt_variant", "bias"],
    "gptj": ["rotary_dim"],
    "falcon-new": ["bias", "parallel_attention", "new_decoder_architecture", "num_ln_in_parallel_attn"],
}  # fmt: skip


@pytest.mark.parametrize("name", MANDATORY)
def test_every_mandatory_key_is_missed(name):
    config, _ = headers(name, "none", Parallel())
    for key in (*COMMON, *MANDATORY[name]):
        without = {other: value for other, value in config.items() if other != key}
        expected = (
            f'key "{key}" is missing, {config["architecture"]} reads it' if key != "architecture" else "architecture is"
        )
        assert [line for line in config_problems(without) if line.startswith(expected)], key


MOE_MAPPING = MIXTRAL["mapping"]


@pytest.mark.parametrize(
    ("config", "change", "problem"),
    [
        (MIXTRAL, {"mapping": MOE_MAPPING | {"moe_tp_size": 4}}, "mapping: moe_tp_size 4 x moe_ep_size 2 is not tp_size 4"),
        (MIXTRAL, {"moe": {"num_experts": 8, "top_k": 9}}, "moe: top_k is 9, num_experts 8"),
        (MIXTRAL, {"moe": {"num_experts": 7, "top_k": 2}}, "moe.num_experts 7 is not a multiple of moe_ep_size 2"),
        (MIXTRAL, {"moe": MIXTRAL["moe"] | {"topk": 2}}, 'moe: unknown key "topk" is refused'),
        (MIXTRAL, {"intermediate_size": 101}, "the size of an expert 101 is not a multiple of moe_tp_size 2"),
        (MIXTRAL, {"moe_shared_expert_intermediate_size": 102},
         "the size of the shared expert 102 is not a multiple of tp_size 4"),
        (MIXTRAL, {"quantization": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}},
         "quantization: FP8_PER_CHANNEL_PER_TOKEN cannot be combined with experts"),
        (LLAMA, {"mapping": {"world_size": 2, "tp_size": 1, "pp_size": 2}}, "pp_size 2 exceeds num_hidden_layers 1"),
        (LLAMA, {"vocab_size": 0}, "vocab_size is 0, expected at least 1"),
        (LLAMA, {"intermediate_size": 2047}, "intermediate_size 2047 is not a multiple of tp_size 2"),
        (LLAMA | {"mapping": {"world_size": 8, "tp_size": 8, "pp_size": 1}}, {"num_key_value_heads": 3},
         "num_key_value_heads 3 and tp_size 8: neither is a multiple of the other"),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_itself_is_named(config, change, problem):
    assert config_problems({"quantization": {"quant_algo": None}, **config, **change}) == [problem]


def test_the_embedding_is_split_along_either_side():
    config = LLAMA | {"quantization": {"quant_algo": None}, "use_parallel_embedding": True}
    name = "transformer.vocab_embedding.weight"
    assert required_tensors(config | {"embedding_sharding_dim": 0}, 0)[name] == Form("F16", (501, 512))
    assert required_tensors(config | {"embedding_sharding_dim": 1}, 0)[name] == Form("F16", (1001, 256))


def test_an_excluded_layer_ships_its_plain_weight():
    defaults = ["*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding",
                "*shared_expert_gate", "*fused_a"]  # fmt: skip
    config = LLAMA | {"quantization": INT4 | {"exclude_modules": [*defaults, "transformer.layers.*.mlp.proj"]}}
    assert config_problems(config) == []
    tensors = required_tensors(config, 0)
    found = {name: form for name, form in tensors.items() if ".mlp.proj." in name}
    assert found == {"transformer.layers.0.mlp.proj.weight": Form("F16", (512, 1024))}
    assert tensors["transformer.layers.0.mlp.fc.weight"].dtype == "I8"


def test_every_class_of_the_architecture_table_is_known():
    assert {row.trtllm for row in ARCHITECTURES.values()} == set(FAMILIES)


def test_phi3_has_no_pipeline_and_gemma_splits_its_embedding():
    config, _ = headers("phi3", "none", Parallel())
    config["mapping"] = {"world_size": 2, "tp_size": 1, "pp_size": 2}
    assert config_problems(config) == ["pp_size is 2, Phi3ForCausalLM builds every layer on every stage"]
    config, _ = headers("gemma", "none", Parallel(tp_size=2))
    problem = "vocab_size 97 is not a multiple of tp_size 2"
    assert config_problems(config | {"vocab_size": 97}) == [problem]


def test_a_plan_that_forgets_a_tensor_is_caught_before_anything_is_published(tkit, monkeypatch, make_llama):
    """The plan and the source agree that there are no biases; the config that is written does not."""
    import tkit.stages.build_plan as build_plan

    def wrong(*arguments: Any) -> dict[str, Any]:
        return trtllm_config(*arguments) | {"attn_bias": True}

    monkeypatch.setattr(build_plan, "trtllm_config", wrong)
    result = tkit("build", make_llama(), "--tp", "2")
    assert result.exit_code == 1
    assert "TensorRT-LLM would not load this checkpoint" in result.stderr
    for rank in (0, 1):
        for layer in range(3):
            module = f"rank {rank}, rank{rank}.safetensors: transformer.layers.{layer}.attention"
            assert f"{module}.qkv.bias is missing, expected BF16 (64,)" in result.stderr
            assert f"{module}.dense.bias is missing, expected BF16 (64,)" in result.stderr
    assert list(Path("engines").iterdir()) == []
