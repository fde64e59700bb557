"""The wall: what a run's hardware allows and what the plan predicts, beside what was measured.

The report knows files, the planner knows hardware; they meet here. Where a fact is missing, the run says which.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from tkit.errors import InputError
from tkit.planner.engines import DEFAULT_ENGINE, Engine, engine
from tkit.planner.gpus import gpu_of_device
from tkit.planner.models import find_shape
from tkit.planner.shapes import ModelShape, num_params
from tkit.planner.sweeps import read_calibration
from tkit.planner.wall import Place, cpu_walls, gpu_walls
from tkit.report.record import Cell, Comparison, Group, RunFacts
from tkit.specs.engine import EngineCard
from tkit.specs.parallel import Parallel
from tkit.specs.wall import Wall
from tkit.stages.models import DEFAULT_MODEL
from tkit.stages.plan import resolve_shape, shape_from_hf
from tkit.units import format_bytes


def with_walls(comparison: Comparison) -> Comparison:
    """The same, each run with the hardware it was held against, each closed-loop cell with its wall where that is known."""
    runs, walls = [], {}
    for run in comparison.runs:
        places = {
            _place(group, cell)
            for group in comparison.groups
            for level in group.levels
            for cell in level.cells
            if cell.run == run.id and cell.load.concurrency is not None
        }
        try:
            walls[run.id], hardware = _walls(run, places)
        except InputError as error:
            walls[run.id], hardware = {}, "; ".join((error.message, *error.problems))
        runs.append(dataclasses.replace(run, hardware=hardware))
    groups = tuple(
        dataclasses.replace(
            group,
            levels=tuple(
                dataclasses.replace(
                    level,
                    cells=tuple(
                        dataclasses.replace(cell, wall=walls[cell.run].get(_place(group, cell))) for cell in level.cells
                    ),
                )
                for level in group.levels
            ),
        )
        for group in comparison.groups
    )
    return dataclasses.replace(comparison, runs=tuple(runs), groups=groups)


def _place(group: Group, cell: Cell) -> Place:
    isl, osl = map(int, group.shape.split("/"))
    return isl, osl, cell.load.concurrency or 0


def _walls(run: RunFacts, places: set[Place]) -> tuple[dict[Place, Wall], str]:
    """(walls, what they were computed from). InputError says why there are none."""
    card = run.engine
    if card is None:
        raise InputError("no wall: without an engine card neither model nor layout is known (tkit sweep --engine)")
    shape = _shape(card)
    if run.host_speed is not None:
        speed = run.host_speed
        return cpu_walls(shape, speed.bytes_per_s, speed.flops, places), (
            f"{run.identity.get('hardware') or 'its processor'}, as measured before the sweep: "
            f"{speed.bytes_per_s / 1e9:.1f} GB/s reading {format_bytes(speed.num_bytes)} again and again, "
            f"{speed.flops / 1e9:.0f} GFLOP/s. The reference engine computes in float32 whatever the format. "
            "No prediction: tkit plan knows engines on GPUs"
        )
    device = str(run.identity.get("hardware") or (card.compiled or {}).get("gpu") or "")
    gpu = gpu_of_device(device)
    if gpu is None:
        raise InputError(
            f'no wall: "{device}" is not in the GPU table of tkit plan'
            if device
            else "no wall: the run does not say what it ran on"
        )
    data_sheet = (
        f"{gpu.name}, {gpu.bandwidth / 1e12:.2f} TB/s and {gpu.fp16_flops / 1e12:.0f} dense 16-bit TFLOP/s each"
    )
    if card.backend == "reference":
        walls = gpu_walls(shape, "none", "fp16", gpu, Parallel(), places, None)
        return walls, f"1 x {data_sheet}. The reference engine computes in 16 bits; no prediction: it was never fitted"
    constants, source = _constants(run, card)
    parallel = Parallel(tp_size=card.tp_size, pp_size=card.pp_size)
    kv = card.recipe.get("kv_cache")
    walls = gpu_walls(shape, card.quant, kv if kv in ("fp8", "int8") else "fp16", gpu, parallel, places, constants)
    mixed = f"; as {card.quant} throughout" if card.recipe.get("quant_overrides") or card.recipe.get("exclude") else ""
    return walls, f"{parallel.world_size} x {data_sheet}{mixed}. Prediction of tkit plan: {source}"


def _constants(run: RunFacts, card: EngineCard) -> tuple[Engine, str]:
    refitted = read_calibration(Path(run.directory))
    if refitted is not None:
        return refitted, f"{refitted.provenance}, so it is a fit to this run, not a forecast"
    found = engine(DEFAULT_ENGINE, card.versions.get("tensorrt_llm"))
    return found, f"{found.name} {found.generation}, {found.provenance}"


def _shape(card: EngineCard) -> ModelShape:
    """From the config in the card; of engines that hold none, from the model's own name, if that gives as many parameters."""
    model = str(card.source.get("model", ""))
    config = card.source.get("config")
    if isinstance(config, Mapping):
        return shape_from_hf(config, model, f"{card.name}: config.json")
    shape = resolve_shape(model)[0] if model == DEFAULT_MODEL else find_shape(model)
    if shape is None or num_params(shape) != card.num_params:
        raise InputError(f"no wall: the engine card does not hold the model's config ({json.dumps(model)})")
    return shape
