"""A comparison and its rows -> the report's sections, in the order they are read. One function per section.

A part for which the runs hold no data says so in one line. A new part is a new function in SECTIONS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tkit.report import gates, text
from tkit.report.plots.loads import WALLS, latency_plot, pareto_plot, wall_plot
from tkit.report.plots.plot import Plot
from tkit.report.plots.samples import TELEMETRY_PLOTS, ecdf_plot, in_flight_plot, telemetry_plot, ttft_plot
from tkit.report.read import Point, Run
from tkit.report.record import Comparison
from tkit.report.statistics import REPEAT_NOISE
from tkit.report.tables.engines import cost_table, memory_table, quality_table, samples_table, size_table
from tkit.report.tables.loads import (
    common_load,
    found_table,
    group_id,
    latency_table,
    limits,
    telemetry_table,
    throughput_table,
)
from tkit.report.tables.provenance import (
    commands_table,
    definitions_table,
    files_table,
    identity_table,
    other_definitions_table,
)
from tkit.report.tables.runs import differences_tables, gates_table, left_out_table, runs_table, validity_table
from tkit.report.tables.stalls import stalls_table
from tkit.report.tables.table import Table
from tkit.report.tables.wall import wall_table, wall_ttft_table
from tkit.report.telemetry import over_time
from tkit.specs.record import DEFINITIONS, SLO_TIERS, Load

Runs = Mapping[str, Run]  # by run id


@dataclass(frozen=True, kw_only=True)
class Section:
    """`lead` are plain sentences before the plots and tables. `is_brief`: stands open in a pull-request comment.

    `has_legend`: runs are drawn by their marks.
    """

    id: str
    title: str
    lead: tuple[str, ...] = ()
    plots: tuple[Plot, ...] = field(default=(), repr=False)
    tables: tuple[Table, ...] = ()
    is_brief: bool = False

    @property
    def has_legend(self) -> bool:
        return bool(self.plots) or any(table.is_grouped for table in self.tables)


def sections(comparison: Comparison, runs: Sequence[Run]) -> tuple[Section, ...]:
    by_id = {facts.id: run for facts, run in zip(comparison.runs, runs, strict=True)}
    found = tuple(made for section in SECTIONS if (made := section(comparison, by_id)) is not None)
    return (gated(comparison), *found) if comparison.gates else found


def gated(comparison: Comparison) -> Section:
    """What the gates say: stands before everything else, when there are any."""
    is_single = any(cell.repeats == 1 for group in comparison.groups for level in group.levels for cell in level.cells)
    single = (
        "Where something was measured once, its interval is that of its requests, and of "
        f"{REPEAT_NOISE * 100:.1f} % that repeats are assumed to scatter: a loss of 10 % is then missed one time out of three "
        "(--repeats 3)."
    )
    return Section(
        id="gates",
        title="Gates",
        lead=(
            f"{gates.summary(comparison)}.",
            "A change fails a gate only where it is significant and larger than the practical threshold. What cannot be "
            "evaluated does not pass.",
            *((single,) if is_single else ()),
        ),
        tables=(gates_table(comparison),),
        is_brief=True,
    )


def what_differs(comparison: Comparison, runs: Runs) -> Section:
    found = differences_tables(comparison)
    lead = []
    if len(comparison.runs) == 1:
        lead.append("One run: nothing to compare.")
    elif not found:
        lead.append("Nothing: engines and conditions are the same in every recorded fact.")
    if comparison.left_out:
        found.append(left_out_table(comparison))
    return Section(
        id="runs",
        title="What was compared, and what differs",
        lead=tuple(lead),
        tables=(runs_table(comparison), *found),
        is_brief=True,
    )


def numbers(comparison: Comparison, runs: Runs) -> Section:
    lead = []
    if comparison.baseline is not None:
        name = text.shorten(comparison.facts(comparison.baseline).name)
        lead.append(
            f"Under a number: its change against the baseline {comparison.baseline}, {name}, with the 95 % interval. "
            f"▲ better and ▼ worse stand only where the interval excludes zero and the change exceeds "
            f"{comparison.threshold * 100:.0f} %. The baseline shows the interval of the number itself."
        )
    else:
        lead.append("Under a number: its 95 % interval.")
    if any(run.manifest.repeats == 1 for run in runs.values()):
        lead.append(
            f"Points measured once do not show how one run scatters against the next: their intervals assume "
            f"{REPEAT_NOISE * 100:.1f} %. Repeat the sweep (--repeats 3) before deciding on a small difference."
        )
    lead.append(
        "Tail: the highest of p99, p95 and p90 that the requests support "
        "(662, 130 and 64 of them, MLPerf's early-stopping bound)."
    )
    tiers = "; ".join(f"{tier}: {limits(tier)}" for tier in SLO_TIERS)
    lead.append(f"Goodput: requests per second within a tier's limits, under it their share of all ({tiers}).")
    lead += [f"{group.title}: {group.note}." for group in comparison.groups if group.note]
    found = [
        table
        for group in comparison.groups
        for table in (throughput_table(comparison, group), latency_table(comparison, group))
    ]
    if any(group.arrivals is not None for group in comparison.groups):
        lead.append(
            "In an open loop, rates are what the schedule asked for: they are shown, and compared by nothing but latency."
        )
    if any(run.found for run in comparison.runs):
        found.insert(0, found_table(comparison))
    return Section(id="numbers", title="Numbers per load", lead=tuple(lead), tables=tuple(found), is_brief=True)


def pareto(comparison: Comparison, runs: Runs) -> Section:
    """Of closed loops: in an open one the hardware yields what the schedule asked for."""
    closed = [group for group in comparison.groups if group.arrivals is None]
    drawn = [pareto_plot(comparison, group, f"pareto-{group_id(comparison, group)}") for group in closed]
    return _drawn("pareto", "Throughput against interactivity", drawn)


def latency(comparison: Comparison, runs: Runs) -> Section:
    drawn = [
        latency_plot(comparison, group, metric, f"{metric}-{group_id(comparison, group)}")
        for group in comparison.groups
        for metric in ("ttft" if group.arrivals is None else "ttft_sched", "tpot")
    ]
    return _drawn("latency", "Latency against throughput", drawn)


def _drawn(section_id: str, title: str, drawn: Sequence[Plot]) -> Section:
    """Only plots that show something."""
    shown = tuple(plot for plot in drawn if plot.spec["data"]["values"])
    return Section(id=section_id, title=title, lead=() if shown else ("No point to draw.",), plots=shown)


def distributions(comparison: Comparison, runs: Runs) -> Section:
    section = Section(id="distributions", title="Distributions and time")
    place = common_load(comparison)
    if place is None:
        return Section(id=section.id, title=section.title, lead=("No valid point to look into.",))
    group, level = place
    shown = {cell.run: _first_valid(runs[cell.run], group.shape, level.load) for cell in level.cells if cell.is_valid}
    where = f"{group.shape} at {level.load}"
    samples = [("TTFT", "ttft"), ("TPOT", "tpot")]
    drawn = [
        ecdf_plot(
            comparison,
            {run_id: point.measured[column].dropna().to_numpy() for run_id, point in shown.items()},
            name,
            where,
            f"ecdf-{column}",
        )
        for name, column in samples
    ]
    gaps = {run_id: found for run_id, point in shown.items() if len(found := point.chunk_gaps())}
    lead = [f"One point per run: {where}, its first valid repeat."]
    if gaps:
        samples_of_gaps = {run_id: found["gap"].to_numpy() for run_id, found in gaps.items()}
        drawn.append(ecdf_plot(comparison, samples_of_gaps, "Chunk gap", where, "ecdf-gap"))
    else:
        lead.append("No gaps between chunks were recorded.")
    drawn += [
        in_flight_plot(comparison, shown, where, "in-flight"),
        ttft_plot(comparison, shown, where, "ttft-time"),
    ]
    stalls = stalls_table(comparison, shown, gaps)
    return Section(
        id=section.id,
        title=section.title,
        lead=tuple(lead),
        plots=tuple(plot for plot in drawn if plot.spec["data"]["values"]),
        tables=(stalls,) if stalls.rows else (),
    )


def telemetry(comparison: Comparison, runs: Runs) -> Section | None:
    """None where neither server nor GPUs were asked, or nobody answered."""
    found = [table for group in comparison.groups if (table := telemetry_table(comparison, group)) is not None]
    if not found:
        return None
    drawn = []
    place = common_load(comparison)
    if place is not None:
        group, level = place
        where = f"{group.shape} at {level.load}"
        told = {
            cell.run: over_time(_first_valid(runs[cell.run], group.shape, level.load))
            for cell in level.cells
            if cell.is_valid
        }
        for quantity in TELEMETRY_PLOTS:
            values = {run_id: series[quantity] for run_id, series in told.items() if quantity in series}
            if values:
                drawn.append(telemetry_plot(comparison, quantity, values, where, f"told-{quantity}"))
    return Section(
        id="telemetry",
        title="What server and GPUs said",
        lead=(
            "Sampled once a second beside the measurement: NVML and the server's own metrics, while requests counted.",
        ),
        plots=tuple(drawn),
        tables=tuple(found),
    )


def _first_valid(run: Run, shape: str, load: Load) -> Point:
    return next(
        point
        for point in run.points
        if (point.summary.shape, point.summary.load) == (shape, load) and point.summary.is_valid
    )


def wall(comparison: Comparison, runs: Runs) -> Section:
    lead = [
        "Limit: what physics allows, every byte of weights and KV cache read once per step at full bandwidth while every "
        "operation runs at the peak rate; no engine is faster. Prediction: what tkit plan expects of the engine, with the "
        "band that holds nine measurements of ten; of open loops it simulates the arrivals. There, the limit is that of as "
        "many requests as were in flight on average.",
        *(f"{run.id}: {run.hardware}." for run in comparison.runs),
    ]
    known = [
        group
        for group in comparison.groups
        if any(cell.wall is not None for level in group.levels for cell in level.cells)
    ]
    return Section(
        id="wall",
        title="The wall",
        lead=tuple(lead),
        plots=tuple(
            wall_plot(comparison, group, quantity, f"wall-{quantity}-{group_id(comparison, group)}")
            for group in known
            for quantity in WALLS
        ),
        tables=tuple(table(comparison, group) for group in known for table in (wall_table, wall_ttft_table)),
    )


def size(comparison: Comparison, runs: Runs) -> Section:
    found = tuple(table for table in (size_table(comparison), memory_table(comparison)) if table.rows)
    lead = () if found else ("No engine card in these runs.",)
    return Section(id="size", title="Memory, size and build", lead=lead, tables=found)


def quality(comparison: Comparison, runs: Runs) -> Section:
    table = quality_table(comparison)
    without = [run.id for run in comparison.runs if run.engine is not None and run.validation is None]
    lead = [f"Not validated: {', '.join(without)} (tkit validate, then sweep again)."] if without else []
    foreign = [run.id for run in comparison.runs if run.engine is None]
    lead += [f"Not known of {', '.join(foreign)}: only engines with a card are validated."] if foreign else []
    return Section(
        id="quality",
        title="Quality beside speed",
        lead=tuple(lead),
        tables=tuple(table for table in (table, samples_table(comparison)) if table.rows),
        is_brief=True,
    )


def cost(comparison: Comparison, runs: Runs) -> Section:
    table = cost_table(comparison)
    if comparison.prices is None:
        lead = ["No prices were given (--prices FILE)."]
        if table.rows:
            lead.append("Each run at the valid load where its tokens take the least energy.")
    else:
        lead = [f"Prices: {comparison.prices}. Each run at the valid load where its tokens are cheapest."]
        priced = {
            cell.run for group in comparison.groups for level in group.levels for cell in level.cells if cell.cost
        }
        without = [run.id for run in comparison.runs if run.id not in priced]
        lead += [f"No cost of {', '.join(without)}: no price for what it ran on."] if without else []
    return Section(id="cost", title="Cost and energy", lead=tuple(lead), tables=(table,) if table.rows else ())


def validity(comparison: Comparison, runs: Runs) -> Section:
    table = validity_table(comparison)
    total = sum(run.num_points for run in comparison.runs)
    if not table.rows:
        return Section(id="validity", title="Validity", lead=(f"All {total} points count.",), is_brief=True)
    return Section(
        id="validity",
        title="Validity",
        lead=(
            "An invalid point says more about the client or the moment than about the server: it is drawn hollow and "
            "takes no part in changes and verdicts. A missing one is a gap, never a guess.",
        ),
        tables=(table,),
        is_brief=True,
    )


def provenance(comparison: Comparison, runs: Runs) -> Section:
    others = other_definitions_table(comparison)
    lead = [f"Definitions: {DEFINITIONS}."]
    if others.rows:
        lead.append(
            "What other tools measured means something else: it stands in groups of its own. Percentiles, rates and TPOT are "
            "computed here, from the times and tokens that each tool recorded; TPOT is (last - first) / (N - 1)."
        )
    return Section(
        id="provenance",
        title="Provenance",
        lead=tuple(lead),
        tables=(
            definitions_table(),
            *((others,) if others.rows else ()),
            commands_table(comparison),
            *(identity_table(run) for run in comparison.runs),
            *(files_table(run) for run in comparison.runs),
        ),
    )


SECTIONS: tuple[Callable[[Comparison, Runs], Section | None], ...] = (
    what_differs,
    numbers,
    pareto,
    latency,
    distributions,
    telemetry,
    wall,
    size,
    quality,
    cost,
    validity,
    provenance,
)
