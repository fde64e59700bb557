"""The client surface of TensorRT-LLM's `ensemble` model, as data: a client cannot tell who stands behind it.

Source: TensorRT-LLM `triton_backend/all_models/inflight_batcher_llm/ensemble/config.pbtxt`. Inputs of that model that
are not here (prompt tables, LoRA, guided decoding) are refused by Triton, which names them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tkit.specs.server import MODEL_NAME
from tkit.triton.model_config import ModelConfig, TensorSpec


def _required(name: str, data_type: str) -> TensorSpec:
    return TensorSpec(name=name, data_type=data_type)


def _optional(name: str, data_type: str, *dims: int) -> TensorSpec:
    return TensorSpec(name=name, data_type=data_type, dims=dims or (1,), is_optional=True)


# fmt: off
INPUTS = (
    _required("text_input",               "STRING"),
    _required("max_tokens",               "INT32"),
    _optional("stop_words",               "STRING", -1),
    _optional("exclude_input_in_output",  "BOOL"),
    _optional("end_id",                   "INT32"),
    _optional("pad_id",                   "INT32"),
    _optional("top_k",                    "INT32"),
    _optional("top_p",                    "FP32"),
    _optional("temperature",              "FP32"),
    _optional("repetition_penalty",       "FP32"),
    _optional("min_tokens",               "INT32"),
    _optional("seed",                     "UINT64"),
    _optional("return_log_probs",         "BOOL"),
    _optional("return_num_input_tokens",  "BOOL"),
    _optional("return_num_output_tokens", "BOOL"),
    _optional("return_perf_metrics",      "BOOL"),
    _optional("stream",                   "BOOL"),
    # Accepted with the value that changes nothing, since common clients always send them; refused with any other.
    _optional("bad_words",                "STRING", -1),
    _optional("beam_width",               "INT32"),
    _optional("num_return_sequences",     "INT32"),
    _optional("length_penalty",           "FP32"),
    _optional("presence_penalty",         "FP32"),
    _optional("frequency_penalty",        "FP32"),
    _optional("return_context_logits",    "BOOL"),
    _optional("return_generation_logits", "BOOL"),
)
OUTPUTS = (
    TensorSpec(name="text_output",             data_type="STRING", dims=(-1,)),
    TensorSpec(name="cum_log_probs",           data_type="FP32",   dims=(-1,)),
    TensorSpec(name="output_log_probs",        data_type="FP32",   dims=(-1, -1)),
    TensorSpec(name="sequence_index",          data_type="INT32"),
    TensorSpec(name="batch_index",             data_type="INT32"),
    TensorSpec(name="num_input_tokens",        data_type="INT32"),
    TensorSpec(name="num_output_tokens",       data_type="INT32"),
    TensorSpec(name="arrival_time_ns",         data_type="INT64"),
    TensorSpec(name="first_scheduled_time_ns", data_type="INT64"),
    TensorSpec(name="first_token_time_ns",     data_type="INT64"),
    TensorSpec(name="last_token_time_ns",      data_type="INT64"),
)
# fmt: on


def ensemble_config(parameters: Mapping[str, str], without: Collection[str] = ()) -> ModelConfig:
    """Decoupled, so that a request may stream. One prompt per request: the engine batches requests, not Triton.

    `without` are tensors that the engine has nothing for: clients look at what there is, and leave them out.
    """
    return ModelConfig(
        name=MODEL_NAME,
        inputs=tuple(tensor for tensor in INPUTS if tensor.name not in without),
        outputs=tuple(tensor for tensor in OUTPUTS if tensor.name not in without),
        max_batch_size=1,
        is_decoupled=True,
        parameters=parameters,
    )
