"""What published runs near to the asked one change, against a slow textbook process and the table itself."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from tkit.planner.engines import engine
from tkit.planner.gpus import find_gpu
from tkit.planner.kernels import Fold, choose, doubtful, is_held, mape, predicted, widths
from tkit.planner.models import find_shape
from tkit.planner.neighbours import Kernel, Neighbours, Run, Width
from tkit.planner.planning import make_plan
from tkit.planner.wish import Wish

KERNEL = Kernel(
    scale=0.5, noise=0.1, level=0.3, version=0.8, generation=0.5, gpu=0.6, arch=0.4, format=0.7, attention_dp=0.5, model=1.5,
    tp=2.0, pp=1.0, isl=2.0, osl=1.5, requests=2.5,
)  # fmt: skip
WIDTHS = [Width(deviation=0.2, low=-1.0, high=1.5, n=50), Width(deviation=100.0, low=-2.0, high=2.0, n=40)]
RUN = Run(
    engine="vllm", version="0.12.0", generation="0.x", gpu="H100-SXM", num_params=8_030_261_248,
    num_active_params=8_030_261_248, is_moe=False, quant="fp8", tp=1, pp=1, has_attention_dp=False, isl=1024, osl=1024,
    load="closed", requests=16.0, metric="tpot",
)  # fmt: skip


def neighbours(runs, residuals, values=None, doubts=None):
    return Neighbours(
        runs,
        values or list(range(1, len(runs) + 1)),
        residuals,
        doubts or [False] * len(runs),
        {"tpot dense": KERNEL, "ttft dense": KERNEL},
        {"tpot dense": WIDTHS, "ttft dense": WIDTHS},
    )


def slow_covariance(a, b):
    arch = {"H100-SXM": "Hopper", "H200-SXM": "Hopper", "B200": "Blackwell"}
    c = KERNEL.scale**2
    if a.version != b.version:
        c *= KERNEL.version * (KERNEL.generation if a.generation != b.generation else 1)
    if a.gpu != b.gpu:
        c *= KERNEL.gpu * (KERNEL.arch if arch[a.gpu] != arch[b.gpu] else 1)
    if a.quant != b.quant:
        c *= KERNEL.format
    c *= math.exp(
        -abs(math.log2(a.tp / b.tp)) / KERNEL.tp - 2 * abs(math.log(a.num_params / b.num_params)) / KERNEL.model
    )
    load = sum(abs(math.log(getattr(a, n) / getattr(b, n))) / getattr(KERNEL, n) for n in ("isl", "osl", "requests"))
    return c * (KERNEL.level + (1 - KERNEL.level) * math.exp(-load))


def test_a_textbook_process_gives_the_same():
    rng = np.random.default_rng(0)
    runs = [
        dataclasses.replace(
            RUN, version=str(rng.choice(["0.12.0", "0.13.0"])), gpu=str(rng.choice(["H100-SXM", "H200-SXM", "B200"])),
            quant=str(rng.choice(["none", "fp8"])), tp=int(rng.choice([1, 2, 4])), isl=int(rng.integers(100, 8000)),
            osl=int(rng.integers(100, 8000)), requests=float(rng.integers(1, 256)), num_params=size, num_active_params=size,
        )
        for size in rng.integers(7e9, 7e10, 30).tolist()
    ]  # fmt: skip
    residuals, doubts = rng.normal(0.2, 0.3, len(runs)), [index == 3 for index in range(len(runs))]
    noise = np.diag([KERNEL.noise**2 + doubt for doubt in doubts])
    among = np.array([[slow_covariance(a, b) for b in runs] for a in runs]) + noise
    near = np.array([slow_covariance(RUN, b) for b in runs])
    mean = near @ np.linalg.inv(among) @ residuals
    deviation = math.sqrt(KERNEL.scale**2 + KERNEL.noise**2 - near @ np.linalg.inv(among) @ near)
    found = neighbours(runs, residuals, doubts=doubts).correction(RUN)
    assert math.log(found.factor) == pytest.approx(mean, rel=1e-9)
    assert math.log(found.high) == pytest.approx(2.0 * deviation, rel=1e-9)  # the far width
    assert found.n == 40


def test_leaving_out_blocks_is_predicting_without_them():
    rng = np.random.default_rng(1)
    runs = [dataclasses.replace(RUN, requests=float(2**power), isl=isl) for power in range(6) for isl in (512, 4096)]
    residuals, out = rng.normal(0, 0.3, 12), np.arange(12) % 3 == 0
    left, deviation = predicted(KERNEL, runs, [Fold(out, residuals), Fold(~out, residuals)])
    inside = neighbours([run for run, is_out in zip(runs, out, strict=True) if not is_out], residuals[~out])
    for index in np.flatnonzero(out):
        found = inside.correction(runs[index])
        assert residuals[index] - left[index] == pytest.approx(math.log(found.factor), abs=1e-9)
        assert deviation[index] * (1.5 if deviation[index] <= 0.2 else 2.0) == pytest.approx(
            math.log(found.high), rel=1e-9
        )


def test_far_from_everything_the_formula_stands():
    other_engine = neighbours([dataclasses.replace(RUN, engine="sglang")], [0.7]).correction(RUN)
    assert (other_engine.factor, other_engine.source) == (1.0, "no published run near")
    far = dataclasses.replace(RUN, num_params=2 * 10**12, num_active_params=2 * 10**12)
    assert neighbours([RUN], [0.7]).correction(far).factor == pytest.approx(1.0, abs=1e-3)
    near = neighbours([RUN], [0.7]).correction(RUN)
    assert 1.8 < near.factor < math.exp(0.7)
    assert near.source == "1 published run of this deployment"
    assert near.high < other_engine.high


def test_a_row_is_not_its_own_neighbour_and_no_copy_of_it_is():
    copy = dataclasses.replace(RUN, version="0.13.0")  # a later table that repeats the number
    again = dataclasses.replace(RUN, version="0.13.0")  # measured again
    table = neighbours([RUN, copy, again], [0.7, 0.7, -0.2], values=[0.020, 0.020, 0.009])
    alone = neighbours([again], [-0.2], values=[0.009])
    assert table.correction(RUN, 0.020) == alone.correction(RUN)
    assert table.correction(RUN).factor > 1 > alone.correction(RUN).factor


def test_throughput_of_a_closed_loop_follows_the_time_per_token():
    table = neighbours([RUN], [0.4])
    tpot, rate = (table.correction(dataclasses.replace(RUN, metric=metric)) for metric in ("tpot", "throughput"))
    assert rate.factor == 1 / tpot.factor
    assert (rate.low, rate.high) == (1 / tpot.high, 1 / tpot.low)


def test_a_search_finds_what_made_the_residuals_and_doubts_the_misprint():
    """Versions all alike, GPUs with nothing in common."""
    rng = np.random.default_rng(2)
    runs = [
        dataclasses.replace(RUN, version=version, gpu=gpu, requests=float(requests))
        for version in ("0.12.0", "0.13.0") for gpu in ("H100-SXM", "H200-SXM", "B200") for requests in (1, 2, 4, 8, 16, 32, 64)
    ]  # fmt: skip
    of_gpu = {"H100-SXM": 0.4, "H200-SXM": -0.4, "B200": 0.1}
    residuals = np.array([of_gpu[run.gpu] for run in runs]) + rng.normal(0, 0.02, len(runs))
    ways = {
        name: [Fold(np.array([getattr(run, key) == value for run in runs]), residuals) for value in values]
        for name, key, values in (
            ("versions", "version", ("0.12.0", "0.13.0")),
            ("GPUs", "gpu", tuple(of_gpu)),
        )
    }
    kernel = choose(runs, ways)
    assert kernel.version > 0.9
    assert kernel.gpu < 0.3
    assert mape(predicted(kernel, runs, ways["versions"])[0]).mean() < 0.05
    residuals[5] += 2.0
    rows = [Fold(np.arange(len(runs)) % 4 == fold, residuals) for fold in range(4)]
    assert np.flatnonzero(doubtful(kernel, runs, rows)).tolist() == [5]


def test_widths_hold_nine_in_ten_of_what_they_have_not_seen():
    rng = np.random.default_rng(3)
    deviation = rng.uniform(0.05, 0.5, 3000)
    left = rng.normal(0, 1, 3000) * deviation * 1.4  # the process thinks too well of itself
    found = widths(left, deviation)
    assert [width.n for width in found] == [600] * 5
    folds = [Fold(np.arange(3000) % 5 == fold, left) for fold in range(5)]
    inside = is_held({"rows": left}, {"rows": deviation}, {"rows": folds}, "rows")
    assert inside.mean() == pytest.approx(0.93, abs=0.015)  # TAIL beyond either end


def test_a_plan_says_what_it_was_corrected_by():
    shape = find_shape("Llama-3.1-8B")
    wish = Wish(
        gpu=find_gpu("h100"), quant="none", tp=1, engine="tensorrt-llm", engine_version="1.0.0rc3", isl=1024, osl=512
    )
    plan = make_plan(shape, wish, "table")
    assert plan.tpot_ms.source.endswith("published runs of this deployment")
    assert plan.tok_s.factor == pytest.approx(1 / plan.tpot_ms.factor)
    asked = next(point for point in plan.curve if point.concurrency == wish.concurrency)
    assert (asked.tpot_ms, asked.tok_s) == (plan.tpot_ms.value, plan.tok_s.value)
    own = dataclasses.replace(engine("tensorrt-llm", "1.0.0rc3"), is_refitted=True)
    uncorrected = make_plan(shape, wish, "table", constants=own)
    assert uncorrected.tpot_ms.factor == 1.0
    assert uncorrected.tpot_ms.value * plan.tpot_ms.factor == pytest.approx(plan.tpot_ms.value)
    assert uncorrected.tpot_ms.source.startswith("the constants alone")
