"""What the loader says to `config.json` and `quant_cfg.json` alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from tkit.checkpoints.load_simulation.algorithms import (
    ALGORITHMS,
    MIXED,
    module_quantization,
)
from tkit.checkpoints.load_simulation.families import DICT, FAMILIES, INT, LIST, NUMBER, STR, Family, Keys
from tkit.checkpoints.load_simulation.modules import Linear, expert_size
from tkit.checkpoints.tensors import SAFETENSORS_DTYPE

LAYER_CONFIG_FILE = "quant_cfg.json"

# fmt: off
_COMMON: Keys = {
    "architecture": STR, "dtype": STR, "hidden_size": INT, "num_hidden_layers": INT, "num_attention_heads": INT,
    "vocab_size": INT, "max_position_embeddings": INT, "mapping": DICT, "quantization": DICT,
    # the loader has defaults for these, and they are another model
    "num_key_value_heads": INT, "head_size": INT, "intermediate_size": INT, "hidden_act": STR,
    "norm_epsilon": NUMBER, "position_embedding_type": STR,
}
_LONG_ROPE: Keys = {"original_max_position_embeddings": INT, "longrope_scaling_short_factors": LIST,
                    "longrope_scaling_long_factors": LIST}

_MAPPING_KEYS = {"world_size", "tp_size", "pp_size", "cp_size", "moe_tp_size", "moe_ep_size", "gpus_per_node"}
_QUANTIZATION_KEYS = {
    "quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val", "use_meta_recipe",
    "has_zero_point", "pre_quant_scale", "exclude_modules",
}
_MOE_KEYS = {
    "num_experts", "shared_expert_intermediate_size", "top_k", "normalization_mode", "sparse_mixer_epsilon", "tp_mode",
    "device_limited_n_group", "device_limited_topk_group", "device_limited_routed_scaling_factor",
}
_ACTIVATIONS = {
    "relu", "tanh", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "openai-gelu", "geglu", "gegelu", "identity",
    "silu", "softplus", "squared-relu", "swiglu", "fast-swiglu",
}
_POSITIONS = {
    "learned_absolute", "rope_gptj", "rope_gpt_neox", "long_rope", "alibi", "alibi_with_scale", "relative", "chatglm",
    "yarn", "mrope",
}
_ROTARY_SCALINGS = {"none", "default", "linear", "dynamic", "longrope", "llama3", "yarn", "mrope"}
_KV_CACHE_ALGOS = {None, "FP8", "INT8"}
# fmt: on


def with_layer_config(config: Any, layer_config: Any) -> Any:
    """`config` as the loader reads it: with MIXED_PRECISION, `quant_cfg.json` takes the place of `quantization`."""
    if not isinstance(layer_config, dict) or not isinstance(config, dict):
        return config
    if not isinstance(config.get("quantization"), dict) or config["quantization"].get("quant_algo") != MIXED:
        return config
    layers = layer_config.get("quantized_layers")
    if config.get("architecture") == "MixtralForCausalLM" and isinstance(layers, dict):
        layers = dict(layers)
        for name in [name for name in layers if "mlp.fc" in name or "mlp.proj" in name]:
            layers.setdefault(name.rsplit(".", 1)[0], layers[name])
        layer_config = {**layer_config, "quantized_layers": layers}
    return {**config, "quantization": layer_config}


def config_problems(config: Any) -> list[str]:
    """What makes `config.json` itself unreadable, or readable as another model."""
    if not isinstance(config, dict):
        return [f"expected a mapping of keys, found {type(config).__name__}"]
    architecture = config.get("architecture")
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        return [f"architecture is {architecture!r}, expected one of {', '.join(FAMILIES)}"]
    keys = {**_COMMON, **family.keys}
    if config.get("position_embedding_type") == "long_rope":
        keys.update(_LONG_ROPE)
    problems = [
        f'key "{key}" is missing, {architecture} reads it'
        if key not in config
        else f"{key} is {config[key]!r}, expected {_type_names(types)}"
        for key, types in keys.items()
        if key not in config or not _is_a(config[key], types)
    ]
    # what follows needs the keys
    return problems or [*_value_problems(config), *_mapping_problems(config, family), *_quantization_problems(config)]


def _is_a(value: Any, types: Any) -> bool:
    allowed = types if isinstance(types, tuple) else (types,)
    if value is None:
        return None in allowed
    if isinstance(value, bool):
        return bool in allowed
    return isinstance(value, tuple(kind for kind in allowed if kind is not None))


def _type_names(types: Any) -> str:
    allowed = types if isinstance(types, tuple) else (types,)
    return " or ".join("null" if kind is None else kind.__name__ for kind in allowed)


def _value_problems(config: Mapping[str, Any]) -> Iterator[str]:
    rotary = config.get("rotary_scaling") or {}
    for name, value, known in (
        ("dtype", config["dtype"], SAFETENSORS_DTYPE),
        ("hidden_act", config["hidden_act"], _ACTIVATIONS),
        ("position_embedding_type", config["position_embedding_type"], _POSITIONS),
        ("rotary_scaling.rope_type", rotary.get("rope_type", rotary.get("type", "none")), _ROTARY_SCALINGS),
    ):
        if value not in known:
            yield f"{name} is {value!r}, expected one of {', '.join(sorted(known))}"
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size",
                 "intermediate_size", "vocab_size", "max_position_embeddings"):  # fmt: skip
        if config[name] < 1:
            yield f"{name} is {config[name]}, expected at least 1"
    moe = config.get("moe") or {}
    for key in sorted(moe.keys() - _MOE_KEYS):
        yield f'moe: unknown key "{key}" is refused'
    if moe and not 1 <= moe.get("top_k", 0) <= moe.get("num_experts", 0):
        yield f"moe: top_k is {moe.get('top_k')}, num_experts {moe.get('num_experts')}"


def _mapping_problems(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    mapping = config["mapping"]
    for key in sorted(mapping.keys() - _MAPPING_KEYS):
        yield f'mapping: unknown key "{key}" is refused'
    missing = [key for key in ("world_size", "tp_size", "pp_size") if key not in mapping]
    wrong = [key for key in mapping.keys() & _MAPPING_KEYS if not _is_a(mapping[key], INT) or mapping[key] < 1]
    yield from (f'mapping: key "{key}" is missing' for key in missing)
    yield from (f"mapping: {key} is {mapping[key]!r}, expected a number of GPUs" for key in wrong)
    if missing or wrong:
        return
    tp, pp, cp = mapping["tp_size"], mapping["pp_size"], mapping.get("cp_size", 1)
    if mapping["world_size"] != tp * pp * cp:
        yield f"mapping: world_size is {mapping['world_size']}, tp_size x pp_size x cp_size is {tp * pp * cp}"
    moe_ep = mapping.get("moe_ep_size", 1)
    moe_tp = mapping.get("moe_tp_size", tp // moe_ep)
    if moe_tp * moe_ep != tp:
        yield f"mapping: moe_tp_size {moe_tp} x moe_ep_size {moe_ep} is not tp_size {tp}"
    kv_heads = config["num_key_value_heads"]
    if kv_heads % tp and tp % kv_heads:
        yield f"num_key_value_heads {kv_heads} and tp_size {tp}: neither is a multiple of the other"
    moe = config.get("moe") or {}
    for name, size, divisor_name, divisor in (
        ("num_attention_heads", config["num_attention_heads"], "tp_size", tp),
        ("intermediate_size", 0 if moe else config["intermediate_size"], "tp_size", tp),
        ("moe.num_experts", moe.get("num_experts", 0), "moe_ep_size", moe_ep),
        ("the size of an expert", expert_size(config) if moe else 0, "moe_tp_size", moe_tp),
        ("the size of the shared expert", config.get("moe_shared_expert_intermediate_size", 0), "tp_size", tp),
        ("vocab_size", config["vocab_size"] if family.shards_embedding else 0, "tp_size", tp),
    ):
        if size % divisor:
            yield f"{name} {size} is not a multiple of {divisor_name} {divisor}"
    if pp > config["num_hidden_layers"]:
        yield f"pp_size {pp} exceeds num_hidden_layers {config['num_hidden_layers']}"
    if pp > 1 and not family.has_pipeline:
        yield f"pp_size is {pp}, {config['architecture']} builds every layer on every stage"


def _quantization_problems(config: Mapping[str, Any]) -> Iterator[str]:
    quantization = config["quantization"]
    if quantization.get("quant_algo") == MIXED:
        problems = list(_mixed_problems(quantization))
        yield from problems or _expert_problems(config)
        return
    problems = list(_algorithm_problems(quantization, "quantization"))
    yield from problems or _expert_problems(config)
    algo, kv_algo = quantization.get("quant_algo"), quantization.get("kv_cache_quant_algo")
    if kv_algo not in _KV_CACHE_ALGOS:
        yield f"quantization: kv_cache_quant_algo is {kv_algo!r}, expected one of {_KV_CACHE_ALGOS}"
    patterns = quantization.get("exclude_modules") or ()
    lost = [name for name in _never_quantized(config) if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if algo is not None and patterns and lost:
        yield f"quantization: exclude_modules replaces the defaults and leaves out {', '.join(lost)}"


def _never_quantized(config: Mapping[str, Any]) -> Iterator[str]:
    """Modules that the algorithm would replace if TensorRT-LLM's own patterns did not name them."""
    algo = config["quantization"].get("quant_algo")
    yield "lm_head"
    if algo in ("W8A16", "W4A16"):  # these have an embedding of their own; others replace linear layers alone
        yield "transformer.vocab_embedding"
        if config["position_embedding_type"] == "learned_absolute":
            yield "transformer.position_embedding"
    if config.get("moe"):
        yield "transformer.layers.0.mlp.router"
        if config.get("moe_shared_expert_intermediate_size"):
            yield "transformer.layers.0.mlp.shared_expert_gate"
    if algo == "FP8_PER_CHANNEL_PER_TOKEN":
        yield "transformer.ln_f"


def _mixed_problems(quantization: Mapping[str, Any]) -> Iterator[str]:
    layers = quantization.get("quantized_layers")
    if not isinstance(layers, dict) or not layers:
        yield f"quantization: {MIXED} needs {LAYER_CONFIG_FILE} with quantized_layers"
        return
    for key in sorted(quantization.keys() - {"quant_algo", "kv_cache_quant_algo", "quantized_layers"}):
        yield f'{LAYER_CONFIG_FILE}: unknown key "{key}"'
    if quantization.get("kv_cache_quant_algo") not in _KV_CACHE_ALGOS:
        yield f"{LAYER_CONFIG_FILE}: kv_cache_quant_algo is {quantization['kv_cache_quant_algo']!r}"
    lines: dict[str, None] = {}
    for entry in layers.values():
        lines.update(dict.fromkeys(_algorithm_problems(entry, LAYER_CONFIG_FILE)))
        if entry.get("quant_algo") == "FP8_PER_CHANNEL_PER_TOKEN":
            lines["FP8_PER_CHANNEL_PER_TOKEN replaces whole attention and MLP modules and their norms, not layers"] = (
                None
            )
    yield from lines


def _algorithm_problems(entry: Mapping[str, Any], where: str) -> Iterator[str]:
    for key in sorted(entry.keys() - _QUANTIZATION_KEYS):
        yield f'{where}: unknown key "{key}" is refused'
    algo = entry.get("quant_algo")
    if algo not in ALGORITHMS:
        yield f"{where}: quant_algo is {algo!r}, expected one of {', '.join(map(str, ALGORITHMS))}"
        return
    group_size = entry.get("group_size", 128)
    if group_size not in ALGORITHMS[algo].group_sizes:
        yield f"{where}: group_size is {group_size}, {algo} knows {ALGORITHMS[algo].group_sizes}"


def _expert_problems(config: Mapping[str, Any]) -> list[str]:
    if not config.get("moe"):
        return []
    names = (f"transformer.layers.{layer}.mlp.fc" for layer in range(config["num_hidden_layers"]))
    experts = (Linear(name, 1, 1, "column", experts=1) for name in names)
    used = {module_quantization(linear, config).get("quant_algo") for linear in experts}
    return [
        f"quantization: {algo} cannot be combined with experts" for algo in used if not ALGORITHMS[algo].has_experts
    ]
