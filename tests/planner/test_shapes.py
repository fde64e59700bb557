"""Parameter counts, exact; and stored bytes against the moves that `tkit build` carries out."""

from __future__ import annotations

import csv
import math

import pytest

from tkit.architectures.config import spec_from_hf
from tkit.architectures.moves import plan_moves
from tkit.errors import InputError
from tkit.planner.memory import stored_bytes
from tkit.planner.models import TABLE, find_shape, shape_table
from tkit.planner.precision import precision
from tkit.planner.shapes import (
    kv_values_per_token_layer,
    num_active_params,
    num_params,
    shape_from_config,
    shape_from_spec,
)
from tkit.specs.parallel import Parallel
from tkit.specs.precision import Precision
from tkit.specs.quantization import QUANT_FORMATS

BYTES = {"model": 2, "F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "I32": 4}
ROWS = list(csv.DictReader(TABLE.read_text().splitlines()))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model"])
def test_parameter_counts_are_exact(row):
    shape = shape_table()[row["model"]]
    assert num_params(shape) == int(row["params_total"])
    assert num_active_params(shape) == int(row["params_active"])
    if row["params_ref"]:
        assert num_params(shape) == int(row["params_ref"])
    layers = sum(layer.has_attention for layer in shape.layers)
    assert layers * kv_values_per_token_layer(shape) * 2 == int(row["kv_bytes_per_token_bf16"])


SMALL = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 256, "dtype": "bfloat16",
}  # fmt: skip
GPT = {"vocab_size": 1024, "n_embd": 256, "n_layer": 3, "n_head": 8, "n_positions": 64, "dtype": "float16"}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
CONFIGS = {
    "LlamaForCausalLM": {"attention_bias": True, "mlp_bias": True},
    "MistralForCausalLM": {},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": {},
    "Qwen2MoeForCausalLM": {**MOE, "shared_expert_intermediate_size": 512, "decoder_sparse_step": 2},
    "Qwen3MoeForCausalLM": MOE,
    "GemmaForCausalLM": {},
    "Gemma2ForCausalLM": {},
    "Gemma3ForCausalLM": {},
    "Phi3ForCausalLM": {},
    "GPT2LMHeadModel": GPT,
    "GPTJForCausalLM": {**GPT, "rotary_dim": 16},
    "FalconForCausalLM": {"multi_query": True},
}


LAYOUTS = [Parallel(tp_size=tp, pp_size=pp) for tp, pp in ((1, 1), (2, 1), (8, 1), (1, 2))]


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("quant", QUANT_FORMATS)
def test_stored_bytes_equal_the_plan_of_the_build(architecture, quant):
    sizes = {} if architecture.startswith("GPT") else SMALL
    spec = spec_from_hf({**sizes, **CONFIGS[architecture], "architectures": [architecture]}, "config.json")
    shape, compared = shape_from_spec(spec, "small"), 0
    for parallel in LAYOUTS:
        try:
            moves = plan_moves(spec, Precision.of(quant), parallel)
        except InputError:  # layouts that this format or architecture does not have
            continue
        outputs = [output for move in moves for output in move.outputs]
        planned = sum(math.prod(output.shape) * BYTES[output.dtype] for output in outputs)
        assert stored_bytes(shape, precision(quant), parallel) == planned
        compared += 1
    assert compared or spec.num_experts or spec.num_kv_heads == 1


def test_variants_of_a_model_have_its_shape():
    assert find_shape("meta-llama/Llama-3.1-70B-Instruct") is find_shape("Llama 3.1 70B")
    assert find_shape("mistralai/Mistral-7B-Instruct-v0.3").vocab_size == 32768
    assert find_shape("nvidia/DeepSeek-R1-NVFP4").latent.kv_lora == 512
    assert find_shape("nobody/unheard-of-7b") is None


DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "n_shared_experts": 1, "n_routed_experts": 256, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "qk_nope_head_dim": 128, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
    "max_position_embeddings": 163840,
}  # fmt: skip
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "num_hidden_layers": 36, "num_local_experts": 128, "vocab_size": 201088,
    "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
    "sliding_window": 128, "num_experts_per_tok": 4, "max_position_embeddings": 131072,
}  # fmt: skip
NAS = {
    "architectures": ["DeciLMForCausalLM"], "num_hidden_layers": 2, "vocab_size": 1000, "hidden_size": 768,
    "num_attention_heads": 8, "max_position_embeddings": 64,
    "block_configs": [
        {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 1.0}},
        {"attention": {"no_op": True}, "ffn": {"ffn_mult": 0.5}},
    ],
}  # fmt: skip


def test_configs_that_are_planned_but_not_converted():
    assert shape_from_config(DEEPSEEK, "DeepSeek-V3/R1", "") == find_shape("deepseek-ai/DeepSeek-V3")
    assert shape_from_config(GPT_OSS, "gpt-oss-120b", "") == find_shape("openai/gpt-oss-120b")
    nas = shape_from_config(NAS, "nas", "")
    assert [layer.intermediate_size for layer in nas.layers] == [512, 256]  # 2/3 x 768 = 512; 256
    # embeddings 2 x 1000 x 768, q and o 2 x 768^2, k and v 2 x 768 x 192, MLP 3 x 768 x 768, norms 4 x 768
    assert num_params(nas) == 1_536_000 + 1_179_648 + 294_912 + 1_769_472 + 3_072


def test_unknown_architectures_and_missing_sizes_are_named():
    with pytest.raises(InputError, match="did you mean"):
        shape_from_config({"architectures": ["DeepseekV3ForCausal"]}, "x", "x/config.json")
    with pytest.raises(InputError, match='x/config.json: key "kv_lora_rank" is missing'):
        shape_from_config({k: v for k, v in DEEPSEEK.items() if k != "kv_lora_rank"}, "x", "x/config.json")
