"""One row per Hugging Face architecture, one table of modules per family.

A module is one TensorRT-LLM layer object (`attention.qkv`, `mlp.fc`, a norm): the Hugging Face modules it is made of, and
the axes of its weight. The axis names say how a weight is sharded:

    hidden    never split
    heads     query heads, split evenly over TP
    kv_heads  KV heads, split over TP, repeated when there are fewer heads than ranks
    mlp       intermediate size, split evenly over TP
    vocab     vocabulary, never split (the embedding)
    vocab_tp  vocabulary, padded to a multiple of TP and split (lm_head)

Source of names and order: TensorRT-LLM 1.0-1.2 `models/llama/convert.py`, `models/modeling_utils.py`.
Adding a model of a known family is one row in ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tkit.specs.model import ModelSpec

SHARDED_AXES = ("heads", "kv_heads", "mlp", "vocab_tp")


@dataclass(frozen=True)
class Module:
    """`out` names the output axis of each source in order; `in_` is None for one-dimensional weights (norms)."""

    name: str
    sources: tuple[str, ...]
    out: tuple[str, ...]
    in_: str | None = None
    has_bias: Callable[[ModelSpec], bool] = lambda spec: False
    input: str | None = None  # modules with the same input see the same activations, and share what is searched on them
    is_quantized: bool = False


def _attention_bias(spec: ModelSpec) -> bool:
    return spec.attention_bias


def _mlp_bias(spec: ModelSpec) -> bool:
    return spec.mlp_bias


def _linear(
    name: str,
    sources: tuple[str, ...],
    out: tuple[str, ...],
    in_: str,
    input: str,
    bias: Callable[[ModelSpec], bool],
) -> Module:
    return Module(name, sources, out, in_, has_bias=bias, input=input, is_quantized=True)


# fmt: off
LLAMA_LAYER = (
    Module("input_layernorm",  ("input_layernorm",), ("hidden",)),
    _linear("attention.qkv",   ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                                                     ("heads", "kv_heads", "kv_heads"), "hidden", "attention", _attention_bias),
    _linear("attention.dense", ("self_attn.o_proj",), ("hidden",), "heads",  "attention.dense", _attention_bias),
    Module("post_layernorm",   ("post_attention_layernorm",), ("hidden",)),
    # TensorRT-LLM applies the activation to fc and multiplies by gate: its fc is Hugging Face's gate_proj
    _linear("mlp.fc",          ("mlp.gate_proj",),    ("mlp",),    "hidden", "mlp", _mlp_bias),
    _linear("mlp.gate",        ("mlp.up_proj",),      ("mlp",),    "hidden", "mlp", _mlp_bias),
    _linear("mlp.proj",        ("mlp.down_proj",),    ("hidden",), "mlp",    "mlp.proj", _mlp_bias),
)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A Hugging Face class: its TensorRT-LLM class, its decoder layer, and the modules around the layers."""

    trtllm: str
    model_type: str
    layer: tuple[Module, ...]
    layer_prefix: str = "model.layers.{layer}."
    embedding: Module = Module("transformer.vocab_embedding", ("model.embed_tokens",), ("vocab",), "hidden")
    final_norm: Module = Module("transformer.ln_f", ("model.norm",), ("hidden",))
    lm_head: Module = Module("lm_head", ("lm_head",), ("vocab_tp",), "hidden")
    ignored: tuple[str, ...] = (
        "rotary_emb.inv_freq",
    )  # endings of source tensors that are recomputed, never converted


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(trtllm="LlamaForCausalLM", model_type="llama", layer=LLAMA_LAYER),
}
