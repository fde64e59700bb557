"""What each engine reaches of the hardware: one fitted file per engine in `data/engines/`, with its n, errors and date.

Constants belong to an engine and a generation of it, and do not transfer. `errors` maps a cell (metric/dtype/dense or MoE/
seen or new GPU) to the held-out errors: {"n", "mape", "low", "high"}, where truth / prediction lay in [low, high] for 90 %.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tkit.errors import InputError, did_you_mean
from tkit.files import read_json
from tkit.planner.roofline import Efficiencies

DIRECTORY = Path(__file__).with_name("data") / "engines"
ENGINE_SCHEMA = "tkit.planner-engine/1"
DEFAULT_ENGINE = "tensorrt-llm"


@dataclass(frozen=True, kw_only=True)
class Band:
    """truth / prediction lies in [low, high] nine times out of ten; `n` held-out rows say so."""

    low: float
    high: float
    n: int
    cell: str


@dataclass(frozen=True, kw_only=True)
class Engine:
    name: str
    version: str  # as asked for; empty = not stated
    generation: str
    efficiencies: Efficiencies
    errors: Mapping[str, Mapping[str, Any]]
    gpus: tuple[str, ...]  # seen by the fit
    provenance: str  # one line: rows, error, date
    is_refitted: bool = False  # to the user's own sweep

    def band(self, metric: str, gpu: str, dtype: str, is_moe: bool) -> Band:
        """The most specific cell that has rows."""
        kind, seen = "moe" if is_moe else "dense", "seen" if gpu in self.gpus else "new"
        for cell in (f"{metric}/{dtype}/{kind}/{seen}", f"{metric}/{kind}/{seen}", f"{metric}/{kind}", metric):
            if cell in self.errors:
                row = self.errors[cell]
                # a cell whose errors all lie on one side still holds the estimate itself
                return Band(low=min(row["low"], 1.0), high=max(row["high"], 1.0), n=row["n"], cell=cell)
        return Band(low=0.5, high=2.0, n=0, cell="no published rows: a factor of two either way")


@functools.cache
def engine(name: str = DEFAULT_ENGINE, version: str | None = None) -> Engine:
    """The constants of the generation that `version` belongs to; the newest without one."""
    known = sorted(path.stem for path in DIRECTORY.glob("*.json"))
    if name not in known:
        raise InputError(
            f'--engine: unknown engine "{name}"{did_you_mean(name, known)}', hint=f"known: {', '.join(known)}"
        )
    record = read_json(DIRECTORY / f"{name}.json")
    generations = record["generations"]
    generation = generations[generation_index([row["before"] for row in generations], version)]
    return Engine(
        name=name,
        version=version or "",
        generation=generation["name"],
        efficiencies=Efficiencies(**generation["efficiencies"]),
        errors=record["errors"],
        gpus=tuple(record["gpus"]),
        provenance=record["provenance"],
    )


def generation_index(before: list[str | None], version: str | None) -> int:
    """The first generation that ends after `version`. What cannot be read as a version is new."""
    number = version_number(version)
    if number is None:
        return len(before) - 1
    for index, end in enumerate(before):
        limit = version_number(end)
        if limit is None or number < limit:
            return index
    return len(before) - 1


def version_number(version: str | None) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(match.group(1)), int(match.group(2))) if match else None
