"""Tables of where the numbers come from: definitions, commands, identities, files, and the longest stalls."""

from __future__ import annotations

from tkit.report.differences import flat_facts
from tkit.report.record import Comparison, RunFacts
from tkit.report.tables.table import Column, Entry, Table, text_columns
from tkit.specs.record import DEFINITIONS, METRICS, OTHER_DEFINITIONS


def definitions_table() -> Table:
    rows = tuple((Entry(text=name), Entry(text=unit), Entry(text=meaning)) for name, (unit, meaning) in METRICS.items())
    return Table(id="definitions", caption="Definitions", columns=text_columns("Metric", "Unit", "Meaning"), rows=rows)


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
    columns = text_columns("Definitions", "Tokens counted by", "TTFT", "Rates are over")
    return Table(id="other-definitions", caption="Definitions of other tools", columns=columns, rows=rows)


def commands_table(comparison: Comparison) -> Table:
    """What to type to build and measure each run again."""
    rows: list[tuple[Entry, ...]] = []
    for run in comparison.runs:
        if run.engine is not None:
            rows.append((Entry(text=run.name, run=run.id), Entry(text="build"), Entry(text=run.engine.command)))
        rows.append((Entry(text=run.name, run=run.id), Entry(text="measure"), Entry(text=run.command)))
    columns = (*text_columns("Run", "Step"), Column(name="Command", kind="code"))
    return Table(id="commands", caption="Commands to repeat it", columns=columns, rows=tuple(rows))


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
        columns=text_columns("Fact", "Value"),
        rows=rows,
        is_folded=True,
    )


def files_table(run: RunFacts) -> Table:
    rows = tuple((Entry(text=name), Entry(text=digest)) for name, digest in run.files.items())
    columns = (Column(name="File", kind="text"), Column(name="sha256", kind="code"))
    return Table(id=f"files-{run.id}", caption=f"Files of {run.id}", columns=columns, rows=rows, is_folded=True)
