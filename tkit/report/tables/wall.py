"""Tables of the wall: limit, prediction and measurement of every load whose limit is known."""

from __future__ import annotations

from tkit.report import text
from tkit.report.record import Cell, Comparison, Group, Level
from tkit.report.statistics import Estimate
from tkit.report.tables.loads import group_id, load_column, per_load
from tkit.report.tables.table import Column, Entry, Table
from tkit.specs.record import METRICS
from tkit.specs.wall import Prediction


def wall_table(comparison: Comparison, group: Group) -> Table:
    """Limit, prediction and measurement of every load whose limit is known."""
    is_predicted = _has_predictions(group)
    columns = (
        load_column(group),
        Column(name="Run", kind="text"),
        *([] if group.arrivals is None else [Column(name="in flight", meaning="requests, the mean over the time")]),
        Column(name="output tok/s", meaning=METRICS["output_tok_s"][1]),
        Column(name="limit", meaning="the highest rate that physics allows"),
        Column(name="of the limit"),
        *([Column(name="predicted", meaning="by tkit plan, under it the error band")] * is_predicted),
        Column(name="TPOT p50, ms", meaning=METRICS["tpot"][1]),
        Column(name="limit", meaning="the shortest decode step that physics allows"),
        *([Column(name="predicted", meaning="by tkit plan, under it the error band")] * is_predicted),
        Column(
            name="what binds",
            kind="text",
            meaning="what sets the limit; under it what the plan expects to take most time",
        ),
    )

    def entries(level: Level, cell: Cell) -> list[Entry]:
        wall, rate, tpot = cell.wall, cell.estimates["output_tok_s"], cell.estimates["tpot_p50"]
        if wall is None:
            return [Entry(text=text.ABSENT, tone="absent")] * (len(columns) - 2)
        expected = f"expected: {wall.predicted_binds}" if wall.predicted_binds else ""
        return [
            *([] if group.arrivals is None else [Entry(text=text.number(cell.in_flight))]),
            Entry(text=text.number(rate.value if rate else None)),
            Entry(text=text.number(wall.limit_tok_s)),
            _share_of_limit(rate.value / wall.limit_tok_s if rate else None),
            *([_predicted(wall.predicted_tok_s, rate)] * is_predicted),
            Entry(text=text.number(tpot.value if tpot else None)),
            Entry(text=text.number(wall.limit_tpot_ms)),
            *([_predicted(wall.predicted_tpot_ms, tpot)] * is_predicted),
            Entry(text=wall.limit_binds, note=expected),
        ]

    return per_load(
        comparison, group, f"wall-{group_id(comparison, group)}", f"The wall, {group.title}", columns, entries
    )


def wall_ttft_table(comparison: Comparison, group: Group) -> Table:
    """The same of the first token."""
    is_predicted = _has_predictions(group)
    scheduled = "" if group.arrivals is None else ", from the schedule"
    columns = (
        load_column(group),
        Column(name="Run", kind="text"),
        Column(name="TTFT mean, ms", meaning=f"{METRICS['ttft'][1]}{scheduled}; the mean, as the plan predicts it"),
        Column(name="limit", meaning="the shortest prefill that physics allows, of one prompt on an idle engine"),
        Column(name="of it", meaning="the measurement in multiples of the limit"),
        *([Column(name="predicted", meaning="by tkit plan, with the queue; under it the error band")] * is_predicted),
        Column(name="what binds", kind="text", meaning="what sets the limit"),
    )

    def entries(level: Level, cell: Cell) -> list[Entry]:
        wall, ttft = cell.wall, cell.ttft_mean
        if wall is None or ttft is None:
            return [Entry(text=text.ABSENT, tone="absent")] * (len(columns) - 2)
        multiple = ttft.value / wall.limit_ttft_ms
        is_wrong = multiple < 1
        return [
            Entry(text=text.number(ttft.value), aside=text.interval(ttft.low, ttft.high)),
            Entry(text=text.number(wall.limit_ttft_ms)),
            Entry(
                text=f"{text.number(multiple)}{text.THIN}x",
                note="the limit is told too high" if is_wrong else "",
                tone="invalid" if is_wrong else "",
            ),
            *([_predicted(wall.predicted_ttft_ms, ttft)] * is_predicted),
            Entry(text=wall.limit_ttft_binds),
        ]

    return per_load(
        comparison, group, f"wall-ttft-{group_id(comparison, group)}", f"The wall of the first token, {group.title}",
        columns, entries,
    )  # fmt: skip


def _has_predictions(group: Group) -> bool:
    return any(
        cell.wall is not None and cell.wall.predicted_tok_s is not None
        for level in group.levels
        for cell in level.cells
    )


def _share_of_limit(share: float | None) -> Entry:
    if share is None:
        return Entry(text=text.ABSENT, tone="absent")
    told = f"{text.number(100 * share)}{text.THIN}%"
    return Entry(text=told, note="the limit is told too low", tone="invalid") if share > 1 else Entry(text=told)


def _predicted(prediction: Prediction | None, measured: Estimate | None) -> Entry:
    if prediction is None:
        return Entry(text=text.ABSENT, tone="absent")
    is_outside = measured is not None and not prediction.low <= measured.value <= prediction.high
    return Entry(
        text=text.number(prediction.value),
        note="measured outside" if is_outside else "",
        aside=text.interval(prediction.low, prediction.high),
        tone="invalid" if is_outside else "",
    )
