"""TensorRT-LLM's `llmapi` Triton model around the LLM API, as data -> its config and its model.yaml.

Source: TensorRT-LLM 1.2 `triton_backend/all_models/llmapi/tensorrt_llm`. Its code is the container's. It is decoupled and not
batched by Triton; both are said in config.pbtxt, since `--disable-auto-complete-config` keeps what model.yaml says from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from tkit.triton.model_config import ModelConfig, TensorSpec

LLM_MODEL = "tensorrt_llm"
LLM_CODE = ("model.py", "helpers.py")  # what the container has in its version directory


def _optional(name: str, data_type: str, *dims: int) -> TensorSpec:
    return TensorSpec(name=name, data_type=data_type, dims=dims or (1,), is_optional=True)


def _output(name: str, data_type: str, *dims: int) -> TensorSpec:
    return TensorSpec(name=name, data_type=data_type, dims=dims or (1,))


# fmt: off
LLM_INPUTS = (
    TensorSpec(name="text_input", data_type="STRING", dims=(-1,)),
    _optional("streaming",                                "BOOL"),
    _optional("sampling_param_best_of",                   "INT32"),
    _optional("sampling_param_temperature",               "FP32"),
    _optional("sampling_param_top_k",                     "INT32"),
    _optional("sampling_param_top_p",                     "FP32"),
    _optional("sampling_param_frequency_penalty",         "FP32"),
    _optional("sampling_param_presence_penalty",          "FP32"),
    _optional("sampling_param_max_tokens",                "INT32"),
    _optional("sampling_param_stop",                      "STRING", -1),
    _optional("sampling_param_seed",                      "UINT64"),
    _optional("sampling_param_exclude_input_from_output", "BOOL"),
    _optional("sampling_param_return_perf_metrics",       "BOOL"),
    _optional("return_finish_reason",                     "BOOL"),
    _optional("return_stop_reason",                       "BOOL"),
    _optional("return_cumulative_logprob",                "BOOL"),
    _optional("stop",                                     "BOOL"),
)
LLM_OUTPUTS = (
    _output("text_output",                 "STRING", -1),
    _output("finish_reason",               "STRING", -1),
    _output("stop_reason",                 "STRING", -1),
    _output("cumulative_logprob",          "FP32", -1),
    _output("kv_cache_reused_block",       "INT32", -1),
    _output("kv_cache_missed_block",       "INT32", -1),
    _output("kv_cache_alloc_new_blocks",   "INT32", -1),
    _output("kv_cache_alloc_total_blocks", "INT32", -1),
    _output("kv_cache_hit_rate",           "FP32", -1),
    _output("arrival_time_ns",             "INT64"),
    _output("first_scheduled_time_ns",     "INT64"),
    _output("first_token_time_ns",         "INT64"),
    _output("last_token_time_ns",          "INT64"),
    _output("acceptance_rate",             "FP32"),
    _output("total_accepted_draft_tokens", "INT32"),
    _output("total_draft_tokens",          "INT32"),
)
# fmt: on


def llmapi_config() -> ModelConfig:
    return ModelConfig(name=LLM_MODEL, inputs=LLM_INPUTS, outputs=LLM_OUTPUTS, max_batch_size=0, is_decoupled=True)


def model_yaml(options: Mapping[str, Any], model_dir: str, kv_cache_fraction: float) -> str:
    """`options` of the LLM API, with what Triton's model adds to them."""
    kv_cache = {**options.get("kv_cache_config", {}), "free_gpu_memory_fraction": kv_cache_fraction}
    triton = {"max_batch_size": 0, "decoupled": True, "cancellation_check_period_ms": 100}
    values = {
        "model": model_dir, "backend": "pytorch", **options, "kv_cache_config": kv_cache, "triton_config": triton,
    }  # fmt: skip
    return yaml.safe_dump(values, sort_keys=False)
