from __future__ import annotations

import pytest
from transformers import LlamaConfig

from tkit.architectures.config import hf_config, spec_from_hf, spec_from_trtllm, trtllm_config
from tkit.errors import InputError
from tkit.specs.parallel import Parallel
from tkit.specs.precision import Precision

LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
TRANSFORMERS_4 = {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}
TRANSFORMERS_5 = {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}}
OLDEST = {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}


@pytest.mark.parametrize("spelling", [TRANSFORMERS_4, TRANSFORMERS_5])
def test_both_spellings_of_rope_reach_the_checkpoint(spelling):
    spec = spec_from_hf({**LLAMA_3_1_8B, **spelling}, "config.json")
    config = trtllm_config(spec, Precision.of("none"), Parallel())
    assert config["rotary_base"] == 500000.0
    assert config["rotary_scaling"] == LLAMA3_ROPE


def test_the_oldest_spelling_of_rope_type_is_read():
    spec = spec_from_hf({**LLAMA_3_1_8B, **OLDEST}, "config.json")
    assert spec.rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_checkpoint_config_holds_every_field_tensorrt_llm_needs_and_no_unknown_one_inside():
    spec = spec_from_hf({**LLAMA_3_1_8B, **TRANSFORMERS_4}, "config.json")
    config = trtllm_config(spec, Precision.of("int4_awq"), Parallel(tp_size=2, pp_size=2))
    assert config == {
        "architecture": "LlamaForCausalLM", "dtype": "bfloat16", "logits_dtype": "float32", "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "head_size": 128,
        "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072, "hidden_act": "silu",
        "norm_epsilon": 1e-5, "position_embedding_type": "rope_gpt_neox", "rotary_base": 500000.0,
        "rotary_scaling": LLAMA3_ROPE, "attn_bias": False, "mlp_bias": False, "qk_layernorm": False,
        "tie_word_embeddings": False, "use_parallel_embedding": False, "embedding_sharding_dim": 0,
        "mapping": {"world_size": 4, "tp_size": 2, "pp_size": 2},
        "quantization": {
            "quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None, "group_size": 128, "smoothquant_val": 0.5,
            "clamp_val": None, "use_meta_recipe": False, "has_zero_point": False, "pre_quant_scale": True,
            "exclude_modules": None,
        },
    }  # fmt: skip


@pytest.mark.parametrize("rope", [TRANSFORMERS_4, TRANSFORMERS_5, OLDEST, {}])
def test_the_way_back_loses_nothing(rope):
    spec = spec_from_hf({**LLAMA_3_1_8B, **rope}, "config.json")
    assert spec_from_trtllm(trtllm_config(spec, Precision.of("fp8"), Parallel())) == spec
    assert spec_from_hf(LlamaConfig(**hf_config(spec)).to_dict(), "config.json") == spec


def test_defaults_are_those_of_transformers():
    minimal = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
               "num_attention_heads": 4, "vocab_size": 100}  # fmt: skip
    spec, config = spec_from_hf(minimal, "config.json"), LlamaConfig(**minimal)
    assert (spec.max_position_embeddings, spec.hidden_act) == (config.max_position_embeddings, config.hidden_act)
    assert (spec.norm_epsilon, spec.tie_word_embeddings) == (config.rms_norm_eps, config.tie_word_embeddings)
    assert (spec.num_kv_heads, spec.head_size) == (config.num_key_value_heads, config.head_dim)
    assert spec.rope_theta == config.rope_parameters["rope_theta"]


def test_everything_wrong_with_a_config_is_listed_at_once():
    broken = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "trust_remote_code": True,
              "rope_parameters": {"rope_type": "llama4"}}  # fmt: skip
    with pytest.raises(InputError) as error:
        spec_from_hf(broken, "m/config.json")
    text = str(error.value)
    for part in (
        '"num_hidden_layers" is missing',
        '"vocab_size" is missing',
        "trust_remote_code",
        'did you mean "llama3"',
    ):
        assert part in text
    assert error.value.exit_code == 2


def test_unknown_architecture_names_the_near_one():
    with pytest.raises(
        InputError, match=r'unknown architecture "LLamaForCausalLM" \(did you mean "LlamaForCausalLM"\?\)'
    ):
        spec_from_hf({"architectures": ["LLamaForCausalLM"]}, "config.json")
