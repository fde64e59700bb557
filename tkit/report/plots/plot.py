"""What a plot is, and the parts that plots share: colours, marks, axes.

Pure: dicts in, dicts out; knows no HTML and no browser. Colours are CSS variables, so that one drawing follows the page from
light to dark; `render_png` replaces them by the light ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tkit.report import text
from tkit.report.record import Comparison

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


def vega_lite(rows: list[Row], layers: list[Spec], *, height: int, description: str) -> Spec:
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


def run_name(comparison: Comparison, run_id: str) -> str:
    """A run in tooltips and scales: unique through its id."""
    return f"{run_id} {text.shorten(comparison.facts(run_id).name)}"


def _told_apart(comparison: Comparison, values: Sequence[Any], *, by: int = 0) -> Spec:
    """A run's own of `values`, chosen by its colour (0) or its mark (1)."""
    names = [run_name(comparison, run.id) for run in comparison.runs]
    chosen = [values[series(comparison, run.id)[by]] for run in comparison.runs]
    return {"field": "run", "type": "nominal", "scale": {"domain": names, "range": chosen}, "legend": None}


def run_color(comparison: Comparison) -> Spec:
    return _told_apart(comparison, [f"var(--series-{i})" for i in range(NUM_SERIES)])


def run_shape(comparison: Comparison) -> Spec:
    return _told_apart(comparison, MARKS, by=1)


def run_dash(comparison: Comparison) -> Spec:
    return _told_apart(comparison, DASHES, by=1)


def quantitative(name: str, title: str, *, zero: bool = False) -> Spec:
    scale, axis = {"zero": zero, "nice": True}, {"tickCount": 6}
    return {"field": name, "type": "quantitative", "title": title, "scale": scale, "axis": axis}


def whole_ticks(highest: float) -> Spec:
    """Of counts, from zero: ticks at whole numbers, at most seven."""
    step = max(1, math.ceil(highest / 6))
    return {"values": list(range(0, math.ceil(highest) + step, step)), "format": "d"}


def logarithmic(name: str, title: str) -> Spec:
    scale = {"type": "log", "nice": False, "padding": 12}
    axis = {"format": "~r", "tickCount": 6, "labelOverlap": True}
    return {"field": name, "type": "quantitative", "title": title, "scale": scale, "axis": axis}


def tip(name: str, title: str, number_format: str | None = None) -> Spec:
    if number_format is None:
        return {"field": name, "type": "nominal", "title": title}
    return {"field": name, "type": "quantitative", "title": title, "format": number_format}


def points_layer(
    comparison: Comparison, x: Spec, y: Spec, tooltip: list[Spec], *, size: int = 70, counted: str = "valid"
) -> Spec:
    """Filled when the state is `counted`, else hollow."""
    return {
        "mark": {"type": "point", "size": size, "strokeWidth": 1.4, "opacity": 1},
        "encoding": {
            "x": x,
            "y": y,
            "color": run_color(comparison),
            "fill": run_color(comparison),
            "shape": run_shape(comparison),
            "fillOpacity": fill_by_state({counted: 1}),
            "tooltip": tooltip,
        },
    }


def fill_by_state(opacities: Mapping[str, float]) -> Spec:
    """How full a point is by its state; every other state is hollow."""
    conditions = [{"test": f"datum.state === '{state}'", "value": value} for state, value in opacities.items()]
    return {"condition": conditions, "value": 0}
