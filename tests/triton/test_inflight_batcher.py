"""TensorRT-LLM's five models: every tensor of the contract, and the real Triton on what it can load of them here."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path

import pytest
from container import MODELS
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tkit.triton import probe
from tkit.triton.inflight_batcher import InflightBatcher, inflight_batcher_configs
from tkit.triton.install import find_install, free_ports, link_backends
from tkit.triton.launcher import LaunchSpec, ServerProcess
from tkit.triton.model_config import ModelConfig, render_model_config
from tkit.triton.repository import ServedModel, write_repository

SPEC = InflightBatcher(
    engine_dir="/engine/trt", tokenizer_dir="/engine/tokenizer", max_batch_size=4, max_queue_size=9,
    kv_cache_fraction=0.85, parameters={"instance": "abc"},
)  # fmt: skip
# Read from TensorRT-LLM's config.pbtxt files: names, then type and dims that hold for all names before them; ? = optional
CLIENT_INPUTS = """
text_input STRING[1]  max_tokens INT32[1]
decoder_text_input ?STRING[1]  bad_words stop_words ?STRING[-1]  exclude_input_in_output ?BOOL[1]  end_id pad_id ?INT32[1]
top_k ?INT32[1]  top_p temperature length_penalty repetition_penalty ?FP32[1]  min_tokens ?INT32[1]
presence_penalty frequency_penalty ?FP32[1]  seed ?UINT64[1]
return_log_probs return_context_logits return_generation_logits return_perf_metrics return_num_input_tokens
return_num_output_tokens ?BOOL[1]  num_return_sequences beam_width ?INT32[1]  stream ?BOOL[1]
prompt_embedding_table ?FP16[-1,-1]  prompt_table_extra_id ?UINT64[1]  prompt_vocab_size ?INT32[1]
embedding_bias_words ?STRING[-1]  embedding_bias_weights ?FP32[-1]
lora_task_id ?UINT64[1]  lora_weights ?FP16[-1,-1]  lora_config ?INT32[-1,3]
guided_decoding_guide_type guided_decoding_guide ?STRING[1]
"""
SHARED_OUTPUTS = """
cum_log_probs FP32[-1]  output_log_probs FP32[-1,-1]  context_logits FP32[-1,-1]  generation_logits FP32[-1,-1,-1]
batch_index sequence_index kv_cache_alloc_new_blocks kv_cache_reused_blocks kv_cache_alloc_total_blocks INT32[1]
arrival_time_ns first_scheduled_time_ns first_token_time_ns last_token_time_ns INT64[1]  acceptance_rate FP32[1]
total_accepted_draft_tokens total_draft_tokens num_input_tokens num_output_tokens INT32[1]
"""
CONTRACT = {
    "preprocessing": (
        """QUERY STRING[1]  DECODER_QUERY ?STRING[1]  IMAGE_BYTES ?UINT8[-1,-1,-1,-1]  IMAGE_URL ?STRING[1]  IMAGES ?STRING[-1]
        VIDEO_BYTES ?UINT8[-1,-1,-1,-1]  REQUEST_OUTPUT_LEN INT32[1]  BAD_WORDS_DICT STOP_WORDS_DICT EMBEDDING_BIAS_WORDS
        ?STRING[-1]  EMBEDDING_BIAS_WEIGHTS ?FP32[-1]  END_ID PAD_ID ?INT32[1]  PROMPT_TABLE_EXTRA_ID ?UINT64[1]""",
        """INPUT_ID INT32[-1]  REQUEST_INPUT_LEN INT32[1]  DECODER_INPUT_ID INT32[-1]  REQUEST_DECODER_INPUT_LEN INT32[1]
        BAD_WORDS_IDS STOP_WORDS_IDS INT32[2,-1]  EMBEDDING_BIAS FP32[-1]  REQUEST_OUTPUT_LEN INT32[-1]
        OUT_END_ID OUT_PAD_ID INT32[1]  OUT_PROMPT_TABLE_EXTRA_IDS UINT64[-1]  PIXEL_VALUES FP16[-1,-1,-1,-1]
        ASPECT_RATIO_IDS INT64[-1]  ASPECT_RATIO_MASK INT64[-1,-1]  CROSS_ATTENTION_MASK INT64[-1,-1,-1]
        IMAGE_SIZES INT64[-1,2]  IS_VIDEO_INPUT BOOL[1]  ATTENTION_MASK INT64[-1]  IMAGE_GRID_THW INT64[3]
        VISION_INPUT_ID INT32[-1]""",
    ),
    "tensorrt_llm": (
        """input_ids ?INT32[-1]  input_lengths request_output_len INT32[1]  encoder_input_features ?FP16[-1,-1]
        encoder_output_lengths num_return_sequences ?INT32[1]  draft_input_ids decoder_input_ids ?INT32[-1]
        decoder_input_lengths ?INT32[1]  draft_logits ?FP32[-1,-1]  draft_acceptance_threshold ?FP32[1]
        end_id pad_id ?INT32[1]  stop_words_list bad_words_list ?INT32[2,-1]  embedding_bias ?FP32[-1]
        beam_width ?INT32[1]  temperature ?FP32[1]  runtime_top_k ?INT32[1]  runtime_top_p runtime_top_p_min
        runtime_top_p_decay ?FP32[1]  runtime_top_p_reset_ids ?INT32[1]  len_penalty ?FP32[1]  early_stopping ?BOOL[1]
        repetition_penalty ?FP32[1]  min_tokens ?INT32[1]  beam_search_diversity_rate presence_penalty frequency_penalty
        ?FP32[1]  seed ?UINT64[1]  return_log_probs return_context_logits return_generation_logits return_perf_metrics
        return_num_input_tokens return_num_output_tokens exclude_input_in_output stop streaming ?BOOL[1]
        prompt_embedding_table ?FP16[-1,-1]  prompt_table_extra_ids ?UINT64[-1]  prompt_vocab_size ?INT32[1]
        cross_attention_mask ?BOOL[-1,-1]  mrope_rotary_cos_sin ?FP32[-1]  mrope_position_deltas ?INT64[1]
        lora_task_id ?UINT64[1]  lora_weights ?FP16[-1,-1]  lora_config ?INT32[-1,3]  context_phase_params ?UINT8[-1]
        skip_cross_attn_blocks ?BOOL[1]  retention_token_range_starts retention_token_range_ends
        retention_token_range_priorities retention_token_range_durations_ms ?INT32[-1]  retention_decode_priority
        retention_decode_duration_ms ?INT32[1]  guided_decoding_guide_type guided_decoding_guide ?STRING[1]
        lookahead_window_size lookahead_ngram_size lookahead_verification_set_size ?INT32[1]""",
        f"output_ids INT32[-1,-1]  sequence_length INT32[-1]  context_phase_params UINT8[-1] {SHARED_OUTPUTS}",
    ),
    "postprocessing": ("TOKENS_BATCH INT32[-1,-1]  SEQUENCE_LENGTH INT32[-1]", "OUTPUT STRING[-1]"),
    "ensemble": (CLIENT_INPUTS, f"text_output STRING[-1] {SHARED_OUTPUTS}"),
    "tensorrt_llm_bls": (
        f"""{CLIENT_INPUTS} image_input ?FP16[-1,3,-1,-1]  image_bytes_input video_bytes_input ?UINT8[-1,-1,-1,-1]
        image_url_input ?STRING[1]  num_draft_tokens ?INT32[1]  use_draft_logits ?BOOL[1]""",
        f"text_output STRING[-1] {SHARED_OUTPUTS}",
    ),
}


def expected(text: str) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """{name: (type, dims, optional)}"""
    tensors, names = {}, []
    for word in text.split():
        if (described := re.fullmatch(r"(\??)([A-Z0-9]+)\[([-\d,]+)\]", word)) is None:
            names.append(word)
            continue
        optional, data_type, dims = described.groups()
        tensors |= {name: (data_type, tuple(map(int, dims.split(","))), bool(optional)) for name in names}
        names = []
    return tensors


def parsed(config: ModelConfig) -> model_config_pb2.ModelConfig:
    return text_format.Parse(render_model_config(config), model_config_pb2.ModelConfig())


def found(tensors) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    names = model_config_pb2.DataType.Name
    return {
        t.name: (names(t.data_type).removeprefix("TYPE_"), tuple(t.dims), getattr(t, "optional", False))
        for t in tensors
    }


CONFIGS = {config.name: config for config in inflight_batcher_configs(SPEC)}


def test_the_five_models() -> None:
    assert CONFIGS.keys() == CONTRACT.keys()


@pytest.mark.parametrize("name", CONTRACT)
def test_every_tensor_of_the_contract_is_there(name: str) -> None:
    message = parsed(CONFIGS[name])
    inputs, outputs = CONTRACT[name]
    assert found(message.input) == expected(inputs)
    assert found(message.output) == expected(outputs)
    assert message.max_batch_size == 4


def test_streams_work_and_the_engine_is_reached() -> None:
    messages = {name: parsed(config) for name, config in CONFIGS.items()}
    assert messages["tensorrt_llm"].model_transaction_policy.decoupled
    assert messages["tensorrt_llm_bls"].model_transaction_policy.decoupled
    assert (messages["ensemble"].platform, messages["ensemble"].backend) == ("ensemble", "")
    assert messages["tensorrt_llm"].backend == "tensorrtllm"
    assert messages["tensorrt_llm"].dynamic_batching.default_queue_policy.max_queue_size == 9
    parameters = {key: value.string_value for key, value in messages["tensorrt_llm"].parameters.items()}
    assert parameters["gpt_model_path"] == "/engine/trt"
    assert parameters["kv_cache_free_gpu_mem_fraction"] == "0.85"
    assert parameters["enable_chunked_context"] == parameters["enable_kv_cache_reuse"] == "true"
    unpaged = inflight_batcher_configs(dataclasses.replace(SPEC, has_paged_context=False))[1]
    assert unpaged.parameters["enable_chunked_context"] == unpaged.parameters["enable_kv_cache_reuse"] == "false"
    assert messages["preprocessing"].parameters["tokenizer_dir"].string_value == "/engine/tokenizer"


def test_every_step_is_fed_by_a_client_or_an_earlier_step() -> None:
    ensemble = CONFIGS["ensemble"]
    known = {tensor.name for tensor in ensemble.inputs}
    for step in ensemble.steps:
        model = CONFIGS[step.model]
        assert set(step.inputs) <= {tensor.name for tensor in model.inputs}
        assert set(step.outputs) <= {tensor.name for tensor in model.outputs}
        assert set(step.inputs.values()) <= known
        known |= set(step.outputs.values())
    assert {tensor.name for tensor in ensemble.outputs} <= known
    # what a client may send reaches a model
    used = {name for step in ensemble.steps for name in step.inputs.values()}
    assert {tensor.name for tensor in ensemble.inputs} <= used


def test_triton_loads_the_five_models_and_streams_through_the_ensemble(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    models = []
    for config in CONFIGS.values():
        # postprocessing keeps its instances, which must not overtake each other
        small = config if config.name == "postprocessing" else dataclasses.replace(config, num_instances=1)
        if config.backend == "tensorrtllm":
            small = dataclasses.replace(small, backend="python")
        models.append(ServedModel(config=small, source=MODELS.get(config.name)))
    write_repository(repository, models)
    install = find_install()
    assert install is not None
    link_backends(install, tmp_path / "backends")
    http_port, grpc_port, metrics_port = free_ports("127.0.0.1", 3)
    spec = LaunchSpec(
        repository=repository, backends=tmp_path / "backends", host="127.0.0.1", http_port=http_port,
        grpc_port=grpc_port, metrics_port=metrics_port, exit_timeout_s=5,
    )  # fmt: skip
    process = ServerProcess.start(install, spec, tmp_path / "log", dies_with_parent=True)
    try:
        deadline = time.monotonic() + 120
        while not probe.is_http_ready("127.0.0.1", http_port, timeout_s=1.0):
            process.check_alive()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        assert probe.http_instance("127.0.0.1", http_port, 30) == "abc"
        assert probe.generate("127.0.0.1", grpc_port, "ab c", 200, 60, instance="abc") == "ab c" * 50
    finally:
        process.kill()
