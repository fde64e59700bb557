"""Times against arithmetic by hand, with round constants."""

from __future__ import annotations

import numpy as np
import pytest

from tkit.planner.engines import engine, version_number
from tkit.planner.gpus import find_gpu, gpu_table
from tkit.planner.models import shape_table
from tkit.planner.precision import precision
from tkit.planner.published import read_table
from tkit.planner.roofline import Efficiencies, decode_step, experts_read, limit, machine, prefill_s, stacked
from tkit.planner.speculation import speculative_gain
from tkit.planner.speed import offline_throughput, throughput, tpot_s
from tkit.specs.parallel import Parallel

FULL = Efficiencies(
    memory=1.0, memory_fp4=1.0, kv=1.0, gemm_fp16=1.0, gemm_fp8=1.0, gemm_int8=1.0, gemm_fp4=1.0, ramp=1e-9,
    attention=1.0, nvlink=1.0, pcie=1.0, pcie_far=1.0, alpha_nvlink_s=0.0, alpha_pcie_s=0.0, host_s=0.0,
    host_per_sequence_s=0.0, moe_gemm=1.0, moe_layer_s=0.0, moe_host_s=0.0, prefill=1.0, request_s=0.0, moe_request_s=0.0,
    request_in_flight_s=0.0, waiting=1.0, kv_heads=0.0, reserved_bytes=0.0,
)  # fmt: skip


def on(model, gpu, tp=1, quant="none", kv="fp16"):
    return machine(shape_table()[model], precision(quant), kv, find_gpu(gpu), Parallel(tp_size=tp))


def test_decode_reads_every_weight_but_the_embedding():
    m = on("Llama-3.1-8B", "l4")
    step = decode_step(m, 1, 0, FULL)
    assert step.weights == pytest.approx(2 * (8_030_261_248 - 128256 * 4096) / 300e9)  # 15.0 GB at 300 GB/s: 50 ms
    assert step.total == pytest.approx(step.weights)
    assert step.binds == "memory bandwidth (weights)"


def test_decode_reads_the_cache_of_every_sequence():
    step = decode_step(on("Llama-3.1-70B", "h200", tp=2), 8, 4096, FULL)
    assert step.kv == pytest.approx(8 * 4096 * 327_680 / (2 * 4.8e12))


def test_an_all_reduce_is_a_ring_twice_a_layer():
    step = decode_step(on("Llama-3.1-70B", "h200", tp=4), 16, 0, FULL)
    # 2 (tp-1)/tp x 16 tokens x 8192 x 2 B over 450 GB/s, 160 times
    assert step.communication == pytest.approx(160 * 2 * 3 / 4 * 16 * 8192 * 2 / 450e9)
    slow = decode_step(on("Llama-3.1-70B", "l40s", tp=4), 16, 0, FULL)
    assert slow.communication == pytest.approx(step.communication * 450 / 31.5)


def test_prefill_multiplies_every_weight_with_every_token():
    m = on("Llama-3.1-8B", "l4")
    products = 2 * 2048 * (8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096)
    attention = 4 * 2048 * (2048 / 2) * 32 * 4096  # causal: half of 2048 is visible
    assert prefill_s(m, 2048, FULL) == pytest.approx((products + attention) / 121e12, rel=1e-6)


def test_tpot_waits_for_the_prompts_beside_it_and_throughput_follows():
    m = on("Llama-3.1-8B", "l4")
    step = float(decode_step(m, 32, 1024 + 256, FULL).total)
    prompt = float(prefill_s(m, 1024, FULL, requests=8)) / 8
    assert tpot_s(m, 32, 1024, 512, FULL) == pytest.approx(step + 31 / 512 * prompt)
    assert throughput(m, 32, 1024, 512, FULL) == pytest.approx(512 / (prompt + 512 * step / 32))
    # a long run of full batches is the steady state
    assert offline_throughput(m, 32, 1024, 512, 32e6, FULL) == pytest.approx(
        throughput(m, 32, 1024, 512, FULL), rel=1e-3
    )


def test_a_batch_touches_more_experts():
    m = on("Mixtral-8x7B", "h100")
    assert experts_read(m, 1) == pytest.approx(2 / 8)
    assert experts_read(m, 4) == pytest.approx(1 - (6 / 8) ** 4)
    assert experts_read(m, 1000) == pytest.approx(1)


def test_formats_without_tensor_cores_are_unpacked():
    assert on("Llama-3.1-8B", "a100", quant="int4_awq").flops == on("Llama-3.1-8B", "a100").flops
    assert on("gpt-oss-20b", "h100", quant="mxfp4").math == 0  # 16-bit products
    assert on("gpt-oss-20b", "b200", quant="mxfp4").math == 3


def test_arrays_give_what_floats_give():
    machines = [
        on("Llama-3.1-8B", "l4"),
        on("Mixtral-8x7B", "h100", tp=2),
        on("Llama-3.1-70B", "l40s", tp=8, quant="fp8"),
    ]
    e = engine().efficiencies
    together = tpot_s(stacked(machines), np.array([4.0, 8.0, 16.0]), 512.0, 128.0, e)
    assert together == pytest.approx(
        [float(tpot_s(m, b, 512, 128, e)) for m, b in zip(machines, (4, 8, 16), strict=True)]
    )


def test_speculation_pays_while_memory_binds():
    m = on("Llama-3.1-70B", "h100", tp=4)
    # verifying five tokens reads the same bytes as one: (1 - .8^5) / (1 - .8) = 3.36 tokens for 1 + 4 x 5 % steps
    assert speculative_gain(m, 1, 0, 0.8, 4, FULL) == pytest.approx(
        3.3616 / 1.2, rel=5e-3
    )  # and the all-reduce of five tokens
    assert speculative_gain(m, 4096, 0, 0.6, 4, FULL) < 1


def test_constants_are_chosen_by_version():
    assert engine(version="0.12.0").generation == "0.5-0.14"
    assert engine(version="0.17.0").generation == "0.15-0.20"
    assert engine(version="1.0.0rc3").generation == "1.0"
    assert engine(version="1.2.0rc6").generation == engine().generation == "1.1+"
    assert version_number("gpt-oss-dev") is None


def test_bands_fall_back_to_wider_cells():
    fitted = engine()
    assert fitted.band("throughput", "H100-SXM", "fp8", False).cell == "throughput/fp8/dense/seen"
    assert fitted.band("throughput", "T4", "fp8", False).cell == "throughput/fp8/dense/new"
    assert engine("vllm").band("throughput", "H100-SXM", "fp8", False).n == 0


def test_every_gpu_has_its_numbers_and_their_source():
    import csv

    from tkit.planner.gpus import TABLE

    rows = list(csv.DictReader(TABLE.read_text().splitlines()))
    assert all(row["source"].startswith("https://") for row in rows)
    for gpu in gpu_table().values():
        assert 0.9 * gpu.memory_bytes < gpu.usable_bytes < 1.1 * gpu.memory_bytes
        assert 50 < gpu.fp16_flops / gpu.bandwidth < 500
    assert find_gpu("h100").usable_bytes == 85_500_000_000
    assert find_gpu("a100-pcie").nvlink_domain == 1


def test_the_limit_is_the_slowest_of_bytes_and_operations():
    """Llama-3.1-8B on an L4: one sequence waits for 15 GB of weights, many with long prompts for 121 TFLOP/s."""
    m = on("Llama-3.1-8B", "l4")
    weights = 2 * (8_030_261_248 - 128256 * 4096)
    kv = (1024 + 256) * 2 * 32 * 8 * 128 * 2  # of one sequence, half of its answer written
    alone = limit(m, 1, 1024, 512)
    assert alone.tok_s == pytest.approx(300e9 / (weights + kv))
    assert alone.tpot_s == pytest.approx(1 / alone.tok_s)
    assert alone.binds == "memory bandwidth (weights)"
    head, norms = 128256 * 4096, 65 * 4096
    answers = 2 * (8_030_261_248 - 128256 * 4096 - norms)
    prompts = 2 * (8_030_261_248 - 128256 * 4096 - head - norms) * 1024 / 16
    attention = 4 * 1024 * 512 * 32 * 4096 / 16
    many = limit(m, 64, 1024, 16)
    assert many.binds == "compute"
    assert many.tok_s == pytest.approx(121e12 / (answers + prompts + attention), rel=1e-6)
    assert many.tpot_s == pytest.approx(
        (weights + 64 * kv * 1032 / 1280) / 300e9
    )  # prompts hold up the rate, not a step
    assert limit(m, 64, 128, 8192).binds == "memory bandwidth (KV cache)"


def test_the_limit_of_the_first_token_is_one_prompt_alone():
    m = on("Llama-3.1-8B", "l4")
    short, long = limit(m, 64, 1, 512), limit(m, 64, 2048, 512)
    assert (short.ttft_s, short.ttft_binds) == (
        pytest.approx(2 * (8_030_261_248 - 128256 * 4096) / 300e9),
        "memory bandwidth (weights)",
    )
    assert (long.ttft_s, long.ttft_binds) == (pytest.approx(float(prefill_s(m, 2048, FULL)), rel=1e-6), "compute")
    stages = machine(shape_table()["Llama-3.1-8B"], precision("none"), "fp16", find_gpu("l4"), Parallel(pp_size=2))
    assert limit(stages, 64, 2048, 512).ttft_s == pytest.approx(long.ttft_s / 2)  # its parts are in both stages at once
    assert limit(stages, 64, 1, 512).ttft_s == pytest.approx(short.ttft_s)  # one token passes one after the other


def test_nothing_published_is_faster_than_the_limit():
    """Rows of NVIDIA, InferenceX and MLPerf. The one above is known: a Mixtral row whose 16-bit weights alone would
    take longer to read. No first token comes sooner."""
    above, count, first = [], 0, []
    for row in read_table()[0]:
        if row.metric == "ttft":
            first.append(row.value / limit(row.machine, 1, row.isl, row.osl).ttft_s)
        if row.load == "rate" or row.metric == "ttft":
            continue
        batch = row.amount
        if row.load == "offline":  # all requests are there: as many run as fit
            batch = max(min(batch, row.kv_pool / row.kv_bytes_per_sequence), 1)
        found = limit(row.machine, batch, row.isl, row.osl)
        count += 1
        if row.value > found.tok_s if row.metric == "throughput" else row.value < found.tpot_s:
            above.append((row.shape.name, row.gpu))
    assert count > 2500
    assert len(first) > 1000 and 1 < min(first) < 2
    assert above == [("Mixtral-8x7B", "A100-SXM-80")]
