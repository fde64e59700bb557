"""Tiny random models of every family, made with transformers, and their conversion without the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from tkit.architectures.config import spec_from_hf, trtllm_config
from tkit.architectures.moves import plan_moves
from tkit.architectures.table import ARCHITECTURES
from tkit.checkpoints.convert import check_sources, convert
from tkit.checkpoints.reader import open_source
from tkit.files import write_json
from tkit.specs.parallel import Parallel
from tkit.specs.precision import Precision
from tkit.specs.progress import Progress

# 3 layers: uneven at pp 2; 2 KV heads: repeated at tp 4; an odd vocabulary: padded
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT = {
    "vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FALCON = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"} | {
    "ffn_hidden_size": 48, "num_kv_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA = {"vocab_size": 96, "head_dim": 16}  # the embedding is split, so its rows must divide
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [2.0, 4.0, 6.0, 8.0], "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip

# name -> (Hugging Face class, its configuration)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SIZES | {"head_dim": 16}),
    "llama-biases-tied": (
        "LlamaForCausalLM",
        SIZES | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralForCausalLM", SIZES | {"head_dim": 16, "sliding_window": 8}),
    "mixtral": ("MixtralForCausalLM", SIZES | {"num_local_experts": 4, "sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", SIZES | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", SIZES | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", SIZES | MOE | {"shared_expert_intermediate_size": 40}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", SIZES | MOE | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen3-moe-mixed": ("Qwen3MoeForCausalLM", SIZES | MOE | {"head_dim": 16, "mlp_only_layers": [1]}),
    "gemma": ("GemmaForCausalLM", SIZES | GEMMA),
    "gemma2": ("Gemma2ForCausalLM", SIZES | GEMMA | {"query_pre_attn_scalar": 20, "sliding_window": 8}),
    "gemma3": (
        "Gemma3ForCausalLM",
        SIZES | GEMMA | {"query_pre_attn_scalar": 20, "sliding_window": 8, "sliding_window_pattern": 2},
    ),
    "phi3": ("Phi3ForCausalLM", SIZES | {"original_max_position_embeddings": 64}),
    "phi3-partial-rotary": (
        "Phi3ForCausalLM",
        SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "phi3-longrope": (
        "Phi3ForCausalLM",
        SIZES | {"original_max_position_embeddings": 16, "rope_parameters": LONG_ROPE},
    ),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "gptj": ("GPTJForCausalLM", GPT | {"rotary_dim": 4}),
    "falcon-new": ("FalconForCausalLM", FALCON | {"new_decoder_architecture": True}),
    "falcon-new-one-norm": (
        "FalconForCausalLM",
        FALCON | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-7b": ("FalconForCausalLM", FALCON | {"multi_query": True, "tie_word_embeddings": True}),
    "falcon-rw": (
        "FalconForCausalLM",
        FALCON | {"multi_query": False, "num_kv_heads": 4, "parallel_attn": False, "alibi": True, "bias": True},
    ),
}
LAYOUTS = [
    (name, tp_size, pp_size, 1)
    for name, (architecture, _) in MODELS.items()
    for tp_size in (1, 2, 4)
    for pp_size in (1, 2)
    if pp_size == 1 or ARCHITECTURES[architecture].has_pipeline
] + [
    (name, tp_size, pp_size, moe_ep_size)
    for name in ("mixtral", "qwen2-moe", "qwen3-moe")
    for tp_size, pp_size, moe_ep_size in ((2, 1, 2), (4, 2, 2), (4, 1, 4))
]


def make_model(name: str, directory: Path) -> Path:
    """Norms and biases are random too: fresh ones and zeros would hide a norm that is lost or a bias in the wrong place."""
    architecture, arguments = MODELS[name]
    model_class = getattr(transformers, architecture)
    torch.manual_seed(list(MODELS).index(name))
    model = model_class(model_class.config_class(**arguments))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def write_checkpoint(
    model_dir: Path, directory: Path, *, quant: str = "none", tp_size: int = 1, pp_size: int = 1, moe_ep_size: int = 1
) -> Path:
    """`directory`/checkpoint as `tkit build` writes it, for formats that need no calibration."""
    spec = spec_from_hf(json.loads((model_dir / "config.json").read_text()), "config.json")
    parallel = Parallel(tp_size=tp_size, pp_size=pp_size, moe_ep_size=moe_ep_size)
    moves = plan_moves(spec, Precision.of(quant), parallel)
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(parents=True)
    with open_source(model_dir) as source:
        check_sources(source, moves, ARCHITECTURES[spec.architecture].ignored)
        convert(source, moves, spec.dtype, checkpoint, None, Progress())
    write_json(checkpoint / "config.json", trtllm_config(spec, Precision.of(quant), parallel))
    return checkpoint
