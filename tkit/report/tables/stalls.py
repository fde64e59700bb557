"""The longest gaps between chunks, by request."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from tkit.report import text
from tkit.report.read import Point
from tkit.report.record import Comparison
from tkit.report.tables.loads import load_text
from tkit.report.tables.table import Column, Entry, Table
from tkit.specs.record import METRICS

MAX_STALLS = 5


def stalls_table(comparison: Comparison, points: Mapping[str, Point], gaps: Mapping[str, pd.DataFrame]) -> Table:
    """The longest gaps between chunks of one point per run; `gaps` as `Point.chunk_gaps` gives them."""
    columns = (
        Column(name="Run", kind="text"),
        Column(name="C"),
        Column(name="gap, ms", meaning=METRICS["chunk_gap"][1]),
        Column(name="request"),
        Column(name="sent at, s", meaning="since the first request of the point"),
    )
    rows: list[tuple[Entry, ...]] = []
    for run_id, found in gaps.items():
        point = points[run_id]
        sent: dict[float, float] = dict(zip(point.requests["id"], point.requests["sent_s"], strict=True))
        for request, gap in found.nlargest(MAX_STALLS, "gap").itertuples(index=False):
            rows.append(
                (
                    Entry(text=comparison.facts(run_id).name, run=run_id),
                    Entry(text=load_text(point.summary.load)),
                    Entry(text=text.number(gap)),
                    Entry(text=str(int(request))),
                    Entry(text=text.number(sent.get(request))),
                )
            )
    return Table(id="stalls", caption="Longest stalls", columns=columns, rows=tuple(rows))
