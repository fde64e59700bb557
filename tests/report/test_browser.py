"""The page in a real browser, without a driver: Chromium prints what it has drawn, and what it complained about."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from factory import card, make_run

from tkit.report.compare import compare
from tkit.report.read import read_runs
from tkit.report.render_html import render_html
from tkit.report.sections import sections
from tkit.report.verdict import verdicts

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=20000",
)  # fmt: skip

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")]

EVIL = '</script><script>document.title="owned"</script><img src="http://127.0.0.1:9/x.png" onerror="document.title=1">'


def test_the_page_draws_every_plot_and_complains_about_nothing(tmp_path: Path) -> None:
    runs, _ = read_runs(
        [
            make_run(tmp_path, "one", label=EVIL, engine=card("none"), concurrency=(1, 4), requests=12),
            make_run(tmp_path, "two", engine=card("fp8"), concurrency=(1, 4), requests=12, invalid={4: EVIL}),
        ]
    )
    comparison = compare(runs, baseline=runs[0], left_out=(), created="2025-06-02T10:00:00+00:00", tkit="0")
    comparison = replace(comparison, verdict=verdicts(comparison))
    parts = sections(comparison, runs)
    page = tmp_path / "report.html"
    page.write_text(render_html(comparison, parts), encoding="utf-8")
    assert CHROMIUM is not None
    result = subprocess.run(
        [CHROMIUM, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in result.stderr, result.stderr
    drawn = result.stdout
    assert "data-ready" in drawn
    assert len(re.findall(r'<svg[^>]* class="marks"', drawn)) == sum(len(part.plots) for part in parts) == 8
    assert ">not drawn:" not in drawn
    assert "var(--series-1)" in drawn  # colours follow the page from light to dark
    assert "<title>Comparison of 2 runs – tkit</title>" in drawn
    assert '<img src="http' not in drawn
