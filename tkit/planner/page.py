"""A plan -> one HTML file with three plots, which needs no network. Pure: a plan in, text out.

Vega, Vega-Lite and Vega-Embed are inlined; a content security policy lets these scripts run and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from typing import Any

from tkit.planner.record import Plan
from tkit.planner.text import render

Spec = dict[str, Any]
BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#c4540a", "#2b7a52", "#8a8d92"
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #1d1d1f; }
pre { font: 12px/1.45 ui-monospace, monospace; background: #f6f6f4; padding: 1rem; overflow-x: auto; }
h2 { font-size: 1.1rem; margin-top: 2.5rem; } p { color: #5d6066; max-width: 46rem; }
"""


def render_html(plan: Plan) -> str:
    plots = [
        ("memory", "Memory against context and concurrency", MEMORY_CAPTION, memory_plot(plan)),
        ("pareto", "Throughput against latency", PARETO_CAPTION, pareto_plot(plan)),
        ("roofline", "The roofline and the two phases", ROOFLINE_CAPTION, roofline_plot(plan)),
    ]
    script = "\n".join(
        f"vegaEmbed('#{plot_id}', {script_json(spec)}, {{actions: false, renderer: 'svg', ast: true}});"
        for plot_id, _, _, spec in plots
    )
    scripts = [_javascript_bundle(), script]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    title = html.escape(f"{plan.model} on {plan.chosen.parallel.world_size} x {plan.gpu}")
    sections = "".join(
        f'<h2>{html.escape(name)}</h2><div id="{plot_id}" style="width:100%"></div><p>{html.escape(caption)}</p>'
        for plot_id, name, caption, _ in plots
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        f'script-src {hashes}">'
        f"<title>{title}</title><style>{CSS}</style></head><body><h1>{title}</h1>"
        f"<p>{html.escape(plan.verdict)}</p>{sections}<h2>All of it</h2><pre>{html.escape(render(plan))}</pre>"
        + "".join(f"<script>{s}</script>" for s in scripts)
        + "</body></html>\n"
    )


MEMORY_CAPTION = (
    "Bytes of one GPU: weights, activations and the engine's own first, then the KV cache of so many sequences, each of the "
    "context on the axis. Dashed: what the engine fills of the card. Lines that pass it do not fit."
)
PARETO_CAPTION = (
    "Each point is a number of requests in flight. Right: tokens per second that one user sees. Up: tokens per second per GPU. "
    "The bars are the 90 % bands of held-out rows."
)
ROOFLINE_CAPTION = (
    "Operations per second that a GPU can reach at a given number of operations per byte read. Left of the ridge the memory "
    "binds, right of it the tensor cores. Points: prefill and decode at the asked load, as predicted."
)


def memory_plot(plan: Plan) -> Spec:
    book = plan.chosen.ledger
    fixed = (book.weight_bytes + book.activations + book.overhead) / 1e9
    rows = [
        {"context": context, "gigabytes": fixed + users * size / 1e9, "users": f"{users}"}
        for users in sorted({1, 4, 16, 64, plan.concurrency})
        for context, size in plan.kv_bytes_by_context.items()
    ]
    top = 2.2 * book.usable / 1e9
    line = {
        "mark": {"type": "line", "clip": True, "point": True},
        "encoding": {
            "x": {
                "field": "context",
                "type": "quantitative",
                "scale": {"type": "log", "base": 2},
                "title": "tokens of context",
            },
            "y": {
                "field": "gigabytes",
                "type": "quantitative",
                "title": "GB of one GPU",
                "scale": {"domain": [0, top]},
            },
            "color": {"field": "users", "type": "nominal", "title": "sequences", "sort": ["1", "4", "16", "64"]},
        },
    }
    limit = {
        "data": {"values": [{"y": (book.usable - max(book.unused, 0)) / 1e9}]},
        "mark": {"type": "rule", "strokeDash": [6, 4], "color": ORANGE},
        "encoding": {"y": {"field": "y", "type": "quantitative"}},
    }
    return _spec(rows, [line, limit])


def pareto_plot(plan: Plan) -> Spec:
    rows = [
        {
            "user": point.tok_s_user,
            "gpu": point.tok_s_gpu,
            "low": point.tok_s_gpu_low,
            "high": point.tok_s_gpu_high,
            "load": point.concurrency,
            "ttft": point.ttft_ms,
            "tpot": point.tpot_ms,
        }
        for point in plan.curve
        if point.running == point.concurrency
    ]
    x = {"field": "user", "type": "quantitative", "title": "tok/s per user (1 / TPOT)"}
    y = {"field": "gpu", "type": "quantitative", "title": "tok/s per GPU"}
    low_end = {**y, "field": "low"}
    tooltip = [
        {"field": name, "type": "quantitative", "format": ".4~r"} for name in ("load", "ttft", "tpot", "gpu", "user")
    ]
    return _spec(
        rows,
        [
            {"mark": {"type": "rule", "color": GREY}, "encoding": {"x": x, "y": low_end, "y2": {"field": "high"}}},
            {"mark": {"type": "line", "color": BLUE}, "encoding": {"x": x, "y": y, "order": {"field": "load"}}},
            {"mark": {"type": "point", "filled": True, "color": BLUE}, "encoding": {"x": x, "y": y, "tooltip": tooltip}},
            {"mark": {"type": "text", "dx": 8, "dy": -8}, "encoding": {"x": x, "y": y, "text": {"field": "load"}}},
        ],
    )  # fmt: skip


def roofline_plot(plan: Plan) -> Spec:
    prefill, decode = plan.phases
    ridge, peak = prefill.ridge, plan.peak_flops
    bandwidth = peak / ridge
    roof = [{"x": x, "y": min(x * bandwidth, peak) / 1e12} for x in (0.5, 1, 4, 16, 64, ridge, 4 * ridge, 64 * ridge)]
    points = [
        {
            "x": phase.intensity,
            "y": min(phase.intensity * bandwidth, peak) / 1e12 * phase.share_of_peak,
            "phase": phase.name,
        }
        for phase in (prefill, decode)
    ]
    x = {"field": "x", "type": "quantitative", "scale": {"type": "log"}, "title": "FLOP per byte"}
    y = {"field": "y", "type": "quantitative", "scale": {"type": "log"}, "title": "TFLOP/s per GPU"}
    return _spec(
        roof,
        [
            {"mark": {"type": "line", "color": GREY}, "encoding": {"x": x, "y": y}},
            {
                "data": {"values": points},
                "mark": {"type": "point", "filled": True, "size": 110},
                "encoding": {"x": x, "y": y, "color": {"field": "phase", "scale": {"range": [GREEN, ORANGE]}}},
            },
            {
                "data": {"values": points},
                "mark": {"type": "text", "dy": -14},
                "encoding": {"x": x, "y": y, "text": {"field": "phase"}},
            },
        ],
    )


def _spec(rows: list[dict[str, Any]], layers: list[Mapping[str, Any]]) -> Spec:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": "container",
        "height": 320,
        "data": {"values": rows},
        "layer": layers,
        "config": {"view": {"stroke": None}, "axis": {"gridColor": "#e3e3e0"}},
    }


def _javascript_bundle() -> str:
    import vl_convert

    bundle = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    written = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return written
