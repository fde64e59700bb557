"""A comparison and its rows -> Vega-Lite specifications. Pure: dicts in, dicts out; knows no HTML and no browser.

Colours are CSS variables, so that one drawing follows the page from light to dark; `render_png` replaces them by
the light ones. A line joins neighbouring loads only: where a load is missing or invalid there is a gap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tkit.report import text
from tkit.report.read import Point
from tkit.report.record import DEVICES, LATENCY_NAMES, Cell, Comparison, Group
from tkit.report.statistics import Floats
from tkit.specs.record import SLO_TIERS

Spec = dict[str, Any]
Row = dict[str, Any]

# name -> (light, dark); the page defines each as a CSS variable. A series is told apart by its mark and dashes as well.
COLORS = {
    "ink":      ("#1d1d1f", "#e9e7e3"),
    "muted":    ("#5d6066", "#a3a6ab"),
    "rule":     ("#d9d9d6", "#3b3d41"),
    "paper":    ("#ffffff", "#17181a"),
    "series-0": ("#1f5fa8", "#6aa9f0"),
    "series-1": ("#c4540a", "#f2914a"),
    "series-2": ("#2b7a52", "#58bd8b"),
    "series-3": ("#8a4a9e", "#c68fd6"),
    "series-4": ("#8c6d00", "#d3b13b"),
    "series-5": ("#a8324a", "#ee7c92"),
    "series-6": ("#3f6f7d", "#7fb9c9"),
    "series-7": ("#5c5c5c", "#b5b5b5"),
}  # fmt: skip
NUM_SERIES = 8
MARKS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "triangle-right", "triangle-left")
DASHES = ([1, 0], [9, 3], [4, 3], [9, 3, 2, 3], [2, 2], [14, 3], [6, 6], [4, 2, 1, 2])
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

ECDF_POINTS = 160  # per line; the tail is kept exactly
TAIL_POINTS = 25
SCATTER_POINTS = 400  # per run
TIME_STEPS = 200
MIN_MS = 0.01  # two chunks read at once have no gap; a logarithmic axis needs one


@dataclass(frozen=True, kw_only=True)
class Plot:
    """`caption` says what is drawn and defines the axes."""

    id: str
    title: str
    caption: str
    spec: Spec


def series(comparison: Comparison, run_id: str) -> tuple[int, int]:
    """The numbers of a run's colour and mark; together they repeat only after 64 runs."""
    position = [run.id for run in comparison.runs].index(run_id)
    return position % NUM_SERIES, (position + position // NUM_SERIES) % NUM_SERIES


def pareto(comparison: Comparison, group: Group, plot_id: str) -> Plot:
    rows = []
    for run_id in group.runs:
        for segment, cell in _segments(group, run_id):
            user, device = cell.estimates["tok_s_user"], cell.estimates["tok_s_device"]
            if user is None or device is None:
                continue
            state = "invalid" if not cell.is_valid else "frontier" if cell.is_on_frontier else "behind"
            rows.append(
                _row(comparison, run_id, segment, cell)
                | {"x": user.value, "y": device.value, "state": state, "load": cell.load.number}
            )
    device_name = comparison.device
    x = _quantitative("x", "tok/s per user", zero=True)
    y = _quantitative("y", f"tok/s per {device_name}", zero=True)
    tooltip = [
        _tip("run", "run"),
        _tip("C", _load_name(group), "~r"),
        _tip("x", "tok/s per user", ".4~r"),
        _tip("y", f"tok/s per {device_name}", ".4~r"),
        _tip("state", "state"),
    ]
    layers = [
        *_slo_rules([row["x"] for row in rows], "x", {tier: 1000 / limit["tpot"] for tier, limit in _tpot_limits()}),
        _line(comparison, x, y),
        {
            "mark": {"type": "point", "size": 90, "strokeWidth": 1.6, "opacity": 1},
            "encoding": {
                "x": x,
                "y": y,
                "color": _color(comparison),
                "fill": _color(comparison),
                "shape": _shape(comparison),
                "fillOpacity": _fill({"frontier": 1, "behind": 0.4}),
                "tooltip": tooltip,
            },
        },
        {
            "mark": {"type": "text", "dx": 8, "dy": -8, "align": "left", "fontSize": 11},
            "encoding": {"x": x, "y": y, "text": {"field": "load"}, "color": _color(comparison)},
        },
    ]
    caption = (
        f"Up and to the right is better. Right: tok/s per user, 1 / median TPOT, how fast one answer streams. "
        f"Up: tok/s per {device_name}, what the hardware yields: {DEVICES[device_name]}. "
        f"A line per configuration, points labelled by {_LOADS[group.arrivals is None]}. "
        f"Filled: on the frontier, no other point is better in both. "
        f"Pale: behind it. Hollow: invalid. Gaps in a line: no valid result."
    )
    return Plot(
        id=plot_id,
        title=f"Throughput against interactivity, {group.title}",
        caption=caption,
        spec=_spec(rows, layers, height=380, description=f"Pareto plot of {group.title}"),
    )


def latency_against_throughput(comparison: Comparison, group: Group, metric: str, plot_id: str) -> Plot:
    """p50 as a point, a bar from there to the tail percentile. `metric`: ttft, ttft_sched or tpot."""
    rows = []
    tails = {level.load: level.tail for level in group.levels}
    for run_id in group.runs:
        for segment, cell in _segments(group, run_id):
            rate, median = cell.estimates["output_tok_s"], cell.estimates[f"{metric}_p50"]
            if rate is None or median is None:
                continue
            tail = cell.estimates[f"{metric}_tail"]
            rows.append(
                _row(comparison, run_id, segment, cell)
                | {
                    "x": rate.value,
                    "y": median.value,
                    "tail": tail.value if tail else None,
                    "percentile": f"p{tails[cell.load]}" if tail else "too few requests",
                    "state": "valid" if cell.is_valid else "invalid",
                    "load": cell.load.number,
                }
            )
    name = LATENCY_NAMES[metric]
    x, y = _quantitative("x", "output tok/s", zero=True), _logarithmic("y", f"{name}, ms")
    tooltip = [
        _tip("run", "run"),
        _tip("C", _load_name(group), "~r"),
        _tip("x", "output tok/s", ".4~r"),
        _tip("y", f"{name} p50, ms", ".4~r"),
        _tip("tail", f"{name} tail, ms", ".4~r"),
        _tip("percentile", "tail is"),
        _tip("state", "state"),
    ]
    limited = metric.removesuffix("_sched")
    limits = {tier: limit[limited] for tier, limit in SLO_TIERS.items() if limited in limit}
    bar = {
        "transform": [{"filter": "isValid(datum.tail)"}],
        "mark": {"type": "rule", "strokeWidth": 5, "opacity": 0.3},
        "encoding": {"x": x, "y": y, "y2": {"field": "tail"}, "color": _color(comparison), "tooltip": tooltip},
    }
    spread = [value for row in rows for value in (row["y"], row["tail"]) if value]
    layers = [
        *_slo_rules(spread, "y", limits),
        *([bar] if any(row["tail"] for row in rows) else []),
        _line(comparison, x, y),
        _points(comparison, x, y, tooltip),
        {
            "mark": {"type": "text", "dy": 15, "fontSize": 11},
            "encoding": {"x": x, "y": y, "text": {"field": "load"}, "color": _color(comparison)},
        },
    ]
    return Plot(
        id=plot_id,
        title=f"{name} against throughput, {group.title}",
        caption=f"Point: {name} p50 at each load. Bar: up to the highest percentile that the requests support (hover). "
        f"Down and to the right is better.",
        spec=_spec(rows, layers, height=300, description=f"{name} against output tokens per second, {group.title}"),
    )


# quantity -> (axis, key of the limit in Wall, of the prediction, is a higher number better)
WALLS = {
    "rate": ("output tok/s", "limit_tok_s", "predicted_tok_s", True),
    "ttft": ("TTFT mean, ms", "limit_ttft_ms", "predicted_ttft_ms", False),
}


def wall(comparison: Comparison, group: Group, quantity: str, plot_id: str) -> Plot:
    """`quantity` of WALLS: measured points, the line that physics draws, and the band of the plan where there is one."""
    name, limit_key, predicted_key, is_rate = WALLS[quantity]
    rows = []
    for run_id in group.runs:
        for segment, cell in _segments(group, run_id):
            measured = cell.estimates["output_tok_s"] if is_rate else cell.ttft_mean
            if measured is None or cell.wall is None:
                continue
            limit, predicted = getattr(cell.wall, limit_key), getattr(cell.wall, predicted_key)
            rows.append(
                _row(comparison, run_id, segment, cell)
                | {
                    "x": cell.load.order,
                    "y": measured.value,
                    "limit": limit,
                    "binds": cell.wall.limit_binds if is_rate else cell.wall.limit_ttft_binds,
                    "low": predicted.low if predicted else None,
                    "high": predicted.high if predicted else None,
                    "state": "valid" if cell.is_valid else "invalid",
                }
            )
    load = "requests in flight (C)" if group.arrivals is None else "requests per second asked"
    x, y = _logarithmic("x", load), _logarithmic("y", name)
    x["axis"] |= {"values": sorted({row["x"] for row in rows})}
    tooltip = [
        _tip("run", "run"),
        _tip("x", _load_name(group), "~r"),
        _tip("y", name, ".4~r"),
        _tip("limit", f"limit, {name}", ".4~r"),
        _tip("binds", "limit set by"),
        _tip("low", "predicted from", ".4~r"),
        _tip("high", "predicted to", ".4~r"),
        _tip("state", "state"),
    ]
    band = {
        "mark": {"type": "area", "opacity": 0.16},
        "encoding": {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": _color(comparison)},
    }
    layers = [
        *([band] if any(row["low"] for row in rows) else []),
        {
            "mark": {"type": "line", "strokeDash": [6, 4], "strokeWidth": 1.4},
            "encoding": {"x": x, "y": y | {"field": "limit"}, "color": _color(comparison)},
        },
        _line(comparison, x, y),
        _points(comparison, x, y, tooltip),
    ]
    side = "No engine is above it" if is_rate else "No engine is below it"
    return Plot(
        id=plot_id,
        title=f"{'Measured, predicted, possible' if is_rate else 'The first token'}: {group.title}",
        caption=f"Dashed: the limit of the hardware. {side}. Shaded: what tkit plan predicts, where it knows the engine and "
        "the hardware. Points: measured; hollow: invalid. Both axes are logarithmic.",
        spec=_spec(rows, layers, height=300, description=f"{name} against the limit of the hardware, {group.title}"),
    )


def ecdf(comparison: Comparison, samples: Mapping[str, Floats], name: str, where: str, plot_id: str) -> Plot:
    """Share of values at or below x, logarithmic in x. `samples`: run id -> milliseconds."""
    rows: list[Row] = []
    for run_id, values in samples.items():
        rows.extend(
            {"run": _name(comparison, run_id), "x": round(x, 4), "share": round(share, 5), "n": len(values)}
            for x, share in ecdf_points(values)
        )
    x, y = _logarithmic("x", f"{name}, ms"), _quantitative("share", "share of requests", zero=True)
    if name == "Chunk gap":
        y["title"] = "share of gaps"
    y["axis"] = {"format": ".0%", "tickCount": 5}
    layers = [
        {
            "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 1.8},
            "encoding": {"x": x, "y": y, "color": _color(comparison), "strokeDash": _dash(comparison)},
        },
        {
            "mark": {"type": "point", "size": 120, "opacity": 0},
            "encoding": {
                "x": x,
                "y": y,
                "tooltip": [
                    _tip("run", "run"),
                    _tip("share", "share at or below", ".2%"),
                    _tip("x", f"{name}, ms", ".4~r"),
                    _tip("n", "values", ",d"),
                ],
            },
        },
    ]
    counts = ", ".join(f"{run_id} {text.count(len(values))}" for run_id, values in samples.items())
    return Plot(
        id=plot_id,
        title=f"{name}, {where}",
        caption=f"Share at or below a value; further left is better. Values: {counts}.",
        spec=_spec(rows, layers, height=260, description=f"Distribution of {name}"),
    )


def ecdf_points(values: Floats) -> list[tuple[float, float]]:
    """(value, share at or below): at most ECDF_POINTS, evenly in rank, the largest TAIL_POINTS all kept."""
    ordered = np.maximum(np.sort(values[np.isfinite(values)]), MIN_MS)
    if not len(ordered):
        return []
    ranks = np.unique(
        np.concatenate(
            [
                np.linspace(0, len(ordered) - 1, min(len(ordered), ECDF_POINTS - TAIL_POINTS)).round().astype(int),
                np.arange(max(0, len(ordered) - TAIL_POINTS), len(ordered)),
            ]
        )
    )
    return [(float(ordered[rank]), (int(rank) + 1) / len(ordered)) for rank in ranks]


def in_flight(comparison: Comparison, points: Mapping[str, Point], where: str, plot_id: str) -> Plot:
    rows: list[Row] = []
    for run_id, point in points.items():
        sent, ended = point.requests["sent_s"].dropna().to_numpy(), point.requests["end_s"].dropna().to_numpy()
        if not len(sent) or not len(ended):
            continue
        times = np.linspace(0, float(ended.max()), TIME_STEPS)
        counts = np.searchsorted(np.sort(sent), times, "right") - np.searchsorted(np.sort(ended), times, "right")
        rows.extend(
            {"run": _name(comparison, run_id), "x": round(float(time), 3), "y": int(count)}
            for time, count in zip(times, counts, strict=True)
        )
    x, y = _quantitative("x", "seconds since the first request"), _quantitative("y", "requests in flight", zero=True)
    mark = {"type": "line", "interpolate": "step-after", "strokeWidth": 1.5}
    tooltip = [_tip("run", "run"), _tip("x", "at, s", ".3~r"), _tip("y", "in flight", "d")]
    layers = [
        {"mark": mark, "encoding": {"x": x, "y": y, "color": _color(comparison), "strokeDash": _dash(comparison)}},
        {"mark": {"type": "point", "size": 60, "opacity": 0}, "encoding": {"x": x, "y": y, "tooltip": tooltip}},
    ]
    y["axis"] = _whole_ticks(max((row["y"] for row in rows), default=0))
    return Plot(
        id=plot_id,
        title=f"Requests in flight, {where}",
        caption=f"Sent and not yet ended, warm-up included, at {TIME_STEPS} moments.",
        spec=_spec(rows, layers, height=240, description="Requests in flight over time"),
    )


# quantity of report.telemetry -> (title, axis, number format, caption)
TELEMETRY_PLOTS = {
    "power_w": ("GPU power", "W, all GPUs", ".4~r", "As NVML says, once a second."),
    "waiting": ("Requests waiting in the server", "requests", "d", "The server's own count, once a second."),
    "kv_share": ("KV cache in use", "share of the cache", ".2%", "The server's own count, once a second."),
}


def told_over_time(
    comparison: Comparison, quantity: str, values: Mapping[str, pd.Series], where: str, plot_id: str
) -> Plot:
    """`values`: run id -> by seconds since its first request; at most TIME_STEPS are drawn."""
    title, axis, number_format, caption = TELEMETRY_PLOTS[quantity]
    rows: list[Row] = []
    for run_id, series_of_run in values.items():
        shown = np.unique(
            np.linspace(0, len(series_of_run) - 1, min(len(series_of_run), TIME_STEPS)).round().astype(int)
        )
        rows.extend(
            {"run": _name(comparison, run_id), "x": round(float(x), 3), "y": round(float(y), 4)}
            for x, y in series_of_run.iloc[shown].items()
        )
    x = _quantitative("x", "seconds since the first request", zero=True)
    y = _quantitative("y", axis, zero=True)
    highest = max(row["y"] for row in rows)
    if number_format == "d":
        y["axis"] = _whole_ticks(highest)
    elif number_format.endswith("%"):
        y["axis"] |= {"format": ".2~%"}
    if highest == 0:
        y["scale"] |= {"domain": [0, 1]}
    color, dash = _color(comparison), _dash(comparison)
    tooltip = [_tip("run", "run"), _tip("x", "at, s", ".3~r"), _tip("y", axis, number_format)]
    layers = [
        {
            "mark": {"type": "line", "strokeWidth": 1.5},
            "encoding": {"x": x, "y": y, "color": color, "strokeDash": dash},
        },
        {"mark": {"type": "point", "size": 60, "opacity": 0}, "encoding": {"x": x, "y": y, "tooltip": tooltip}},
    ]
    return Plot(
        id=plot_id,
        title=f"{title}, {where}",
        caption=caption,
        spec=_spec(rows, layers, height=200, description=f"{title} over time"),
    )


def ttft_over_time(comparison: Comparison, points: Mapping[str, Point], where: str, plot_id: str) -> Plot:
    rows: list[Row] = []
    for run_id, point in points.items():
        frame = point.requests[point.requests["ttft"].notna()]
        shown = frame.iloc[np.unique(np.linspace(0, len(frame) - 1, min(len(frame), SCATTER_POINTS)).astype(int))]
        worst = frame.nlargest(TAIL_POINTS, "ttft")
        kept = frame.loc[sorted(set(shown.index) | set(worst.index))]
        rows.extend(
            {
                "run": _name(comparison, run_id),
                "id": int(request),
                "x": round(float(sent), 4),
                "y": round(max(float(ttft), MIN_MS), 4),
                "state": "error" if status != "ok" else str(phase),
            }
            for request, sent, ttft, phase, status in kept[["id", "sent_s", "ttft", "phase", "status"]].itertuples(
                index=False
            )
        )
    x, y = _quantitative("x", "sent, seconds since the first request"), _logarithmic("y", "TTFT, ms")
    tooltip = [
        _tip("run", "run"),
        _tip("id", "request", "d"),
        _tip("x", "sent at, s", ".3~f"),
        _tip("y", "TTFT, ms", ".4~r"),
        _tip("state", "state"),
    ]
    return Plot(
        id=plot_id,
        title=f"TTFT over time, {where}",
        caption=f"A point per request, at most {SCATTER_POINTS} per run and always its {TAIL_POINTS} slowest. "
        f"Hollow: warm-up, drain or error; not counted.",
        spec=_spec(
            rows,
            [_points(comparison, x, y, tooltip, size=28, counted="measured")],
            height=240,
            description="Time to first token of each request over time",
        ),
    )


def render_png(plot: Plot, comparison: Comparison, *, width: int = 860, scale: float = 2) -> bytes:
    """The plot as a picture, on white, with its legend and title."""
    import vl_convert

    spec = json.loads(json.dumps(plot.spec))
    names = [text.shorten(run.name, 48) for run in comparison.runs]
    _show_legend(spec["layer"], dict(zip([_name(comparison, run.id) for run in comparison.runs], names, strict=True)))
    spec |= {"width": width, "background": COLORS["paper"][0], "title": {"text": plot.title, "anchor": "start"}}
    spec["config"]["title"] = {"color": "var(--ink)", "font": "sans-serif", "fontSize": 15}
    written = json.dumps(spec).replace(json.dumps(FONT)[1:-1], "Arial, Liberation Sans, DejaVu Sans, sans-serif")
    for name, (light, _) in COLORS.items():
        written = written.replace(f"var(--{name})", light)
    return bytes(vl_convert.vegalite_to_png(written, scale=scale))


def _show_legend(layers: Iterable[Spec], names: Mapping[str, str]) -> None:
    """One legend for every channel that tells runs apart; the page has a legend of its own."""
    legend = {"title": None, "orient": "bottom", "columns": 2, "labelLimit": 400, "symbolOpacity": 1}
    legend["labelExpr"] = f"({json.dumps(names)})[datum.label]"
    for layer in layers:
        for channel in ("color", "fill", "shape"):
            if channel in layer["encoding"]:
                layer["encoding"][channel]["legend"] = legend


# ---- parts --------------------------------------------------------------------------------------------------------


def _spec(rows: list[Row], layers: list[Spec], *, height: int, description: str) -> Spec:
    axis = {
        "labelColor": "var(--muted)", "labelFont": FONT, "labelFontSize": 11, "labelFlush": False,
        "titleColor": "var(--ink)", "titleFont": FONT, "titleFontSize": 12, "titleFontWeight": 500, "titlePadding": 8,
        "gridColor": "var(--rule)", "gridWidth": 0.8, "tickColor": "var(--rule)", "domainColor": "var(--muted)",
    }  # fmt: skip
    legend = {"labelColor": "var(--ink)", "labelFont": FONT, "labelFontSize": 12}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": description,
        "width": "container",
        "height": height,
        "background": None,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": rows},
        "layer": layers,
        "config": {
            "view": {"stroke": None},
            "axis": axis,
            "legend": legend,
            "text": {"font": FONT},
            "padding": 4,
        },
    }


def _segments(group: Group, run_id: str) -> Iterable[tuple[int, Cell]]:
    """The run's cells in order of load; the number changes where a load in between is missing or invalid."""
    segment = 0
    for level in group.levels:
        cell = next((cell for cell in level.cells if cell.run == run_id), None)
        if cell is None or not cell.is_valid:
            segment += 1
        if cell is not None:
            yield segment, cell
        if cell is not None and not cell.is_valid:
            segment += 1


_LOADS = {True: "requests in flight (C)", False: "requests per second asked"}


def _load_name(group: Group) -> str:
    return "C" if group.arrivals is None else "req/s asked"


def _name(comparison: Comparison, run_id: str) -> str:
    """A run in tooltips and scales: unique through its id."""
    return f"{run_id} {text.shorten(comparison.facts(run_id).name)}"


def _row(comparison: Comparison, run_id: str, segment: int, cell: Cell) -> Row:
    return {
        "run": _name(comparison, run_id),
        "segment": f"{run_id}{segment}",
        "C": cell.load.order,
        "is_valid": cell.is_valid,
    }


def _told_apart(comparison: Comparison, values: Sequence[Any], *, by: int = 0) -> Spec:
    """A run's own of `values`, chosen by its colour (0) or its mark (1)."""
    names = [_name(comparison, run.id) for run in comparison.runs]
    chosen = [values[series(comparison, run.id)[by]] for run in comparison.runs]
    return {"field": "run", "type": "nominal", "scale": {"domain": names, "range": chosen}, "legend": None}


def _color(comparison: Comparison) -> Spec:
    return _told_apart(comparison, [f"var(--series-{i})" for i in range(NUM_SERIES)])


def _shape(comparison: Comparison) -> Spec:
    return _told_apart(comparison, MARKS, by=1)


def _dash(comparison: Comparison) -> Spec:
    return _told_apart(comparison, DASHES, by=1)


def _quantitative(name: str, title: str, *, zero: bool = False) -> Spec:
    scale, axis = {"zero": zero, "nice": True}, {"tickCount": 6}
    return {"field": name, "type": "quantitative", "title": title, "scale": scale, "axis": axis}


def _whole_ticks(highest: float) -> Spec:
    """Of counts, from zero: ticks at whole numbers, at most seven."""
    step = max(1, math.ceil(highest / 6))
    return {"values": list(range(0, math.ceil(highest) + step, step)), "format": "d"}


def _logarithmic(name: str, title: str) -> Spec:
    scale = {"type": "log", "nice": False, "padding": 12}
    axis = {"format": "~r", "tickCount": 6, "labelOverlap": True}
    return {"field": name, "type": "quantitative", "title": title, "scale": scale, "axis": axis}


def _tip(name: str, title: str, number_format: str | None = None) -> Spec:
    if number_format is None:
        return {"field": name, "type": "nominal", "title": title}
    return {"field": name, "type": "quantitative", "title": title, "format": number_format}


def _line(comparison: Comparison, x: Spec, y: Spec) -> Spec:
    return {
        "transform": [{"filter": "datum.is_valid"}],
        "mark": {"type": "line", "strokeWidth": 1.8},
        "encoding": {
            "x": x,
            "y": y,
            "color": _color(comparison),
            "detail": {"field": "segment"},
            "order": {"field": "C", "type": "quantitative"},
        },
    }


def _points(
    comparison: Comparison, x: Spec, y: Spec, tooltip: list[Spec], *, size: int = 70, counted: str = "valid"
) -> Spec:
    """Filled when the state is `counted`, else hollow."""
    return {
        "mark": {"type": "point", "size": size, "strokeWidth": 1.4, "opacity": 1},
        "encoding": {
            "x": x,
            "y": y,
            "color": _color(comparison),
            "fill": _color(comparison),
            "shape": _shape(comparison),
            "fillOpacity": _fill({counted: 1}),
            "tooltip": tooltip,
        },
    }


def _fill(opacities: Mapping[str, float]) -> Spec:
    """How full a point is by its state; every other state is hollow."""
    conditions = [{"test": f"datum.state === '{state}'", "value": value} for state, value in opacities.items()]
    return {"condition": conditions, "value": 0}


def _tpot_limits() -> list[tuple[str, Mapping[str, float]]]:
    return [(tier, limits) for tier, limits in SLO_TIERS.items() if "tpot" in limits]


def _slo_rules(values: Sequence[float], channel: str, limits: Mapping[str, float]) -> list[Spec]:
    """A dashed line and its name for each limit within reach of the data; one far away would squeeze the rest."""
    if not values:
        return []
    low, high = min(values), max(values)
    shown = [{"at": limit, "tier": tier} for tier, limit in limits.items() if 0.7 * low <= limit <= 1.3 * high]
    if not shown:
        return []
    at = {"field": "at", "type": "quantitative"}
    place = {"x": at, "y": {"value": "height"}} if channel == "x" else {"y": at, "x": {"value": 4}}
    return [
        {
            "data": {"values": shown},
            "mark": {"type": "rule", "strokeDash": [4, 3], "color": "var(--muted)"},
            "encoding": {channel: at},
        },
        {
            "data": {"values": shown},
            "mark": {"type": "text", "align": "left", "dx": 4, "dy": -6, "fontSize": 10, "color": "var(--muted)"},
            "encoding": place | {"text": {"field": "tier"}},
        },
    ]
