"""The LLM-API options of the PyTorch backend, and which quantized formats it reads. TensorRT-LLM 1.0 to 1.2.

Only keys that every one of these versions knows: unknown ones are refused. `trtllm-serve --extra_llm_api_options` reads the
file, and so does the `llmapi` model of Triton, which wants `model` and `triton_config` in it as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from tkit.backends.trtllm_build import GOAL_LIMITS
from tkit.specs.recipe import EngineRecipe

LLM_API_FILE = "llm_api.yaml"
# quant_algo of hf_quant_config.json with a linear method in `_torch/modules/linear.py`. INT8 SmoothQuant has none.
READ_FORMATS = (
    None, "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES", "NVFP4", "W4A16_AWQ", "W4A8_AWQ", "W8A16", "W4A16",
    "MIXED_PRECISION",
)  # fmt: skip
KV_OPTIONS: dict[str | None, dict[str, str]] = {None: {}, "FP8": {"dtype": "fp8"}, "NVFP4": {"dtype": "nvfp4"}}


def format_problems(quant_algo: str | None, kv_cache_quant_algo: str | None) -> list[str]:
    """Why the PyTorch backend cannot read a checkpoint of these formats, one line each."""
    problems = []
    if quant_algo not in READ_FORMATS:
        problems.append(f"{quant_algo}: the PyTorch backend of TensorRT-LLM 1.0 to 1.2 has no linear layer for it")
    if kv_cache_quant_algo not in KV_OPTIONS:
        problems.append(f"KV cache in {kv_cache_quant_algo}: the PyTorch backend knows FP8 and NVFP4 only")
    return problems


def llm_api_options(
    recipe: EngineRecipe, max_position_embeddings: int, kv_cache_quant_algo: str | None = None
) -> dict[str, Any]:
    max_batch_size, max_num_tokens = GOAL_LIMITS[recipe.goal]
    max_batch_size = recipe.max_batch_size or max_batch_size
    return {
        "tensor_parallel_size": recipe.tp_size,
        "pipeline_parallel_size": recipe.pp_size,
        "moe_expert_parallel_size": recipe.moe_ep_size,
        "dtype": "auto",
        "max_batch_size": max_batch_size,
        "max_num_tokens": recipe.max_num_tokens or max_num_tokens,
        "max_seq_len": recipe.max_seq_len or max_position_embeddings,
        "max_beam_width": 1,
        "enable_chunked_prefill": True,
        "kv_cache_config": {"enable_block_reuse": True, **KV_OPTIONS[kv_cache_quant_algo]},
        # Without padding, a batch between two captured sizes runs without a graph.
        "cuda_graph_config": {"enable_padding": True, "max_batch_size": max_batch_size},
    }


def llm_api_yaml(options: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(options), sort_keys=False)
