"""The wall of a measured run: the limit and the prediction of every load. Knows hardware and models; never sees a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tkit.planner.engines import Engine
from tkit.planner.estimates import Speed
from tkit.planner.fit import Demand, layout
from tkit.planner.precision import Precision, precision
from tkit.planner.record import Estimate
from tkit.planner.roofline import Machine, limit, machine
from tkit.planner.shapes import ModelShape
from tkit.planner.wish import Wish
from tkit.specs.hardware import Gpu
from tkit.specs.parallel import Parallel
from tkit.specs.wall import Prediction, Wall


@dataclass(frozen=True, kw_only=True)
class Place:
    """A load of equal requests: C in flight, or so many on average where they arrive at `rate` per second."""

    isl: int
    osl: int
    in_flight: float
    rate: float | None = None


def gpu_walls(
    shape: ModelShape,
    weights: Precision,
    kv: str,
    gpu: Gpu,
    parallel: Parallel,
    places: Iterable[Place],
    constants: Engine | None,
) -> dict[Place, Wall]:
    """Without `constants` there is no prediction: an engine that was never fitted is not guessed at."""
    m = machine(shape, weights, kv, gpu, parallel)
    found = {}
    for place in places:
        wall = _limit(m, place)
        if constants is not None:
            wall = _predicted(wall, shape, weights, kv, gpu, parallel, place, m, constants)
        found[place] = wall
    return found


def cpu_walls(shape: ModelShape, bytes_per_s: float, flops: float, places: Iterable[Place]) -> dict[Place, Wall]:
    """Of the reference engine, which computes in float32 whatever the format, at rates measured on that processor."""
    cpu = Gpu(
        name="cpu", arch="cpu", sm=70, memory_bytes=0, usable_bytes=0, bandwidth=bytes_per_s, fp16_flops=flops,
        fp8_flops=0, int8_ops=0, fp4_flops=0, nvlink_bandwidth=0, nvlink_domain=1, pcie_bandwidth=1, tdp_w=0,
    )  # fmt: skip
    m = machine(shape, precision("none"), "fp16", cpu, Parallel())
    wide = replace(
        m,
        dense_bytes=2 * m.dense_bytes,
        expert_bytes=2 * m.expert_bytes,
        kv_token_bytes=2 * m.kv_token_bytes,
    )
    return {place: _limit(wide, place) for place in places}


def _limit(m: Machine, place: Place) -> Wall:
    found = limit(m, place.in_flight, place.isl, place.osl)
    return Wall(
        limit_tok_s=float(found.tok_s),
        limit_tpot_ms=1e3 * found.tpot_s,
        limit_ttft_ms=1e3 * found.ttft_s,
        limit_binds=found.binds,
        limit_ttft_binds=found.ttft_binds,
    )


def _predicted(
    wall: Wall,
    shape: ModelShape,
    weights: Precision,
    kv: str,
    gpu: Gpu,
    parallel: Parallel,
    place: Place,
    m: Machine,
    constants: Engine,
) -> Wall:
    isl, osl, in_flight = place.isl, place.osl, max(round(place.in_flight), 1)
    wish = Wish(gpu=gpu, quant=weights.name, mixed=weights, isl=isl, osl=osl, concurrency=in_flight)
    reserved = int(constants.efficiencies.reserved_bytes)
    demand = Demand(isl=isl, osl=osl, concurrency=in_flight, engine=constants.name, reserved_bytes=reserved)
    chosen = layout(shape, weights, kv, gpu, parallel, demand)
    speed = Speed(shape, weights, kv, wish, constants, m, chosen)
    found = speed.closed_loop(in_flight, is_warm=True) if place.rate is None else speed.open_loop(place.rate)
    return replace(
        wall,
        predicted_tok_s=_banded(found.tok_s),
        predicted_tpot_ms=_banded(found.tpot_ms),
        predicted_ttft_ms=_banded(found.ttft_ms),
        predicted_binds=found.binds,
    )


def _banded(estimate: Estimate) -> Prediction:
    return Prediction(value=estimate.value, low=estimate.low, high=estimate.high)
