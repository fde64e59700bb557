"""What published runs near to the asked one say about the formulas: ln(measured / formula), weighed by nearness.

A Gaussian process over those logarithms. Two runs of one engine, metric, kind of load and kind of model (dense, MoE) have
the covariance

    scale^2 x version x GPU x model x format x layout      each 1 where both are the same, less where not
            x (level + (1 - level) exp(-|ln ISL ratio| / isl - |ln OSL ratio| / osl - |ln requests ratio| / requests))

and every measurement has noise; one that its own neighbours contradict, a misprint or a cold start, much of it. The mean is 0:
with nothing near, the formula stands as it is. The constants of each metric were chosen by cross-validation
(`kernels.py`), and so were the bands. Knows measurements; no hardware, no formula.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tkit.files import read_json
from tkit.planner.gpus import gpu_table
from tkit.planner.precision import precision

Floats = NDArray[np.float64]
DATA = Path(__file__).with_name("data")
RESIDUALS = DATA / "residuals.csv"
KERNELS = DATA / "neighbours.json"
MAX_NEIGHBOURS = 64  # the nearest; with 128 the mean error changes by 0.02 points
NEAR = 0.2  # correlation of a run that is called near


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measurement, published or asked for. `requests`: the batch, requests in flight, or requests per second."""

    engine: str
    version: str
    generation: str  # of the engine, as its constants are
    gpu: str
    num_params: int
    num_active_params: int
    is_moe: bool
    quant: str
    tp: int
    pp: int
    has_attention_dp: bool
    isl: int
    osl: int
    load: str  # as published.Row has it
    requests: float
    metric: str

    @property
    def kernel(self) -> str:
        """Which kernel and bands are its own. Few published runs have an idle TTFT; sizes tell their models apart."""
        metric = metric_of(self.metric, self.load)
        return metric if metric == "idle ttft" else f"{metric} {'moe' if self.is_moe else 'dense'}"

    @property
    def group(self) -> tuple[str, str, str]:
        """What is never compared with another group. A burst is a closed loop of one round."""
        return (self.engine, "closed" if self.load == "burst" else self.load, self.kernel)

    @property
    def deployment(self) -> tuple[object, ...]:
        """Without the engine's version. Models of equal sizes run equally fast, whatever their names."""
        form = precision(self.quant)
        return (
            self.engine, self.gpu, self.num_params, self.num_active_params, form.weight_bits, form.math, self.tp, self.pp,
            self.has_attention_dp,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """How fast nearness fades. Factors lie in [0, 1] and count where runs differ; lengths are in ln, of tp and pp in log2."""

    scale: float
    noise: float
    level: float  # of the covariance that does not depend on lengths and requests
    version: float  # factor: another version of the same generation
    generation: float  # factor, on top: another generation
    gpu: float  # factor: another GPU
    arch: float  # factor, on top: of another architecture
    format: float  # factor: other bits or another type of products
    attention_dp: float  # factor
    model: float  # length, of total and active parameters
    tp: float
    pp: float
    isl: float
    osl: float
    requests: float


@dataclass(frozen=True, kw_only=True)
class Width:
    """What held-out rows left of ln(measured / (factor x formula)), in deviations of the process: nine of ten lay between `low`
    and `high`. Of rows whose deviation is at most `deviation`."""

    deviation: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Correction:
    """measured / formula as the neighbours have it; measured / (factor x formula) lies in [low, high] nine times out of ten, as
    `n` held-out rows as near as this one say."""

    factor: float
    low: float
    high: float
    n: int
    source: str  # of all this, in words

    @property
    def inverse(self) -> Correction:
        """Of a rate instead of a time."""
        return replace(self, factor=1 / self.factor, low=1 / self.high, high=1 / self.low)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Runs of one group as arrays."""

    version: NDArray[np.int64]
    generation: NDArray[np.int64]
    gpu: NDArray[np.int64]
    arch: NDArray[np.int64]
    format: NDArray[np.int64]
    attention_dp: NDArray[np.int64]
    deployment: NDArray[np.int64]
    params: Floats  # the rest in logarithms
    active_params: Floats
    tp: Floats
    pp: Floats
    isl: Floats
    osl: Floats
    requests: Floats

    def at(self, index: Any) -> Columns:
        return Columns(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def metric_of(metric: str, load: str) -> str:
    """Idle TTFT is another quantity than TTFT under load."""
    return "idle ttft" if metric == "ttft" and load == "static" else metric


_CODES: dict[object, int] = {}  # a number for every name, so that arrays of them compare fast


def _code(value: object) -> int:
    return _CODES.setdefault(value, len(_CODES))


def columns(runs: Sequence[Run]) -> Columns:
    formats = {quant: precision(quant) for quant in {run.quant for run in runs}}
    gpus = gpu_table()

    def codes(values: Iterable[object]) -> NDArray[np.int64]:
        return np.array([_code(value) for value in values], dtype=np.int64)

    def logarithms(values: Iterable[float]) -> Floats:
        return np.log(np.array(list(values), dtype=float))

    return Columns(
        version=codes(run.version for run in runs),
        generation=codes(run.generation for run in runs),
        gpu=codes(run.gpu for run in runs),
        arch=codes(gpus[run.gpu].arch for run in runs),
        format=codes((formats[run.quant].weight_bits, formats[run.quant].math) for run in runs),
        attention_dp=codes(run.has_attention_dp for run in runs),
        deployment=codes(run.deployment for run in runs),
        params=logarithms(run.num_params for run in runs),
        active_params=logarithms(run.num_active_params for run in runs),
        tp=logarithms(run.tp for run in runs) / np.log(2),
        pp=logarithms(run.pp for run in runs) / np.log(2),
        isl=logarithms(run.isl for run in runs),
        osl=logarithms(run.osl for run in runs),
        # an offline run's requests are all there at once: how many says nothing about the load
        requests=logarithms(1.0 if run.load == "offline" else min(max(run.requests, 0.1), 1e4) for run in runs),
    )


def covariance(k: Kernel, a: Columns, b: Columns) -> Floats:
    """(runs of a, runs of b), without noise."""

    def differs(name: str) -> NDArray[np.bool_]:
        return np.asarray(getattr(a, name)[:, None] != getattr(b, name)[None, :])

    def distance(name: str) -> Floats:
        return np.asarray(np.abs(getattr(a, name)[:, None] - getattr(b, name)[None, :]))

    version = np.where(differs("generation"), k.generation * k.version, np.where(differs("version"), k.version, 1.0))
    gpu = np.where(differs("arch"), k.arch * k.gpu, np.where(differs("gpu"), k.gpu, 1.0))
    layout = np.where(differs("attention_dp"), k.attention_dp, 1.0)
    precisions = np.where(differs("format"), k.format, 1.0)
    fixed = (distance("params") + distance("active_params")) / k.model + distance("tp") / k.tp + distance("pp") / k.pp
    load = distance("isl") / k.isl + distance("osl") / k.osl + distance("requests") / k.requests
    shared = version * gpu * layout * precisions * np.exp(-fixed)
    return np.asarray(k.scale**2 * shared * (k.level + (1 - k.level) * np.exp(-load)))


@dataclass(frozen=True)
class _Group:
    columns: Columns
    values: Floats
    residuals: Floats
    noise: Floats  # variance


class Neighbours:
    """Published runs, ready to be asked."""

    def __init__(
        self,
        runs: Sequence[Run],
        values: Sequence[float],
        residuals: Sequence[float],
        doubtful: Sequence[bool],
        kernels: Mapping[str, Kernel],
        widths: Mapping[str, Sequence[Width]],
    ):
        """`values`: what was measured; `residuals`: ln(measured / formula)."""
        self.kernels, self.widths = kernels, widths
        members: dict[tuple[str, str, str], list[int]] = {}
        for index, run in enumerate(runs):
            members.setdefault(run.group, []).append(index)
        self.groups = {
            group: _Group(
                columns([runs[index] for index in chosen]),
                np.array(values)[chosen],
                np.array(residuals)[chosen],
                noise(kernels[group[2]], np.array(doubtful)[chosen]),
            )
            for group, chosen in members.items()
        }

    def correction(self, run: Run, value: float | None = None) -> Correction:
        """`value` is what `run` measured, when it is itself a published row: then neither it nor a copy of it is a neighbour.

        Throughput in a closed loop is seldom published; it follows the time per token.
        """
        if (run.metric, run.load) == ("throughput", "closed"):
            return self.correction(replace(run, metric="tpot")).inverse
        k, group = self.kernels[run.kernel], self.groups.get(run.group)
        if group is None:
            return self._correction(run.kernel, 0.0, k.scale**2 + k.noise**2, "no published run near")
        asked = columns([run])
        near = covariance(k, asked, group.columns)[0]
        if value is not None:
            near[_is_copy(asked, group.columns) & np.isclose(group.values, value, rtol=1e-6)] = -1.0
        chosen = np.argsort(-near, kind="stable")[:MAX_NEIGHBOURS]
        chosen = chosen[near[chosen] >= 0]
        own = group.columns.at(chosen)
        weights = np.linalg.solve(covariance(k, own, own) + np.diag(group.noise[chosen]), near[chosen])
        of_version = "version" if run.version else "generation"
        is_same = (group.columns.deployment == asked.deployment[0]) & (near >= 0)
        is_same &= getattr(group.columns, of_version) == getattr(asked, of_version)[0]
        return self._correction(
            run.kernel,
            float(weights @ group.residuals[chosen]),
            max(k.scale**2 - float(weights @ near[chosen]), 0.0) + k.noise**2,
            _source(int(is_same.sum()), int((near > NEAR * k.scale**2).sum())),
        )

    def _correction(self, kernel: str, residual: float, variance: float, source: str) -> Correction:
        deviation = float(np.sqrt(variance))
        steps = self.widths[kernel]
        width = next((step for step in steps if deviation <= step.deviation), steps[-1])
        return Correction(
            factor=float(np.exp(residual)),
            # a band whose errors all lie on one side still holds the estimate itself
            low=float(np.exp(min(width.low, 0.0) * deviation)),
            high=float(np.exp(max(width.high, 0.0) * deviation)),
            n=width.n,
            source=source,
        )


def _source(num_same: int, num_near: int) -> str:
    if num_same:
        return f"{num_same} published run{'s' * (num_same > 1)} of this deployment"
    if num_near:
        return f"{num_near} published run{'s' * (num_near > 1)} near"
    return "distant published runs only"


def _is_copy(asked: Columns, others: Columns) -> NDArray[np.bool_]:
    """The same run of the same deployment, whatever the version is called: tables repeat rows of earlier ones."""
    names = ("gpu", "format", "params", "active_params", "tp", "pp", "isl", "osl", "requests")
    return np.logical_and.reduce([getattr(others, name) == getattr(asked, name)[0] for name in names])


def noise(k: Kernel, doubtful: NDArray[np.bool_]) -> Floats:
    """Variance of every measurement. A doubtful one may be off by a factor of e."""
    return np.asarray(k.noise**2 + np.where(doubtful, 1.0, 0.0))


@functools.cache
def published() -> Neighbours:
    """The shipped table."""
    record = read_json(KERNELS)
    with open(RESIDUALS, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return Neighbours(
        [_run(row) for row in rows],
        [float(row["value"]) for row in rows],
        [float(row["residual"]) for row in rows],
        [row["doubtful"] == "True" for row in rows],
        {name: Kernel(**values) for name, values in record["kernels"].items()},
        {name: [Width(**values) for values in steps] for name, steps in record["widths"].items()},
    )


_PARSERS: dict[str, Callable[[str], Any]] = {
    "int": int, "float": float, "str": str, "bool": lambda text: text == "True",
}  # fmt: skip


def _run(row: Mapping[str, str]) -> Run:
    return Run(**{field.name: _PARSERS[str(field.type)](row[field.name]) for field in fields(Run)})
