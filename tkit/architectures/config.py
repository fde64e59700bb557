"""Config files in both directions: Hugging Face `config.json` <-> ModelSpec <-> TensorRT-LLM `config.json`.

Knows dictionaries; reads no file. The way back exists so that the reference runtime needs nothing but the checkpoint it
runs: a field that is lost on the way (RoPE scaling, say) then shows as wrong logits, not only on the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tkit.architectures.table import ARCHITECTURES
from tkit.errors import InputError, did_you_mean
from tkit.specs.model import ModelSpec
from tkit.specs.parallel import Parallel
from tkit.specs.quantization import QuantFormat

_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "longrope", "yarn")


def spec_from_hf(config: Mapping[str, Any], where: str) -> ModelSpec:
    """Reads a Hugging Face config. RoPE is understood in both spellings: `rope_theta` + `rope_scaling` (transformers 4)
    and `rope_parameters` (transformers 5).

    Raises InputError with every problem at once; `where` is the file's name.
    """
    names = config.get("architectures") or []
    if not names:
        raise InputError(f'{where}: no "architectures" entry', hint=f"known: {', '.join(ARCHITECTURES)}")
    architecture = names[0]
    if architecture not in ARCHITECTURES:
        raise InputError(
            f'{where}: unknown architecture "{architecture}"{did_you_mean(architecture, ARCHITECTURES)}',
            hint=f"known: {', '.join(ARCHITECTURES)}; docs/add-a-model.md shows how to add one",
        )
    problems = [f'{where}: key "{key}" is missing' for key in _REQUIRED if config.get(key) is None]
    if config.get("auto_map"):
        problems.append(f"{where}: auto_map asks to run code that ships with the model; tkit never runs it")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        problems.append(
            f'{where}: the checkpoint is quantized already (quant_method "{method}"), expected 16-bit weights'
        )
    rope = rope_parameters(config)
    rope_type = rope.get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        problems.append(f'{where}: unknown rope_type "{rope_type}"{did_you_mean(rope_type, _ROPE_TYPES)}')
    if problems:
        raise InputError(f"{where}: not a config tkit can convert", problems=problems)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return ModelSpec(
        architecture=architecture,
        dtype=checkpoint_dtype(config.get("dtype") or config.get("torch_dtype") or "float32"),
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config.get("intermediate_size") or 4 * config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_size=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        max_position_embeddings=config.get("max_position_embeddings") or 2048,
        hidden_act=config.get("hidden_act") or "silu",
        norm_epsilon=config.get("rms_norm_eps") or 1e-6,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling=scaling if scaling.get("rope_type", "default") != "default" else None,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_type` and the scaling's own keys, from either spelling."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "type" in rope:  # the oldest spelling of rope_type
        rope.setdefault("rope_type", rope.pop("type"))
    if config.get("rope_theta") is not None:
        rope.setdefault("rope_theta", config["rope_theta"])
    return rope


def checkpoint_dtype(dtype: str) -> str:
    """The dtype the checkpoint is written in: TensorRT-LLM serves 16-bit models, so float32 becomes float16 there too."""
    return "float16" if dtype == "float32" else dtype


def trtllm_config(spec: ModelSpec, quant: QuantFormat, parallel: Parallel) -> dict[str, Any]:
    """`config.json` of a TensorRT-LLM 1.0-1.2 checkpoint. `mapping` and `quantization` hold only the keys that every
    version knows: both reject unknown ones. Sizes are global, and the vocabulary unpadded."""
    return {
        "architecture": ARCHITECTURES[spec.architecture].trtllm,
        "dtype": spec.dtype,
        "logits_dtype": "float32",
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "hidden_size": spec.hidden_size,
        "head_size": spec.head_size,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "hidden_act": spec.hidden_act,
        "norm_epsilon": spec.norm_epsilon,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": spec.rope_theta,
        "rotary_scaling": dict(spec.rope_scaling) if spec.rope_scaling else None,
        "attn_bias": spec.attention_bias,
        "mlp_bias": spec.mlp_bias,
        "qk_layernorm": False,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {
            "world_size": parallel.world_size,
            "tp_size": parallel.tp_size,
            "pp_size": parallel.pp_size,
        },
        "quantization": {
            "quant_algo": quant.algo,
            "kv_cache_quant_algo": None,
            "group_size": quant.group_size or 128,
            "smoothquant_val": 0.5,
            "clamp_val": None,
            "use_meta_recipe": False,
            "has_zero_point": False,
            "pre_quant_scale": quant.has_prequant_scale,
            "exclude_modules": None,
        },
    }


def spec_from_trtllm(config: Mapping[str, Any]) -> ModelSpec:
    """The way back. Only reads what `trtllm_config` wrote."""
    return ModelSpec(
        architecture=next(name for name, row in ARCHITECTURES.items() if row.trtllm == config["architecture"]),
        dtype=config["dtype"],
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_size=config["head_size"],
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        hidden_act=config["hidden_act"],
        norm_epsilon=config["norm_epsilon"],
        rope_theta=config["rotary_base"],
        rope_scaling=config["rotary_scaling"],
        tie_word_embeddings=config["tie_word_embeddings"],
        attention_bias=config["attn_bias"],
        mlp_bias=config["mlp_bias"],
    )


def hf_config(spec: ModelSpec) -> dict[str, Any]:
    """Keyword arguments for transformers' config class of `model_type`."""
    return {
        "architectures": [spec.architecture],
        "model_type": ARCHITECTURES[spec.architecture].model_type,
        "dtype": spec.dtype,
        "num_hidden_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_size,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "hidden_act": spec.hidden_act,
        "rms_norm_eps": spec.norm_epsilon,
        "rope_parameters": {"rope_type": "default", **(spec.rope_scaling or {}), "rope_theta": spec.rope_theta},
        "tie_word_embeddings": spec.tie_word_embeddings,
        "attention_bias": spec.attention_bias,
        "mlp_bias": spec.mlp_bias,
    }
