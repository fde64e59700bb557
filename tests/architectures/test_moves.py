from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tkit.architectures.moves import plan_moves, shard_range
from tkit.errors import InputError
from tkit.specs.model import ModelSpec
from tkit.specs.parallel import Parallel
from tkit.specs.precision import Precision

SPEC = ModelSpec(
    architecture="LlamaForCausalLM", dtype="bfloat16", num_layers=5, hidden_size=256, intermediate_size=768, num_heads=8,
    num_kv_heads=4, head_size=32, vocab_size=1001, max_position_embeddings=128, hidden_act="silu", norm_epsilon=1e-5,
    rope_theta=10000.0,
)  # fmt: skip


def test_shapes_of_int4_on_two_ranks_are_those_of_the_contract():
    outputs = {
        output.name: output
        for move in plan_moves(SPEC, Precision.of("int4_awq"), Parallel(tp_size=2))
        for output in move.outputs
        if output.rank == 1
    }
    layer = "transformer.layers.0."
    assert outputs[layer + "attention.qkv.weight"].shape == ((128 + 64 + 64) // 2, 256)
    assert outputs[layer + "attention.qkv.weights_scaling_factor"].shape == (256, 2)
    assert outputs[layer + "attention.qkv.prequant_scaling_factor"].shape == (256,)
    assert outputs[layer + "attention.dense.weight"].shape == (128, 128)
    assert outputs[layer + "attention.dense.weights_scaling_factor"].shape == (256, 1)
    assert outputs[layer + "attention.dense.prequant_scaling_factor"].shape == (128,)
    assert outputs[layer + "mlp.proj.weight"].shape == (128, 384)
    assert outputs["lm_head.weight"].shape == (501, 256)
    assert outputs["transformer.vocab_embedding.weight"].shape == (1001, 256)


def test_layers_are_numbered_per_stage_and_the_first_stages_take_the_extras():
    moves = plan_moves(SPEC, Precision.of("none"), Parallel(pp_size=2))
    names = [{output.name for move in moves for output in move.outputs if output.rank == rank} for rank in (0, 1)]
    layers = [{int(name.split(".")[2]) for name in rank if ".layers." in name} for rank in names]
    assert layers == [{0, 1, 2}, {0, 1}]
    assert "transformer.vocab_embedding.weight" in names[0] - names[1]
    assert {"transformer.ln_f.weight", "lm_head.weight"} <= names[1] - names[0]


@given(num_kv_heads=st.sampled_from([1, 2, 4, 8]), tp_size=st.sampled_from([1, 2, 4, 8]))
def test_every_rank_gets_the_kv_heads_its_query_heads_attend_to(num_kv_heads, tp_size):
    spec = dataclasses.replace(SPEC, num_kv_heads=num_kv_heads)
    for tp_rank in range(tp_size):
        start, stop = shard_range("kv_heads", spec, Parallel(tp_size=tp_size), tp_rank)
        held = set(range(start // 32, stop // 32))
        queries = range(tp_rank * 8 // tp_size, (tp_rank + 1) * 8 // tp_size)
        assert held == {query * num_kv_heads // 8 for query in queries}


def test_every_broken_rule_is_listed():
    with pytest.raises(InputError) as error:
        plan_moves(SPEC, Precision.of("int4_awq"), Parallel(tp_size=3, pp_size=6))
    text = str(error.value)
    assert "num_attention_heads 8 is not a multiple of tp 3" in text
    assert "num_key_value_heads 4 and tp 3" in text
    assert "pp 6 exceeds num_hidden_layers 5" in text
    assert "attention.qkv: out size 512 is not a multiple of 384 (128 x tp 3), as int4_awq kernels need" in text


def test_group_rule_names_the_layer_that_breaks_it():
    with pytest.raises(InputError, match=r"mlp.fc: out size 768 is not a multiple of 512 \(128 x tp 4\)"):
        plan_moves(SPEC, Precision.of("int4_awq"), Parallel(tp_size=4))
