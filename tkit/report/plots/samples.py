"""Plots of one load in detail: distributions, and what happened over time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from tkit.report import text
from tkit.report.plots.plot import (
    Plot,
    Row,
    logarithmic,
    points_layer,
    quantitative,
    run_color,
    run_dash,
    run_name,
    tip,
    vega_lite,
    whole_ticks,
)
from tkit.report.read import Point
from tkit.report.record import Comparison
from tkit.report.statistics import Floats

ECDF_POINTS = 160  # per line; the tail is kept exactly
TAIL_POINTS = 25
SCATTER_POINTS = 400  # per run
TIME_STEPS = 200
MIN_MS = 0.01  # two chunks read at once have no gap; a logarithmic axis needs one

# quantity of report.telemetry -> (title, axis, number format, caption)
TELEMETRY_PLOTS = {
    "power_w": ("GPU power", "W, all GPUs", ".4~r", "As NVML says, once a second."),
    "waiting": ("Requests waiting in the server", "requests", "d", "The server's own count, once a second."),
    "kv_share": ("KV cache in use", "share of the cache", ".2%", "The server's own count, once a second."),
}


def ecdf_plot(comparison: Comparison, samples: Mapping[str, Floats], name: str, where: str, plot_id: str) -> Plot:
    """Share of values at or below x, logarithmic in x. `samples`: run id -> milliseconds."""
    rows: list[Row] = []
    for run_id, values in samples.items():
        rows.extend(
            {"run": run_name(comparison, run_id), "x": round(x, 4), "share": round(share, 5), "n": len(values)}
            for x, share in ecdf_points(values)
        )
    x, y = logarithmic("x", f"{name}, ms"), quantitative("share", "share of requests", zero=True)
    if name == "Chunk gap":
        y["title"] = "share of gaps"
    y["axis"] = {"format": ".0%", "tickCount": 5}
    layers = [
        {
            "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 1.8},
            "encoding": {"x": x, "y": y, "color": run_color(comparison), "strokeDash": run_dash(comparison)},
        },
        {
            "mark": {"type": "point", "size": 120, "opacity": 0},
            "encoding": {
                "x": x,
                "y": y,
                "tooltip": [
                    tip("run", "run"),
                    tip("share", "share at or below", ".2%"),
                    tip("x", f"{name}, ms", ".4~r"),
                    tip("n", "values", ",d"),
                ],
            },
        },
    ]
    counts = ", ".join(f"{run_id} {text.count(len(values))}" for run_id, values in samples.items())
    return Plot(
        id=plot_id,
        title=f"{name}, {where}",
        caption=f"Share at or below a value; further left is better. Values: {counts}.",
        spec=vega_lite(rows, layers, height=260, description=f"Distribution of {name}"),
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


def in_flight_plot(comparison: Comparison, points: Mapping[str, Point], where: str, plot_id: str) -> Plot:
    rows: list[Row] = []
    for run_id, point in points.items():
        sent, ended = point.requests["sent_s"].dropna().to_numpy(), point.requests["end_s"].dropna().to_numpy()
        if not len(sent) or not len(ended):
            continue
        times = np.linspace(0, float(ended.max()), TIME_STEPS)
        counts = np.searchsorted(np.sort(sent), times, "right") - np.searchsorted(np.sort(ended), times, "right")
        rows.extend(
            {"run": run_name(comparison, run_id), "x": round(float(time), 3), "y": int(count)}
            for time, count in zip(times, counts, strict=True)
        )
    x, y = quantitative("x", "seconds since the first request"), quantitative("y", "requests in flight", zero=True)
    mark = {"type": "line", "interpolate": "step-after", "strokeWidth": 1.5}
    tooltip = [tip("run", "run"), tip("x", "at, s", ".3~r"), tip("y", "in flight", "d")]
    layers = [
        {
            "mark": mark,
            "encoding": {"x": x, "y": y, "color": run_color(comparison), "strokeDash": run_dash(comparison)},
        },
        {"mark": {"type": "point", "size": 60, "opacity": 0}, "encoding": {"x": x, "y": y, "tooltip": tooltip}},
    ]
    y["axis"] = whole_ticks(max((row["y"] for row in rows), default=0))
    return Plot(
        id=plot_id,
        title=f"Requests in flight, {where}",
        caption=f"Sent and not yet ended, warm-up included, at {TIME_STEPS} moments.",
        spec=vega_lite(rows, layers, height=240, description="Requests in flight over time"),
    )


def telemetry_plot(
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
            {"run": run_name(comparison, run_id), "x": round(float(x), 3), "y": round(float(y), 4)}
            for x, y in series_of_run.iloc[shown].items()
        )
    x = quantitative("x", "seconds since the first request", zero=True)
    y = quantitative("y", axis, zero=True)
    highest = max(row["y"] for row in rows)
    if number_format == "d":
        y["axis"] = whole_ticks(highest)
    elif number_format.endswith("%"):
        y["axis"] |= {"format": ".2~%"}
    if highest == 0:
        y["scale"] |= {"domain": [0, 1]}
    color, dash = run_color(comparison), run_dash(comparison)
    tooltip = [tip("run", "run"), tip("x", "at, s", ".3~r"), tip("y", axis, number_format)]
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
        spec=vega_lite(rows, layers, height=200, description=f"{title} over time"),
    )


def ttft_plot(comparison: Comparison, points: Mapping[str, Point], where: str, plot_id: str) -> Plot:
    rows: list[Row] = []
    for run_id, point in points.items():
        frame = point.requests[point.requests["ttft"].notna()]
        shown = frame.iloc[np.unique(np.linspace(0, len(frame) - 1, min(len(frame), SCATTER_POINTS)).astype(int))]
        worst = frame.nlargest(TAIL_POINTS, "ttft")
        kept = frame.loc[sorted(set(shown.index) | set(worst.index))]
        rows.extend(
            {
                "run": run_name(comparison, run_id),
                "id": int(request),
                "x": round(float(sent), 4),
                "y": round(max(float(ttft), MIN_MS), 4),
                "state": "error" if status != "ok" else str(phase),
            }
            for request, sent, ttft, phase, status in kept[["id", "sent_s", "ttft", "phase", "status"]].itertuples(
                index=False
            )
        )
    x, y = quantitative("x", "sent, seconds since the first request"), logarithmic("y", "TTFT, ms")
    tooltip = [
        tip("run", "run"),
        tip("id", "request", "d"),
        tip("x", "sent at, s", ".3~f"),
        tip("y", "TTFT, ms", ".4~r"),
        tip("state", "state"),
    ]
    return Plot(
        id=plot_id,
        title=f"TTFT over time, {where}",
        caption=f"A point per request, at most {SCATTER_POINTS} per run and always its {TAIL_POINTS} slowest. "
        f"Hollow: warm-up, drain or error; not counted.",
        spec=vega_lite(
            rows,
            [points_layer(comparison, x, y, tooltip, size=28, counted="measured")],
            height=240,
            description="Time to first token of each request over time",
        ),
    )
