"""A comparison -> tables of text. Every rendering draws these, so that none can show another number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tkit.report import gates, text
from tkit.report.differences import flat_facts
from tkit.report.read import Point
from tkit.report.record import (
    DEVICES,
    FAILED,
    LATENCY_NAMES,
    MEASURES,
    NOT_EVALUATED,
    PASSED,
    TELEMETRY,
    Cell,
    Comparison,
    Goodput,
    Group,
    Level,
    RunFacts,
)
from tkit.report.statistics import Estimate
from tkit.report.verdict import judgement
from tkit.specs.record import DEFINITIONS, METRICS, OTHER_DEFINITIONS, SLO_TIERS, Load, SloStep
from tkit.specs.wall import Prediction
from tkit.units import format_bytes, format_seconds

MAX_STALLS = 5
# closed loop? -> what the latency table shows
LATENCIES = {True: ("ttft", "tpot", "e2e"), False: ("ttft", "ttft_sched", "tpot", "e2e_sched")}
GATE_TONES = {FAILED: "worse", NOT_EVALUATED: "invalid"}
KINDS = {
    "engine": "the engine",
    "model": "the model it was built from: may explain a result instead",
    "conditions": "the measurement: may explain a result instead",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """`qualifier` belongs to the number (`p95`), `note` stands under it, and `aside`, an interval, behind the note.

    `tone`: better, worse, invalid, absent or "". `run`: the id of the run whose mark stands before it.
    """

    text: str
    qualifier: str = ""
    note: str = ""
    aside: str = ""
    tone: str = ""
    run: str | None = None


@dataclass(frozen=True, kw_only=True)
class Column:
    """`kind`: number, text or code. `meaning` is the definition behind a number."""

    name: str
    kind: str = "number"
    meaning: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """`is_grouped`: rows with the same first entry belong together. `is_folded`: shown on demand."""

    id: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]
    is_grouped: bool = False
    is_folded: bool = False


def _text(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name=name, kind="text") for name in names)


def runs_table(comparison: Comparison) -> Table:
    """The key to every other table and plot."""
    rows = []
    for run in comparison.runs:
        engine = run.engine
        layout = (
            f"{engine.quant}, TP {engine.tp_size}, PP {engine.pp_size}, {engine.backend}" if engine else _server(run)
        )
        wrong = [f"{run.num_invalid} invalid"] * bool(run.num_invalid) + [f"{len(run.missing)} missing"] * bool(
            run.missing
        )
        rows.append(
            (
                Entry(text=run.name, run=run.id, note="baseline" if run.id == comparison.baseline else ""),
                Entry(text=layout),
                Entry(text=f"{run.protocol}, {run.profile}"),
                Entry(text=_time(run.started)),
                Entry(text=str(run.num_points), note=", ".join(wrong), tone="invalid" if wrong else ""),
            )
        )
    columns = (*_text("Run", "Engine", "Measured through", "Started"), Column(name="Points"))
    return Table(id="runs", caption="Runs", columns=columns, rows=tuple(rows))


def _server(run: RunFacts) -> str:
    """What runs without an engine card tell of what answered: another server, or transformers in the sweep's process."""
    server = run.identity.get("server")
    facts = server if isinstance(server, Mapping) else {}
    return ", ".join(str(facts[key]) for key in ("server", "version", "batching") if facts.get(key)) or "not known"


def differences_tables(comparison: Comparison) -> list[Table]:
    tables = []
    for kind, words in KINDS.items():
        rows = tuple(
            (
                Entry(text=difference.name),
                *(Entry(text=difference.values[run.id] or text.ABSENT) for run in comparison.runs),
            )
            for difference in comparison.differences
            if difference.kind == kind
        )
        if rows:
            columns = _text("Fact", *(run.id for run in comparison.runs))
            tables.append(Table(id=f"differs-{kind}", caption=f"Differs in {words}", columns=columns, rows=rows))
    return tables


def gates_table(comparison: Comparison) -> Table:
    """A row per finding that is no pass; of a gate that passed, the check that came closest to its limit."""
    rows: list[tuple[Entry, ...]] = []
    for outcome in comparison.gates:
        told = [checks for checks in gates.findings(outcome) if checks[0].state != PASSED]
        nearest = gates.closest(outcome)
        if not told and nearest is not None:
            told = [(nearest,)]
        total = text.plural(len(outcome.checks), "check")
        for checks in sorted(told, key=lambda checks: checks[0].state != FAILED):
            check = checks[0]
            found = (
                f"{total}; closest: {check.text}" if check.state == PASSED and len(outcome.checks) > 1 else check.text
            )
            rows.append(
                (
                    Entry(text=outcome.gate.text),
                    Entry(text=check.state, tone=GATE_TONES.get(check.state, "")),
                    Entry(text=comparison.facts(check.run).name, run=check.run)
                    if check.run
                    else Entry(text=text.ABSENT),
                    Entry(text=gates.place(checks) or text.ABSENT),
                    Entry(text=found),
                )
            )
    columns = _text("Fails when", "Outcome", "Run", "Point", "Found")
    return Table(id="gates", caption="Gates", columns=columns, rows=tuple(rows))


def throughput_table(comparison: Comparison, group: Group) -> Table:
    device = comparison.device
    columns = (
        _load_column(group),
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
            *(_estimate(comparison, level, cell, name) for name in ("output_tok_s", "tok_s_device", "tok_s_user")),
            *(_goodput(cell.goodput.get(tier)) for tier in SLO_TIERS),
            Entry(text=text.count(errors), note=total, aside=named, tone="invalid" if errors else ""),
        ]

    return _per_load(
        comparison, group, f"throughput-{group_id(comparison, group)}", f"Throughput, {group.title}", columns, entries
    )


def latency_table(comparison: Comparison, group: Group) -> Table:
    shown = LATENCIES[group.arrivals is None]
    names = [name for metric in shown for name, measure in MEASURES.items() if measure.metric == metric]
    columns = (
        _load_column(group),
        Column(name="Run", kind="text"),
        *(
            Column(name=f"{LATENCY_NAMES[metric]} {percentile}, ms", meaning=METRICS[metric][1])
            for metric, percentile in ((MEASURES[name].metric, MEASURES[name].percentile) for name in names)
        ),
    )

    def entries(level: Level, cell: Cell) -> list[Entry]:
        return [_estimate(comparison, level, cell, name) for name in names]

    return _per_load(
        comparison, group, f"latency-{group_id(comparison, group)}", f"Latency, {group.title}", columns, entries
    )


def _has_predictions(group: Group) -> bool:
    return any(
        cell.wall is not None and cell.wall.predicted_tok_s is not None
        for level in group.levels
        for cell in level.cells
    )


def wall_table(comparison: Comparison, group: Group) -> Table:
    """Limit, prediction and measurement of every load whose limit is known."""
    is_predicted = _has_predictions(group)
    columns = (
        _load_column(group),
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

    return _per_load(
        comparison, group, f"wall-{group_id(comparison, group)}", f"The wall, {group.title}", columns, entries
    )


def wall_ttft_table(comparison: Comparison, group: Group) -> Table:
    """The same of the first token."""
    is_predicted = _has_predictions(group)
    scheduled = "" if group.arrivals is None else ", from the schedule"
    columns = (
        _load_column(group),
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

    return _per_load(
        comparison, group, f"wall-ttft-{group_id(comparison, group)}", f"The wall of the first token, {group.title}",
        columns, entries,
    )  # fmt: skip


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


def _is_missing(run: RunFacts, level: Level) -> bool:
    return any(missing.load == level.load for missing in run.missing)


def _load_column(group: Group) -> Column:
    if group.arrivals is None:
        return Column(name="C", meaning="requests in flight")
    return Column(name="req/s asked", meaning=f"requests per second that are due, {group.arrivals} arrivals")


def _load_text(load: Load) -> str:
    """In columns of mixed loads, where a bare number is a concurrency."""
    return load.number if load.rate is None else str(load)


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


def _per_load(
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


def _estimate(comparison: Comparison, level: Level, cell: Cell, name: str) -> Entry:
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


def size_table(comparison: Comparison) -> Table:
    """Memory and size, from the engine cards."""
    columns = (
        Column(name="Run", kind="text"),
        Column(name="weights", meaning="all ranks, from the engine card"),
        Column(name="weights per rank"),
        Column(name="KV cache per token", meaning="all layers and ranks"),
        Column(name="on disk", meaning="every file of the engine"),
        Column(name="parameters"),
        Column(name="build time"),
        Column(name="build memory", meaning="highest resident memory of the build"),
    )
    rows = []
    for run in comparison.runs:
        if run.engine is None:
            continue
        engine, build = run.engine, run.engine.build
        ranks = rank_bytes(engine.files)
        per_rank = " / ".join(dict.fromkeys(format_bytes(size) for size in ranks)) or text.ABSENT
        rows.append(
            (
                Entry(text=run.name, run=run.id),
                Entry(text=format_bytes(engine.weight_bytes)),
                Entry(text=per_rank, note=text.plural(len(ranks), "rank")),
                _told(build.get("kv_bytes_per_token"), format_bytes),
                Entry(text=format_bytes(sum(facts["bytes"] for facts in engine.files.values()))),
                Entry(text=text.count(engine.num_params)),
                _told(build.get("seconds"), format_seconds),
                _told(build.get("peak_memory_bytes"), format_bytes),
            )
        )
    return Table(id="size", caption="Memory and size", columns=columns, rows=tuple(rows))


def rank_bytes(files: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """Size of each rank's weights, in rank order."""
    names = [name for name in files if name.startswith("checkpoint/rank") and name.endswith(".safetensors")]
    names.sort(key=lambda name: (len(name), name))
    return [files[name]["bytes"] for name in names]


def _told(value: Any, format_value: Callable[[float], str]) -> Entry:
    if isinstance(value, int | float):
        return Entry(text=format_value(value))
    return Entry(text=text.ABSENT, note="not in the card", tone="absent")


def memory_table(comparison: Comparison) -> Table:
    """What the plan says beside what the engine card and, where they were asked, the GPUs and the server say."""
    measured = {run.id: _measured_memory(comparison, run) for run in comparison.runs}
    shown = [name for name in MEASURED_MEMORY if any(name in told for told in measured.values())]
    has_gpu = any(run.memory is not None and run.memory.gpu_usable is not None for run in comparison.runs)
    on_gpu = (
        Column(name="weights per GPU", meaning="of the fullest GPU, as the plan expects them there"),
        Column(name="activations", meaning="an estimate, rounded up"),
        Column(name="overhead", meaning="CUDA context, libraries, captured graphs, NCCL; an estimate, rounded up"),
        Column(name="left for the KV cache"),
        Column(name="usable", meaning="what the driver leaves for programs"),
    )
    columns: tuple[Column, ...] = (
        Column(name="Run", kind="text"),
        Column(name="weights, planned", meaning="all ranks, on disk; from the model's shapes and the format's layout"),
        Column(name="built", meaning="the rank files in the engine card"),
        Column(name="KV per token, planned", meaning="all layers and ranks"),
        Column(name="built", meaning="from the engine card"),
        *(on_gpu if has_gpu else ()),
        *(Column(name=MEASURED_MEMORY[name][0], meaning=MEASURED_MEMORY[name][1]) for name in shown),
    )
    rows = []
    for run in comparison.runs:
        if run.engine is None or run.memory is None:
            continue
        memory = run.memory
        built = sum(rank_bytes(run.engine.files)) or None
        planned = (
            memory.gpu_weights,
            memory.gpu_activations,
            memory.gpu_overhead,
            memory.gpu_kv_pool,
            memory.gpu_usable,
        )
        rows.append(
            (
                Entry(text=run.name, run=run.id),
                _bytes(memory.stored),
                _bytes(built),
                _bytes(memory.kv_per_token),
                _told(run.engine.build.get("kv_bytes_per_token"), format_bytes),
                *(map(_bytes, planned) if has_gpu else ()),
                *(measured[run.id].get(name, Entry(text=text.ABSENT, tone="absent")) for name in shown),
            )
        )
    caption = "Memory, planned, built and measured" if shown else "Memory, planned and built"
    return Table(id="memory", caption=caption, columns=columns, rows=tuple(rows))


# name -> (column, meaning); of the load at which it was highest
MEASURED_MEMORY = {
    "gpu": ("per GPU, measured", "NVML: the mean of a load, divided by the GPUs; at the load where it was highest"),
    "server": ("engine's process, measured", "resident memory, the highest"),
    "kv": ("KV cache in use, measured", "by the server, the highest share"),
}


def _measured_memory(comparison: Comparison, run: RunFacts) -> dict[str, Entry]:
    told = [
        cell.telemetry
        for group in comparison.groups
        for level in group.levels
        for cell in level.cells
        if cell.run == run.id
    ]
    per_gpu = [
        numbers["gpu_memory_bytes"] / count
        for numbers in told
        if "gpu_memory_bytes" in numbers and (count := numbers.get("gpus"))
    ]
    server = [numbers["server_bytes_max"] for numbers in told if "server_bytes_max" in numbers]
    share = [numbers["kv_share_max"] for numbers in told if "kv_share_max" in numbers]
    return {
        **({"gpu": Entry(text=format_bytes(max(per_gpu)))} if per_gpu else {}),
        **({"server": Entry(text=format_bytes(max(server)))} if server else {}),
        **({"kv": Entry(text=text.share(max(share)))} if share else {}),
    }


def _bytes(size: int | None) -> Entry:
    return Entry(text=text.ABSENT, tone="absent") if size is None else Entry(text=format_bytes(size))


JOULES = "joules_per_output_token"


def cost_table(comparison: Comparison) -> Table:
    """At each run's cheapest valid load per group, by price or, where there is none, by measured energy."""
    columns = (
        Column(name="Run", kind="text"),
        Column(name="Shape", kind="text"),
        Column(name="Load", kind="text"),
        Column(name="output tok/s", meaning=METRICS["output_tok_s"][1]),
        Column(name="$ per million output tokens", meaning="at the utilisation that the price file states"),
        Column(
            name="J per output token",
            meaning="of the GPUs' measured power; without it, data-sheet power times 1.13 to 1.31 for servers and fans",
        ),
    )
    rows = []
    for run in comparison.runs:
        for group in comparison.groups:
            known = [
                (cell.cost.usd_per_million.value if cell.cost is not None else cell.telemetry[JOULES], cell)
                for level in group.levels
                for cell in level.cells
                if cell.run == run.id and cell.is_valid and (cell.cost is not None or JOULES in cell.telemetry)
            ]
            if not known:
                continue
            _, cell = min(known, key=lambda pair: pair[0])
            rate, dollars = cell.estimates["output_tok_s"], cell.cost.usd_per_million if cell.cost else None
            rows.append(
                (
                    Entry(text=run.name, run=run.id),
                    Entry(text=group.shape),
                    Entry(text=str(cell.load)),
                    Entry(text=text.number(rate.value if rate else None)),
                    Entry(text=text.number(dollars.value), aside=text.interval(dollars.low, dollars.high))
                    if dollars
                    else Entry(text=text.ABSENT, tone="absent"),
                    Entry(text=text.number(cell.telemetry[JOULES]), note="measured")
                    if JOULES in cell.telemetry
                    else Entry(text=text.interval(*cell.cost.joules_per_token) if cell.cost else text.ABSENT),
                )
            )
    return Table(id="cost", caption="Each run where its tokens are cheapest", columns=columns, rows=tuple(rows))


def quality_table(comparison: Comparison) -> Table:
    """Quality beside speed: the speed at the highest load that is valid in every run."""
    place = common_load(comparison)
    speed = f"output tok/s, {place[0].shape} {place[1].load}" if place else "output tok/s"
    columns = (
        Column(name="Run", kind="text"),
        Column(name=speed),
        Column(name="perplexity"),
        Column(name="source"),
        Column(name="ratio", meaning="perplexity / perplexity of the source model"),
        Column(name="KL, nats/token", meaning="mean KL divergence from the source model"),
        Column(name="top-1", meaning="share of positions with the source model's most likely token"),
        Column(
            name="noisiest layer, dB", meaning="the lowest signal-to-noise ratio that a decoder layer has by itself"
        ),
        Column(name="over", kind="text"),
    )
    rows = []
    for run in comparison.runs:
        facts = run.validation
        if facts is None:
            continue
        cell = next((cell for cell in place[1].cells if cell.run == run.id), None) if place else None
        rows.append(
            (
                Entry(text=run.name, run=run.id),
                _estimate(comparison, place[1], cell, "output_tok_s") if place and cell else Entry(text=text.ABSENT),
                Entry(text=text.fixed(facts["ppl"], 3)),
                Entry(text=text.fixed(facts["ppl_source"], 3)),
                Entry(text=text.fixed(facts["ppl_ratio"], 4)),
                Entry(text=text.number(facts["kl"])),
                Entry(text=text.share(facts["top1"])),
                _noisiest(facts.get("layer_snr_db")),
                Entry(text=f"{facts.get('tokens', text.ABSENT)} tokens of {_text_name(facts.get('text'))}"),
            )
        )
    return Table(id="quality", caption="Quality and speed", columns=columns, rows=tuple(rows))


def _noisiest(ratios: Any) -> Entry:
    """Of a list with a number, or null, per layer; records of earlier versions hold none."""
    told = list(enumerate(ratios)) if isinstance(ratios, list | tuple) else []
    known = [(ratio, layer) for layer, ratio in told if isinstance(ratio, int | float)]
    if not known:
        return Entry(text=text.ABSENT, tone="absent")
    ratio, layer = min(known)
    return Entry(text=f"{ratio:.1f}", note=f"layer {layer}")


def samples_table(comparison: Comparison) -> Table:
    """What source and engine go on with after the same prompts."""
    rows: list[tuple[Entry, ...]] = []
    for run in comparison.runs:
        samples = (run.validation or {}).get("samples")
        for sample in samples if isinstance(samples, list | tuple) else ():
            if not isinstance(sample, Mapping):
                continue
            told = [str(sample.get(name, text.ABSENT)) for name in ("prompt", "source", "engine")]
            same = f"{sample.get('same_tokens', text.ABSENT)} of {sample.get('tokens', text.ABSENT)}"
            rows.append((Entry(text=run.name, run=run.id), *(Entry(text=item) for item in told), Entry(text=same)))
    columns = (*_text("Run", "Prompt", "Source goes on", "Engine goes on"), Column(name="equal tokens"))
    return Table(
        id="samples", caption="What source and engine go on with", columns=columns, rows=tuple(rows), is_folded=True
    )


def _text_name(facts: Any) -> str:
    return str(facts.get("name", "a text")) if isinstance(facts, Mapping) else str(facts or "a text")


def common_load(comparison: Comparison) -> tuple[Group, Level] | None:
    """The first group's highest load that is valid in most runs."""
    for group in comparison.groups:
        valid = [(sum(cell.is_valid for cell in level.cells), level) for level in group.levels]
        most = max((count for count, _ in valid), default=0)
        if most:
            return group, [level for count, level in valid if count == most][-1]
    return None


def validity_table(comparison: Comparison) -> Table:
    """Points that are invalid or missing, each with its reason."""
    rows: list[tuple[Entry, ...]] = []
    for group in comparison.groups:
        for level in group.levels:
            for cell in level.cells:
                name = Entry(text=comparison.facts(cell.run).name, run=cell.run)
                where = (Entry(text=group.shape), Entry(text=_load_text(level.load)))
                rows.extend(
                    (name, *where, Entry(text="invalid", tone="invalid"), Entry(text=reason))
                    for reason in cell.invalid_reasons
                )
    for run in comparison.runs:
        for missing in run.missing:
            reason = f"the sweep ended early: {run.ended_early}" if run.ended_early else "no readable result"
            rows.append(
                (
                    Entry(text=run.name, run=run.id),
                    Entry(text=missing.shape),
                    Entry(text=_load_text(missing.load)),
                    Entry(text="missing", tone="absent"),
                    Entry(text=f"repeat {missing.repeat}: {reason}"),
                )
            )
    columns = (*_text("Run", "Shape"), Column(name="C"), *_text("State", "Reason"))
    return Table(id="validity", caption="Points that do not count", columns=columns, rows=tuple(rows))


def left_out_table(comparison: Comparison) -> Table:
    rows = tuple((Entry(text=left.path), Entry(text=left.reason)) for left in comparison.left_out)
    return Table(id="left-out", caption="Directories left out", columns=_text("Directory", "Reason"), rows=rows)


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


def telemetry_table(comparison: Comparison, group: Group) -> Table | None:
    """Only columns that some run has; None without any."""
    told = {name for level in group.levels for cell in level.cells for name in cell.telemetry}
    shown = [name for name in TELEMETRY_COLUMNS if name in told]
    if not shown:
        return None
    columns = (
        _load_column(group),
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

    return _per_load(
        comparison,
        group,
        f"telemetry-{group_id(comparison, group)}",
        f"Server and GPUs, {group.title}",
        columns,
        entries,
    )


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
                    Entry(text=_load_text(point.summary.load)),
                    Entry(text=text.number(gap)),
                    Entry(text=str(int(request))),
                    Entry(text=text.number(sent.get(request))),
                )
            )
    return Table(id="stalls", caption="Longest stalls", columns=columns, rows=tuple(rows))


def definitions_table() -> Table:
    rows = tuple((Entry(text=name), Entry(text=unit), Entry(text=meaning)) for name, (unit, meaning) in METRICS.items())
    return Table(id="definitions", caption="Definitions", columns=_text("Metric", "Unit", "Meaning"), rows=rows)


def other_definitions_table(comparison: Comparison) -> Table:
    """Of the tools whose results were imported."""
    rows = tuple(
        (
            Entry(text=definitions),
            *(Entry(text=found.get(name, "not known")) for name in ("tokens", "ttft", "output_tok_s")),
        )
        for definitions in sorted({run.definitions for run in comparison.runs} - {DEFINITIONS})
        for found in (OTHER_DEFINITIONS.get(definitions.partition("/")[0], {}),)
    )
    columns = _text("Definitions", "Tokens counted by", "TTFT", "Rates are over")
    return Table(id="other-definitions", caption="Definitions of other tools", columns=columns, rows=rows)


def identity_table(run: RunFacts) -> Table:
    """What was measured, as the run told it."""
    facts: list[tuple[str, str]] = [
        ("run", run.run),
        ("directory", run.directory),
        ("started", run.started),
        ("definitions", run.definitions),
        ("url", run.url),
        ("model", run.model),
        *flat_facts(run.identity),
    ]
    if run.engine is not None:
        facts[6:6] = [("engine", run.engine.name), ("engine key", run.engine.key)]
    rows = tuple((Entry(text=name), Entry(text=value)) for name, value in facts)
    return Table(
        id=f"identity-{run.id}",
        caption=f"Identity of {run.id}",
        columns=_text("Fact", "Value"),
        rows=rows,
        is_folded=True,
    )


def files_table(run: RunFacts) -> Table:
    rows = tuple((Entry(text=name), Entry(text=digest)) for name, digest in run.files.items())
    columns = (Column(name="File", kind="text"), Column(name="sha256", kind="code"))
    return Table(id=f"files-{run.id}", caption=f"Files of {run.id}", columns=columns, rows=rows, is_folded=True)


def commands_table(comparison: Comparison) -> Table:
    """What to type to build and measure each run again."""
    rows: list[tuple[Entry, ...]] = []
    for run in comparison.runs:
        if run.engine is not None:
            rows.append((Entry(text=run.name, run=run.id), Entry(text="build"), Entry(text=run.engine.command)))
        rows.append((Entry(text=run.name, run=run.id), Entry(text="measure"), Entry(text=run.command)))
    columns = (*_text("Run", "Step"), Column(name="Command", kind="code"))
    return Table(id="commands", caption="Commands to repeat it", columns=columns, rows=tuple(rows))


def group_id(comparison: Comparison, group: Group) -> str:
    """The group in an HTML id."""
    return f"{group.shape.replace('/', 'x')}-{comparison.groups.index(group)}"


def _time(iso: str) -> str:
    """`2025-06-01 12:00` of an ISO 8601 time, whatever it says about seconds and zone: they are UTC."""
    return iso[:16].replace("T", " ")
