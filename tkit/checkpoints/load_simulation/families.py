"""One row per TensorRT-LLM model class: its layers, and the keys of `config.json` that it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tkit.checkpoints.load_simulation.modules import (
    Sizes,
    Tree,
    falcon_layer,
    gemma_layer,
    gpt_layer,
    gptj_layer,
    layer_norm,
    llama_layer,
    phi3_layer,
    qwen_layer,
    rms_norm,
)

# fmt: off
INT, STR, BOOL, DICT, LIST, NUMBER = int, str, bool, dict, list, (int, float)
Keys = Mapping[str, Any]  # key -> type; None among the types = may be null

_ROTARY: Keys = {"rotary_base": NUMBER, "rotary_scaling": (DICT, None)}
_BIASES: Keys = {"attn_bias": BOOL, "mlp_bias": BOOL}
_MOE: Keys = {"moe": DICT}
_QWEN: Keys = {**_ROTARY, "attn_bias": BOOL, "qwen_type": STR, "seq_length": INT}
_QWEN_MOE: Keys = {**_QWEN, **_MOE, "moe_intermediate_size": INT}
_GEMMA2: Keys = {**_ROTARY, "query_pre_attn_scalar": NUMBER}
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Family:
    """One TensorRT-LLM model class. `keys` are those that it reads from config.json beside the common ones."""

    layer: Callable[[Sizes, int], Tree]
    keys: Keys = field(default_factory=dict)
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
    "Qwen2MoeForCausalLM": Family(layer=qwen_layer, keys={**_QWEN_MOE, "moe_shared_expert_intermediate_size": INT}),
    "Qwen3MoeForCausalLM": Family(layer=qwen_layer, keys=_QWEN_MOE),
    "GemmaForCausalLM":    Family(layer=gemma_layer, keys={**_ROTARY, **_BIASES}, shards_embedding=True),
    "Gemma2ForCausalLM":   Family(layer=gemma_layer, shards_embedding=True, keys={
        **_GEMMA2, **_BIASES, "final_logit_softcapping": (*NUMBER, None), "attn_logit_softcapping": (*NUMBER, None)}),
    "Gemma3ForCausalLM":   Family(layer=gemma_layer, shards_embedding=True, keys={
        **_GEMMA2, **_BIASES, "_sliding_window_pattern": INT, "sliding_window_pattern": INT, "sliding_window": INT,
        "rope_local_base_freq": NUMBER}),
    "Phi3ForCausalLM":     Family(layer=phi3_layer, has_pipeline=False, keys={
        **_ROTARY, "rotary_pct": NUMBER, "tie_word_embeddings": BOOL}),
    "GPT2LMHeadModel":     Family(layer=gpt_layer, norm=layer_norm, has_position_embedding=True, keys={
        "gpt_variant": STR, "bias": BOOL}),
    "GPTJForCausalLM":     Family(layer=gptj_layer, norm=layer_norm, has_lm_head_bias=True, keys={"rotary_dim": INT}),
    "FalconForCausalLM":   Family(layer=falcon_layer, norm=layer_norm, keys={
        "rotary_base": NUMBER, "bias": BOOL, "parallel_attention": BOOL, "new_decoder_architecture": BOOL,
        "num_ln_in_parallel_attn": (INT, None)}),
}
# fmt: on
