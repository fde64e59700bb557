"""Worked figures, each with its arithmetic."""

from __future__ import annotations

import pytest

from tkit.planner.fit import Demand, choose
from tkit.planner.gpus import find_gpu
from tkit.planner.memory import GIB, kv_bytes_per_sequence, kv_bytes_per_token, ledger, resident_bytes, stored_bytes
from tkit.planner.models import find_shape, shape_table
from tkit.planner.page import memory_plot
from tkit.planner.planning import make_plan
from tkit.planner.precision import precision
from tkit.planner.shapes import num_params
from tkit.planner.wish import Wish
from tkit.specs.parallel import Parallel

ONE = Parallel()
L70, L7 = shape_table()["Llama-3.1-70B"], shape_table()["Llama-2-7B"]


def weight_bytes(shape, quant="none", parallel=ONE):
    return sum(resident_bytes(shape, precision(quant), parallel)[0].values())


def test_16_bit_weights_are_two_bytes_per_parameter():
    assert weight_bytes(L7) == 2 * 6_738_415_616  # 13.5 GB, the "14 GB" of a 7B model
    assert weight_bytes(L70) == 2 * 70_553_706_496  # 141 GB, the "140 GB"
    assert weight_bytes(shape_table()["Qwen2.5-14B"]) == 2 * 14_770_033_664  # 29.5 GB, the "28 GB"


def test_int4_of_a_7b_model_is_3_5_gb_and_its_scales_and_embeddings():
    embeddings = 2 * 2 * 32000 * 4096  # both stay 16-bit
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    norms = 2 * 65 * 4096
    prequant = 2 * 32 * (4 * 4096 + 11008)  # one factor per input: qkv, dense, fc, gate take 4096, proj 11008
    assert 6_738_415_616 // 2 == 3_369_207_808  # every weight in 4 bits: the "3.5 GB"
    # 0.5 byte, and a 4-byte scale per 128 = 0.25 bit
    assert weight_bytes(L7, "int4_awq") == linear // 2 + linear // 128 * 4 + prequant + embeddings + norms


def test_kv_per_token_with_grouped_queries():
    assert kv_bytes_per_token(L70, "fp16") == 2 * 80 * 8 * 128 * 2 == 327_680
    assert 327_680 / 2**20 == 0.3125
    assert 2 * 80 * 64 * 128 * 2 / 2**20 == 2.5  # were it multi-head
    assert kv_bytes_per_token(L70, "fp8") == 163_840


@pytest.mark.parametrize(
    ("tokens", "gib"), [(32768, 10), (131072, 40)]
)  # 32768 x 327 680 B = 10 GiB; multi-head would be 8 times that: 80 and 320
def test_long_contexts(tokens, gib):
    assert kv_bytes_per_sequence(L70, "fp16", tokens, ONE) == gib * GIB
    assert 8 * gib * GIB == tokens * int(2.5 * 2**20)


def test_llama_2_7b_cache():
    assert kv_bytes_per_sequence(L7, "fp16", 1024, ONE) == 2 * 32 * 32 * 128 * 2 * 1024 == GIB // 2
    assert 64 * kv_bytes_per_sequence(L7, "fp16", 32768, ONE) == 1024 * GIB  # 32k x 64 users: 1 TiB


def test_64_users_of_2k_overflow_two_80_gb_cards():
    cache = 64 * kv_bytes_per_sequence(L70, "fp16", 2048, ONE)
    assert cache == 40 * GIB
    assert weight_bytes(L70) + cache > 2 * 85.5e9  # 141.1 + 42.9 = 184.1 GB
    demand = Demand(isl=1024, osl=1024, concurrency=64)
    best, considered = choose(L70, precision("none"), "fp16", find_gpu("h100"), demand)
    assert best.parallel.world_size == 4
    assert next(item for item in considered if item.parallel.world_size == 2).binds == "KV cache"


def test_28_gb_does_not_fit_24_gb():
    shape, gpu = shape_table()["Qwen2.5-14B"], find_gpu("rtx-4090")
    assert weight_bytes(shape) > gpu.usable_bytes
    best, considered = choose(shape, precision("none"), "fp16", gpu, Demand(isl=512, osl=512, concurrency=1))
    assert considered[0].binds == "weights"
    assert best.parallel.world_size == 2


def test_windows_cap_and_blocks_round():
    gemma = shape_table()["Gemma-2-9B"]  # 21 layers of 4096, 21 full; 8 KV heads of 256
    per_layer_token = 2 * 8 * 256 * 2
    assert kv_bytes_per_sequence(gemma, "fp16", 8192, ONE) == 21 * (4096 + 8192) * per_layer_token
    assert kv_bytes_per_sequence(L70, "fp16", 33, ONE) == 64 * 327_680  # two blocks of 32


def test_mla_is_the_same_on_every_rank_and_few_kv_heads_repeat():
    deepseek = shape_table()["DeepSeek-V3/R1"]
    assert kv_bytes_per_token(deepseek, "fp16") == 61 * (512 + 64) * 2 == 70_272
    assert kv_bytes_per_token(deepseek, "fp16", tp_size=8) == 70_272
    assert kv_bytes_per_token(L70, "fp16", tp_size=8) == 327_680 // 8
    assert kv_bytes_per_token(L70, "fp16", tp_size=16) == 327_680 // 8  # one head, held by two ranks


def test_layers_without_attention_hold_no_cache():
    assert kv_bytes_per_token(shape_table()["Llama-3.3-Nemotron-Super-49B"], "fp16") == 49 * 2 * 8 * 128 * 2


@pytest.mark.parametrize("engine", ["tensorrt-llm", "vllm", "sglang"])
@pytest.mark.parametrize("model", ["Llama-3.1-8B", "Mixtral-8x7B", "gpt-oss-120b"])
def test_a_ledger_sums_to_the_card(model, engine):
    shape, gpu = shape_table()[model], find_gpu("h200")
    book = ledger(shape, precision("fp8"), "fp8", gpu, Parallel(tp_size=2), context=4096, engine=engine)
    assert book.weight_bytes + book.activations + book.overhead + book.kv_pool + book.unused == gpu.usable_bytes
    assert sum(book.weights_by_dtype.values()) == book.weight_bytes


def test_bits_per_weight_of_the_four_bit_formats():
    n = 4096 * 4096
    linear = {name: sum(_size(tensor) for tensor in precision(name).tensors) for name in ("nvfp4", "mxfp4")}
    assert linear["nvfp4"] == n // 2 + n // 16 + 8  # 0.5625 B and two scalars
    assert linear["mxfp4"] / n == 0.53125


def _size(tensor):
    from tkit.planner.precision import DTYPE_BYTES

    size = DTYPE_BYTES[tensor.dtype]
    for side in tensor.shape(4096, 4096):
        size *= side
    return size


def test_ranks_add_up_to_the_model():
    assert stored_bytes(L70, precision("none"), ONE) == 2 * num_params(L70)
    # every rank keeps the whole embedding and all norms
    repeated = 2 * (128256 * 8192 + 161 * 8192)
    assert stored_bytes(L70, precision("none"), Parallel(tp_size=4)) == 2 * num_params(L70) + 3 * repeated


def test_the_plot_of_memory_says_what_fits():
    wish = Wish(gpu=find_gpu("l40s"), concurrency=47)  # one more than fits with 4096 tokens
    plan = make_plan(find_shape("Llama-3.1-8B"), wish, "table", with_alternatives=False)
    assert plan.concurrency_by_context[4096] == 46
    plot = memory_plot(plan)
    (limit,) = [row["y"] for layer in plot["layer"] if "data" in layer for row in layer["data"]["values"]]
    for row in plot["data"]["values"]:
        fits = int(row["users"]) <= plan.concurrency_by_context[row["context"]]
        assert (row["gigabytes"] <= limit * (1 + 1e-9)) == fits, row
