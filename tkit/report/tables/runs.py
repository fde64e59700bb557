"""Tables of what was compared: the runs, how they differ, what the gates say of them, which points do not count."""

from __future__ import annotations

from collections.abc import Mapping

from tkit.report import gates, text
from tkit.report.record import FAILED, NOT_EVALUATED, PASSED, Comparison, RunFacts
from tkit.report.tables.loads import load_text
from tkit.report.tables.table import Column, Entry, Table, text_columns

GATE_TONES = {FAILED: "worse", NOT_EVALUATED: "invalid"}
KINDS = {
    "engine": "the engine",
    "model": "the model it was built from: may explain a result instead",
    "conditions": "the measurement: may explain a result instead",
}


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
    columns = (*text_columns("Run", "Engine", "Measured through", "Started"), Column(name="Points"))
    return Table(id="runs", caption="Runs", columns=columns, rows=tuple(rows))


def _server(run: RunFacts) -> str:
    """What runs without an engine card tell of what answered: another server, or transformers in the sweep's process."""
    server = run.identity.get("server")
    facts = server if isinstance(server, Mapping) else {}
    return ", ".join(str(facts[key]) for key in ("server", "version", "batching") if facts.get(key)) or "not known"


def _time(iso: str) -> str:
    """`2025-06-01 12:00` of an ISO 8601 time, whatever it says about seconds and zone: they are UTC."""
    return iso[:16].replace("T", " ")


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
            columns = text_columns("Fact", *(run.id for run in comparison.runs))
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
    columns = text_columns("Fails when", "Outcome", "Run", "Point", "Found")
    return Table(id="gates", caption="Gates", columns=columns, rows=tuple(rows))


def validity_table(comparison: Comparison) -> Table:
    """Points that are invalid or missing, each with its reason."""
    rows: list[tuple[Entry, ...]] = []
    for group in comparison.groups:
        for level in group.levels:
            for cell in level.cells:
                name = Entry(text=comparison.facts(cell.run).name, run=cell.run)
                where = (Entry(text=group.shape), Entry(text=load_text(level.load)))
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
                    Entry(text=load_text(missing.load)),
                    Entry(text="missing", tone="absent"),
                    Entry(text=f"repeat {missing.repeat}: {reason}"),
                )
            )
    columns = (*text_columns("Run", "Shape"), Column(name="C"), *text_columns("State", "Reason"))
    return Table(id="validity", caption="Points that do not count", columns=columns, rows=tuple(rows))


def left_out_table(comparison: Comparison) -> Table:
    rows = tuple((Entry(text=left.path), Entry(text=left.reason)) for left in comparison.left_out)
    return Table(id="left-out", caption="Directories left out", columns=text_columns("Directory", "Reason"), rows=rows)
