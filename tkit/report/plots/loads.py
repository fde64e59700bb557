"""Plots with a point per load: Pareto, latency against throughput, the wall. A line joins neighbouring loads only: where a load
is missing or invalid there is a gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tkit.report.plots.plot import (
    Plot,
    Row,
    Spec,
    fill_by_state,
    logarithmic,
    points_layer,
    quantitative,
    run_color,
    run_name,
    run_shape,
    tip,
    vega_lite,
)
from tkit.report.record import DEVICES, LATENCY_NAMES, Cell, Comparison, Group
from tkit.specs.record import SLO_TIERS

_LOADS = {True: "requests in flight (C)", False: "requests per second asked"}

# quantity -> (axis, key of the limit in Wall, of the prediction, is a higher number better)
WALLS = {
    "rate": ("output tok/s", "limit_tok_s", "predicted_tok_s", True),
    "ttft": ("TTFT mean, ms", "limit_ttft_ms", "predicted_ttft_ms", False),
}


def pareto_plot(comparison: Comparison, group: Group, plot_id: str) -> Plot:
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
    x = quantitative("x", "tok/s per user", zero=True)
    y = quantitative("y", f"tok/s per {device_name}", zero=True)
    tooltip = [
        tip("run", "run"),
        tip("C", _load_name(group), "~r"),
        tip("x", "tok/s per user", ".4~r"),
        tip("y", f"tok/s per {device_name}", ".4~r"),
        tip("state", "state"),
    ]
    layers = [
        *_slo_rules([row["x"] for row in rows], "x", {tier: 1000 / limit["tpot"] for tier, limit in _tpot_limits()}),
        _line(comparison, x, y),
        {
            "mark": {"type": "point", "size": 90, "strokeWidth": 1.6, "opacity": 1},
            "encoding": {
                "x": x,
                "y": y,
                "color": run_color(comparison),
                "fill": run_color(comparison),
                "shape": run_shape(comparison),
                "fillOpacity": fill_by_state({"frontier": 1, "behind": 0.4}),
                "tooltip": tooltip,
            },
        },
        {
            "mark": {"type": "text", "dx": 8, "dy": -8, "align": "left", "fontSize": 11},
            "encoding": {"x": x, "y": y, "text": {"field": "load"}, "color": run_color(comparison)},
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
        spec=vega_lite(rows, layers, height=380, description=f"Pareto plot of {group.title}"),
    )


def latency_plot(comparison: Comparison, group: Group, metric: str, plot_id: str) -> Plot:
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
    x, y = quantitative("x", "output tok/s", zero=True), logarithmic("y", f"{name}, ms")
    tooltip = [
        tip("run", "run"),
        tip("C", _load_name(group), "~r"),
        tip("x", "output tok/s", ".4~r"),
        tip("y", f"{name} p50, ms", ".4~r"),
        tip("tail", f"{name} tail, ms", ".4~r"),
        tip("percentile", "tail is"),
        tip("state", "state"),
    ]
    limited = metric.removesuffix("_sched")
    limits = {tier: limit[limited] for tier, limit in SLO_TIERS.items() if limited in limit}
    bar = {
        "transform": [{"filter": "isValid(datum.tail)"}],
        "mark": {"type": "rule", "strokeWidth": 5, "opacity": 0.3},
        "encoding": {"x": x, "y": y, "y2": {"field": "tail"}, "color": run_color(comparison), "tooltip": tooltip},
    }
    spread = [value for row in rows for value in (row["y"], row["tail"]) if value]
    layers = [
        *_slo_rules(spread, "y", limits),
        *([bar] if any(row["tail"] for row in rows) else []),
        _line(comparison, x, y),
        points_layer(comparison, x, y, tooltip),
        {
            "mark": {"type": "text", "dy": 15, "fontSize": 11},
            "encoding": {"x": x, "y": y, "text": {"field": "load"}, "color": run_color(comparison)},
        },
    ]
    return Plot(
        id=plot_id,
        title=f"{name} against throughput, {group.title}",
        caption=f"Point: {name} p50 at each load. Bar: up to the highest percentile that the requests support (hover). "
        f"Down and to the right is better.",
        spec=vega_lite(rows, layers, height=300, description=f"{name} against output tokens per second, {group.title}"),
    )


def wall_plot(comparison: Comparison, group: Group, quantity: str, plot_id: str) -> Plot:
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
    x, y = logarithmic("x", load), logarithmic("y", name)
    x["axis"] |= {"values": sorted({row["x"] for row in rows})}
    tooltip = [
        tip("run", "run"),
        tip("x", _load_name(group), "~r"),
        tip("y", name, ".4~r"),
        tip("limit", f"limit, {name}", ".4~r"),
        tip("binds", "limit set by"),
        tip("low", "predicted from", ".4~r"),
        tip("high", "predicted to", ".4~r"),
        tip("state", "state"),
    ]
    band = {
        "mark": {"type": "area", "opacity": 0.16},
        "encoding": {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": run_color(comparison)},
    }
    layers = [
        *([band] if any(row["low"] for row in rows) else []),
        {
            "mark": {"type": "line", "strokeDash": [6, 4], "strokeWidth": 1.4},
            "encoding": {"x": x, "y": y | {"field": "limit"}, "color": run_color(comparison)},
        },
        _line(comparison, x, y),
        points_layer(comparison, x, y, tooltip),
    ]
    side = "No engine is above it" if is_rate else "No engine is below it"
    return Plot(
        id=plot_id,
        title=f"{'Measured, predicted, possible' if is_rate else 'The first token'}: {group.title}",
        caption=f"Dashed: the limit of the hardware. {side}. Shaded: what tkit plan predicts, where it knows the engine and "
        "the hardware. Points: measured; hollow: invalid. Both axes are logarithmic.",
        spec=vega_lite(
            rows, layers, height=300, description=f"{name} against the limit of the hardware, {group.title}"
        ),
    )


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


def _load_name(group: Group) -> str:
    return "C" if group.arrivals is None else "req/s asked"


def _row(comparison: Comparison, run_id: str, segment: int, cell: Cell) -> Row:
    return {
        "run": run_name(comparison, run_id),
        "segment": f"{run_id}{segment}",
        "C": cell.load.order,
        "is_valid": cell.is_valid,
    }


def _line(comparison: Comparison, x: Spec, y: Spec) -> Spec:
    return {
        "transform": [{"filter": "datum.is_valid"}],
        "mark": {"type": "line", "strokeWidth": 1.8},
        "encoding": {
            "x": x,
            "y": y,
            "color": run_color(comparison),
            "detail": {"field": "segment"},
            "order": {"field": "C", "type": "quantitative"},
        },
    }


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
