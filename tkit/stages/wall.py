"""The wall: what a run's hardware allows and what the plan predicts, beside what was measured.

The report knows files, the planner knows hardware; they meet here. Where a fact is missing, the run says which.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tkit.errors import InputError
from tkit.planner.cost import Prices, cost
from tkit.planner.engines import DEFAULT_ENGINE, Engine, engine
from tkit.planner.gpus import gpu_of_device
from tkit.planner.memory import kv_bytes_per_token, ledger, stored_bytes
from tkit.planner.models import find_shape
from tkit.planner.precision import Precision, precision
from tkit.planner.shapes import ModelShape, num_params
from tkit.planner.sweeps import read_calibration
from tkit.planner.wall import Place, cpu_walls, gpu_walls
from tkit.report.record import Cell, Comparison, Group, RunFacts
from tkit.specs.engine import EngineCard
from tkit.specs.hardware import Gpu
from tkit.specs.parallel import Parallel
from tkit.specs.precision import Precision as Formats
from tkit.specs.recipe import HF_GENERATE
from tkit.specs.wall import PlannedMemory, Prediction, TokenCost, Wall
from tkit.stages.models import DEFAULT_MODEL
from tkit.stages.plan import mixed_precision, resolve_shape, shape_from_hf
from tkit.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What one run is held against. `gpu` is None on a processor."""

    walls: Mapping[Place, Wall]
    hardware: str
    memory: PlannedMemory | None = None
    gpu: Gpu | None = None
    num_gpus: int = 1


def with_walls(comparison: Comparison, prices: Prices | None = None) -> Comparison:
    """The same, each run with the hardware it was held against, each cell with its wall where that is known.

    With `prices`, each cell on a GPU that has one with its cost too.
    """
    held = {run.id: _held(comparison, run) for run in comparison.runs}
    runs = tuple(replace(run, hardware=held[run.id].hardware, memory=held[run.id].memory) for run in comparison.runs)
    groups = tuple(
        replace(
            group,
            levels=tuple(
                replace(level, cells=tuple(_completed(group, cell, held[cell.run], prices) for cell in level.cells))
                for level in group.levels
            ),
        )
        for group in comparison.groups
    )
    told = f"{prices.source or 'prices'} of {prices.date}" if prices else None
    return replace(comparison, runs=runs, groups=groups, prices=told)


def _completed(group: Group, cell: Cell, held: _Held, prices: Prices | None) -> Cell:
    rate = cell.estimates["output_tok_s"]
    found = None
    if prices is not None and held.gpu is not None and held.gpu.name in prices.gpus and rate is not None:
        at = cost(held.gpu, held.num_gpus, (rate.value, rate.value, rate.value), prices)
        edges = cost(held.gpu, held.num_gpus, (rate.value, rate.low or rate.value, rate.high or rate.value), prices)
        low, high = edges.usd_per_million
        found = TokenCost(
            usd_per_million=Prediction(value=at.usd_per_million[0], low=low, high=high),
            joules_per_token=at.joules_per_token,
        )
    place = _place(group, cell)
    return replace(cell, wall=held.walls.get(place) if place is not None else None, cost=found)


def _held(comparison: Comparison, run: RunFacts) -> _Held:
    places = {
        place
        for group in comparison.groups
        for level in group.levels
        for cell in level.cells
        if cell.run == run.id and (place := _place(group, cell)) is not None
    }
    try:
        if run.engine is None:
            hint = "" if run.protocol == HF_GENERATE else " (tkit sweep --engine)"
            raise InputError(f"without an engine card neither model nor layout is known{hint}")
        return _against_hardware(run, run.engine, places)
    except InputError as error:
        return _Held(walls={}, hardware=f"no wall: {'; '.join((error.message, *error.problems))}")
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:  # sizes that no model has, from another's hands
        return _Held(walls={}, hardware=f"no wall: the engine card contradicts itself: {type(error).__name__}: {error}")


def _place(group: Group, cell: Cell) -> Place | None:
    """None unless all requests are alike in tokens: not characters, a data set, a common beginning."""
    plain = re.fullmatch(r"(\d+)/(\d+)", group.shape)
    if plain is None or not cell.in_flight:
        return None
    return Place(isl=int(plain[1]), osl=int(plain[2]), in_flight=cell.in_flight, rate=cell.load.rate)


def _against_hardware(run: RunFacts, card: EngineCard, places: set[Place]) -> _Held:
    """InputError says which fact is missing."""
    shape = _shape(card)
    parallel = Parallel(tp_size=card.tp_size, pp_size=card.pp_size)
    kv = "fp16" if card.recipe.get("kv_cache", "auto") == "auto" else str(card.recipe["kv_cache"])
    weights, mixed = _weights(card)
    stored = None if mixed else stored_bytes(shape, weights, parallel, has_kv_scales=kv != "fp16")
    memory = PlannedMemory(stored=stored, kv_per_token=kv_bytes_per_token(shape, kv))
    speed = run.host_speed
    if speed is not None:
        return _Held(
            walls=cpu_walls(shape, speed.bytes_per_s, speed.flops, places),
            hardware=f"{run.identity.get('hardware') or 'its processor'}, as measured before the sweep: "
            f"{speed.bytes_per_s / 1e9:.1f} GB/s reading {format_bytes(speed.num_bytes)} again and again, "
            f"{speed.flops / 1e9:.0f} GFLOP/s. The reference engine computes in float32 whatever the format. "
            "No prediction: tkit plan knows engines on GPUs",
            memory=memory,
        )
    device = str(run.identity.get("hardware") or (card.compiled or {}).get("gpu") or "")
    gpu = gpu_of_device(device)
    if gpu is None:
        reason = f'"{device}" is not in the GPU table of tkit plan' if device else "the run does not say what it ran on"
        return _Held(walls={}, hardware=f"no wall: {reason}", memory=memory)
    data_sheet = (
        f"{gpu.name}, {gpu.bandwidth / 1e12:.2f} TB/s and {gpu.fp16_flops / 1e12:.0f} dense 16-bit TFLOP/s each"
    )
    if card.backend == "reference":
        return _Held(
            walls=gpu_walls(shape, precision("none"), "fp16", gpu, Parallel(), places, None),
            hardware=f"1 x {data_sheet}. The reference engine computes in 16 bits; no prediction: it was never fitted",
            memory=memory,
            gpu=gpu,
        )
    constants, source = _constants(run, card)
    book = ledger(
        shape, weights, kv, gpu, parallel,
        context=max((place.isl + place.osl for place in places), default=1),
        engine=constants.name, reserved_bytes=int(constants.efficiencies.reserved_bytes),
    )  # fmt: skip
    return _Held(
        walls=gpu_walls(shape, weights, kv, gpu, parallel, places, constants),
        hardware=f"{parallel.world_size} x {data_sheet}{mixed}. Prediction of tkit plan: {source}",
        memory=replace(
            memory,
            gpu_weights=book.weight_bytes,
            gpu_activations=book.activations,
            gpu_overhead=book.overhead,
            gpu_kv_pool=book.kv_pool,
            gpu_usable=book.usable,
        ),
        gpu=gpu,
        num_gpus=parallel.world_size,
    )


def _constants(run: RunFacts, card: EngineCard) -> tuple[Engine, str]:
    refitted = read_calibration(Path(run.directory))
    if refitted is not None:
        return refitted, f"{refitted.provenance}, so it is a fit to this run, not a forecast"
    found = engine(DEFAULT_ENGINE, card.versions.get("tensorrt_llm"))
    return found, f"{found.name} {found.generation}, {found.provenance} and corrected by those near to each load"


def _weights(card: EngineCard) -> tuple[Precision, str]:
    """(the formats of all layers, how that departs from the recipe). Only the model's config says what patterns mean."""
    overrides, exclude = card.recipe.get("quant_overrides") or {}, card.recipe.get("exclude") or ()
    config = card.source.get("config")
    if not overrides and not exclude:
        return precision(card.quant), ""
    if not isinstance(config, Mapping):
        return precision(card.quant), f"; as {card.quant} throughout"
    formats = Formats.of(card.quant, overrides, exclude)
    return mixed_precision(config, f"{card.name}: config.json", formats), ""


def _shape(card: EngineCard) -> ModelShape:
    """From the config in the card; of engines that hold none, from the model's own name, if that gives as many parameters."""
    model = str(card.source.get("model", ""))
    config = card.source.get("config")
    if isinstance(config, Mapping):
        return shape_from_hf(config, model, f"{card.name}: config.json")
    shape = resolve_shape(model)[0] if model == DEFAULT_MODEL else find_shape(model)
    if shape is None or num_params(shape) != card.num_params:
        raise InputError(f"the engine card does not hold the model's config ({json.dumps(model)})")
    return shape
