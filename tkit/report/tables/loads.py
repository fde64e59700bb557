"""Tables with a row per load and run: throughput, latency, what server and GPUs said; and the loads that hold a tier."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tkit.report import text
from tkit.report.record import (
    DEVICES,
    LATENCY_NAMES,
    MEASURES,
    TELEMETRY,
    Cell,
    Comparison,
    Goodput,
    Group,
    Level,
    RunFacts,
)
from tkit.report.tables.table import Column, Entry, Table
from tkit.report.verdict import judgement
from tkit.specs.record import METRICS, SLO_TIERS, Load, SloStep
from tkit.units import format_bytes

# closed loop? -> what the latency table shows
LATENCIES = {True: ("ttft", "tpot", "e2e"), False: ("ttft", "ttft_sched", "tpot", "e2e_sched")}

# of record.TELEMETRY -> (column, how its values are written)
TELEMETRY_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "gpu_power_w": ("GPU power, W", text.number),
    "joules_per_output_token": ("J per output token", text.number),
    "gpu_utilisation": ("GPU busy", text.share),
    "gpu_sm_clock_mhz": ("SM clock, MHz", text.number),
    "gpu_memory_bytes": ("GPU memory", format_bytes),
    "running_mean": ("running", text.number),
    "waiting_mean": ("waiting", text.number),
    "waiting_max": ("waiting, most", "{:g}".format),
    "kv_share_max": ("KV cache in use, most", text.share),
    "server_bytes_max": ("engine's memory, most", format_bytes),
}


def throughput_table(comparison: Comparison, group: Group) -> Table:
    device = comparison.device
    columns = (
        load_column(group),
        Column(name="Run", kind="text"),
        *([] if group.arrivals is None else [Column(name="req/s", meaning=METRICS["requests_s"][1])]),
        Column(name="output tok/s", meaning=METRICS["output_tok_s"][1]),
        Column(name=f"tok/s per {device}", meaning=DEVICES[device]),
        Column(name="tok/s per user", meaning=METRICS["tok_s_user"][1]),
        *(Column(name=f"goodput, {tier}", meaning=f"{METRICS['goodput'][1]}: {limits(tier)}") for tier in SLO_TIERS),
        Column(name="errors"),
    )

    def entries(level: Level, cell: Cell) -> list[Entry]:
        errors = sum(cell.errors.values())
        named = ", ".join(f"{name} {count}" for name, count in sorted(cell.errors.items()) if count)
        total = f"of {text.count(cell.requests)}"
        return [
            *([] if group.arrivals is None else [Entry(text=text.number(cell.requests_s))]),
            *(estimate_entry(comparison, level, cell, name) for name in ("output_tok_s", "tok_s_device", "tok_s_user")),
            *(_goodput(cell.goodput.get(tier)) for tier in SLO_TIERS),
            Entry(text=text.count(errors), note=total, aside=named, tone="invalid" if errors else ""),
        ]

    return per_load(
        comparison, group, f"throughput-{group_id(comparison, group)}", f"Throughput, {group.title}", columns, entries
    )


def latency_table(comparison: Comparison, group: Group) -> Table:
    shown = LATENCIES[group.arrivals is None]
    names = [name for metric in shown for name, measure in MEASURES.items() if measure.metric == metric]
    columns = (
        load_column(group),
        Column(name="Run", kind="text"),
        *(
            Column(name=f"{LATENCY_NAMES[metric]} {percentile}, ms", meaning=METRICS[metric][1])
            for metric, percentile in ((MEASURES[name].metric, MEASURES[name].percentile) for name in names)
        ),
    )

    def entries(level: Level, cell: Cell) -> list[Entry]:
        return [estimate_entry(comparison, level, cell, name) for name in names]

    return per_load(
        comparison, group, f"latency-{group_id(comparison, group)}", f"Latency, {group.title}", columns, entries
    )


def telemetry_table(comparison: Comparison, group: Group) -> Table | None:
    """Only columns that some run has; None without any."""
    told = {name for level in group.levels for cell in level.cells for name in cell.telemetry}
    shown = [name for name in TELEMETRY_COLUMNS if name in told]
    if not shown:
        return None
    columns = (
        load_column(group),
        Column(name="Run", kind="text"),
        *(Column(name=TELEMETRY_COLUMNS[name][0], meaning=TELEMETRY[name]) for name in shown),
    )

    def entries(level: Level, cell: Cell) -> list[Entry]:
        return [
            Entry(text=TELEMETRY_COLUMNS[name][1](cell.telemetry[name]))
            if name in cell.telemetry
            else Entry(text=text.ABSENT, tone="absent")
            for name in shown
        ]

    return per_load(
        comparison,
        group,
        f"telemetry-{group_id(comparison, group)}",
        f"Server and GPUs, {group.title}",
        columns,
        entries,
    )


def found_table(comparison: Comparison) -> Table:
    """The largest load of each shape that holds an SLO tier, as the sweep searched for it."""
    columns = (
        Column(name="Shape", kind="text"),
        Column(name="Run", kind="text"),
        Column(name="Tier", kind="text", meaning="; ".join(f"{tier}: {limits(tier)}" for tier in SLO_TIERS)),
        Column(name="largest load", meaning="at which the target's share of the requests meets the tier"),
        Column(name="share", meaning="of the requests at that load, with its 95 % Wilson interval"),
        Column(name="fails at"),
        Column(name="share there"),
    )
    rows = [
        (
            Entry(text=found.shape),
            Entry(text=run.name, run=run.id),
            Entry(text=found.tier, note=f"target {text.share(found.target)}"),
            *_step_entries(found.best, "none"),
            *_step_entries(found.first_failing, "not reached"),
        )
        for run in comparison.runs
        for found in run.found
    ]
    return Table(id="found", caption="Largest loads within a tier", columns=columns, rows=tuple(rows))


def _step_entries(step: SloStep | None, absent: str) -> tuple[Entry, Entry]:
    if step is None:
        return Entry(text=absent, tone="absent"), Entry(text=text.ABSENT, tone="absent")
    doubt = "invalid" if step.reason else "" if step.is_certain else "not certain"
    span = f"{text.share(step.low)} to {text.share(step.high)}"
    return Entry(text=str(step.load)), Entry(text=text.share(step.attainment), note=doubt, aside=span)


def per_load(
    comparison: Comparison,
    group: Group,
    table_id: str,
    caption: str,
    columns: tuple[Column, ...],
    entries: Callable[[Level, Cell], Sequence[Entry]],
) -> Table:
    rows = []
    for level in group.levels:
        for run_id in group.runs:
            cell = next((cell for cell in level.cells if cell.run == run_id), None)
            name = Entry(text=comparison.facts(run_id).name, run=run_id)
            load = Entry(text=level.load.number)
            if cell is None and level.load.rate is not None and not _is_missing(comparison.facts(run_id), level):
                continue  # rates are rarely those of another run; that it has no such point is no hole
            if cell is None:
                hole = [Entry(text=text.ABSENT, tone="absent")] * (len(columns) - 3)
                rows.append((load, name, Entry(text="no result", tone="absent"), *hole))
                continue
            if not cell.is_valid:
                name = Entry(text=name.text, run=run_id, note="invalid", tone="invalid")
            elif cell.repeats > 1:
                name = Entry(text=name.text, run=run_id, note=f"{cell.repeats} repeats")
            rows.append((load, name, *entries(level, cell)))
    return Table(id=table_id, caption=caption, columns=columns, rows=tuple(rows), is_grouped=True)


def estimate_entry(comparison: Comparison, level: Level, cell: Cell, name: str) -> Entry:
    value = cell.estimates[name]
    if value is None:
        too_few = MEASURES[name].percentile == "tail" and level.tail is None
        return Entry(text=text.ABSENT, note="too few requests" if too_few else "", tone="absent")
    qualifier = f"p{level.tail}" if MEASURES[name].percentile == "tail" else ""
    found = cell.changes.get(name)
    if found is None:
        span = text.interval(value.low, value.high)
        return Entry(text=text.number(value.value), qualifier=qualifier, aside=span)
    tone = judgement(name, found, comparison.threshold)
    return Entry(
        text=text.number(value.value),
        qualifier=qualifier,
        note=text.percent(found.relative),
        aside=text.change_interval(found.low, found.high),
        tone=tone if tone in ("better", "worse") else "",
    )


def _goodput(goodput: Goodput | None) -> Entry:
    if goodput is None:
        return Entry(text=text.ABSENT, tone="absent")
    return Entry(text=text.number(goodput.requests_s), note=text.share(goodput.attainment))


def limits(tier: str) -> str:
    """`TTFT <= 500 ms and TPOT <= 30 ms`"""
    parts = [f"{metric.upper()} ≤ {text.number(limit)} ms" for metric, limit in SLO_TIERS[tier].items()]
    return " and ".join(parts) or "no limit"


def _is_missing(run: RunFacts, level: Level) -> bool:
    return any(missing.load == level.load for missing in run.missing)


def load_column(group: Group) -> Column:
    if group.arrivals is None:
        return Column(name="C", meaning="requests in flight")
    return Column(name="req/s asked", meaning=f"requests per second that are due, {group.arrivals} arrivals")


def load_text(load: Load) -> str:
    """In columns of mixed loads, where a bare number is a concurrency."""
    return load.number if load.rate is None else str(load)


def common_load(comparison: Comparison) -> tuple[Group, Level] | None:
    """The first group's highest load that is valid in most runs."""
    for group in comparison.groups:
        valid = [(sum(cell.is_valid for cell in level.cells), level) for level in group.levels]
        most = max((count for count, _ in valid), default=0)
        if most:
            return group, [level for count, level in valid if count == most][-1]
    return None


def group_id(comparison: Comparison, group: Group) -> str:
    """The group in an HTML id."""
    return f"{group.shape.replace('/', 'x')}-{comparison.groups.index(group)}"
