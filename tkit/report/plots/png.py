"""A plot as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from tkit.report import text
from tkit.report.plots.plot import COLORS, FONT, Plot, Spec, run_name
from tkit.report.record import Comparison


def render_png(plot: Plot, comparison: Comparison, *, width: int = 860, scale: float = 2) -> bytes:
    """The plot as a picture, on white, with its legend and title."""
    import vl_convert

    spec = json.loads(json.dumps(plot.spec))
    names = [text.shorten(run.name, 48) for run in comparison.runs]
    _show_legend(
        spec["layer"], dict(zip([run_name(comparison, run.id) for run in comparison.runs], names, strict=True))
    )
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
