"""TensorRT-LLM's llmapi model: every tensor of the contract, and what its model.yaml must say."""

from __future__ import annotations

import yaml
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tkit.triton.llmapi import llmapi_config, model_yaml
from tkit.triton.model_config import render_model_config

NAMES = {
    "STRING": ("text_input", "sampling_param_stop"),
    "BOOL": (
        "streaming", "sampling_param_exclude_input_from_output", "sampling_param_return_perf_metrics",
        "return_finish_reason", "return_stop_reason", "return_cumulative_logprob", "stop",
    ),
    "INT32": ("sampling_param_best_of", "sampling_param_top_k", "sampling_param_max_tokens"),
    "FP32": (
        "sampling_param_temperature", "sampling_param_top_p", "sampling_param_frequency_penalty",
        "sampling_param_presence_penalty",
    ),
    "UINT64": ("sampling_param_seed",),
}  # fmt: skip
LISTS = ("text_input", "sampling_param_stop")
OUTPUTS = {
    "STRING": ("text_output", "finish_reason", "stop_reason"),
    "FP32": ("cumulative_logprob", "kv_cache_hit_rate", "acceptance_rate"),
    "INT32": (
        "kv_cache_reused_block", "kv_cache_missed_block", "kv_cache_alloc_new_blocks", "kv_cache_alloc_total_blocks",
        "total_accepted_draft_tokens", "total_draft_tokens",
    ),
    "INT64": ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns"),
}  # fmt: skip


def test_every_tensor_of_the_contract_is_there() -> None:
    message = text_format.Parse(render_model_config(llmapi_config()), model_config_pb2.ModelConfig())
    type_of = model_config_pb2.DataType.Name
    found = {t.name: (type_of(t.data_type), tuple(t.dims), t.optional) for t in message.input}
    assert found == {
        name: (f"TYPE_{data_type}", (-1,) if name in LISTS else (1,), name != "text_input")
        for data_type, names in NAMES.items()
        for name in names
    }
    assert {t.name: type_of(t.data_type) for t in message.output} == {
        name: f"TYPE_{data_type}" for data_type, names in OUTPUTS.items() for name in names
    }
    assert (message.backend, message.max_batch_size) == ("python", 0)
    assert message.model_transaction_policy.decoupled


def test_the_model_yaml_repeats_what_the_config_says() -> None:
    options = {"tensor_parallel_size": 2, "kv_cache_config": {"enable_block_reuse": True, "dtype": "fp8"}}
    values = yaml.safe_load(model_yaml(options, "/engine/hf", 0.8))
    assert values == {
        "model": "/engine/hf",
        "backend": "pytorch",
        "tensor_parallel_size": 2,
        "kv_cache_config": {"enable_block_reuse": True, "dtype": "fp8", "free_gpu_memory_fraction": 0.8},
        "triton_config": {"max_batch_size": 0, "decoupled": True, "cancellation_check_period_ms": 100},
    }
