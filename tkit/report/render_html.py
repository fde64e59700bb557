"""A comparison -> one HTML file that needs no network, this year or in ten.

The plots' library is inlined; a content security policy allows the page's own scripts by their digests and nothing
else, so that a name out of a run directory could not run even if an escape were forgotten.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tkit.report import gates
from tkit.report.plots.plot import COLORS, series
from tkit.report.record import FAILED, NOT_EVALUATED, PASSED, Comparison
from tkit.report.sections import Section
from tkit.report.verdict import TITLES

GATE_TONES = {FAILED: "worse", NOT_EVALUATED: "undecided", PASSED: "better"}
TEMPLATES = Path(__file__).with_name("templates")

# the marks of plots.plot.MARKS, 12 units wide around the origin
MARK_PATHS = (
    "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0 -5 0Z",
    "M-4.5 -4.5H4.5V4.5H-4.5Z",
    "M0 -6L5 0L0 6L-5 0Z",
    "M0 -5L5.5 4.5H-5.5Z",
    "M-2 -5.5H2V-2H5.5V2H2V5.5H-2V2H-5.5V-2H-2Z",
    "M0 5L5.5 -4.5H-5.5Z",
    "M5 0L-4.5 5.5V-5.5Z",
    "M-5 0L4.5 5.5V-5.5Z",
)


def render_html(comparison: Comparison, sections: Sequence[Section]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [_script(javascript_bundle()), _script((TEMPLATES / "report.js").read_text(encoding="utf-8"))]
    return environment.get_template("report.html").render(
        comparison=comparison,
        sections=sections,
        titles=TITLES,
        gate_summary=gates.summary(comparison) if comparison.gates else "",
        gate_tone=GATE_TONES[gates.worst(comparison)] if comparison.gates else "",
        colors=COLORS,
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src {' '.join(digest for _, digest in scripts)}",
        scripts=[script for script, _ in scripts],
        mark=functools.partial(_mark, comparison),
        script_json=script_json,
    )


@functools.cache
def javascript_bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines `vegaEmbed`."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def script_json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    written = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return Markup(written)


def _script(source: str) -> tuple[Markup, str]:
    """The text of a script element and the source expression that allows it."""
    source = source.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return Markup(source), f"'sha256-{digest}'"


def _mark(comparison: Comparison, run_id: str) -> Markup:
    """The run's mark and letter, as its points are drawn."""
    color, mark = series(comparison, run_id)
    return Markup(
        '<span class="run"><svg class="mark" viewBox="-7 -7 14 14" aria-hidden="true">'
        '<path d="{path}" fill="var(--series-{color})"/></svg>'
        '<b class="id">{run_id}</b></span>'
    ).format(path=MARK_PATHS[mark], color=color, run_id=run_id)
