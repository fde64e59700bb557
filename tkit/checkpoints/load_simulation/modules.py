"""The module tree that `trtllm-build` makes for one rank: which layers of which sizes each model class has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Form(NamedTuple):
    """A tensor without its values."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


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
        self.expert_mlp = expert_size(config) // mapping.get("moe_tp_size", self.tp // moe_ep)
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


def expert_size(config: Mapping[str, Any]) -> int:
    size: int = config.get("moe_intermediate_size", config["intermediate_size"])
    return size
