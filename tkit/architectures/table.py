"""One row per Hugging Face architecture, one table of modules per family.

A module is one TensorRT-LLM layer object (`attention.qkv`, `mlp.fc`, a norm). Its weight is made of blocks of rows; each
block belongs to one Hugging Face tensor and one axis. The axis says how the rows are sharded:

    hidden    never split
    heads     query heads, split evenly over TP
    kv_heads  KV heads, split over TP, repeated when there are fewer heads than ranks
    mlp       intermediate size, split evenly over TP
    expert    intermediate size of one expert, split evenly over the MoE's share of TP
    shared    intermediate size of the shared expert, split evenly over TP
    vocab     vocabulary: never split, or split like vocab_tp where the family shards its embedding
    vocab_tp  vocabulary, padded to a multiple of TP and split (lm_head)
    head, experts, one, positions: never split

Source of names and order: TensorRT-LLM 1.0-1.2 `models/*/convert.py`, `models/modeling_utils.py`.
Adding a model of a known family is one row in ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tkit.specs.model import ModelSpec

SHARDED_AXES = ("heads", "kv_heads", "mlp", "expert", "shared", "vocab_tp")


@dataclass(frozen=True)
class Source:
    """One Hugging Face module and the axes of its rows, in its own order. `{expert}` stands for every expert."""

    name: str
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Module:
    """`in_` is None for one-dimensional weights (norms).

    `order` lists the blocks as TensorRT-LLM stores them when that is not the order of the sources: indices into all axes
    of all sources. `is_interleaved` says that the rows of a fused q/k/v come per KV head: its queries, its key, its value.
    """

    name: str
    sources: tuple[Source, ...]
    in_: str | None = None
    order: tuple[int, ...] | None = None
    is_interleaved: bool = False
    bias: Callable[[ModelSpec], bool] = lambda spec: False
    is_bias_on_first_rank_only: bool = False  # added before the all-reduce there, so the other ranks hold zeros
    transform: str | None = None  # add_one | transpose | float32: applied to every source
    feeds: str | None = None  # a norm: the `input` that its output is, and nothing else's
    input: str | None = None  # modules with the same input see the same activations, and share what is searched on them
    is_quantized: bool = False
    when: Callable[[ModelSpec, int], bool] = lambda spec, layer: True

    @property
    def has_experts(self) -> bool:
        """It holds the weights of all experts, one behind the other."""
        return any("{expert}" in source.name for source in self.sources)


def always(spec: ModelSpec) -> bool:
    return True


def norm(name: str, source: str, axis: str = "hidden", **options: Any) -> Module:
    return Module(name, (Source(source, (axis,)),), **options)


def linear(name: str, sources: Mapping[str, str | tuple[str, ...]], in_: str, input: str, **options: Any) -> Module:
    """A layer that `--quant` quantizes. `sources` maps Hugging Face modules to the axes of their rows."""
    parts = tuple(Source(s, (axes,) if isinstance(axes, str) else axes) for s, axes in sources.items())
    return Module(name, parts, in_, input=input, is_quantized=True, **options)


def attention_bias(spec: ModelSpec) -> bool:
    return spec.attention_bias


def mlp_bias(spec: ModelSpec) -> bool:
    return spec.mlp_bias


def is_moe_layer(spec: ModelSpec, layer: int) -> bool:
    """Qwen's rule for models that mix dense and sparse layers."""
    step = spec.extras.get("decoder_sparse_step", 1)
    return layer not in spec.extras.get("mlp_only_layers", ()) and (layer + 1) % step == 0


def is_dense_layer(spec: ModelSpec, layer: int) -> bool:
    return not is_moe_layer(spec, layer)


# fmt: off
QKV = {"self_attn.q_proj": "heads", "self_attn.k_proj": "kv_heads", "self_attn.v_proj": "kv_heads"}
FUSED_QKV = ("heads", "kv_heads", "kv_heads")
O_PROJ = {"self_attn.o_proj": "hidden"}
# TensorRT-LLM applies the activation to fc and multiplies by gate: its fc is Hugging Face's gate_proj
GATED_MLP = (
    linear("mlp.fc",   {"mlp.gate_proj": "mlp"},    "hidden", "mlp",      bias=mlp_bias),
    linear("mlp.gate", {"mlp.up_proj":   "mlp"},    "hidden", "mlp",      bias=mlp_bias),
    linear("mlp.proj", {"mlp.down_proj": "hidden"}, "mlp",    "mlp.proj", bias=mlp_bias),
)
QK_NORMS = (
    norm("attention.q_layernorm", "self_attn.q_norm", "head"),
    norm("attention.k_layernorm", "self_attn.k_norm", "head"),
)

LLAMA_LAYER = (
    norm("input_layernorm", "input_layernorm", feeds="attention"),
    linear("attention.qkv",   QKV,    "hidden", "attention",       bias=attention_bias),
    linear("attention.dense", O_PROJ, "heads",  "attention.dense", bias=attention_bias),
    norm("post_layernorm", "post_attention_layernorm", feeds="mlp"),
    *GATED_MLP,
)
QWEN2_ATTENTION = (
    linear("attention.qkv",   QKV,    "hidden", "attention", bias=always),
    linear("attention.dense", O_PROJ, "heads",  "attention.dense"),
)
QWEN3_ATTENTION = (
    linear("attention.qkv",   QKV,    "hidden", "attention"),
    *QK_NORMS,
    linear("attention.dense", O_PROJ, "heads",  "attention.dense"),
)


def qwen_layer(attention: tuple[Module, ...], mlp: tuple[Module, ...]) -> tuple[Module, ...]:
    return (norm("input_layernorm", "input_layernorm", feeds="attention"), *attention,
            norm("post_layernorm", "post_attention_layernorm", feeds="mlp"), *mlp)


def moe(router: str, gate: str, up: str, down: str, when: Callable[[ModelSpec, int], bool]) -> tuple[Module, ...]:
    """The router stays float32. Per expert the MoE plugin wants [up; gate]: first the linear half, then the activated."""
    return (
        Module("mlp.router", (Source(router, ("experts",)),), "hidden", transform="float32", when=when),
        linear("mlp.fc",   {gate: "expert", up: "expert"}, "hidden", "mlp",      order=(1, 0), when=when),
        linear("mlp.proj", {down: "hidden"},               "expert", "mlp.proj", when=when),
    )


QWEN_EXPERTS = moe("mlp.gate", "mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj",
                   "mlp.experts.{expert}.down_proj", is_moe_layer)
QWEN_SHARED_EXPERT = (
    linear("mlp.shared_expert.fc", {"mlp.shared_expert.gate_proj": "shared", "mlp.shared_expert.up_proj": "shared"},
           "hidden", "mlp.shared_expert", order=(1, 0), when=is_moe_layer),
    linear("mlp.shared_expert.proj", {"mlp.shared_expert.down_proj": "hidden"}, "shared", "mlp.shared_expert.proj",
           when=is_moe_layer),
    Module("mlp.shared_expert_gate", (Source("mlp.shared_expert_gate", ("one",)),), "hidden", when=is_moe_layer),
)
DENSE_MLP = tuple(replace(module, when=is_dense_layer) for module in GATED_MLP)
MIXTRAL_LAYER = (
    *LLAMA_LAYER[:4],
    *moe("block_sparse_moe.gate", "block_sparse_moe.experts.{expert}.w1", "block_sparse_moe.experts.{expert}.w3",
         "block_sparse_moe.experts.{expert}.w2", lambda spec, layer: True),
)


def gemma_norm(name: str, source: str, axis: str = "hidden", feeds: str | None = None) -> Module:
    """Gemma multiplies by 1 + w; TensorRT-LLM's RMSNorm by w."""
    return norm(name, source, axis, feeds=feeds, transform="add_one")


GEMMA_ATTENTION = LLAMA_LAYER[1:3]
GEMMA_LAYER = (
    gemma_norm("input_layernorm", "input_layernorm", feeds="attention"), *GEMMA_ATTENTION,
    gemma_norm("post_layernorm", "post_attention_layernorm", feeds="mlp"), *GATED_MLP,
)
GEMMA2_LAYER = (
    gemma_norm("input_layernorm", "input_layernorm", feeds="attention"), *GEMMA_ATTENTION,
    gemma_norm("post_layernorm", "post_attention_layernorm"),
    gemma_norm("pre_feedforward_layernorm", "pre_feedforward_layernorm", feeds="mlp"), *GATED_MLP,
    gemma_norm("post_feedforward_layernorm", "post_feedforward_layernorm"),
)
GEMMA3_LAYER = (
    *GEMMA2_LAYER,
    gemma_norm("attention.q_layernorm", "self_attn.q_norm", "head"),
    gemma_norm("attention.k_layernorm", "self_attn.k_norm", "head"),
)
PHI3_LAYER = (
    norm("input_layernorm", "input_layernorm", feeds="attention"),
    linear("attention.qkv", {"self_attn.qkv_proj": FUSED_QKV}, "hidden", "attention"),
    linear("attention.dense", O_PROJ, "heads", "attention.dense"),
    norm("post_layernorm", "post_attention_layernorm", feeds="mlp"),
    # one fused layer: the rank's own halves are swapped, because swiglu activates the second
    linear("mlp.fc", {"mlp.gate_up_proj": ("mlp", "mlp")}, "hidden", "mlp", order=(1, 0)),
    linear("mlp.proj", {"mlp.down_proj": "hidden"}, "mlp", "mlp.proj"),
)
GPT2_LAYER = (  # Conv1D stores (in, out)
    norm("input_layernorm", "ln_1", bias=always),
    linear("attention.qkv", {"attn.c_attn": FUSED_QKV}, "hidden", "attention", bias=always, transform="transpose"),
    linear("attention.dense", {"attn.c_proj": "hidden"}, "heads", "attention.dense", bias=always, transform="transpose"),
    norm("post_layernorm", "ln_2", bias=always),
    linear("mlp.fc", {"mlp.c_fc": "mlp"}, "hidden", "mlp", bias=always, transform="transpose"),
    linear("mlp.proj", {"mlp.c_proj": "hidden"}, "mlp", "mlp.proj", bias=always, transform="transpose"),
)
GPTJ_LAYER = (
    norm("input_layernorm", "ln_1", bias=always),
    linear("attention.qkv", {"attn.q_proj": "heads", "attn.k_proj": "kv_heads", "attn.v_proj": "kv_heads"},
           "hidden", "attention"),
    linear("attention.dense", {"attn.out_proj": "hidden"}, "heads", "attention.dense"),
    linear("mlp.fc", {"mlp.fc_in": "mlp"}, "hidden", "mlp", bias=always),
    linear("mlp.proj", {"mlp.fc_out": "hidden"}, "mlp", "mlp.proj", bias=always, is_bias_on_first_rank_only=True),
)


def falcon_bias(spec: ModelSpec) -> bool:
    return bool(spec.extras["bias"])


def has_two_falcon_norms(spec: ModelSpec, layer: int) -> bool:
    return bool(spec.extras["new_decoder_architecture"]) and spec.extras["num_ln_in_parallel_attn"] != 1


def has_one_falcon_norm(spec: ModelSpec, layer: int) -> bool:
    return not has_two_falcon_norms(spec, layer)


def is_sequential_falcon(spec: ModelSpec, layer: int) -> bool:
    return not spec.extras["new_decoder_architecture"] and not spec.extras["parallel_attn"]


FALCON_LAYER = (
    norm("input_layernorm", "ln_attn", bias=always, when=has_two_falcon_norms),
    norm("mlp_layernorm", "ln_mlp", bias=always, when=has_two_falcon_norms),
    norm("input_layernorm", "input_layernorm", bias=always, when=has_one_falcon_norm),
    linear("attention.qkv", {"self_attention.query_key_value": FUSED_QKV}, "hidden", "attention",
           bias=falcon_bias, is_interleaved=True),
    linear("attention.dense", {"self_attention.dense": "hidden"}, "heads", "attention.dense", bias=falcon_bias),
    norm("post_layernorm", "post_attention_layernorm", bias=always, when=is_sequential_falcon),
    linear("mlp.fc", {"mlp.dense_h_to_4h": "mlp"}, "hidden", "mlp", bias=falcon_bias),
    linear("mlp.proj", {"mlp.dense_4h_to_h": "hidden"}, "mlp", "mlp.proj", bias=falcon_bias),
)


def embedding(name: str) -> Module:
    return Module("transformer.vocab_embedding", (Source(name, ("vocab",)),), "hidden")
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A Hugging Face class: its TensorRT-LLM class, its modules, and where its config differs from the common fields.

    `keys` renames ModelSpec fields in config.json, `defaults` is what transformers assumes where config.json is silent.
    `extras` are config fields only this family has: Hugging Face name -> (TensorRT-LLM name, default).
    `activations` translates hidden_act. `constants` are fixed TensorRT-LLM fields, `config` computed ones.
    """

    trtllm: str
    model_type: str
    layer: tuple[Module, ...]
    layer_prefix: str = "model.layers.{layer}."
    first: tuple[Module, ...] = (embedding("model.embed_tokens"),)
    final_norm: Module = norm("transformer.ln_f", "model.norm")
    lm_head: Module = Module("lm_head", (Source("lm_head", ("vocab_tp",)),), "hidden")
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)  # endings of source tensors that are recomputed, not converted
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    config: Callable[[ModelSpec], dict[str, Any]] = lambda spec: {}
    has_pipeline: bool = True  # False: TensorRT-LLM's class builds every layer on every stage
    shards_embedding: bool = False  # use_parallel_embedding is forced on when tp > 1
    derived: tuple[str, ...] = ()  # ModelSpec fields that the Hugging Face config computes and does not take
    unsupported: Mapping[str, Any] = field(default_factory=dict)  # config field -> the only value that converts


def _moe_config(normalization_mode: Callable[[ModelSpec], int]) -> Callable[[ModelSpec], dict[str, Any]]:
    """MoeConfig: normalization_mode 1 renormalises the weights of the chosen experts, 0 leaves them."""

    def config(spec: ModelSpec) -> dict[str, Any]:
        return {
            "moe": {
                "num_experts": spec.num_experts,
                "top_k": spec.experts_per_token,
                "normalization_mode": normalization_mode(spec),
            }
        }

    return config


def _qwen_moe_config(spec: ModelSpec) -> dict[str, Any]:
    # the official converter always writes 0; with norm_topk_prob the model is another one then
    mode = 1 if spec.extras["norm_topk_prob"] else 0
    return {
        **_moe_config(lambda _: mode)(spec),
        "moe_intermediate_size": spec.expert_size,
        "moe_shared_expert_intermediate_size": spec.shared_expert_size,
    }


def _gemma3_config(spec: ModelSpec) -> dict[str, Any]:
    pattern = spec.extras["sliding_window_pattern"]
    return {"_sliding_window_pattern": pattern}  # its name from 1.0 on; before, without the underscore


def _phi3_config(spec: ModelSpec) -> dict[str, Any]:
    rope = spec.rope_scaling or {}
    if rope.get("rope_type") != "longrope":
        return {}
    return {
        "position_embedding_type": "long_rope",
        "original_max_position_embeddings": spec.extras["original_max_position_embeddings"],
        "longrope_scaling_short_factors": rope["short_factor"],
        "longrope_scaling_long_factors": rope["long_factor"],
    }


def _falcon_config(spec: ModelSpec) -> dict[str, Any]:
    return {"position_embedding_type": "alibi_with_scale" if spec.extras["alibi"] else "rope_gpt_neox"}


def _gptj_config(spec: ModelSpec) -> dict[str, Any]:
    return {"rotary_embedding_dim": spec.extras["rotary_dim"]}


# `sliding_window` and its kin are not read by TensorRT-LLM's class (the window is set when the engine runs);
# the reference runtime reads them, and unknown top-level keys are allowed
_WINDOW = {"sliding_window": ("sliding_window", None)}
_QWEN_WINDOW = {
    "sliding_window": ("sliding_window", 4096),
    "use_sliding_window": ("use_sliding_window", False),
    "max_window_layers": ("max_window_layers", 28),
}
_QWEN_MOE = {
    "decoder_sparse_step": ("decoder_sparse_step", 1),
    "mlp_only_layers": ("mlp_only_layers", []),
    "norm_topk_prob": ("norm_topk_prob", False),
}
_SWIGLU = {"silu": "swiglu"}  # TensorRT-LLM's name where one fused layer holds both halves
_GEMMA = {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_size": 256}
_SOFTCAPPING = {
    "query_pre_attn_scalar": ("query_pre_attn_scalar", 256),
    "final_logit_softcapping": ("final_logit_softcapping", None),
    "attn_logit_softcapping": ("attn_logit_softcapping", None),
}
_GPT_KEYS = {
    "num_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "norm_epsilon": "layer_norm_epsilon",
}
_GPT_DEFAULTS = {"hidden_act": "gelu_new", "norm_epsilon": 1e-5}


def _qwen(qwen_type: str, attn_bias: bool) -> dict[str, Any]:
    return {"qwen_type": qwen_type, "seq_length": 8192, "attn_bias": attn_bias}


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(trtllm="LlamaForCausalLM", model_type="llama", layer=LLAMA_LAYER),
    "MistralForCausalLM": Architecture(
        trtllm="MistralForCausalLM", model_type="mistral", layer=LLAMA_LAYER, extras=_WINDOW
    ),
    "MixtralForCausalLM": Architecture(
        trtllm="MixtralForCausalLM",
        model_type="mixtral",
        layer=MIXTRAL_LAYER,
        keys={"expert_size": "intermediate_size"},
        defaults={"norm_epsilon": 1e-5, "rope_theta": 1e6, "num_experts": 8, "experts_per_token": 2},
        extras=_WINDOW,
        activations=_SWIGLU,
        config=_moe_config(lambda spec: 1),
    ),
    "Qwen2ForCausalLM": Architecture(
        trtllm="Qwen2ForCausalLM",
        model_type="qwen2",
        layer=qwen_layer(QWEN2_ATTENTION, GATED_MLP),
        extras=_QWEN_WINDOW,
        constants=_qwen("qwen2", attn_bias=True),
    ),
    "Qwen3ForCausalLM": Architecture(
        trtllm="Qwen3ForCausalLM",
        model_type="qwen3",
        layer=qwen_layer(QWEN3_ATTENTION, GATED_MLP),
        defaults={"head_size": 128},
        extras=_QWEN_WINDOW,
        constants=_qwen("qwen3", attn_bias=False),
        unsupported={"attention_bias": False},
    ),
    "Qwen2MoeForCausalLM": Architecture(
        trtllm="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        layer=qwen_layer(QWEN2_ATTENTION, (*DENSE_MLP, *QWEN_EXPERTS, *QWEN_SHARED_EXPERT)),
        defaults={"num_experts": 60, "experts_per_token": 4, "expert_size": 1408, "shared_expert_size": 5632},
        extras={**_QWEN_WINDOW, **_QWEN_MOE},
        activations=_SWIGLU,
        constants=_qwen("qwen2_moe", attn_bias=True),
        config=_qwen_moe_config,
        unsupported={"qkv_bias": True},
    ),
    "Qwen3MoeForCausalLM": Architecture(
        trtllm="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        layer=qwen_layer(QWEN3_ATTENTION, (*DENSE_MLP, *QWEN_EXPERTS)),
        defaults={"num_experts": 128, "experts_per_token": 8, "expert_size": 768},
        extras={**_QWEN_WINDOW, **_QWEN_MOE},
        activations=_SWIGLU,
        constants=_qwen("qwen3_moe", attn_bias=False),
        config=_qwen_moe_config,
        unsupported={"attention_bias": False},
    ),
    "GemmaForCausalLM": Architecture(
        trtllm="GemmaForCausalLM",
        model_type="gemma",
        layer=GEMMA_LAYER,
        final_norm=gemma_norm("transformer.ln_f", "model.norm"),
        defaults=_GEMMA,
        shards_embedding=True,
    ),
    "Gemma2ForCausalLM": Architecture(
        trtllm="Gemma2ForCausalLM",
        model_type="gemma2",
        layer=GEMMA2_LAYER,
        final_norm=gemma_norm("transformer.ln_f", "model.norm"),
        keys={"hidden_act": "hidden_activation"},
        defaults=_GEMMA,
        extras={
            **_SOFTCAPPING,
            "final_logit_softcapping": ("final_logit_softcapping", 30.0),
            "attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
            "sliding_window": ("sliding_window", 4096),
        },
        shards_embedding=True,
    ),
    "Gemma3ForCausalLM": Architecture(
        trtllm="Gemma3ForCausalLM",
        model_type="gemma3_text",
        layer=GEMMA3_LAYER,
        final_norm=gemma_norm("transformer.ln_f", "model.norm"),
        keys={"hidden_act": "hidden_activation"},
        defaults={**_GEMMA, "rope_theta": 1e6},
        extras={
            **_SOFTCAPPING,
            "sliding_window": ("sliding_window", 4096),
            "sliding_window_pattern": ("sliding_window_pattern", 6),
            "rope_local_base_freq": ("rope_local_base_freq", 10000.0),
        },
        config=_gemma3_config,
        shards_embedding=True,
    ),
    "Phi3ForCausalLM": Architecture(
        trtllm="Phi3ForCausalLM",
        model_type="phi3",
        layer=PHI3_LAYER,
        defaults={"norm_epsilon": 1e-5},
        extras={
            **_WINDOW,
            "original_max_position_embeddings": ("original_max_position_embeddings", 4096),
            "partial_rotary_factor": ("rotary_pct", 1.0),
        },
        activations=_SWIGLU,
        config=_phi3_config,
        has_pipeline=False,
    ),
    "GPT2LMHeadModel": Architecture(
        trtllm="GPT2LMHeadModel",
        model_type="gpt2",
        layer=GPT2_LAYER,
        layer_prefix="transformer.h.{layer}.",
        first=(
            embedding("transformer.wte"),
            Module("transformer.position_embedding", (Source("transformer.wpe", ("positions",)),), "hidden"),
        ),
        final_norm=norm("transformer.ln_f", "transformer.ln_f", bias=always),
        ignored=("attn.bias", "attn.masked_bias"),
        keys=_GPT_KEYS,
        defaults={**_GPT_DEFAULTS, "tie_word_embeddings": True},
        constants={
            "gpt_variant": "gpt2",
            "bias": True,
            "q_scaling": 1.0,
            "embedding_scale": None,
            "apply_query_key_layer_scaling": False,
            "position_embedding_type": "learned_absolute",
        },
        unsupported={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    "GPTJForCausalLM": Architecture(
        trtllm="GPTJForCausalLM",
        model_type="gptj",
        layer=GPTJ_LAYER,
        layer_prefix="transformer.h.{layer}.",
        first=(embedding("transformer.wte"),),
        final_norm=norm("transformer.ln_f", "transformer.ln_f", bias=always),
        lm_head=Module("lm_head", (Source("lm_head", ("vocab_tp",)),), "hidden", bias=always),
        ignored=("attn.bias", "attn.masked_bias"),
        keys=_GPT_KEYS,
        defaults=_GPT_DEFAULTS,
        extras={"rotary_dim": ("rotary_dim", 64)},
        activations={"gelu_new": "gelu"},  # one function there
        constants={"position_embedding_type": "rope_gptj"},
        config=_gptj_config,
    ),
    "FalconForCausalLM": Architecture(
        trtllm="FalconForCausalLM",
        model_type="falcon",
        layer=FALCON_LAYER,
        layer_prefix="transformer.h.{layer}.",
        first=(embedding("transformer.word_embeddings"),),
        final_norm=norm("transformer.ln_f", "transformer.ln_f", bias=always),
        keys={
            "num_kv_heads": "num_kv_heads",
            "intermediate_size": "ffn_hidden_size",
            "hidden_act": "activation",
            "norm_epsilon": "layer_norm_epsilon",
        },
        defaults={"hidden_act": "gelu", "norm_epsilon": 1e-5, "tie_word_embeddings": True},
        extras={
            "bias": ("bias", False),
            "parallel_attn": ("parallel_attention", True),
            "new_decoder_architecture": ("new_decoder_architecture", False),
            "num_ln_in_parallel_attn": ("num_ln_in_parallel_attn", None),
            "alibi": ("alibi", False),
        },
        config=_falcon_config,
        derived=("head_size",),
    ),
}
