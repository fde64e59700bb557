"""Refits the shipped constants, chooses the kernels of their corrections, and measures what both are worth on rows they have
not seen. `python -m tkit.planner.holdout` writes everything anew: `data/engines/*.json`, `residuals.csv`, `neighbours.json`.

Four ways of leaving out: every fifth row (another run of a published deployment), every fifth group of (engine version,
GPU, model) (a new deployment on a known card), every GPU in turn (a card nobody measured), every engine version in turn.
The coverage that bands reach is measured across the folds: each fold's band comes from the other folds.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tkit.files import write_json
from tkit.planner.calibration import (
    GENERATIONS,
    GROUPS,
    TTFT_CONSTANTS,
    Values,
    capacity,
    fit,
    group_of,
    is_steady,
    levenberg_marquardt,
    predict,
    table,
)
from tkit.planner.engines import DIRECTORY, ENGINE_SCHEMA
from tkit.planner.kernels import Fold, Folds, bare, choose, doubtful, is_held, mape, predicted, widths
from tkit.planner.neighbours import KERNELS, RESIDUALS, Run, metric_of
from tkit.planner.published import SHIPPED, Row, read_table
from tkit.planner.roofline import Efficiencies
from tkit.planner.speed import served

Floats = NDArray[np.float64]
MIN_ROWS = 30  # of a cell with a band of its own
NUM_FOLDS = 5
# of the held-out errors beyond either end of a band: 5 % would do if folds were alike; they are not, and left-out folds are
# then covered less often than 90 %
TAIL = 0.02


def efficiencies(values: Values, group: int) -> Efficiencies:
    return Efficiencies(**{name: float(value[group]) for name, value in values.items()})


def predict_row_ttft(row: Row, e: Efficiencies) -> tuple[float, float]:
    """(mean TTFT, requests in flight) of a simulated run."""
    fits = float(capacity(row.kv_pool, row.kv_bytes_per_sequence, e.reserved_bytes))
    if row.load in ("closed", "burst"):
        num_requests = int(row.amount) if row.load == "burst" else None
        result = served(row.machine, row.isl, row.osl, fits, e, concurrency=int(row.amount), num_requests=num_requests)
        return float(result.ttft.mean()), row.amount
    result = served(row.machine, row.isl, row.osl, fits, e, rate=row.amount, num_requests=500)
    return float(result.ttft.mean()), float(np.sum(result.ttft + result.tpot * row.osl)) / result.duration_s


def predict_rows(rows: Sequence[Row], values: Values) -> Floats:
    """Seconds or tokens per second, whatever each row measured."""
    steady = [index for index, row in enumerate(rows) if is_steady(row)]
    result = np.full(len(rows), np.nan)
    if steady:
        result[steady] = predict(table([rows[index] for index in steady]), values)
    for index, row in enumerate(rows):
        if is_steady(row):
            continue
        e = efficiencies(values, group_of(row.engine, row.version))
        if row.metric == "ttft":
            result[index] = predict_row_ttft(row, e)[0]
        else:
            result[index] = _under_rate(row, e)
    return result


def _under_rate(row: Row, e: Efficiencies) -> float:
    fits = float(capacity(row.kv_pool, row.kv_bytes_per_sequence, e.reserved_bytes))
    result = served(row.machine, row.isl, row.osl, fits, e, rate=row.amount, num_requests=500, spread=0.0)
    return float(result.tpot.mean()) if row.metric == "tpot" else 500 * row.osl / result.duration_s


def fit_all(rows: Sequence[Row]) -> dict[str, Floats]:
    """Steady rows first; then the way in and out, from what the simulation leaves of the measured TTFT."""
    steady = [row for row in rows if is_steady(row)]
    dense, sparse = [row for row in steady if not row.is_moe], [row for row in steady if row.is_moe]
    values = fit(table(dense), table(sparse) if sparse else None)
    return _fit_way_in([row for row in rows if row.metric == "ttft" and not is_steady(row)], values)


def _fit_way_in(rows: Sequence[Row], values: dict[str, Floats]) -> dict[str, Floats]:
    if not rows:
        return values
    free = values | {name: np.zeros(len(GROUPS)) for name in TTFT_CONSTANTS} | {"waiting": np.ones(len(GROUPS))}
    group = np.array([group_of(row.engine, row.version) for row in rows])
    found = [predict_row_ttft(row, efficiencies(free, g)) for row, g in zip(rows, group, strict=True)]
    ttft, in_flight = np.array(found).T
    truth, is_moe = np.array([row.value for row in rows]), np.array([row.is_moe for row in rows])
    starts = np.array([constant.start for constant in TTFT_CONSTANTS.values()])
    widths = np.array([constant.width for constant in TTFT_CONSTANTS.values()])
    num, count = len(GROUPS), len(starts)

    def constants(x: Floats) -> Floats:
        common, own = x[:count], x[count:].reshape(count, num)
        return np.asarray(starts[:, None] * np.exp(common[:, None] + own))  # (constants, groups)

    def residuals(x: Floats) -> Floats:
        dense, sparse, per_request, waiting = constants(x)[:, group]
        way_in = np.where(is_moe, sparse, dense) + per_request * in_flight
        return np.asarray(np.log((ttft * waiting + way_in) / truth))

    all_widths = np.concatenate([widths, np.repeat(widths, num)])
    fitted = constants(levenberg_marquardt(residuals, np.zeros(len(all_widths)), all_widths, max_steps=80))
    return values | dict(zip(TTFT_CONSTANTS, fitted, strict=True))


def folds_by_row(rows: Sequence[Row]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Copies of a row are in the same fold."""
    number = np.array(
        [
            zlib.crc32(f"{row.gpu}{row.shape}{row.parallel}{row.isl}{row.osl}{row.amount}{row.value}".encode())
            % NUM_FOLDS
            for row in rows
        ]
    )
    for fold in range(NUM_FOLDS):
        yield str(fold), number == fold


def folds_by_gpu(rows: Sequence[Row]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    for gpu in sorted({row.gpu for row in rows}):
        yield gpu, np.array([row.gpu == gpu for row in rows])


def folds_by_version(rows: Sequence[Row]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    versions = sorted({(row.engine, row.version) for row in rows})
    for engine, version in versions:
        yield f"{engine} {version}", np.array([(row.engine, row.version) == (engine, version) for row in rows])


def folds_by_deployment(rows: Sequence[Row]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    number = np.array(
        [zlib.crc32(f"{row.engine}{row.version}{row.gpu}{row.shape}".encode()) % NUM_FOLDS for row in rows]
    )
    for fold in range(NUM_FOLDS):
        yield str(fold), number == fold


def left_out(rows: Sequence[Row], folds: Iterator[tuple[str, NDArray[np.bool_]]]) -> tuple[list[Fold], list[str]]:
    """(every fold with what constants that have not seen it leave of all rows, the fold of every row)."""
    measured, found, names = np.log([row.value for row in rows]), [], [""] * len(rows)
    for name, out in folds:
        values = fit_all([row for row, is_out in zip(rows, out, strict=True) if not is_out])
        found.append(Fold(out, measured - np.log(predict_rows(rows, values))))
        for index in np.flatnonzero(out):
            names[index] = name
    return found, names


def cells_of(row: Row, is_seen: bool) -> tuple[str, ...]:
    """From the most specific to the metric alone; as `Engine.band` looks them up."""
    metric = metric_of(row.metric, row.load)
    kind, seen = "moe" if row.is_moe else "dense", "seen" if is_seen else "new"
    return (f"{metric}/{row.dtype}/{kind}/{seen}", f"{metric}/{kind}/{seen}", f"{metric}/{kind}", metric)


def bands(rows: Sequence[Row], seen: Floats, new: Floats, tail: float = TAIL) -> dict[str, dict[str, float]]:
    collected: dict[str, list[float]] = {}
    for row, seen_error, new_error in zip(rows, seen, new, strict=True):
        for error, is_seen in ((seen_error, True), (new_error, False)):
            for cell in cells_of(row, is_seen):
                collected.setdefault(cell, []).append(error)
    return {
        cell: {
            "n": len(errors),
            "mape": round(float(np.mean(np.abs(np.exp(-np.array(errors)) - 1))), 4),
            "median": round(float(np.median(np.abs(np.exp(-np.array(errors)) - 1))), 4),
            "low": round(float(np.exp(np.quantile(errors, tail))), 4),
            "high": round(float(np.exp(np.quantile(errors, 1 - tail))), 4),
        }
        for cell, errors in sorted(collected.items())
        if len(errors) >= MIN_ROWS or "/" not in cell
    }


def coverage(rows: Sequence[Row], errors: Floats, names: Sequence[str], tail: float = TAIL) -> float:
    """How often a 90 % band, made of the other folds' errors, holds the truth."""
    inside = 0
    for fold in sorted(set(names)):
        out = [index for index, name in enumerate(names) if name == fold]
        others = [index for index, name in enumerate(names) if name != fold]
        rest = np.array(errors)[others]
        made = bands([rows[index] for index in others], rest, rest, tail)
        for index in out:
            cell = next(cell for cell in cells_of(rows[index], True) if cell in made)
            inside += made[cell]["low"] <= np.exp(errors[index]) <= made[cell]["high"]
    return inside / len(rows)


def summary(rows: Sequence[Row], errors: Floats) -> dict[str, dict[str, float]]:
    """{load/metric/dense or MoE: n, MAPE, median}. A burst counts as a closed loop."""
    result = {}
    loads = ["closed" if row.load == "burst" else row.load for row in rows]
    keys = [f"{load} {row.metric} {'moe' if row.is_moe else 'dense'}" for row, load in zip(rows, loads, strict=True)]
    for key in sorted(set(keys)):
        size = mape(errors[[k == key for k in keys]])
        result[key] = {
            "n": len(size),
            "mape": round(float(size.mean()), 4),
            "median": round(float(np.median(size)), 4),
        }
    return result


def refit(today: str) -> Mapping[str, Any]:
    """Writes every engine's file and the corrections; returns what was reached."""
    rows, _ = read_table(SHIPPED)
    values = fit_all(rows)
    inside = np.log([row.value for row in rows]) - np.log(predict_rows(rows, values))
    found = {
        "rows": left_out(rows, folds_by_row(rows)),
        "deployments": left_out(rows, folds_by_deployment(rows)),
        "GPUs": left_out(rows, folds_by_gpu(rows)),
        "versions": left_out(rows, folds_by_version(rows)),
    }
    errors = {way: bare(folds) for way, (folds, _) in found.items()}
    _write_engines(rows, values, inside, errors, today)
    corrected = _write_corrections(rows, inside, {way: folds for way, (folds, _) in found.items()}, today)
    return {
        "formula": {"in sample": summary(rows, inside), **{way: summary(rows, left) for way, left in errors.items()}},
        "corrected": {way: summary(rows, left) for way, (left, _) in corrected.items()},
        "coverage of the formula's bands": {
            way: round(coverage(rows, errors[way], names), 4) for way, (_, names) in found.items()
        },
        "coverage": {
            way: {name: round(float(np.nanmean(inside[mask])), 4) for name, mask in _masks(rows).items()}
            for way, (_, inside) in corrected.items()
        },
    }


def _masks(rows: Sequence[Row]) -> dict[str, NDArray[np.bool_]]:
    names = np.array([row.run.kernel for row in rows])
    return {"all": np.ones(len(rows), dtype=bool), **{name: names == name for name in sorted(set(names))}}


def _write_corrections(
    rows: Sequence[Row], inside: Floats, ways: Folds, today: str
) -> dict[str, tuple[Floats, NDArray[np.float64]]]:
    """{way of leaving out: (what is left of every row, whether its band held it)}."""
    runs = [row.run for row in rows]
    left = {way: (np.full(len(rows), np.nan), np.full(len(rows), np.nan)) for way in ways}
    doubts = np.zeros(len(rows), dtype=bool)
    kernels, steps = {}, {}
    for name in sorted({run.kernel for run in runs}):
        index = np.array([i for i, run in enumerate(runs) if run.kernel == name])
        own = [runs[i] for i in index]
        folds = {way: [Fold(fold.out[index], fold.residuals[index]) for fold in all_] for way, all_ in ways.items()}
        kernel = choose(own, folds)
        doubts[index] = doubtful(kernel, own, folds["rows"])
        found = {way: predicted(kernel, own, own_folds, doubts[index]) for way, own_folds in folds.items()}
        residuals, deviations = ({way: pair[i] for way, pair in found.items()} for i in (0, 1))
        for way in ways:
            left[way][0][index] = residuals[way]
            left[way][1][index] = is_held(residuals, deviations, folds, way)
        kernels[name] = asdict(kernel)
        steps[name] = [
            asdict(width)
            for width in widths(np.concatenate([*residuals.values()]), np.concatenate([*deviations.values()]))
        ]
    write_json(KERNELS, {"date": today, "rows": SHIPPED.name, "kernels": kernels, "widths": steps})
    names = [field.name for field in dataclasses.fields(Run)]
    with open(RESIDUALS, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*names, "value", "residual", "doubtful"])
        for row, run, residual, doubt in zip(rows, runs, inside, doubts, strict=True):
            writer.writerow([*(getattr(run, name) for name in names), f"{row.value:.8g}", f"{residual:.5f}", doubt])
    return left


def _write_engines(
    rows: Sequence[Row], values: Values, inside: Floats, errors: Mapping[str, Floats], today: str
) -> None:
    """The formulas' constants and what these are worth alone."""
    for engine, generations in GENERATIONS.items():
        own = np.array([row.engine == engine for row in rows])
        chosen = [row for row in rows if row.engine == engine]
        write_json(
            DIRECTORY / f"{engine}.json",
            {
                "schema": ENGINE_SCHEMA,
                "engine": engine,
                "date": today,
                "provenance": f"fitted to {len(chosen)} published rows, {today}",
                "rows": SHIPPED.name,
                "gpus": sorted({row.gpu for row in chosen}),
                "generations": [
                    {
                        "name": name,
                        "before": before,
                        "n": sum(group_of(row.engine, row.version) == GROUPS.index((engine, index)) for row in chosen),
                        "efficiencies": {
                            key: float(f"{value:.4g}")
                            for key, value in asdict(efficiencies(values, GROUPS.index((engine, index)))).items()
                        },
                    }
                    for index, (name, before) in enumerate(generations)
                ],
                "in_sample": summary(chosen, inside[own]),
                "leave_one_gpu_out": summary(chosen, errors["GPUs"][own]),
                "leave_one_version_out": summary(chosen, errors["versions"][own]),
                "leave_deployments_out": summary(chosen, errors["deployments"][own]),
                "errors": bands(chosen, errors["deployments"][own], errors["GPUs"][own]),
            },
        )


if __name__ == "__main__":
    import json

    print(json.dumps(refit(datetime.datetime.now(datetime.UTC).date().isoformat()), indent=2))
