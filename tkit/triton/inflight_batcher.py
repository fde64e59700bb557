"""TensorRT-LLM's own five Triton models around a compiled engine, as data -> their configs.

    ensemble          preprocessing -> tensorrt_llm -> postprocessing, wired by Triton; what clients talk to
    tensorrt_llm_bls  the same, wired by a Python model that also knows stop words and draft models
    tensorrt_llm      the C++ backend, which batches in flight

Source: TensorRT-LLM 1.2 `triton_backend/all_models/inflight_batcher_llm/*/config.pbtxt`. A parameter that is left out is
at the backend's default. The Python models' code is the container's; it must fit its TensorRT-LLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tkit.specs.server import MODEL_NAME
from tkit.triton.ensemble import INPUTS, OUTPUTS
from tkit.triton.model_config import EnsembleStep, ModelConfig, Queue, TensorSpec

ENGINE_MODEL = "tensorrt_llm"
LOGITS, PROMPT_TABLE, ENCODER_FEATURES = "FP32", "FP16", "FP16"
# What the container has of the Python models' code: model -> names in its version directory
PYTHON_MODELS = {
    "preprocessing": ("model.py",),
    "postprocessing": ("model.py",),
    "tensorrt_llm_bls": ("model.py", "lib"),
}
# Preprocessing and postprocessing are CPU work in Python, one request at a time: NVIDIA's own hint for their number.
NUM_INSTANCES = 5


@dataclass(frozen=True, kw_only=True)
class InflightBatcher:
    """What the five models need to know about an engine and its server."""

    engine_dir: str  # of rank{r}.engine and config.json
    tokenizer_dir: str
    max_batch_size: int  # the engine's
    max_beam_width: int = 1
    max_queue_size: int = 0  # 0 = no limit
    kv_cache_fraction: float = 0.9  # of the memory that is free once the engine is loaded
    has_paged_context: bool = True  # the engine's use_paged_context_fmha; chunks and reuse of the KV cache need it
    parameters: Mapping[str, str] | None = None  # of `ensemble`


def _tensor(name: str, data_type: str, *dims: int) -> TensorSpec:
    return TensorSpec(name=name, data_type=data_type, dims=dims or (1,))


def _optional(name: str, data_type: str, *dims: int, scalar: bool = False, ragged: bool = False) -> TensorSpec:
    return TensorSpec(
        name=name, data_type=data_type, dims=dims or (1,), is_optional=True, is_scalar=scalar, is_ragged=ragged
    )


def _scalars(data_type: str, *names: str) -> tuple[TensorSpec, ...]:
    return tuple(_optional(name, data_type, scalar=True) for name in names)


def _outputs(data_type: str, *names: str) -> tuple[TensorSpec, ...]:
    return tuple(_tensor(name, data_type) for name in names)


# fmt: off
PREPROCESSING_INPUTS = (
    _tensor  ("QUERY",                  "STRING"),
    _optional("DECODER_QUERY",          "STRING"),
    _optional("IMAGE_BYTES",            "UINT8", -1, -1, -1, -1),
    _optional("IMAGE_URL",              "STRING"),
    _optional("IMAGES",                 "STRING", -1),
    _optional("VIDEO_BYTES",            "UINT8", -1, -1, -1, -1),
    _tensor  ("REQUEST_OUTPUT_LEN",     "INT32"),
    _optional("BAD_WORDS_DICT",         "STRING", -1),
    _optional("STOP_WORDS_DICT",        "STRING", -1),
    _optional("EMBEDDING_BIAS_WORDS",   "STRING", -1),
    _optional("EMBEDDING_BIAS_WEIGHTS", "FP32", -1),
    _optional("END_ID",                 "INT32"),
    _optional("PAD_ID",                 "INT32"),
    _optional("PROMPT_TABLE_EXTRA_ID",  "UINT64"),
)
PREPROCESSING_OUTPUTS = (
    _tensor("INPUT_ID",                   "INT32", -1),
    _tensor("REQUEST_INPUT_LEN",          "INT32"),
    _tensor("DECODER_INPUT_ID",           "INT32", -1),
    _tensor("REQUEST_DECODER_INPUT_LEN",  "INT32"),
    _tensor("BAD_WORDS_IDS",              "INT32", 2, -1),
    _tensor("STOP_WORDS_IDS",             "INT32", 2, -1),
    _tensor("EMBEDDING_BIAS",             "FP32", -1),
    _tensor("REQUEST_OUTPUT_LEN",         "INT32", -1),
    _tensor("OUT_END_ID",                 "INT32"),
    _tensor("OUT_PAD_ID",                 "INT32"),
    _tensor("OUT_PROMPT_TABLE_EXTRA_IDS", "UINT64", -1),
    _tensor("PIXEL_VALUES",               "FP16", -1, -1, -1, -1),
    _tensor("ASPECT_RATIO_IDS",           "INT64", -1),
    _tensor("ASPECT_RATIO_MASK",          "INT64", -1, -1),
    _tensor("CROSS_ATTENTION_MASK",       "INT64", -1, -1, -1),
    _tensor("IMAGE_SIZES",                "INT64", -1, 2),
    _tensor("IS_VIDEO_INPUT",             "BOOL"),
    _tensor("ATTENTION_MASK",             "INT64", -1),
    _tensor("IMAGE_GRID_THW",             "INT64", 3),
    _tensor("VISION_INPUT_ID",            "INT32", -1),
)
POSTPROCESSING_INPUTS = (
    _tensor("TOKENS_BATCH",    "INT32", -1, -1),
    _tensor("SEQUENCE_LENGTH", "INT32", -1),
)
POSTPROCESSING_OUTPUTS = (
    _tensor("OUTPUT", "STRING", -1),
)
_TIMES = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")
_MORE_OUTPUTS = (
    _tensor("context_logits",    LOGITS, -1, -1),
    _tensor("generation_logits", LOGITS, -1, -1, -1),
    *_outputs("INT32", "kv_cache_alloc_new_blocks", "kv_cache_reused_blocks", "kv_cache_alloc_total_blocks"),
    *_outputs("FP32",  "acceptance_rate"),
    *_outputs("INT32", "total_accepted_draft_tokens", "total_draft_tokens"),
)
ENGINE_INPUTS = (
    _optional("input_ids",                  "INT32", -1, ragged=True),
    _optional("encoder_input_features",     ENCODER_FEATURES, -1, -1, ragged=True),
    *_scalars("INT32", "encoder_output_lengths"),
    TensorSpec(name="input_lengths",        data_type="INT32", is_scalar=True),
    TensorSpec(name="request_output_len",   data_type="INT32", is_scalar=True),
    *_scalars("INT32", "num_return_sequences"),
    _optional("draft_input_ids",            "INT32", -1, ragged=True),
    _optional("decoder_input_ids",          "INT32", -1, ragged=True),
    *_scalars("INT32", "decoder_input_lengths"),
    _optional("draft_logits",               LOGITS, -1, -1, ragged=True),
    *_scalars("FP32",  "draft_acceptance_threshold"),
    *_scalars("INT32", "end_id", "pad_id"),
    _optional("stop_words_list",            "INT32", 2, -1, ragged=True),
    _optional("bad_words_list",             "INT32", 2, -1, ragged=True),
    _optional("embedding_bias",             "FP32", -1, ragged=True),
    *_scalars("INT32", "beam_width"),
    *_scalars("FP32",  "temperature"),
    *_scalars("INT32", "runtime_top_k"),
    *_scalars("FP32",  "runtime_top_p", "runtime_top_p_min", "runtime_top_p_decay"),
    *_scalars("INT32", "runtime_top_p_reset_ids"),
    *_scalars("FP32",  "len_penalty"),
    *_scalars("BOOL",  "early_stopping"),
    *_scalars("FP32",  "repetition_penalty"),
    *_scalars("INT32", "min_tokens"),
    *_scalars("FP32",  "beam_search_diversity_rate", "presence_penalty", "frequency_penalty"),
    *_scalars("UINT64", "seed"),
    *_scalars("BOOL",  "return_log_probs", "return_context_logits", "return_generation_logits", "return_perf_metrics",
                       "return_num_input_tokens", "return_num_output_tokens", "exclude_input_in_output", "stop", "streaming"),
    _optional("prompt_embedding_table",     PROMPT_TABLE, -1, -1, ragged=True),
    _optional("prompt_table_extra_ids",     "UINT64", -1, ragged=True),
    *_scalars("INT32", "prompt_vocab_size"),
    _optional("cross_attention_mask",       "BOOL", -1, -1, ragged=True),
    _optional("mrope_rotary_cos_sin",       "FP32", -1),
    _optional("mrope_position_deltas",      "INT64"),
    *_scalars("UINT64", "lora_task_id"),
    _optional("lora_weights",               "FP16", -1, -1, ragged=True),
    _optional("lora_config",                "INT32", -1, 3, ragged=True),
    _optional("context_phase_params",       "UINT8", -1, ragged=True),
    _optional("skip_cross_attn_blocks",     "BOOL", ragged=True),
    _optional("retention_token_range_starts",       "INT32", -1, ragged=True),
    _optional("retention_token_range_ends",         "INT32", -1, ragged=True),
    _optional("retention_token_range_priorities",   "INT32", -1, ragged=True),
    _optional("retention_token_range_durations_ms", "INT32", -1, ragged=True),
    _optional("retention_decode_priority",          "INT32", ragged=True),
    _optional("retention_decode_duration_ms",       "INT32", ragged=True),
    _optional("guided_decoding_guide_type",         "STRING", ragged=True),
    _optional("guided_decoding_guide",              "STRING", ragged=True),
    _optional("lookahead_window_size",              "INT32", ragged=True),
    _optional("lookahead_ngram_size",               "INT32", ragged=True),
    _optional("lookahead_verification_set_size",    "INT32", ragged=True),
)
ENGINE_OUTPUTS = (
    _tensor("output_ids",       "INT32", -1, -1),
    _tensor("sequence_length",  "INT32", -1),
    _tensor("cum_log_probs",    "FP32", -1),
    _tensor("output_log_probs", "FP32", -1, -1),
    *_outputs("INT32", "batch_index", "sequence_index"),
    _tensor("context_phase_params", "UINT8", -1),
    *_outputs("INT64", *_TIMES),
    *_outputs("INT32", "num_input_tokens", "num_output_tokens"),
    *_MORE_OUTPUTS,
)
_MORE_INPUTS = (
    _optional("decoder_text_input",     "STRING"),
    _optional("prompt_embedding_table", PROMPT_TABLE, -1, -1),
    _optional("prompt_table_extra_id",  "UINT64"),
    _optional("prompt_vocab_size",      "INT32"),
    _optional("embedding_bias_words",   "STRING", -1),
    _optional("embedding_bias_weights", "FP32", -1),
    _optional("lora_task_id",           "UINT64"),
    _optional("lora_weights",           "FP16", -1, -1, ragged=True),
    _optional("lora_config",            "INT32", -1, 3, ragged=True),
)
_GUIDES = ("guided_decoding_guide_type", "guided_decoding_guide")
ENSEMBLE_INPUTS = (*INPUTS, *_MORE_INPUTS, *(_optional(name, "STRING", ragged=True) for name in _GUIDES))
ENSEMBLE_OUTPUTS = (*OUTPUTS, *_MORE_OUTPUTS)
# The Python model is handed these as one number per request; the ensemble passes them on as they come.
_BLS_SCALARS = {
    "return_log_probs", "return_context_logits", "return_generation_logits", "return_perf_metrics",
    "return_num_input_tokens", "return_num_output_tokens", "num_return_sequences",
}
BLS_INPUTS = (
    *(replace(tensor, is_scalar=tensor.name in _BLS_SCALARS) for tensor in INPUTS),
    *_MORE_INPUTS,
    *(_optional(name, "STRING") for name in _GUIDES),
    _optional("image_input",       "FP16", -1, 3, -1, -1),
    _optional("image_bytes_input", "UINT8", -1, -1, -1, -1),
    _optional("image_url_input",   "STRING"),
    _optional("video_bytes_input", "UINT8", -1, -1, -1, -1),
    _optional("num_draft_tokens",  "INT32"),
    _optional("use_draft_logits",  "BOOL", scalar=True),
)
# tensor of the model -> tensor of the ensemble; names that begin with _ are between its steps
PREPROCESSING_STEP = EnsembleStep(
    model="preprocessing",
    inputs={
        "QUERY": "text_input", "DECODER_QUERY": "decoder_text_input", "REQUEST_OUTPUT_LEN": "max_tokens",
        "BAD_WORDS_DICT": "bad_words", "STOP_WORDS_DICT": "stop_words",
        "EMBEDDING_BIAS_WORDS": "embedding_bias_words", "EMBEDDING_BIAS_WEIGHTS": "embedding_bias_weights",
        "END_ID": "end_id", "PAD_ID": "pad_id", "PROMPT_TABLE_EXTRA_ID": "prompt_table_extra_id",
    },
    outputs={
        "REQUEST_INPUT_LEN": "_REQUEST_INPUT_LEN", "INPUT_ID": "_INPUT_ID",
        "REQUEST_DECODER_INPUT_LEN": "_REQUEST_DECODER_INPUT_LEN", "DECODER_INPUT_ID": "_DECODER_INPUT_ID",
        "REQUEST_OUTPUT_LEN": "_REQUEST_OUTPUT_LEN", "STOP_WORDS_IDS": "_STOP_WORDS_IDS",
        "BAD_WORDS_IDS": "_BAD_WORDS_IDS", "EMBEDDING_BIAS": "_EMBEDDING_BIAS", "OUT_END_ID": "_PREPROCESSOR_END_ID",
        "OUT_PAD_ID": "_PREPROCESSOR_PAD_ID", "OUT_PROMPT_TABLE_EXTRA_IDS": "_OUT_PROMPT_TABLE_EXTRA_IDS",
    },
)
ENGINE_STEP = EnsembleStep(
    model=ENGINE_MODEL,
    inputs={
        "input_ids": "_INPUT_ID", "decoder_input_ids": "_DECODER_INPUT_ID", "input_lengths": "_REQUEST_INPUT_LEN",
        "decoder_input_lengths": "_REQUEST_DECODER_INPUT_LEN", "request_output_len": "_REQUEST_OUTPUT_LEN",
        "end_id": "_PREPROCESSOR_END_ID", "pad_id": "_PREPROCESSOR_PAD_ID", "embedding_bias": "_EMBEDDING_BIAS",
        "stop_words_list": "_STOP_WORDS_IDS", "bad_words_list": "_BAD_WORDS_IDS",
        "prompt_table_extra_ids": "_OUT_PROMPT_TABLE_EXTRA_IDS",
        "runtime_top_k": "top_k", "runtime_top_p": "top_p", "len_penalty": "length_penalty", "streaming": "stream",
        **{name: name for name in (
            "exclude_input_in_output", "temperature", "repetition_penalty", "min_tokens", "presence_penalty",
            "frequency_penalty", "seed", "return_log_probs", "return_context_logits", "return_generation_logits",
            "return_perf_metrics", "return_num_input_tokens", "return_num_output_tokens", "num_return_sequences",
            "beam_width", "prompt_embedding_table", "prompt_vocab_size", "lora_task_id", "lora_weights", "lora_config",
            *_GUIDES,
        )},
    },
    outputs={
        "output_ids": "_TOKENS_BATCH", "sequence_length": "_SEQUENCE_LENGTH",
        **{tensor.name: tensor.name for tensor in ENSEMBLE_OUTPUTS if tensor.name != "text_output"},
    },
)
POSTPROCESSING_STEP = EnsembleStep(
    model="postprocessing",
    inputs={"TOKENS_BATCH": "_TOKENS_BATCH", "SEQUENCE_LENGTH": "_SEQUENCE_LENGTH"},
    outputs={"OUTPUT": "text_output"},
)
# fmt: on


def inflight_batcher_configs(spec: InflightBatcher) -> tuple[ModelConfig, ...]:
    """The configs of the five models. Decoupled as a whole, so that a request may stream."""
    queue = Queue(preferred_batch_size=spec.max_batch_size, max_size=spec.max_queue_size)
    return (
        ModelConfig(
            name="preprocessing",
            inputs=PREPROCESSING_INPUTS,
            outputs=PREPROCESSING_OUTPUTS,
            max_batch_size=spec.max_batch_size,
            num_instances=NUM_INSTANCES,
            queue=queue,
            parameters={
                "tokenizer_dir": spec.tokenizer_dir,
                "add_special_tokens": "true",
                "multimodal_model_path": "",  # read without asking whether it is there
                "gpt_model_path": spec.engine_dir,
            },
        ),
        ModelConfig(
            name=ENGINE_MODEL,
            backend="tensorrtllm",
            inputs=ENGINE_INPUTS,
            outputs=ENGINE_OUTPUTS,
            max_batch_size=spec.max_batch_size,
            is_decoupled=True,
            queue=queue,
            parameters=_engine_parameters(spec),
        ),
        ModelConfig(
            name="postprocessing",
            inputs=POSTPROCESSING_INPUTS,
            outputs=POSTPROCESSING_OUTPUTS,
            max_batch_size=spec.max_batch_size,
            num_instances=NUM_INSTANCES,
            queue=Queue(is_ordered=True),  # or the instances overtake each other, and a stream's words with them
            parameters={"tokenizer_dir": spec.tokenizer_dir, "skip_special_tokens": "true"},
        ),
        ModelConfig(
            name=MODEL_NAME,
            inputs=ENSEMBLE_INPUTS,
            outputs=ENSEMBLE_OUTPUTS,
            max_batch_size=spec.max_batch_size,
            steps=(PREPROCESSING_STEP, ENGINE_STEP, POSTPROCESSING_STEP),
            parameters=spec.parameters or {},
        ),
        ModelConfig(
            name="tensorrt_llm_bls",
            inputs=BLS_INPUTS,
            outputs=ENSEMBLE_OUTPUTS,
            max_batch_size=spec.max_batch_size,
            is_decoupled=True,
            num_instances=min(spec.max_batch_size, NUM_INSTANCES),  # an instance runs one request at a time
            parameters={"accumulate_tokens": "false", "tensorrt_llm_model_name": ENGINE_MODEL},
        ),
    )


def _engine_parameters(spec: InflightBatcher) -> dict[str, str]:
    paged = str(spec.has_paged_context).lower()
    return {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": spec.engine_dir,
        "max_beam_width": str(spec.max_beam_width),
        "batch_scheduler_policy": "guaranteed_no_evict",
        "kv_cache_free_gpu_mem_fraction": str(spec.kv_cache_fraction),
        "enable_kv_cache_reuse": paged,
        "enable_chunked_context": paged,
        "exclude_input_in_output": "true",  # where a request does not say; an echoed prompt counts as output
        "cancellation_check_period_ms": "100",
        "stats_check_period_ms": "100",
        "iter_stats_max_iterations": "1000",
        "request_stats_max_iterations": "0",
        "normalize_log_probs": "true",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
    }
