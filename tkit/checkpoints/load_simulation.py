"""What TensorRT-LLM's loader will say to a checkpoint, found out without TensorRT-LLM.

From `config.json` alone it derives the module tree that `trtllm-build` makes for each rank, and from that every tensor
that must be in the rank's file; then it does to the files' headers what `preprocess_weights` does to the tensors, and
compares. It knows nothing of the conversion plan: both were written from the format, so a mistake in either shows.

Reads headers, never data. Source: TensorRT-LLM 1.0-1.2 `models/modeling_utils.py` (`PretrainedModel.load`,
`preprocess_weights`), `models/*/model.py`, `layers/{attention,mlp,moe}.py`, `quantization/{layers,quantize}.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from tkit.checkpoints.reader import read_header
from tkit.checkpoints.tensors import SAFETENSORS_DTYPE
from tkit.errors import InputError, TkitError
from tkit.files import read_json

CONFIG_FILE = "config.json"
LAYER_CONFIG_FILE = "quant_cfg.json"
MIXED = "MIXED_PRECISION"


class Form(NamedTuple):
    """A tensor without its values."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def check_load(directory: Path) -> None:
    """Raises TkitError with everything that would keep `trtllm-build` from loading the checkpoint in `directory`."""
    problems = simulate_load(directory)
    if problems:
        raise TkitError(
            f"{directory}: TensorRT-LLM would not load this checkpoint",
            problems=problems,
            hint="what was written contradicts TensorRT-LLM's format: a mistake in tkit, please report it with this list",
        )


def simulate_load(directory: Path) -> list[str]:
    """Everything that `trtllm-build` would refuse, or silently read as another model; empty when it would load."""
    try:
        config = read_json(directory / CONFIG_FILE)
        layer_config = directory / LAYER_CONFIG_FILE
        config = with_layer_config(config, read_json(layer_config) if layer_config.exists() else None)
    except InputError as error:
        return [str(error)]
    problems = config_problems(config)
    if problems:
        return [f"{CONFIG_FILE}: {problem}" for problem in problems]
    num_ranks = config["mapping"]["tp_size"] * config["mapping"]["pp_size"]
    expected = [directory / f"rank{rank}.safetensors" for rank in range(num_ranks)]
    problems = [
        f"{path.name}: no place among the {num_ranks} ranks of {CONFIG_FILE}"
        for path in sorted(directory.glob("rank*.safetensors"))
        if path not in expected
    ]
    for rank, path in enumerate(expected):
        if not path.is_file():
            problems.append(f"rank {rank}: {path.name} is missing")
            continue
        try:
            found = {name: Form(entry.dtype, entry.shape) for name, entry in read_header(path).items()}
        except InputError as error:
            problems.append(f"rank {rank}: {error}")
            continue
        problems += [f"rank {rank}, {path.name}: {line}" for line in rank_problems(config, rank, found)]
    return problems


def rank_problems(config: Mapping[str, Any], rank: int, found: Mapping[str, Form]) -> list[str]:
    """Missing, misshapen and superfluous tensors of one rank's file, in the file's own terms."""
    expected = required_tensors(config, rank)
    engine, loaded = engine_parameters(config, rank), preprocess(found, config)
    if "lm_head.weight" not in found and _may_omit_lm_head(config, expected):
        del engine["lm_head.weight"]
    lines: dict[str, None] = {}  # one tensor of the file may become several parameters: each line once
    for name, (parameter, origin) in engine.items():
        if name not in loaded:
            lines[f"{origin} is missing, expected {expected[origin]}"] = None
        elif not _fits(loaded[name][0], parameter):
            made, source = loaded[name]
            if found[source] == expected[origin]:
                lines[f"{source} {found[source]} is loaded as {made}, its module has {parameter}"] = None
            else:
                lines[f"{source} is {found[source]}, expected {expected[origin]}"] = None
    for name, (_, origin) in loaded.items():
        if name not in engine and origin not in engine:
            lines[f"{origin} {found[origin]} is in no module of {config['architecture']}"] = None
    return list(lines)


def _fits(found: Form, parameter: Form) -> bool:
    """Shapes must be equal; a scalar also fills a parameter of one value. A wrong dtype is only a warning to the loader,
    but the network is strongly typed: it fails later."""
    is_scalar = found.shape == () and math.prod(parameter.shape) == 1
    return found.dtype == parameter.dtype and (found.shape == parameter.shape or is_scalar)


def _may_omit_lm_head(config: Mapping[str, Any], expected: Mapping[str, Form]) -> bool:
    """Without lm_head the loader takes the embedding of the same rank for it, whether the model ties them or not."""
    embedding = expected.get("transformer.vocab_embedding.weight")
    return bool(config.get("tie_word_embeddings")) and embedding == expected.get("lm_head.weight") is not None


# --- config.json -----------------------------------------------------------------------------------------------------

# fmt: off
_INT, _STR, _BOOL, _DICT, _LIST, _NUMBER = int, str, bool, dict, list, (int, float)
_Keys = Mapping[str, Any]  # key -> type; None among the types = may be null

_COMMON: _Keys = {
    "architecture": _STR, "dtype": _STR, "hidden_size": _INT, "num_hidden_layers": _INT, "num_attention_heads": _INT,
    "vocab_size": _INT, "max_position_embeddings": _INT, "mapping": _DICT, "quantization": _DICT,
    # the loader has defaults for these, and they are another model
    "num_key_value_heads": _INT, "head_size": _INT, "intermediate_size": _INT, "hidden_act": _STR,
    "norm_epsilon": _NUMBER, "position_embedding_type": _STR,
}
_ROTARY: _Keys = {"rotary_base": _NUMBER, "rotary_scaling": (_DICT, None)}
_BIASES: _Keys = {"attn_bias": _BOOL, "mlp_bias": _BOOL}
_MOE: _Keys = {"moe": _DICT}
_QWEN: _Keys = {**_ROTARY, "attn_bias": _BOOL, "qwen_type": _STR, "seq_length": _INT}
_QWEN_MOE: _Keys = {**_QWEN, **_MOE, "moe_intermediate_size": _INT}
_GEMMA2: _Keys = {**_ROTARY, "query_pre_attn_scalar": _NUMBER}
_LONG_ROPE: _Keys = {"original_max_position_embeddings": _INT, "longrope_scaling_short_factors": _LIST,
                     "longrope_scaling_long_factors": _LIST}

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
# a list of one's own replaces these, so it must repeat them
_EXCLUDED = ("*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding", "*shared_expert_gate",
             "*fused_a")
_EXCLUDED_ROWWISE = ("*ln_f", "*ln_embed")
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
    wrong = [key for key in mapping.keys() & _MAPPING_KEYS if not _is_a(mapping[key], _INT) or mapping[key] < 1]
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
        ("the size of an expert", _expert_size(config) if moe else 0, "moe_tp_size", moe_tp),
        ("the size of the shared expert", config.get("moe_shared_expert_intermediate_size", 0), "tp_size", tp),
        ("vocab_size", config["vocab_size"] if family.shards_embedding else 0, "tp_size", tp),
    ):
        if size % divisor:
            yield f"{name} {size} is not a multiple of {divisor_name} {divisor}"
    if pp > config["num_hidden_layers"]:
        yield f"pp_size {pp} exceeds num_hidden_layers {config['num_hidden_layers']}"
    if pp > 1 and not family.has_pipeline:
        yield f"pp_size is {pp}, {config['architecture']} builds every layer on every stage"


def _expert_size(config: Mapping[str, Any]) -> int:
    size: int = config.get("moe_intermediate_size", config["intermediate_size"])
    return size


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
    rowwise = algo == "FP8_PER_CHANNEL_PER_TOKEN"
    defaults = (*_EXCLUDED, *(_EXCLUDED_ROWWISE if rowwise else ()))
    lost = [pattern for pattern in defaults if patterns and pattern not in patterns]
    if algo is not None and lost:
        yield f"quantization: exclude_modules replaces the defaults and leaves out {', '.join(lost)}"


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
    used = {_module_quantization(linear, config).get("quant_algo") for linear in experts}
    return [
        f"quantization: {algo} cannot be combined with experts" for algo in used if not ALGORITHMS[algo].has_experts
    ]


# --- the module tree -------------------------------------------------------------------------------------------------


Loaded = dict[str, tuple[Form, str]]  # parameter of the engine -> (form, the tensor of the file it comes from)


@dataclass(frozen=True)
class Weight:
    """A tensor that no algorithm touches."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "model"


@dataclass(frozen=True)
class Linear:
    """A layer that an algorithm may replace. Sizes are one rank's; `cut` names the side that tensor parallelism splits."""

    name: str
    out: int
    in_: int
    cut: str  # column: the output | row: the input | none
    bias: bool = False
    experts: int = 0  # 0 = not a layer of experts


Tree = Iterator[Weight | Linear]


class Sizes:
    """One rank's sizes. They are the same on all ranks of a pipeline stage."""

    def __init__(self, config: Mapping[str, Any]):
        mapping, moe = config["mapping"], config.get("moe") or {}
        self.config = config
        self.tp: int = mapping["tp_size"]
        self.hidden: int = config["hidden_size"]
        self.head: int = config["head_size"]
        self.queries = config["num_attention_heads"] // self.tp * self.head
        self.keys = -(-config["num_key_value_heads"] // self.tp) * self.head  # and values; at least one head per rank
        self.mlp = config["intermediate_size"] // self.tp
        self.vocab = -(-config["vocab_size"] // self.tp)  # padded to a multiple of tp
        moe_ep = mapping.get("moe_ep_size", 1)
        self.num_experts: int = moe.get("num_experts", 0)
        self.experts = self.num_experts // moe_ep
        self.expert_mlp = _expert_size(config) // mapping.get("moe_tp_size", self.tp // moe_ep)
        self.shared_mlp = config.get("moe_shared_expert_intermediate_size", 0) // self.tp
        self.halves = 2 if config["hidden_act"] in ("swiglu", "gegelu", "geglu") else 1  # in one fused layer


def rms_norm(name: str, size: int) -> Tree:
    yield Weight(f"{name}.weight", (size,))


def layer_norm(name: str, size: int) -> Tree:
    yield Weight(f"{name}.weight", (size,))
    yield Weight(f"{name}.bias", (size,))


def attention(s: Sizes, *, bias: bool, dense_bias: bool) -> Tree:
    yield Linear("attention.qkv", s.queries + 2 * s.keys, s.hidden, "column", bias)
    yield Linear("attention.dense", s.hidden, s.queries, "row", dense_bias)


def head_norms(s: Sizes) -> Tree:
    yield from rms_norm("attention.q_layernorm", s.head)
    yield from rms_norm("attention.k_layernorm", s.head)


def mlp(s: Sizes, *, bias: bool) -> Tree:
    """fc holds both halves where the activation is gated."""
    yield Linear("mlp.fc", s.halves * s.mlp, s.hidden, "column", bias)
    yield Linear("mlp.proj", s.hidden, s.mlp, "row", bias)


def gated_mlp(s: Sizes, *, bias: bool = False) -> Tree:
    yield Linear("mlp.fc", s.mlp, s.hidden, "column", bias)
    yield Linear("mlp.gate", s.mlp, s.hidden, "column", bias)
    yield Linear("mlp.proj", s.hidden, s.mlp, "row", bias)


def mixture(s: Sizes) -> Tree:
    yield Weight("mlp.router.weight", (s.num_experts, s.hidden), "F32")
    yield Linear("mlp.fc", s.halves * s.expert_mlp, s.hidden, "column", experts=s.experts)
    yield Linear("mlp.proj", s.hidden, s.expert_mlp, "row", experts=s.experts)


def shared_expert(s: Sizes) -> Tree:
    yield Linear("mlp.shared_expert.fc", s.halves * s.shared_mlp, s.hidden, "column")
    yield Linear("mlp.shared_expert.proj", s.hidden, s.shared_mlp, "row")
    yield Weight("mlp.shared_expert_gate.weight", (1, s.hidden))


def llama_layer(s: Sizes, layer: int) -> Tree:
    yield from rms_norm("input_layernorm", s.hidden)
    yield from attention(s, bias=s.config["attn_bias"], dense_bias=s.config["attn_bias"])
    yield from rms_norm("post_layernorm", s.hidden)
    yield from mixture(s) if s.num_experts else gated_mlp(s, bias=s.config["mlp_bias"])


def qwen_layer(s: Sizes, layer: int) -> Tree:
    kind = s.config["qwen_type"]
    yield from rms_norm("input_layernorm", s.hidden)
    yield from attention(s, bias=s.config["attn_bias"], dense_bias=False)
    if kind in ("qwen3", "qwen3_moe"):
        yield from head_norms(s)
    yield from rms_norm("post_layernorm", s.hidden)
    is_sparse = (layer + 1) % s.config.get("decoder_sparse_step", 1) == 0
    if s.num_experts and is_sparse and layer not in s.config.get("mlp_only_layers", ()):
        yield from mixture(s)
        yield from shared_expert(s) if kind == "qwen2_moe" else ()
    else:
        yield from gated_mlp(s)


def gemma_layer(s: Sizes, layer: int) -> Tree:
    name = s.config["architecture"]
    yield from rms_norm("input_layernorm", s.hidden)
    yield from attention(s, bias=s.config["attn_bias"], dense_bias=s.config["attn_bias"])
    if name == "Gemma3ForCausalLM":
        yield from head_norms(s)
    yield from rms_norm("post_layernorm", s.hidden)
    yield from gated_mlp(s, bias=s.config["mlp_bias"])
    if name != "GemmaForCausalLM":
        yield from rms_norm("pre_feedforward_layernorm", s.hidden)
        yield from rms_norm("post_feedforward_layernorm", s.hidden)


def phi3_layer(s: Sizes, layer: int) -> Tree:
    yield from rms_norm("input_layernorm", s.hidden)
    yield from attention(s, bias=False, dense_bias=False)
    yield from rms_norm("post_layernorm", s.hidden)
    yield from mlp(s, bias=False)


def gpt_layer(s: Sizes, layer: int) -> Tree:
    bias = s.config["bias"]
    yield from layer_norm("input_layernorm", s.hidden)
    yield from attention(s, bias=bias, dense_bias=bias)
    yield from layer_norm("post_layernorm", s.hidden)
    yield from mlp(s, bias=bias)


def gptj_layer(s: Sizes, layer: int) -> Tree:
    yield from layer_norm("input_layernorm", s.hidden)
    yield from attention(s, bias=False, dense_bias=False)
    yield from mlp(s, bias=True)


def falcon_layer(s: Sizes, layer: int) -> Tree:
    bias, is_new = s.config["bias"], s.config["new_decoder_architecture"]
    yield from layer_norm("input_layernorm", s.hidden)
    if is_new and s.config["num_ln_in_parallel_attn"] in (None, 2):
        yield from layer_norm("mlp_layernorm", s.hidden)
    yield from attention(s, bias=bias, dense_bias=bias)
    if not is_new and not s.config["parallel_attention"]:
        yield from layer_norm("post_layernorm", s.hidden)
    yield from mlp(s, bias=bias)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One TensorRT-LLM model class. `keys` are those that it reads from config.json beside the common ones."""

    layer: Callable[[Sizes, int], Tree]
    keys: _Keys = field(default_factory=dict)
    norm: Callable[[str, int], Tree] = rms_norm
    has_position_embedding: bool = False
    has_lm_head_bias: bool = False
    has_pipeline: bool = True
    shards_embedding: bool = False  # whatever use_parallel_embedding says


# fmt: off
_LLAMA = Family(layer=llama_layer, keys={**_ROTARY, **_BIASES})
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM":    _LLAMA,
    "MistralForCausalLM":  _LLAMA,
    "MixtralForCausalLM":  Family(layer=llama_layer, keys={**_ROTARY, **_BIASES, **_MOE}),
    "Qwen2ForCausalLM":    Family(layer=qwen_layer, keys=_QWEN),
    "Qwen3ForCausalLM":    Family(layer=qwen_layer, keys=_QWEN),
    "Qwen2MoeForCausalLM": Family(layer=qwen_layer, keys={**_QWEN_MOE, "moe_shared_expert_intermediate_size": _INT}),
    "Qwen3MoeForCausalLM": Family(layer=qwen_layer, keys=_QWEN_MOE),
    "GemmaForCausalLM":    Family(layer=gemma_layer, keys={**_ROTARY, **_BIASES}, shards_embedding=True),
    "Gemma2ForCausalLM":   Family(layer=gemma_layer, shards_embedding=True, keys={
        **_GEMMA2, **_BIASES, "final_logit_softcapping": (*_NUMBER, None), "attn_logit_softcapping": (*_NUMBER, None)}),
    "Gemma3ForCausalLM":   Family(layer=gemma_layer, shards_embedding=True, keys={
        **_GEMMA2, **_BIASES, "_sliding_window_pattern": _INT, "sliding_window_pattern": _INT, "sliding_window": _INT,
        "rope_local_base_freq": _NUMBER}),
    "Phi3ForCausalLM":     Family(layer=phi3_layer, has_pipeline=False, keys={
        **_ROTARY, "rotary_pct": _NUMBER, "tie_word_embeddings": _BOOL}),
    "GPT2LMHeadModel":     Family(layer=gpt_layer, norm=layer_norm, has_position_embedding=True, keys={
        "gpt_variant": _STR, "bias": _BOOL}),
    "GPTJForCausalLM":     Family(layer=gptj_layer, norm=layer_norm, has_lm_head_bias=True, keys={"rotary_dim": _INT}),
    "FalconForCausalLM":   Family(layer=falcon_layer, norm=layer_norm, keys={
        "rotary_base": _NUMBER, "bias": _BOOL, "parallel_attention": _BOOL, "new_decoder_architecture": _BOOL,
        "num_ln_in_parallel_attn": (_INT, None)}),
}
# fmt: on


def required_tensors(config: Mapping[str, Any], rank: int) -> dict[str, Form]:
    """{name: form} of everything that must lie in the file of `rank`, in the layout in which it is shipped."""
    return {name: form for name, form, _ in _required(config, rank)}


def engine_parameters(config: Mapping[str, Any], rank: int) -> Loaded:
    """The parameters of the modules that the build makes for `rank`."""
    model = SAFETENSORS_DTYPE[config["dtype"]]
    return {
        parameter: (made, name)
        for name, form, algo in _required(config, rank)
        for parameter, made in ALGORITHMS[algo].preprocess(name, form, model)
    }


def _required(config: Mapping[str, Any], rank: int) -> Iterator[tuple[str, Form, str | None]]:
    """(name, form, algorithm of its module) of every tensor."""
    s, family = Sizes(config), FAMILIES[config["architecture"]]
    pp_rank, pp = rank // s.tp, config["mapping"]["pp_size"]
    parts: list[Weight | Linear] = []
    if pp_rank == 0:
        parts.append(Weight("transformer.vocab_embedding.weight", _embedding_shape(s, family)))
        if family.has_position_embedding:
            shape = (config["max_position_embeddings"], s.hidden)
            parts.append(Weight("transformer.position_embedding.weight", shape))
    for local_layer, layer in enumerate(_stage_layers(config["num_hidden_layers"], pp, pp_rank)):
        prefix = f"transformer.layers.{local_layer}."
        parts += [_renamed(part, prefix) for part in family.layer(s, layer)]
        if config["quantization"].get("kv_cache_quant_algo"):
            parts.append(Weight(f"{prefix}attention.kv_cache_scaling_factor", (1,), "F32"))
    if pp_rank == pp - 1:
        parts += family.norm("transformer.ln_f", s.hidden)
        parts.append(Weight("lm_head.weight", (s.vocab, s.hidden)))
        if family.has_lm_head_bias:
            parts.append(Weight("lm_head.bias", (s.vocab,)))
    model_dtype = SAFETENSORS_DTYPE[config["dtype"]]
    for part in parts:
        algo = _module_quantization(part, config).get("quant_algo") if isinstance(part, Linear) else None
        for weight in stored_parameters(part, config) if isinstance(part, Linear) else (part,):
            yield weight.name, Form(model_dtype if weight.dtype == "model" else weight.dtype, weight.shape), algo


def _embedding_shape(s: Sizes, family: Family) -> tuple[int, int]:
    if s.tp > 1 and (family.shards_embedding or s.config.get("use_parallel_embedding")):
        if s.config.get("embedding_sharding_dim", 0) == 0:
            return s.vocab, s.hidden
        return s.config["vocab_size"], s.hidden // s.tp
    return s.config["vocab_size"], s.hidden


def _stage_layers(num_layers: int, pp: int, pp_rank: int) -> range:
    """As `torch.tensor_split` divides them: the first `num_layers % pp` stages have one more."""
    sizes = [num_layers // pp + (stage < num_layers % pp) for stage in range(pp)]
    return range(sum(sizes[:pp_rank]), sum(sizes[: pp_rank + 1]))


def _renamed(part: Weight | Linear, prefix: str) -> Weight | Linear:
    name = prefix + part.name
    if isinstance(part, Weight):
        return Weight(name, part.shape, part.dtype)
    return Linear(name, part.out, part.in_, part.cut, part.bias, part.experts)


# --- algorithms ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """One tensor of a quantized layer as it is shipped. Dimensions: out, in, E (experts) and numbers, `/2` or `/g`
    (group size) dividing. `experts` is None where a layer of experts has no such tensor; `when` names the flag in
    `quantization` that it depends on."""

    name: str
    dtype: str
    dense: str
    experts: str | None = None
    when: str | None = None


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One `quant_algo`. `multiple` is what the module pads the unsplit sizes to, times tp; "g" = the group size."""

    stored: tuple[Stored, ...]
    preprocess: Callable[[str, Form, str], Iterable[tuple[str, Form]]] = lambda name, form, model: ((name, form),)
    multiple: int | str = 1
    group_sizes: tuple[int, ...] = (64, 128)
    has_experts: bool = True


def groupwise(name: str, form: Form, model: str) -> Iterator[tuple[str, Form]]:
    """Codes go through the kernel's layout and are seen as 16-bit values then; scales are transposed."""
    shape = form.shape
    if name.endswith("weight") and form.dtype == "I8":
        *experts, half_out, in_ = shape
        yield name, Form(model, (*experts, in_, half_out // 2))
    elif name.endswith("weights_scaling_factor"):
        yield name, Form(model, (*shape[:-2], *reversed(shape[-2:])))
    elif name.endswith("prequant_scaling_factor"):
        yield name, Form(form.dtype, (1, shape[-1] if shape else 1))  # of (experts, in) the first row is taken
    else:
        yield name, form


def groupwise_fp8(name: str, form: Form, model: str) -> Iterator[tuple[str, Form]]:
    """As `groupwise`; the two scalars also become `alpha`."""
    yield from groupwise(name, form, model)
    if name.endswith(".weights_scaling_factor_2"):
        yield name.replace(".weights_scaling_factor_2", ".alpha"), Form(form.dtype, form.shape or (1,))


def fp8_bits(name: str, form: Form, model: str) -> Iterator[tuple[str, Form]]:
    yield name, Form("F8_E4M3", form.shape) if name.endswith("weight") and form.dtype == "I8" else form


def weight_only(codes_per_byte: int) -> Callable[[str, Form, str], Iterator[tuple[str, Form]]]:
    """Plain weights are quantized by the build itself, on the GPU it runs on; int8 ones are taken as they are."""

    def preprocess(name: str, form: Form, model: str) -> Iterator[tuple[str, Form]]:
        touched = ("qkv.weight", "dense.weight", "fc.weight", "proj.weight", "gate.weight")
        is_plain_linear = any(part in name for part in touched) and form.dtype != "I8" and len(form.shape) >= 2
        if not is_plain_linear:
            yield name, form
            return
        *experts, out, in_ = form.shape
        yield name, Form("I8", (*experts, in_, out // codes_per_byte))
        yield name.removesuffix("weight") + "per_channel_scale", Form(form.dtype, (*experts, out))

    return preprocess


def block_scaled(name: str, form: Form, model: str) -> Iterator[tuple[str, Form]]:
    for theirs, ours in (
        ("weights_scaling_factor_2", "weights_global_scaling_factor"),
        ("weights_scaling_factor", "weights_block_scaling_factor"),
        ("activation_scaling_factor", "activation_global_scaling_factor"),
    ):
        if name.endswith("." + theirs):
            yield name.removesuffix(theirs) + ours, form
            return
    yield name, form


# fmt: off
_PLAIN = Stored("weight", "model", "out in", "E out in")
_INT4 = (
    Stored("weight",                  "I8",    "out/2 in", "E out/2 in"),
    Stored("weights_scaling_factor",  "F32",   "out in/g", "E out in/g"),
    Stored("prequant_scaling_factor", "model", "in",       "in",         when="pre_quant_scale"),
    Stored("zero",                    "model", "in/g out", "E in/g out", when="has_zero_point"),
)
ALGORITHMS: dict[str | None, Algorithm] = {
    None:    Algorithm(stored=(_PLAIN,)),
    "W8A16": Algorithm(stored=(_PLAIN,), preprocess=weight_only(1), multiple=64),
    "W4A16": Algorithm(stored=(_PLAIN,), preprocess=weight_only(2), multiple=64),
    "FP8": Algorithm(preprocess=fp8_bits, stored=(
        Stored("weight",                    "F8_E4M3", "out in", "E out in"),
        Stored("weights_scaling_factor",    "F32",     "1",      "E 1"),
        Stored("activation_scaling_factor", "F32",     "1",      "1"),
    )),
    "FP8_PER_CHANNEL_PER_TOKEN": Algorithm(preprocess=fp8_bits, has_experts=False, stored=(
        Stored("weight",                    "F8_E4M3", "out in"),
        Stored("per_channel_scale",         "F32",     "out"),
    )),
    "W8A8_SQ_PER_CHANNEL": Algorithm(stored=(  # experts stay in the model's dtype
        Stored("weight",                    "I8",      "out in"),
        Stored("weights_scaling_factor",    "F32",     "out"),
        Stored("prequant_scaling_factor",   "model",   "in"),
        Stored("activation_scaling_factor", "F32",     "1"),
    )),
    "W4A16_AWQ": Algorithm(preprocess=groupwise, multiple="g", stored=_INT4),
    # with experts, `weights_scaling_factor_2` of any shape ends as an alpha that is not the module's (experts, 1)
    "W4A8_AWQ": Algorithm(preprocess=groupwise_fp8, multiple="g", group_sizes=(128,), has_experts=False, stored=(
        *_INT4,
        Stored("weights_scaling_factor_2",  "F32",     "1"),
        Stored("activation_scaling_factor", "F32",     "1"),
    )),
    # the scales' shape is unpacked into two sizes
    "NVFP4": Algorithm(preprocess=block_scaled, group_sizes=(16, 64, 128), has_experts=False, stored=(
        Stored("weight",                    "U8",      "out in/2"),
        Stored("weights_scaling_factor",    "F8_E4M3", "out in/16"),
        Stored("weights_scaling_factor_2",  "F32",     "1"),
        Stored("activation_scaling_factor", "F32",     "1"),
    )),
}
# fmt: on


def stored_parameters(linear: Linear, config: Mapping[str, Any]) -> Iterator[Weight]:
    """The tensors of one linear layer under the algorithm of `config`."""
    quantization = _module_quantization(linear, config)
    algorithm = ALGORITHMS[quantization.get("quant_algo")]
    stored = algorithm.stored
    if linear.experts and not any(tensor.experts for tensor in stored):
        stored = (_PLAIN,)
    group_size = quantization.get("group_size", 128)
    out, in_ = _padded_sizes(linear, config["mapping"]["tp_size"], algorithm, group_size)
    sizes = {"out": out, "in": in_, "E": linear.experts, "g": group_size}
    for tensor in stored:
        dimensions = tensor.experts if linear.experts else tensor.dense
        if dimensions is not None and (tensor.when is None or quantization.get(tensor.when)):
            yield Weight(f"{linear.name}.{tensor.name}", _shape(dimensions, sizes), tensor.dtype)
    if linear.bias:
        yield Weight(f"{linear.name}.bias", (linear.out,))


def _module_quantization(linear: Linear, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry that decides about one layer. Experts go by the name of the module that holds them all, and FP8 rowwise
    replaces whole attention and MLP modules."""
    quantization: Mapping[str, Any] = config["quantization"]
    block = linear.name.rpartition(".")[0]
    if quantization.get("quant_algo") == MIXED:
        return _layer_entry(quantization, block if linear.experts else linear.name)
    is_whole = linear.experts or quantization.get("quant_algo") == "FP8_PER_CHANNEL_PER_TOKEN"
    name = block if is_whole else linear.name
    patterns = quantization.get("exclude_modules") or _EXCLUDED
    return {} if any(fnmatchcase(name, pattern) for pattern in patterns) else quantization


def _layer_entry(quantization: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    layers: Mapping[str, Mapping[str, Any]] = quantization["quantized_layers"]
    return next((entry for pattern, entry in layers.items() if fnmatchcase(name, pattern)), {})


def _padded_sizes(linear: Linear, tp: int, algorithm: Algorithm, group_size: int) -> tuple[int, int]:
    """Weight-only modules are padded to what their kernels divide; a file with smaller tensors does not fit them."""
    multiple = algorithm.multiple if isinstance(algorithm.multiple, int) else max(64, group_size)
    if multiple == 1 or linear.experts:
        return linear.out, linear.in_

    def padded(size: int, is_split: bool) -> int:
        whole = size * tp if is_split else size
        whole = -(-whole // (multiple * tp)) * multiple * tp
        return whole // tp if is_split else whole

    return padded(linear.out, linear.cut == "column"), padded(linear.in_, linear.cut == "row")


def _shape(dimensions: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    shape = []
    for dimension in dimensions.split():
        size, _, divisor = dimension.partition("/")
        value = sizes[size] if size in sizes else int(size)
        shape.append(value // (sizes[divisor] if divisor in sizes else int(divisor or 1)))
    return tuple(shape)


def preprocess(tensors: Mapping[str, Form], config: Mapping[str, Any]) -> Loaded:
    """What `preprocess_weights` makes of a file's tensors, as far as names, dtypes and shapes go."""
    quantization = config["quantization"]
    model = SAFETENSORS_DTYPE[config["dtype"]]
    is_lm_head_plain = tensors.get("lm_head.weight", Form(model, ())).dtype != "F8_E4M3"
    loaded: Loaded = {}
    for name, form in tensors.items():
        algo = quantization.get("quant_algo")
        if algo == MIXED:
            algo = _layer_entry(quantization, _base_name(name)).get("quant_algo")
        if algo == "FP8" and is_lm_head_plain and name.startswith("lm_head.") and name.endswith("scaling_factor"):
            continue  # dropped there
        if name.endswith((".k_cache_scaling_factor", ".v_cache_scaling_factor")):  # the larger of the two counts
            loaded[name.replace(".k_cache", ".kv_cache").replace(".v_cache", ".kv_cache")] = (form, name)
            continue
        if algo in ("W8A16", "W4A16") and _is_left_plain(name, quantization):
            algo = None
        loaded.update({ours: (made, name) for ours, made in ALGORITHMS[algo].preprocess(name, form, model)})
    return loaded


def _base_name(name: str) -> str:
    """The module that the loader takes a tensor for: what stands before and in the first of these words, in this order."""
    for word in ("fc", "gate", "proj", "qkv", "dense"):
        if word in name:
            return name[: name.index(word) + len(word)]
    return name.rpartition(".")[0]


def _is_left_plain(tensor: str, quantization: Mapping[str, Any]) -> bool:
    """Weight-only quantization at load time matches its exclusions against the tensor's own name."""
    patterns = quantization.get("exclude_modules") or ("*shared_expert_gate.weight",)
    return any(fnmatchcase(tensor, pattern) for pattern in patterns)
