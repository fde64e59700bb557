"""Which tensors a model is made of, from its sizes alone. Knows families and axes; no bytes, no GPU, no file.

A `Module` is one layer object as engines store it, so its scales are counted as they are stored. The axis of each block of
features says how tensor parallelism divides it:

    hidden            never
    heads, mlp, expert, shared    evenly
    kv_heads          by whole heads, repeated when there are fewer heads than ranks
    vocab             evenly, the last rank padded
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tkit.errors import InputError, did_you_mean
from tkit.specs.model import ModelSpec


class Block(NamedTuple):
    """Features along one axis; `unit` is what tensor parallelism never cuts (a head)."""

    axis: str
    features: int
    unit: int = 1

    def per_rank(self, tp_size: int, moe_tp_size: int) -> int:
        if self.axis == "hidden":
            return self.features
        if self.axis == "kv_heads":
            return max(self.features // self.unit // tp_size, 1) * self.unit
        return -(-self.features // (moe_tp_size if self.axis == "expert" else tp_size))


@dataclass(frozen=True, kw_only=True)
class Module:
    """`count` weights of (sum of `out`, `in_`), stored together; `in_` is None for a vector."""

    kind: str  # embedding | attention | mlp | experts | shared expert | router | norms | lm_head
    name: str = ""  # of what may be quantized: TensorRT-LLM's, within its layer
    out: tuple[Block, ...]
    in_: Block | None = None
    count: int = 1
    has_bias: bool = False
    is_quantized: bool = False
    dtype: str = "model"  # or F32

    @property
    def num_params(self) -> int:
        out = sum(block.features for block in self.out)
        return self.count * out * ((self.in_.features if self.in_ else 1) + self.has_bias)


@dataclass(frozen=True)
class Layer:
    """What differs from layer to layer. `window` is None for full attention, `intermediate_size` 0 for experts."""

    has_attention: bool = True
    window: int | None = None
    intermediate_size: int = 0
    has_experts: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the architectures differ. `norms` counts vectors of hidden_size per layer."""

    norms: int = 2
    has_norm_bias: bool = False
    is_gated: bool = True
    has_fused_gate: bool = False  # one stored layer holds both halves
    has_qkv_bias: bool = False
    has_attention_output_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    has_lm_head_bias: bool = False
    has_positions: bool = False  # learned absolute
    has_shared_gate: bool = False
    has_router_bias: bool = False
    has_expert_bias: bool = False
    has_sinks: bool = False  # a learned logit per head
    router_dtype: str = "F32"
    shards_embedding: bool = False
    has_pipeline: bool = True
    only_planned: bool = False  # `tkit build` does not convert it


# fmt: off
FAMILIES = {
    "llama":        Family(),
    "mistral":      Family(),
    "mixtral":      Family(),
    "qwen2":        Family(has_qkv_bias=True),
    "qwen2_moe":    Family(has_qkv_bias=True, has_shared_gate=True),
    "qwen3":        Family(has_qk_norm=True),
    "qwen3_moe":    Family(has_qk_norm=True),
    "gemma":        Family(shards_embedding=True),
    "gemma2":       Family(norms=4, shards_embedding=True),
    "gemma3":       Family(norms=4, shards_embedding=True, has_qk_norm=True),
    "phi3":         Family(has_fused_gate=True, has_pipeline=False),
    "gpt2":         Family(is_gated=False, has_norm_bias=True, has_qkv_bias=True, has_attention_output_bias=True,
                           has_mlp_bias=True, has_positions=True),
    "gptj":         Family(norms=1, is_gated=False, has_norm_bias=True, has_mlp_bias=True, has_lm_head_bias=True),
    "falcon":       Family(is_gated=False, has_norm_bias=True),
    "deepseek_v3":  Family(has_router_bias=True, router_dtype="model", only_planned=True),
    "gpt_oss":      Family(has_qkv_bias=True, has_attention_output_bias=True, has_router_bias=True,
                           has_expert_bias=True, has_sinks=True, router_dtype="model", only_planned=True),
    "llama4":       Family(router_dtype="model", only_planned=True),
    "nemotron":     Family(is_gated=False, has_norm_bias=True, only_planned=True),
    "nemotron-nas": Family(only_planned=True),
}
ARCHITECTURE_FAMILIES = {
    "LlamaForCausalLM": "llama",     "MistralForCausalLM": "mistral",      "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",     "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",     "Qwen3MoeForCausalLM": "qwen3_moe",
    "GemmaForCausalLM": "gemma",     "Gemma2ForCausalLM": "gemma2",        "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",       "GPT2LMHeadModel": "gpt2",            "GPTJForCausalLM": "gptj",
    "FalconForCausalLM": "falcon",
}
PLANNED_ARCHITECTURES = {
    "DeepseekV3ForCausalLM": "deepseek_v3",  "GptOssForCausalLM": "gpt_oss",
    "Llama4ForCausalLM": "llama4",           "Llama4ForConditionalGeneration": "llama4",
    "NemotronForCausalLM": "nemotron",       "DeciLMForCausalLM": "nemotron-nas",
    "Gemma3ForConditionalGeneration": "gemma3",
}
# fmt: on


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """MLA: keys and values are cached as one compressed vector, the same for all heads."""

    q_lora: int
    kv_lora: int
    qk_nope: int
    qk_rope: int
    v_head: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    name: str
    family: str
    layers: tuple[Layer, ...]
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    max_position: int
    is_tied: bool = False
    has_qkv_bias: bool = False
    has_attention_output_bias: bool = False
    has_mlp_bias: bool = False
    norms: int = 2
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    shared_expert_size: int = 0
    latent: LatentAttention | None = None
    note: str = field(default="", compare=False)

    @property
    def traits(self) -> Family:
        return FAMILIES[self.family]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        return self.name


def kv_values_per_token_layer(shape: ModelShape, tp_size: int = 1) -> int:
    """Values that one rank caches per token in a layer with attention: 2 x KV heads x head size, or one MLA vector."""
    if shape.latent is not None:
        return shape.latent.kv_lora + shape.latent.qk_rope  # every rank holds it whole
    return 2 * max(shape.num_kv_heads // tp_size, 1) * shape.head_size


def layer_modules(shape: ModelShape, layer: Layer) -> list[Module]:
    modules = _attention(shape) if layer.has_attention else []
    norms = shape.norms if layer.has_attention else shape.norms - 1  # a layer without attention has no norm before it
    if layer.has_experts:
        modules += _experts(shape)
    elif layer.intermediate_size:
        modules += _mlp(shape, layer.intermediate_size)
    return modules + [_norm(shape, shape.hidden_size)] * norms


def outside_modules(shape: ModelShape) -> tuple[list[Module], list[Module]]:
    """(before the layers, after them). lm_head is listed also when it is tied."""
    hidden = Block("hidden", shape.hidden_size)
    split = "vocab" if shape.traits.shards_embedding else "hidden"
    first = [Module(kind="embedding", out=(Block(split, shape.vocab_size),), in_=hidden)]
    if shape.traits.has_positions:
        first.append(Module(kind="embedding", out=(Block("hidden", shape.max_position),), in_=hidden))
    lm_head = Module(
        kind="lm_head", out=(Block("vocab", shape.vocab_size),), in_=hidden, has_bias=shape.traits.has_lm_head_bias
    )
    return first, [_norm(shape, shape.hidden_size), lm_head]


def num_params(shape: ModelShape) -> int:
    """Distinct weights: a tied lm_head counts once."""
    return _count(shape, lambda module: module.num_params)


def num_active_params(shape: ModelShape) -> int:
    """Weights that one token passes through; the embedding counts as in model cards."""
    share = lambda module: (  # noqa: E731
        module.num_params * shape.experts_per_token // shape.num_experts
        if module.kind == "experts"
        else module.num_params
    )
    return _count(shape, share)


def matrix_params(shape: ModelShape) -> tuple[int, int]:
    """(dense, experts): weights that take part in matrix products. The lookup of an embedding row is none."""
    first, last = outside_modules(shape)
    dense = experts = 0
    modules = [module for layer in shape.layers for module in layer_modules(shape, layer)] + last
    for module in modules:
        if module.in_ is not None:
            if module.kind == "experts":
                experts += module.num_params
            else:
                dense += module.num_params
    return dense, experts


def _count(shape: ModelShape, size: Any) -> int:
    first, last = outside_modules(shape)
    modules = first + last[:1] + ([] if shape.is_tied else last[1:])
    per_layer: dict[Layer, int] = {}
    for layer in shape.layers:
        if layer not in per_layer:
            per_layer[layer] = sum(size(module) for module in layer_modules(shape, layer))
    return sum(size(module) for module in modules) + sum(per_layer[layer] for layer in shape.layers)


def _norm(shape: ModelShape, size: int) -> Module:
    return Module(kind="norms", out=(Block("hidden", size),), has_bias=shape.traits.has_norm_bias)


def _linear(
    kind: str, out: tuple[Block, ...], in_: Block, has_bias: bool = False, count: int = 1, name: str = ""
) -> Module:
    return Module(kind=kind, name=name, out=out, in_=in_, has_bias=has_bias, count=count, is_quantized=True)


def _attention(shape: ModelShape) -> list[Module]:
    hidden, traits = Block("hidden", shape.hidden_size), shape.traits
    if shape.latent is not None:
        return _latent_attention(shape, shape.latent)
    heads = Block("heads", shape.num_heads * shape.head_size)
    kv_heads = Block("kv_heads", shape.num_kv_heads * shape.head_size, shape.head_size)
    modules = [
        _linear("attention", (heads, kv_heads, kv_heads), hidden, shape.has_qkv_bias, name="attention.qkv"),
        _linear("attention", (hidden,), heads, shape.has_attention_output_bias, name="attention.dense"),
    ]
    if traits.has_qk_norm:
        modules += [Module(kind="norms", out=(Block("hidden", shape.head_size),))] * 2
    if traits.has_sinks:
        modules.append(Module(kind="attention", out=(Block("heads", shape.num_heads),)))
    return modules


def _latent_attention(shape: ModelShape, latent: LatentAttention) -> list[Module]:
    hidden = Block("hidden", shape.hidden_size)
    q_lora, kv_lora = Block("hidden", latent.q_lora), Block("hidden", latent.kv_lora)
    return [
        _linear("attention", (q_lora,), hidden),
        _linear("attention", (Block("heads", shape.num_heads * (latent.qk_nope + latent.qk_rope)),), q_lora),
        _linear("attention", (Block("hidden", latent.kv_lora + latent.qk_rope),), hidden),
        _linear("attention", (Block("heads", shape.num_heads * (latent.qk_nope + latent.v_head)),), kv_lora),
        _linear("attention", (hidden,), Block("heads", shape.num_heads * latent.v_head)),
        Module(kind="norms", out=(q_lora,)),
        Module(kind="norms", out=(kv_lora,)),
    ]


def _mlp(shape: ModelShape, size: int) -> list[Module]:
    hidden, inner = Block("hidden", shape.hidden_size), Block("mlp", size)
    if shape.traits.has_fused_gate:
        up = [_linear("mlp", (inner, inner), hidden, shape.has_mlp_bias, name="mlp.fc")]
    else:
        names = ("mlp.fc", "mlp.gate") if shape.traits.is_gated else ("mlp.fc",)
        up = [_linear("mlp", (inner,), hidden, shape.has_mlp_bias, name=name) for name in names]
    return [*up, _linear("mlp", (hidden,), inner, shape.has_mlp_bias, name="mlp.proj")]


def _experts(shape: ModelShape) -> list[Module]:
    hidden, expert, traits = Block("hidden", shape.hidden_size), Block("expert", shape.expert_size), shape.traits
    modules = [
        Module(
            kind="router",
            out=(Block("hidden", shape.num_experts),),
            in_=hidden,
            has_bias=traits.has_router_bias,
            dtype=traits.router_dtype,
        ),
        _linear("experts", (expert, expert), hidden, traits.has_expert_bias, shape.num_experts, "mlp.fc"),
        _linear("experts", (hidden,), expert, traits.has_expert_bias, shape.num_experts, "mlp.proj"),
    ]
    if shape.shared_expert_size:
        inner, bias = Block("shared", shape.shared_expert_size), shape.has_mlp_bias
        halves = (inner, inner) if traits.is_gated else (inner,)
        modules += [
            _linear("shared expert", halves, hidden, bias, name="mlp.shared_expert.fc"),
            _linear("shared expert", (hidden,), inner, bias, name="mlp.shared_expert.proj"),
        ]
    if traits.has_shared_gate:
        modules.append(Module(kind="router", out=(Block("hidden", 1),), in_=hidden))
    return modules


def shape_from_spec(spec: ModelSpec, name: str) -> ModelShape:
    """A model that `tkit build` converts."""
    family, extras = ARCHITECTURE_FAMILIES[spec.architecture], spec.extras
    traits = FAMILIES[family]
    norms = traits.norms
    if family == "falcon":
        two_norms = extras["new_decoder_architecture"] and extras["num_ln_in_parallel_attn"] != 1
        sequential = not extras["new_decoder_architecture"] and not extras["parallel_attn"]
        norms = 2 if two_norms or sequential else 1
    has_attention_bias = (
        spec.attention_bias if family in ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3") else None
    )
    falcon_bias = bool(extras.get("bias")) if family == "falcon" else None
    step, dense_layers = extras.get("decoder_sparse_step", 1), extras.get("mlp_only_layers", ())
    return ModelShape(
        name=name,
        family=family,
        layers=tuple(
            Layer(
                window=_window(family, extras, index),
                has_experts=is_sparse,
                intermediate_size=0 if is_sparse else spec.intermediate_size,
            )
            for index in range(spec.num_layers)
            for is_sparse in [bool(spec.num_experts) and index not in dense_layers and (index + 1) % step == 0]
        ),
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        vocab_size=spec.vocab_size,
        max_position=spec.max_position_embeddings,
        is_tied=spec.tie_word_embeddings,
        has_qkv_bias=_first(has_attention_bias, falcon_bias, traits.has_qkv_bias),
        has_attention_output_bias=_first(has_attention_bias, falcon_bias, traits.has_attention_output_bias),
        has_mlp_bias=_first(falcon_bias, traits.has_mlp_bias or spec.mlp_bias),
        norms=norms,
        num_experts=spec.num_experts,
        experts_per_token=spec.experts_per_token,
        expert_size=spec.expert_size,
        shared_expert_size=spec.shared_expert_size,
    )


def _first(*values: bool | None) -> bool:
    return next(value for value in values if value is not None)


def _window(family: str, extras: Mapping[str, Any], index: int) -> int | None:
    """The sliding window of a layer; None = it attends to everything."""
    window = extras.get("sliding_window")
    if not window:
        return None
    if family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"):
        return window if extras["use_sliding_window"] and index >= extras["max_window_layers"] else None
    every = {"gemma2": 2, "gemma3": extras.get("sliding_window_pattern", 6)}.get(family)
    return None if every and (index + 1) % every == 0 else int(window)


def shape_from_config(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """A model that is planned but not converted: MLA, gpt-oss, Llama 4, Nemotron, the text half of Gemma 3.

    Raises InputError when the architecture is unknown or a size is missing.
    """
    architecture = (config.get("architectures") or ["(none)"])[0]
    if architecture not in PLANNED_ARCHITECTURES:
        known = [*ARCHITECTURE_FAMILIES, *PLANNED_ARCHITECTURES]
        raise InputError(
            f'{where}: unknown architecture "{architecture}"{did_you_mean(architecture, known)}',
            hint=f"known: {', '.join(known)}",
        )
    family = PLANNED_ARCHITECTURES[architecture]
    text = config.get("text_config", config)
    try:
        return _planned_shape(family, text, name)
    except KeyError as error:
        raise InputError(f'{where}: key "{error.args[0]}" is missing') from error


def _planned_shape(family: str, config: Mapping[str, Any], name: str) -> ModelShape:
    traits, num_layers = FAMILIES[family], config["num_hidden_layers"]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    num_experts = config.get("n_routed_experts") or config.get("num_local_experts") or 0
    expert_size = config.get("moe_intermediate_size") or config.get("intermediate_size", 0)
    latent, shared = None, 0
    layers: list[Layer]
    if family == "deepseek_v3":
        latent = LatentAttention(
            q_lora=config["q_lora_rank"],
            kv_lora=config["kv_lora_rank"],
            qk_nope=config["qk_nope_head_dim"],
            qk_rope=config["qk_rope_head_dim"],
            v_head=config["v_head_dim"],
        )
        shared = config["n_shared_experts"] * expert_size
        dense = config["first_k_dense_replace"]
        layers = [
            Layer(intermediate_size=config["intermediate_size"]) if i < dense else Layer(has_experts=True)
            for i in range(num_layers)
        ]
    elif family == "gpt_oss":
        kinds = config.get("layer_types") or ["sliding_attention", "full_attention"] * (num_layers // 2)
        window = config["sliding_window"]
        layers = [Layer(has_experts=True, window=window if "sliding" in kind else None) for kind in kinds]
    elif family == "llama4":
        step, shared = config.get("interleave_moe_layer_step", 1), expert_size
        chunk = config.get("attention_chunk_size", 8192)
        layers = [
            Layer(
                has_experts=is_sparse,
                intermediate_size=0 if is_sparse else config["intermediate_size_mlp"],
                window=None if (index + 1) % 4 == 0 else chunk,
            )
            for index in range(num_layers)
            for is_sparse in [(index + 1) % step == 0]
        ]
    elif family == "nemotron-nas":
        layers = [_nas_layer(block, hidden) for block in config["block_configs"]]
    else:
        every, window = config.get("sliding_window_pattern", 6), config.get("sliding_window")
        layers = [
            Layer(
                intermediate_size=config["intermediate_size"],
                window=window if family == "gemma3" and (index + 1) % every else None,
            )
            for index in range(num_layers)
        ]
    return ModelShape(
        name=name,
        family=family,
        layers=tuple(layers),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_kv_heads(family, config),
        head_size=latent.qk_nope + latent.qk_rope if latent else config.get("head_dim") or hidden // heads,
        vocab_size=config["vocab_size"],
        max_position=config["max_position_embeddings"],
        is_tied=bool(config.get("tie_word_embeddings", family == "gemma3")),
        has_qkv_bias=traits.has_qkv_bias,
        has_attention_output_bias=traits.has_attention_output_bias,
        norms=traits.norms,
        num_experts=num_experts,
        experts_per_token=config.get("num_experts_per_tok", 0),
        expert_size=expert_size if num_experts else 0,
        shared_expert_size=shared,
        latent=latent,
    )


def _kv_heads(family: str, config: Mapping[str, Any]) -> int:
    if family == "nemotron-nas":
        return next(
            config["num_attention_heads"] // block["attention"]["n_heads_in_group"]
            for block in config["block_configs"]
            if not block["attention"].get("no_op") and block["attention"].get("n_heads_in_group")
        )
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _nas_layer(block: Mapping[str, Any], hidden: int) -> Layer:
    """`ffn_mult` to a size as the model's own code does: 2/3 of mult x hidden, rounded up to 256."""
    ffn = block["ffn"]
    size = 0 if ffn.get("no_op") else -(-int(2 * ffn["ffn_mult"] * hidden / 3) // 256) * 256
    return Layer(has_attention=not block["attention"].get("no_op"), intermediate_size=size)
