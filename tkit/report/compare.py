"""Runs -> one comparison: what is comparable, and how big the differences are. Draws and writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tkit.errors import InputError, did_you_mean
from tkit.report.differences import differences
from tkit.report.read import LeftOut, Point, Run
from tkit.report.record import (
    MEASURES,
    Cell,
    Comparison,
    Goodput,
    Group,
    Level,
    MissingPoint,
    RunFacts,
)
from tkit.report.statistics import (
    PRACTICAL,
    Change,
    Estimate,
    Floats,
    Statistic,
    change,
    estimate,
    mean,
    min_requests,
    percentile_of,
    ratio_of_sums,
    supported_tail,
    wilson,
)
from tkit.report.telemetry import numbers
from tkit.specs.recipe import HF_GENERATE
from tkit.specs.record import SLO_TIERS, TOKEN_SOURCES, Load, Manifest

# name -> (metric, percentile), (rate, column of the requests that it sums, "" = their number) or ("goodput", tier)
ASKABLE: dict[str, tuple[str, int | str]] = {
    **{f"{metric}_p{p}": (metric, p) for metric in ("ttft", "ttfb", "tpot", "e2e") for p in (50, 90, 95, 99)},
    "input_tok_s": ("input_tok_s", "isl"),
    "requests_s": ("requests_s", ""),
    **{f"goodput_{tier}": ("goodput", tier) for tier in SLO_TIERS},
}


# what follows the arrivals of an open loop rather than the server
OFFERED = {"output_tok_s", "tok_s_device", "input_tok_s", "requests_s", *(f"goodput_{tier}" for tier in SLO_TIERS)}


def compare(
    runs: Sequence[Run],
    *,
    baseline: Run | None,
    left_out: Sequence[LeftOut],
    created: str,
    tkit: str,
    asked: Collection[str] = (),
) -> Comparison:
    """Everything a report says, except the verdict's words and the gates' outcomes.

    `baseline` is one of `runs`; one run has none. `asked`: what to estimate beyond MEASURES, names of ASKABLE.
    """
    ids = {run.name: run_id for run, run_id in zip(runs, run_ids(len(runs)), strict=True)}
    by_id = {ids[run.name]: run for run in runs}
    baseline_id = ids[baseline.name] if baseline is not None else None
    device = _device(runs)
    return Comparison(
        created=created,
        tkit=tkit,
        device=device,
        threshold=PRACTICAL,
        baseline=baseline_id,
        runs=tuple(_facts(run, ids[run.name], device) for run in runs),
        differences=differences(by_id),
        groups=_groups(by_id, baseline_id, device, asked),
        left_out=tuple(left_out),
    )


def run_ids(count: int) -> list[str]:
    """A, B, ... Z, A2, B2, ..."""
    return [chr(ord("A") + i % 26) + (str(i // 26 + 1) if i >= 26 else "") for i in range(count)]


def find_baseline(runs: Sequence[Run], name: str) -> Run:
    """The run of that directory, name, label, engine or quantization. More than one is an error."""
    found = [run for run in runs if name in (run.name, run.manifest.run) or _same_path(name, run.directory)]
    if not found:
        found = [run for run in runs if name in _aliases(run)]
    if len(found) == 1:
        return found[0]
    known = sorted({alias for run in runs for alias in (run.manifest.run, *_aliases(run))})
    if found:
        raise InputError(
            f'--baseline "{name}" is {len(found)} of the runs',
            problems=[f"{run.manifest.run}: {run.name}" for run in found],
            hint="name one by its run",
        )
    raise InputError(
        f'--baseline: none of the runs is "{name}"{did_you_mean(name, known)}', hint=f"known: {', '.join(known)}"
    )


def _aliases(run: Run) -> set[str]:
    return {run.manifest.label, *((run.engine.name, run.engine.quant) if run.engine else ())}


def _same_path(name: str, directory: Path) -> bool:
    return Path(name).is_dir() and Path(name).resolve() == directory.resolve()


def _facts(run: Run, run_id: str, device: str) -> RunFacts:
    manifest = run.manifest
    there = {(point.summary.shape, point.summary.load, point.summary.repeat) for point in run.points}
    grid = [
        (shape, load, repeat)
        for shape in manifest.shapes
        for load in _planned(manifest)
        for repeat in range(1, manifest.repeats + 1)
    ]
    return RunFacts(
        id=run_id,
        name=run.name,
        run=manifest.run,
        directory=str(run.directory),
        label=manifest.label,
        started=manifest.started,
        profile=manifest.profile,
        protocol=manifest.protocol,
        url=manifest.url,
        model=manifest.model,
        command=manifest.command,
        num_points=len(run.points),
        num_invalid=sum(not point.summary.is_valid for point in run.points),
        missing=tuple(
            MissingPoint(shape=shape, load=load, repeat=repeat)
            for shape, load, repeat in grid
            if (shape, load, repeat) not in there
            and f"{shape.replace('/', 'x')}-{load.slug}-r{repeat}" not in run.settled
        ),
        ended_early=run.ended_early,
        found=run.found,
        num_devices=_num_devices(run, device),
        engine=run.engine,
        validation=manifest.validation,
        identity=manifest.identity,
        host_speed=manifest.host_speed,
        hardware="not looked into",
        memory=None,
        definitions=manifest.definitions,
        files={
            "manifest.json": run.manifest_sha256,
            **{
                f"points/{point.directory.name}/{file}": digest
                for point in run.points
                for file, digest in point.sha256.items()
            },
        },
    )


def _planned(manifest: Manifest) -> list[Load]:
    closed = [Load(concurrency=concurrency) for concurrency in manifest.concurrency]
    return closed + [Load(rate=rate, arrivals=manifest.arrivals) for rate in manifest.rates]


def _device(runs: Sequence[Run]) -> str:
    counted = [_num_gpus(run) is not None for run in runs]
    if all(counted):
        return "GPU"
    embedded = [  # all ranks on one device
        run.manifest.protocol == HF_GENERATE or (run.engine is not None and run.engine.backend == "reference")
        for run in runs
    ]
    return "device" if all(map(any, zip(counted, embedded, strict=True))) else "server"


def _num_gpus(run: Run) -> int | None:
    """As the sweep counted them."""
    for point in run.points:
        if point.summary.tok_s_gpu:
            return round(point.summary.output_tok_s / point.summary.tok_s_gpu)
    return None


def _num_devices(run: Run, device: str) -> int:
    return 1 if device == "server" else _num_gpus(run) or 1


# ---- groups -------------------------------------------------------------------------------------------------------


def _groups(runs: Mapping[str, Run], baseline: str | None, device: str, asked: Collection[str]) -> tuple[Group, ...]:
    keys: dict[tuple[str, str | None, str, str], dict[str, list[Point]]] = {}
    for run_id, run in runs.items():
        for point in run.points:
            summary = point.summary
            key = (summary.shape, summary.arrivals, TOKEN_SOURCES[summary.token_source], summary.definitions)
            keys.setdefault(key, {}).setdefault(run_id, []).append(point)
    shapes = Counter((shape, arrivals) for shape, arrivals, _, _ in keys)
    groups = []
    for (shape, arrivals, counted, definitions), points in sorted(
        keys.items(), key=lambda item: (_lengths(item[1]), item[0][0], item[0][1] or "")
    ):
        sources = sorted({point.summary.token_source for some in points.values() for point in some})
        note = None
        if shapes[shape, arrivals] > 1:
            others = "group" if shapes[shape, arrivals] == 2 else "groups"
            note = (
                f"{', '.join(points)}: tokens counted by {' or '.join(sources)} ({counted}), definitions {definitions}; "
                f"not comparable with the other {others} of {shape}"
            )
        levels = _levels(points, runs, arrivals, baseline if baseline in points else None, device, asked)
        groups.append(
            Group(
                shape=shape,
                arrivals=arrivals,
                token_source=" or ".join(sources),
                definitions=definitions,
                runs=tuple(points),
                levels=_with_frontier(levels) if arrivals is None else levels,
                note=note,
            )
        )
    return tuple(groups)


def _lengths(points: Mapping[str, Sequence[Point]]) -> tuple[int, int]:
    summary = next(iter(points.values()))[0].summary
    return summary.isl, summary.osl


def _levels(
    points: Mapping[str, Sequence[Point]],
    runs: Mapping[str, Run],
    arrivals: str | None,
    baseline: str | None,
    device: str,
    asked: Collection[str],
) -> tuple[Level, ...]:
    levels = []
    planned = {load for run_id in points for load in _planned(runs[run_id].manifest) if load.arrivals == arrivals}
    measured = {point.summary.load for some in points.values() for point in some}
    for load in sorted(planned | measured, key=lambda load: load.order):
        here = {
            run_id: _usable([point for point in some if point.summary.load == load]) for run_id, some in points.items()
        }
        counts = [
            sum(len(point.measured) for point in some)
            for some in here.values()
            if some and all(point.summary.is_valid for point in some)
        ]
        tail = supported_tail(min(counts)) if counts else None
        cells = {
            run_id: _cell(run_id, load, points[run_id], some, tail, _num_devices(runs[run_id], device), asked)
            for run_id, some in here.items()
            if some
        }
        reference = cells.get(baseline) if baseline is not None else None
        if reference is not None and reference.is_valid:
            cells = {
                run_id: replace(cell, changes=_changes(cell, reference))
                if run_id != baseline and cell.is_valid
                else cell
                for run_id, cell in cells.items()
            }
        levels.append(Level(load=load, tail=tail, cells=tuple(cells.values())))
    return tuple(levels)


def _usable(points: Sequence[Point]) -> list[Point]:
    valid = [point for point in points if point.summary.is_valid]
    return valid or list(points)


def _cell(
    run_id: str,
    load: Load,
    points: Sequence[Point],
    used: Sequence[Point],
    tail: int | None,
    num_devices: int,
    asked: Collection[str],
) -> Cell:
    """`points` are all of the run in this group, `used` those of this load that count."""
    everything = [point for point in points if point.summary.load == load]
    repeats = [point.measured for point in used]
    block = _block(used)
    reported = [point.summary.output_tok_s for point in used]

    def of(columns: Sequence[str], statistic: Statistic, told: Sequence[float] | None = None) -> Estimate | None:
        rows: list[Floats] = [frame[list(columns)].dropna().to_numpy(dtype=float) for frame in repeats]
        return estimate(rows, statistic, block=block, reported=told)

    output = of(("osl", "e2e"), ratio_of_sums, reported)
    estimates = {"output_tok_s": output, "tok_s_device": _scaled(output, 1 / num_devices)}
    percentiles = {"p50": 50, "tail": tail}
    latencies = {
        name: of((measure.metric,), percentile_of(percentile))
        if measure.percentile is not None
        and (percentile := percentiles[measure.percentile]) is not None
        and (load.rate is not None or not measure.metric.endswith("_sched"))
        else None
        for name, measure in MEASURES.items()
        if measure.percentile is not None
    }
    estimates |= {"tok_s_user": _inverse(latencies["tpot_p50"])} | latencies
    estimates |= {name: _asked(name, used) for name in asked if name not in estimates}
    errors: Counter[str] = Counter()
    for point in used:
        errors.update(point.summary.errors)
    return Cell(
        run=run_id,
        load=load,
        repeats=len(used),
        requests=sum(point.summary.requests for point in used),
        errors=dict(errors),
        is_valid=all(point.summary.is_valid for point in used),
        invalid_reasons=tuple(
            f"repeat {point.summary.repeat}: {reason}" if len(everything) > 1 else reason
            for point in everything
            if not point.summary.is_valid
            for reason in (point.summary.invalid_reasons or ("no reason given",))
        ),
        requests_s=float(np.median([point.summary.requests_s for point in used])),
        in_flight=float(load.concurrency or _in_flight(used)),
        ttft_mean=of(("ttft" if load.rate is None else "ttft_sched",), mean),
        estimates=estimates,
        output_tok_s_repeats=tuple(reported),
        goodput=_goodput(used),
        telemetry=numbers(used),
    )


def _in_flight(points: Sequence[Point]) -> float:
    """Little's law: the mean over the time is the rate times the mean time in flight."""
    durations = np.concatenate([point.measured["e2e"].dropna().to_numpy(dtype=float) for point in points])
    rate = float(np.median([point.summary.requests_s for point in points]))
    return rate * float(durations.mean()) / 1000 if len(durations) else 0.0


def _block(points: Sequence[Point]) -> int:
    """Requests that share the server's steps, so that they are no independent samples: those in flight together."""
    summary = points[0].summary
    return summary.concurrency or max(round(summary.client.get("delivered_concurrency", 1)), 1)


def _asked(name: str, points: Sequence[Point]) -> Estimate | None:
    """One of ASKABLE over the points, all of one load; None when too few requests support a percentile."""
    kind, detail = ASKABLE[name]
    block = _block(points)
    frames = [point.measured for point in points]
    if isinstance(detail, int):
        if detail > 50 and sum(map(len, frames)) < min_requests(detail):
            return None
        samples = [frame[[kind]].dropna().to_numpy(dtype=float) for frame in frames]
        return estimate(samples, percentile_of(detail), block=block)
    if kind == "goodput":
        reported = [float(point.summary.goodput.get(detail, {}).get("requests_s", 0.0)) for point in points]
        is_open = points[0].summary.rate is not None
        limits = {
            f"{metric}_sched" if is_open and metric in ("ttft", "e2e") else metric: limit
            for metric, limit in SLO_TIERS[detail].items()
        }
        counted = [
            np.logical_and.reduce([frame[metric] <= limit for metric, limit in limits.items()] or [frame["e2e"] > 0])
            for frame in frames
        ]
    else:
        told = [getattr(point.summary, kind) for point in points]
        if None in told:  # nobody counted the input
            return None
        reported = [float(value) for value in told]
        counted = [frame[detail] if detail else np.ones(len(frame)) for frame in frames]
    rows = [
        np.column_stack([np.asarray(count, dtype=float), frame["e2e"].to_numpy(dtype=float)])
        for count, frame in zip(counted, frames, strict=True)
    ]
    return estimate(rows, ratio_of_sums, block=block, reported=reported)


def _scaled(value: Estimate | None, factor: float) -> Estimate | None:
    if value is None:
        return None
    low, high = (None if edge is None else edge * factor for edge in (value.low, value.high))
    return replace(value, value=value.value * factor, low=low, high=high)


def _inverse(milliseconds: Estimate | None) -> Estimate | None:
    """Per second: the same spread on the logarithmic scale, edges swapped."""
    if milliseconds is None:
        return None
    low, high = (None if edge is None else 1000 / edge for edge in (milliseconds.high, milliseconds.low))
    return replace(milliseconds, value=1000 / milliseconds.value, low=low, high=high)


def _goodput(points: Sequence[Point]) -> dict[str, Goodput]:
    goodput = {}
    for tier in SLO_TIERS:
        told = [
            (point.summary.goodput[tier], point.summary.requests) for point in points if tier in point.summary.goodput
        ]
        total = sum(requests for _, requests in told)
        if not total:
            continue
        met = sum(facts["attainment"] * requests for facts, requests in told)
        low, high = wilson(met, total)
        rate = float(np.median([facts["requests_s"] for facts, _ in told]))
        goodput[tier] = Goodput(requests_s=rate, attainment=met / total, low=low, high=high)
    return goodput


def _changes(cell: Cell, baseline: Cell) -> dict[str, Change]:
    """Rates of an open loop are what the schedule asked for, unevenly by chance: their differences say nothing of a server."""
    pairs = {
        name: (mine, baseline.estimates[name])
        for name, mine in cell.estimates.items()
        if cell.load.rate is None or name not in OFFERED
    }
    return {name: change(mine, its) for name, (mine, its) in pairs.items() if mine is not None and its is not None}


def _with_frontier(levels: Sequence[Level]) -> tuple[Level, ...]:
    """Marks the valid cells that no other valid cell beats in both tok/s per user and tok/s per device."""
    places = {
        (cell.run, cell.load): (user.value, device.value)
        for level in levels
        for cell in level.cells
        if cell.is_valid
        and (user := cell.estimates["tok_s_user"]) is not None
        and (device := cell.estimates["tok_s_device"]) is not None
    }
    frontier = {
        key
        for key, (x, y) in places.items()
        if not any(u >= x and v >= y and (u, v) != (x, y) for u, v in places.values())
    }
    return tuple(
        replace(
            level,
            cells=tuple(replace(cell, is_on_frontier=(cell.run, cell.load) in frontier) for cell in level.cells),
        )
        for level in levels
    )
