"""The simulation against cases that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tkit.planner.arrivals import lengths, poisson, simulate
from tkit.planner.engines import engine
from tkit.planner.gpus import find_gpu
from tkit.planner.models import find_shape
from tkit.planner.planning import make_plan
from tkit.planner.precision import precision
from tkit.planner.wall import Place, gpu_walls
from tkit.planner.wish import Wish
from tkit.specs.parallel import Parallel

RNG = np.random.default_rng


def run(isl, osl, **options):
    """A step takes 10 ms whatever the batch, a prompt token 0.1 ms."""
    settings = {"max_batch": 64, "max_num_tokens": 8192, **options}
    return simulate(lambda batch: 0.010, lambda tokens: 1e-4 * tokens, np.array(isl), np.array(osl), **settings)


def test_one_request_alone():
    served = run([100], [11], concurrency=1)
    assert served.ttft[0] == pytest.approx(0.010)  # 100 tokens, no step beside it
    assert served.tpot[0] == pytest.approx(0.010)
    assert served.duration_s == pytest.approx(0.010 + 10 * 0.010)


def test_a_burst_shares_one_step_until_the_token_budget():
    served = run([100] * 4, [2] * 4, concurrency=4, max_num_tokens=200)
    # two prompts fit a step of 200 tokens; the second pair waits for it, and decodes the first pair beside its own
    assert served.ttft == pytest.approx([0.020, 0.020, 0.050, 0.050])


def test_long_prompts_are_chunked():
    served = run([1000], [2], concurrency=1, max_num_tokens=300)
    assert served.ttft[0] == pytest.approx(0.100)  # 300 + 300 + 300 + 100 tokens


def test_a_full_cache_makes_requests_wait():
    served = run([100] * 2, [11] * 2, concurrency=2, max_batch=1)
    assert served.ttft == pytest.approx([0.010, 0.010 + 0.100 + 0.010])


def test_arrivals_are_waited_for():
    served = run([100, 100], [3, 3], arrivals_s=np.array([1.0, 5.0]))
    assert served.ttft == pytest.approx([0.010, 0.010])
    assert served.duration_s == pytest.approx(5.0 + 0.030)


def test_the_wait_grows_with_the_load_as_a_queue_does():
    """One-token answers are an M/D/1 queue: mean wait = S + rho / (2 (1 - rho)) S (Pollaczek-Khinchine)."""
    service, rho, count = 0.010, 0.7, 20000
    arrivals = poisson(rho / service, count, RNG(1))
    served = run([100] * count, [1] * count, arrivals_s=arrivals, max_num_tokens=100)
    # at most one prompt per step
    assert served.ttft.mean() == pytest.approx(service * (1 + rho / (2 * (1 - rho))), rel=0.06)


def test_lengths_stay_within_the_spread():
    drawn = lengths(1000, 0.2, 5000, RNG(0))
    assert drawn.min() >= 800
    assert drawn.max() == 1000
    assert (lengths(7, 0.0, 10, RNG(0)) == 7).all()


def test_what_a_sweep_is_held_against_has_no_first_wave():
    shape, gpu, place = find_shape("Llama-3.1-70B"), find_gpu("h100"), Place(isl=1024, osl=1024, in_flight=16)
    (wall,) = gpu_walls(shape, precision("fp8"), "fp8", gpu, Parallel(), {place}, engine()).values()
    plan = make_plan(shape, Wish(gpu=gpu, quant="fp8", tp=1, concurrency=16), "table", with_alternatives=False)
    assert wall.predicted_ttft_ms.value < plan.ttft_ms.value / 1.3
    assert wall.predicted_ttft_ms.value == pytest.approx(plan.ttft_p50_p90_p99_ms[0], rel=0.15)
