"""Config files in both directions: Hugging Face `config.json` <-> ModelSpec <-> TensorRT-LLM `config.json`.

Knows dictionaries; reads no file. The way back exists so that the reference runtime needs nothing but the checkpoint it
runs: a field that is lost on the way (RoPE scaling, say) then shows as wrong logits, not only on the GPU.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

from tkit.architectures.formats import trtllm_quantization
from tkit.architectures.table import ARCHITECTURES, Architecture
from tkit.errors import InputError, did_you_mean
from tkit.specs.model import ModelSpec
from tkit.specs.parallel import Parallel
from tkit.specs.precision import Precision

# ModelSpec field -> (config.json key, default); None = required, or computed below
_FIELDS: dict[str, tuple[str, Any]] = {
    "num_layers": ("num_hidden_layers", None),
    "hidden_size": ("hidden_size", None),
    "intermediate_size": ("intermediate_size", None),
    "num_heads": ("num_attention_heads", None),
    "num_kv_heads": ("num_key_value_heads", None),
    "head_size": ("head_dim", None),
    "vocab_size": ("vocab_size", None),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "hidden_act": ("hidden_act", "silu"),
    "norm_epsilon": ("rms_norm_eps", 1e-6),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "attention_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
    "num_experts": ("num_experts", 0),
    "experts_per_token": ("num_experts_per_tok", 0),
    "expert_size": ("moe_intermediate_size", 0),
    "shared_expert_size": ("shared_expert_intermediate_size", 0),
}
_REQUIRED = ("num_layers", "hidden_size", "num_heads", "vocab_size")
_OTHER_SPELLINGS = {"num_experts": "num_local_experts", "hidden_activation": "hidden_act"}
_ROPE_NUMBERS = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "longrope", "yarn")


def spec_from_hf(config: Mapping[str, Any], where: str) -> ModelSpec:
    """Reads a Hugging Face config. RoPE is understood in both spellings: `rope_theta` + `rope_scaling` (transformers 4)
    and `rope_parameters` (transformers 5).

    Raises InputError with every problem at once; `where` is the file's name.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise InputError(
            f'{where}: no "architectures" entry with a name in it', hint=f"known: {', '.join(ARCHITECTURES)}"
        )
    architecture = names[0]
    if architecture not in ARCHITECTURES:
        raise InputError(
            f'{where}: unknown architecture "{architecture}"{did_you_mean(architecture, ARCHITECTURES)}',
            hint=f"known: {', '.join(ARCHITECTURES)}; docs/add-a-model.md shows how to add one",
        )
    row = ARCHITECTURES[architecture]
    kinds = dict.fromkeys((*_type_problems(config, row), *_infinite(config)))
    problems = [f"{where}: {problem}" for problem in kinds]
    rope, local_base = rope_parameters(config) if not problems else ({}, None)
    problems += _problems(config, row, rope, where)
    if problems:
        raise InputError(f"{where}: not a config tkit can convert", problems=problems)
    values = {name: _value(config, row, name) for name in _FIELDS}
    values["intermediate_size"] = values["intermediate_size"] or 4 * values["hidden_size"]
    values["num_kv_heads"] = _num_kv_heads(config, row, values)
    values["head_size"] = values["head_size"] or values["hidden_size"] // max(values["num_heads"], 1)
    values["tie_word_embeddings"] = bool(values["tie_word_embeddings"])
    values["norm_epsilon"] = float(values["norm_epsilon"])  # JSON may write 1, and transformers wants 1.0
    extras = {name: _extra(config, name, default) for name, (_, default) in row.extras.items()}
    if "partial_rotary_factor" in extras:
        extras["partial_rotary_factor"] = rope.pop("partial_rotary_factor", extras["partial_rotary_factor"])
    if "rope_local_base_freq" in extras and local_base is not None:
        extras["rope_local_base_freq"] = local_base
    if config.get("_sliding_window_pattern") and "sliding_window_pattern" in extras:
        extras["sliding_window_pattern"] = config["_sliding_window_pattern"]
    theta = rope.pop("rope_theta", row.defaults.get("rope_theta", 10000.0))
    try:
        return ModelSpec(
            architecture=architecture,
            dtype=checkpoint_dtype(config.get("dtype") or config.get("torch_dtype") or "float32"),
            rope_theta=float(theta),
            rope_scaling=rope if rope.get("rope_type", "default") != "default" else None,
            extras=extras,
            **values,
        )
    except InputError as error:
        raise InputError(f"{where}: {error.message}", problems=error.problems) from error


def _problems(config: Mapping[str, Any], row: Architecture, rope: Mapping[str, Any], where: str) -> list[str]:
    problems = [
        f'{where}: key "{_key(row, name)}" is missing' for name in _REQUIRED if _value(config, row, name) is None
    ]
    problems += [
        f"{where}: {key} asks to run code that ships with the model; tkit never runs it" for key in _code_keys(config)
    ]
    rope_type = rope.get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        problems.append(f'{where}: unknown rope_type "{rope_type}"{did_you_mean(rope_type, _ROPE_TYPES)}')
    problems += [
        f"{where}: {key} is {config[key]!r}, TensorRT-LLM's {row.trtllm} only knows {value!r}"
        for key, value in row.unsupported.items()
        if config.get(key, value) != value
    ]
    return problems


def _type_problems(config: Mapping[str, Any], row: Architecture) -> Iterator[str]:
    """Values of another kind than the fields they are for."""
    hints = get_type_hints(ModelSpec)
    for name in _FIELDS:
        value = _value(config, row, name)
        if value is not None and not _is_a(value, hints[name]):
            yield f"{_key(row, name)} is {value!r}, expected {hints[name].__name__}"
    for name, (_, default) in row.extras.items():
        kind = type(default) if isinstance(default, bool | list) else float
        if config.get(name) is not None and not _is_a(config[name], kind):
            yield f"{name} is {config[name]!r}, expected {kind.__name__}"
    step = config.get("decoder_sparse_step", 1)
    if "decoder_sparse_step" in row.extras and not (_is_a(step, int) and step >= 1):
        yield f"decoder_sparse_step is {step!r}, expected at least 1"
    num_experts = _value(config, row, "num_experts")
    if "num_experts" in row.defaults and _is_a(num_experts, int) and num_experts < 1:
        yield f"{_key(row, 'num_experts')} is {num_experts}, expected at least 1"
    for name in ("rope_parameters", "rope_scaling"):
        yield from _rope_problems(name, config.get(name))
    for name in (*_ROPE_NUMBERS, "_sliding_window_pattern"):
        if config.get(name) is not None and not _is_a(config[name], float):
            yield f"{name} is {config[name]!r}, expected float"


def _rope_problems(name: str, rope: Any) -> Iterator[str]:
    if rope is None:
        return
    if not isinstance(rope, Mapping):
        yield f"{name} is {rope!r}, expected keys"
        return
    for key, value in rope.items():
        if key in ("full_attention", "sliding_attention"):
            yield from _rope_problems(f"{name}.{key}", value)
        elif key in ("type", "rope_type"):
            if not isinstance(value, str):
                yield f"{name}.{key} is {value!r}, expected str"
        elif isinstance(value, list) and key not in _ROPE_NUMBERS:
            if not all(_is_a(item, float) for item in value):
                yield f"{name}.{key} is {value!r}, expected numbers"
        elif value is not None and not isinstance(value, bool) and not _is_a(value, float):
            yield f"{name}.{key} is {value!r}, expected float"


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) <= sys.float_info.max  # an integer may be larger than any float; NaN is not
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _infinite(value: Any, path: str = "") -> Iterator[str]:
    """Numbers that JSON does not have, at any depth: Python reads them, and no file that is written could hold them."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{path.removesuffix('.')} is {value!r}, expected float"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _infinite(inner, f"{path}{key}.")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _infinite(inner, f"{path}{index}.")


def _code_keys(value: Any, path: str = "") -> Iterator[str]:
    """Where a config asks for code of its own, at any depth. `auto_map` beside the architecture does not count: many
    published models carry it, and an architecture of the table is transformers' own class, whatever it names."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if inner and (key == "trust_remote_code" or (key == "auto_map" and path)):
                yield f"{path}{key}"
            else:
                yield from _code_keys(inner, f"{path}{key}.")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _code_keys(inner, f"{path}{index}.")


def rope_parameters(config: Mapping[str, Any]) -> tuple[dict[str, Any], float | None]:
    """`rope_theta`, `rope_type` and the scaling's own keys, from either spelling; and the base of sliding-window layers
    where the config has one of its own (Gemma 3)."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    local_base = config.get("rope_local_base_freq")
    if "full_attention" in rope:
        local_base = rope.get("sliding_attention", {}).get("rope_theta", local_base)
        rope = dict(rope["full_attention"])
    if "type" in rope:  # the oldest spelling of rope_type
        rope.setdefault("rope_type", rope.pop("type"))
    for key in ("rope_theta", "partial_rotary_factor"):
        if config.get(key) is not None:
            rope.setdefault(key, config[key])
    return rope, local_base


def checkpoint_dtype(dtype: str) -> str:
    """The dtype of the checkpoint: TensorRT-LLM serves 16-bit models, so float32 becomes float16, as it does there."""
    return "float16" if dtype == "float32" else dtype


def _key(row: Architecture, name: str) -> str:
    return row.keys.get(name, _FIELDS[name][0])


def _value(config: Mapping[str, Any], row: Architecture, name: str) -> Any:
    key = _key(row, name)
    value = config.get(key)
    if value is None and key in _OTHER_SPELLINGS:
        value = config.get(_OTHER_SPELLINGS[key])
    return row.defaults.get(name, _FIELDS[name][1]) if value is None else value


def _extra(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field of one family. Null is a value of its own for numbers (no window, no softcapping)."""
    value = config.get(name, default)
    return default if value is None and isinstance(default, bool | list) else value


def _num_kv_heads(config: Mapping[str, Any], row: Architecture, values: Mapping[str, Any]) -> int:
    if row.model_type == "falcon" and not config.get("new_decoder_architecture", False):
        return 1 if config.get("multi_query", True) else values["num_heads"]  # num_kv_heads is not read there
    return values["num_kv_heads"] or values["num_heads"]


def trtllm_config(spec: ModelSpec, precision: Precision, parallel: Parallel) -> dict[str, Any]:
    """`config.json` of a TensorRT-LLM 1.0-1.2 checkpoint. `mapping` holds only the keys that every version knows,
    because unknown ones are refused. Sizes are global, and the vocabulary unpadded."""
    row = ARCHITECTURES[spec.architecture]
    mapping = {"world_size": parallel.world_size, "tp_size": parallel.tp_size, "pp_size": parallel.pp_size}
    if spec.num_experts:
        mapping.update(moe_tp_size=parallel.moe_tp_size, moe_ep_size=parallel.moe_ep_size)
    return {
        "architecture": row.trtllm,
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
        "hidden_act": row.activations.get(spec.hidden_act, spec.hidden_act),
        "norm_epsilon": spec.norm_epsilon,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": spec.rope_theta,
        "rotary_scaling": dict(spec.rope_scaling) if spec.rope_scaling else None,
        "attn_bias": spec.attention_bias,
        "mlp_bias": spec.mlp_bias,
        "qk_layernorm": False,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "use_parallel_embedding": (row.shards_embedding or parallel.shards_embedding) and parallel.tp_size > 1,
        "embedding_sharding_dim": 0,
        **row.constants,
        **{trtllm_name: spec.extras[name] for name, (trtllm_name, _) in row.extras.items()},
        **row.config(spec),
        "mapping": mapping,
        "quantization": trtllm_quantization(spec, precision, parallel),
    }


def spec_from_trtllm(config: Mapping[str, Any]) -> ModelSpec:
    """The way back, from what `trtllm_config` or NVIDIA ModelOpt wrote. Keys that ModelOpt leaves out have the values that
    TensorRT-LLM gives them: with transformers 5 it leaves out RoPE's base and scaling, and the model is another one."""
    row = next((row for row in ARCHITECTURES.values() if row.trtllm == config["architecture"]), None)
    if row is None:
        raise InputError(f'config.json: unknown architecture "{config["architecture"]}"')
    architecture = next(name for name, its_row in ARCHITECTURES.items() if its_row is row)
    moe = config.get("moe") or {}
    activations = {ours: theirs for theirs, ours in row.activations.items()}
    return ModelSpec(
        architecture=architecture,
        dtype=config["dtype"],
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_size=config["head_size"],
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        hidden_act=activations.get(config["hidden_act"], config["hidden_act"]),
        norm_epsilon=config["norm_epsilon"],
        rope_theta=config.get("rotary_base", 10000.0),
        rope_scaling=config.get("rotary_scaling"),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        attention_bias=config.get("attn_bias", False) if "attn_bias" not in row.constants else False,
        mlp_bias=config.get("mlp_bias", False),
        num_experts=moe.get("num_experts", 0),
        experts_per_token=moe.get("top_k", 0),
        expert_size=config.get("moe_intermediate_size", config["intermediate_size"]) if moe else 0,
        shared_expert_size=config.get("moe_shared_expert_intermediate_size", 0),
        extras={name: config.get(trtllm_name, default) for name, (trtllm_name, default) in row.extras.items()},
    )


def parallel_from_trtllm(config: Mapping[str, Any]) -> Parallel:
    mapping = config["mapping"]
    shards_embedding = bool(config.get("use_parallel_embedding")) and mapping["tp_size"] > 1
    if shards_embedding and config.get("embedding_sharding_dim", 0) != 0:
        raise InputError("config.json: embedding_sharding_dim is 1, tkit reads embeddings split over the vocabulary, 0")
    return Parallel(
        tp_size=mapping["tp_size"],
        pp_size=mapping["pp_size"],
        moe_ep_size=mapping.get("moe_ep_size", 1),
        shards_embedding=shards_embedding,
    )


def hf_config(spec: ModelSpec) -> dict[str, Any]:
    """Keyword arguments for transformers' config class of `model_type`."""
    row = ARCHITECTURES[spec.architecture]
    fields = {_key(row, name): getattr(spec, name) for name in _FIELDS if name not in row.derived}
    rope: dict[str, Any] = {"rope_type": "default", **(spec.rope_scaling or {}), "rope_theta": spec.rope_theta}
    if row.model_type == "falcon":
        fields["multi_query"] = spec.num_kv_heads == 1
    if "partial_rotary_factor" in spec.extras:
        rope["partial_rotary_factor"] = spec.extras["partial_rotary_factor"]
    if "rope_local_base_freq" in spec.extras:
        local = {"rope_type": "default", "rope_theta": spec.extras["rope_local_base_freq"]}
        rope = {"full_attention": rope, "sliding_attention": local}
    return {
        **fields,
        **spec.extras,
        "architectures": [spec.architecture],
        "model_type": row.model_type,
        "dtype": spec.dtype,
        "rope_parameters": rope,
        "pad_token_id": None,  # a class default beyond a small vocabulary would be refused
    }
