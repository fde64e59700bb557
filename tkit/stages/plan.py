"""Plan: finds the model's shape wherever it can be known without its weights, and hands it to the planner.

A directory or recipe gives config.json; a hub model that is not on this machine is looked up in the shipped table.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tkit import demo
from tkit.architectures.config import spec_from_hf
from tkit.architectures.formats import module_formats
from tkit.architectures.table import ARCHITECTURES
from tkit.errors import InputError, did_you_mean
from tkit.files import read_json
from tkit.planner.compare import ComparedRow, Comparison, parse_axes
from tkit.planner.cost import read_prices
from tkit.planner.models import TABLE, find_shape, shape_table
from tkit.planner.planning import make_plan
from tkit.planner.precision import Precision, mixed
from tkit.planner.published import SHIPPED
from tkit.planner.record import Plan
from tkit.planner.selfcheck import SelfCheck, selfcheck
from tkit.planner.shapes import ModelShape, shape_from_config, shape_from_spec
from tkit.planner.sweeps import calibrate
from tkit.planner.wish import Wish
from tkit.specs.precision import Precision as Formats
from tkit.specs.recipe import EngineRecipe, Recipe
from tkit.stages.models import DEFAULT_MODEL, find_recipe


def resolve_shape(model: str | None) -> tuple[ModelShape, str, Recipe]:
    """(shape, where it comes from, recipe). Reads nothing from the network."""
    table_shape = find_shape(model) if model else None
    try:
        name, recipe = find_recipe(model)
    except InputError:
        if table_shape is None:  # a name of the table, such as "Llama-3.1-8B"
            raise
        return table_shape, "shipped model table", Recipe(model=table_shape.name)
    path = config_path(recipe)
    if path is not None:
        return shape_from_file(path, name), f"{path.parent.name}/config.json", recipe
    shape = find_shape(recipe.model)
    if shape is not None:
        return shape, f"shipped model table; {recipe.model} is not on this machine", recipe
    raise InputError(
        f"{recipe.model}: neither on this machine nor in the shipped model table"
        f"{did_you_mean(recipe.model.rpartition('/')[2], shape_table())}",
        hint=f"give a directory with config.json; the table is {TABLE}",
    )


def config_path(recipe: Recipe) -> Path | None:
    """config.json of the demo, of a directory, or of the hub's cache; None when there is none here."""
    if recipe.model == DEFAULT_MODEL:
        return demo.MODEL_DIR / "config.json"
    directory = Path(recipe.model)
    if directory.is_dir():
        return directory / "config.json"
    cache = Path(
        os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    )
    snapshots = cache / f"models--{recipe.model.replace('/', '--')}" / "snapshots"
    found = sorted(snapshots.glob(f"{recipe.revision or '*'}/config.json"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def shape_from_file(path: Path, name: str) -> ModelShape:
    return shape_from_hf(read_json(path), name, str(path))


def shape_from_hf(config: Any, name: str, where: str) -> ModelShape:
    """Of a config.json's content; `where` is what errors call it."""
    if not isinstance(config, Mapping):
        raise InputError(f"{where}: expected a mapping of keys, found {type(config).__name__}")
    names = config.get("architectures") or [None]
    is_name = isinstance(names, list) and isinstance(names[0], str | None)
    if not is_name or names[0] in ARCHITECTURES:  # what is no name is refused there
        return shape_from_spec(spec_from_hf(_unquantized(config), where), name)
    return shape_from_config(config, name, where)


def _unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A quantized checkpoint has the shape of its base; only the converter needs the base itself."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def plan(model: str | None, wish: Mapping[str, Any], *, prices: Path | None = None, run: Path | None = None) -> Plan:
    """`wish` holds what was given on the command line; the recipe's first engine gives the rest. With `run`, the constants
    are first refitted to that sweep, and kept beside it."""
    shape, source, recipe = resolve_shape(model)
    recipe_engine = recipe.engines[0]
    asked = _wish(wish, recipe_engine)
    note = None
    if wish.get("quant") is None and (recipe_engine.quant_overrides or recipe_engine.exclude):
        path = config_path(recipe)
        if path is None:
            note = f"planned as {asked.quant} throughout: only a config.json tells which modules the recipe's exceptions mean"
        else:
            mixed = mixed_precision(read_json(path), str(path), recipe_engine.precision)
            asked = dataclasses.replace(asked, mixed=mixed)
            note = f"{len(mixed.modules)} layers in another format than {asked.quant}, as the recipe says"
    constants = calibrate(run, shape, asked).engine if run is not None else None
    made = make_plan(shape, asked, source, prices=read_prices(prices) if prices else None, constants=constants)
    return dataclasses.replace(made, notes=(note, *made.notes)) if note else made


def _wish(asked: Mapping[str, Any], default: EngineRecipe) -> Wish:
    """What was asked; formats that were not are those of the recipe's first engine."""
    given = {key: value for key, value in asked.items() if value is not None}
    given.setdefault("quant", default.quant)
    if given.get("kv_cache", "auto") == "auto":
        given["kv_cache"] = default.kv_cache
    return Wish(**given)


def mixed_precision(config: Any, where: str, formats: Formats) -> Precision:
    """Every module's format, in the planner's terms. Raises InputError for patterns that the model has nothing for."""
    found = module_formats(spec_from_hf(_unquantized(config), where), formats)
    return mixed(
        formats.default.name, {name.removeprefix("transformer."): format.name for name, format in found.items()}
    )


def compare(model: str | None, wish: Mapping[str, Any], axes: Sequence[str], prices: Path | None = None) -> Comparison:
    """Every combination of `gpu=a,b quant=x,y tp=1,2`, as rows of one table. What cannot run says why."""
    shape, source, recipe = resolve_shape(model)
    values = parse_axes(axes)
    known_prices = read_prices(prices) if prices else None
    rows: list[ComparedRow] = []
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        label = " ".join(f"{key}={getattr(value, 'name', value)}" for key, value in chosen.items())
        try:
            asked = _wish({**wish, **chosen}, recipe.engines[0])
            made = make_plan(shape, asked, source, prices=known_prices, with_alternatives=False)
            rows.append(ComparedRow(label=label, plan=made))
        except InputError as error:
            rows.append(ComparedRow(label=label, problem="; ".join(error.problems) or error.message))
    return Comparison(model=shape.name, model_source=source, rows=tuple(rows))


def check_published(path: Path | None) -> SelfCheck:
    return selfcheck(path or SHIPPED)
