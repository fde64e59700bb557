"""The user's own sweep against the plan: refits the constants to it and narrows the band. Written beside the run.

Three factors on top of the engine's constants: time at the memory, time in the tensor cores, and everything on the host. More
would be noise: a sweep has a few dozen points of one model on one machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tkit.errors import InputError
from tkit.files import from_mapping, read_json, write_json
from tkit.planner.calibration import levenberg_marquardt
from tkit.planner.engines import Engine, engine
from tkit.planner.estimates import dtype_cell
from tkit.planner.gpus import gpu_of_device
from tkit.planner.memory import ledger
from tkit.planner.precision import kv_dtype, precision
from tkit.planner.roofline import Efficiencies, machine
from tkit.planner.shapes import ModelShape, num_params
from tkit.planner.speed import idle_ttft_s, throughput, tpot_s, way_in_s
from tkit.planner.wish import Wish
from tkit.specs.parallel import Parallel

CALIBRATION_FILE = "plan-calibration.json"
CALIBRATION_SCHEMA = "tkit.plan-calibration/2"
MIN_POINTS = 3
SAME_MODEL = 0.02  # the most by which parameter counts of one model differ; a table's may leave out biases
MEMORY = ("memory", "kv")
PRODUCTS = ("gemm_fp16", "gemm_fp8", "gemm_int8", "gemm_fp4", "attention")
HOST = (
    "host_s",
    "host_per_sequence_s",
    "request_s",
    "moe_request_s",
    "request_in_flight_s",
    "moe_layer_s",
    "moe_host_s",
)
WIDTHS = (1.0, 1.0, 3.0)  # of the priors, in ln; wide, because the machine is another, and a host even more so


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One point of the sweep. Seconds, tokens per second."""

    isl: int
    osl: int
    concurrency: int
    ttft_s: float | None
    tpot_s: float | None
    tok_s: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    run: str
    engine: Engine
    points: int
    mape_before: Mapping[str, float]
    mape_after: Mapping[str, float]
    factors: tuple[float, float, float]


def calibrate(run: Path, shape: ModelShape, wish: Wish) -> Calibration:
    """Fits to the valid points of `run` and writes `plan-calibration.json` into it."""
    measured = read_points(run)
    parallel, quant = _engine_of(run, shape, wish)
    weights = wish.weights if quant == wish.quant else precision(quant)
    kv = kv_dtype(wish.kv_cache, weights, wish.gpu)
    base = engine(wish.engine, wish.engine_version)
    m = machine(shape, weights, kv, wish.gpu, parallel)
    book = ledger(shape, weights, kv, wish.gpu, parallel, context=wish.isl + wish.osl)

    def errors(e: Efficiencies) -> dict[str, np.ndarray]:
        found: dict[str, list[float]] = {"tpot": [], "throughput": [], "ttft": []}
        for point in measured:
            per_sequence = book.kv_bytes_per_token * (point.isl + point.osl)
            batch = max(min(point.concurrency, book.kv_pool // max(per_sequence, 1)), 1)
            found["throughput"].append(np.log(float(throughput(m, batch, point.isl, point.osl, e)) / point.tok_s))
            if point.tpot_s:
                found["tpot"].append(np.log(float(tpot_s(m, batch, point.isl, point.osl, e)) / point.tpot_s))
            if point.ttft_s and point.concurrency == 1:
                found["ttft"].append(np.log(float(idle_ttft_s(m, point.isl, e) + way_in_s(m, 1, e)) / point.ttft_s))
        return {metric: np.array(values) for metric, values in found.items() if values}

    def scaled(x: np.ndarray) -> Efficiencies:
        e = base.efficiencies
        values = {name: min(getattr(e, name) * np.exp(x[0]), 1.0) for name in MEMORY}
        values |= {name: min(getattr(e, name) * np.exp(x[1]), 1.0) for name in PRODUCTS}
        values |= {name: getattr(e, name) * np.exp(x[2]) for name in HOST}
        return e.replaced(**{name: float(value) for name, value in values.items()})

    x = levenberg_marquardt(lambda x: np.concatenate(list(errors(scaled(x)).values())), np.zeros(3), np.array(WIDTHS))
    before, after = errors(base.efficiencies), errors(scaled(x))
    fitted = replace(
        base,
        efficiencies=scaled(x),
        errors={**base.errors, **_bands(after, wish, shape, quant)},
        gpus=tuple(sorted({*base.gpus, wish.gpu.name})),
        provenance=f"{base.provenance}; refitted to {len(measured)} points of {run.name}",
        is_refitted=True,
    )
    result = Calibration(
        run=str(run),
        engine=fitted,
        points=len(measured),
        mape_before=_mape(before),
        mape_after=_mape(after),
        factors=tuple(round(float(np.exp(value)), 4) for value in x),  # type: ignore[arg-type]
    )
    write_json(run / CALIBRATION_FILE, {"schema": CALIBRATION_SCHEMA, **asdict(result)})
    return result


def read_calibration(run: Path) -> Engine | None:
    """The constants that `calibrate` left beside the run; None where it was never called."""
    path = run / CALIBRATION_FILE
    if not path.is_file():
        return None
    record = read_json(path)
    if not isinstance(record, dict) or record.get("schema") != CALIBRATION_SCHEMA:
        raise InputError(f"{path}: not a {CALIBRATION_SCHEMA}", hint="calibrate again: tkit plan --calibrate RUN")
    return from_mapping(Engine, record.get("engine") or {}, f"{path}: engine")


def _measured(path: Path) -> Measured | None:
    """One valid point of a closed loop; None for any other."""
    record = read_json(path)
    try:
        if not record["is_valid"] or record["output_tok_s"] <= 0 or record["concurrency"] is None:
            return None
        return Measured(
            isl=record["isl"],
            osl=record["osl"],
            concurrency=record["concurrency"],
            ttft_s=_seconds(record["ttft"]),
            tpot_s=_seconds(record["tpot"]),
            tok_s=record["output_tok_s"],
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not a point that tkit sweep wrote: {error}") from error


def read_points(run: Path) -> list[Measured]:
    """The valid points of a sweep's closed loops. Raises InputError when there are too few to fit three factors."""
    files = sorted(run.glob("points/*/point.json"))
    if not files:
        raise InputError(f"--calibrate {run}: no points/*/point.json in it", hint="measure it: tkit sweep")
    measured = [point for path in files if (point := _measured(path)) is not None]
    if len(measured) < MIN_POINTS:
        raise InputError(
            f"--calibrate {run}: {len(measured)} valid points of {len(files)}, expected at least {MIN_POINTS}",
            hint="sweep more concurrencies: tkit sweep --concurrency 1,4,16,64",
        )
    return measured


def _seconds(distribution: Mapping[str, Any]) -> float | None:
    return None if distribution["p50"] is None else distribution["p50"] / 1e3


def _engine_of(run: Path, shape: ModelShape, wish: Wish) -> tuple[Parallel, str]:
    """Layout and quantization of what was measured: the engine card in the manifest, else what was asked for. Raises
    InputError where the manifest tells of another model or other hardware."""
    manifest = read_json(run / "manifest.json")
    card = manifest.get("engine") or {}
    problems = []
    hardware = (manifest.get("identity") or {}).get("hardware") or (card.get("compiled") or {}).get("gpu")
    if manifest.get("host_speed"):
        problems.append(f"measured on a processor, not on {wish.gpu.name}")
    elif hardware and gpu_of_device(hardware) != wish.gpu:
        problems.append(f"measured on {hardware}, not on {wish.gpu.name}")
    asked, held = num_params(shape), card.get("num_params") or num_params(shape)
    if abs(held / asked - 1) > SAME_MODEL:
        problems.append(f"measured with a model of {held:,} parameters, not with {shape.name} of {asked:,}")
    if problems:
        raise InputError(
            f"--calibrate {run}", problems=problems, hint="plan what was measured, or sweep what is planned"
        )
    parallel = Parallel(tp_size=card.get("tp_size") or wish.tp or 1, pp_size=card.get("pp_size") or wish.pp or 1)
    return parallel, card.get("quant") or wish.quant


def _mape(errors: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {metric: round(float(np.mean(np.abs(np.exp(values) - 1))), 4) for metric, values in errors.items()}


def _bands(errors: Mapping[str, np.ndarray], wish: Wish, shape: ModelShape, quant: str) -> dict[str, dict[str, float]]:
    """Student's t for a next point: few points leave a wide band."""
    kind = "moe" if shape.num_experts else "dense"
    names = {"ttft": "idle ttft"}
    result = {}
    for metric, values in errors.items():
        n = len(values)
        if n < MIN_POINTS:
            continue
        spread = float(np.std(values, ddof=1)) * _t95(n - 1) * np.sqrt(1 + 1 / n)
        centre = -float(np.mean(values))
        result[f"{names.get(metric, metric)}/{dtype_cell(precision(quant))}/{kind}/seen"] = {
            "n": n,
            "mape": round(float(np.mean(np.abs(np.exp(values) - 1))), 4),
            "low": round(float(np.exp(centre - spread)), 4),
            "high": round(float(np.exp(centre + spread)), 4),
        }
    return result


def _t95(degrees: int) -> float:
    """The two-sided 90 % point of Student's t, by Cornish and Fisher's expansion around the normal's 1.645."""
    z = 1.6449
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
