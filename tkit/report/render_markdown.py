"""A comparison -> Markdown for a pull-request comment: the verdict and the numbers open, the rest folded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from tkit.report import gates, text
from tkit.report.record import Comparison
from tkit.report.sections import Section
from tkit.report.tables.table import Entry, Table
from tkit.report.verdict import TITLES

MAX_CHARACTERS = 65_536  # of a comment on GitHub, which refuses a longer one
TONES = {"better": "▲", "worse": "▼"}
SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")
# what GitHub turns into a link, a notification or a picture; an empty comment in between leaves the text as it is
LIVELY = re.compile(r"(?<=[@#])(?=\w)|(?<=:)(?=//)|(?<=www)(?=\.)|(?<=:)(?=[a-z+-][\w+-]*:)")


def fits_a_comment(written: str) -> bool:
    return len(written) <= MAX_CHARACTERS


def render_markdown(
    comparison: Comparison, sections: Sequence[Section], fits: Callable[[str], bool] = fits_a_comment
) -> str:
    """Without the sections that would make it too long, which are named: folded ones go first, then the last ones."""
    shown = list(sections)
    written = _written(comparison, shown, [])
    for section in sorted(reversed(sections), key=lambda section: section.is_brief):
        if fits(written):
            break
        shown.remove(section)
        left_out = [section.title for section in sections if section not in shown]
        written = _written(comparison, shown, left_out)
    return written


def _written(comparison: Comparison, sections: Sequence[Section], left_out: Sequence[str]) -> str:
    lines = ["# Comparison report" if len(comparison.runs) > 1 else "# Report", ""]
    if comparison.gates:
        lines.append(f"- **Gates: {gates.summary(comparison)}.**")
    for verdict in comparison.verdict:
        mark = f"{TONES.get(verdict.tone, '')} {TITLES[verdict.tone]}: ".lstrip() if verdict.tone in TITLES else ""
        claims = " ".join(f"**{escape(claim.text)}** {escape(claim.over_loads)}".strip() for claim in verdict.claims)
        lines.append(f"- {mark}{claims} {escape(' '.join(verdict.details))}")
    for section in sections:
        if section.lead or section.tables:
            lines += ["", *_section(section)]
    if left_out:
        lines += ["", f"Too long to stand here, see report.html: {escape(', '.join(left_out))}."]
    lines += ["", f"tkit {escape(comparison.tkit)}, {escape(comparison.created)}", ""]
    return "\n".join(lines)


def _section(section: Section) -> Iterable[str]:
    if section.is_brief:
        yield f"## {escape(section.title)}"
    else:
        yield f"<details><summary>{escape(section.title)}</summary>"
    for sentence in section.lead:
        yield from ("", escape(sentence))
    for table in section.tables:
        if table.is_folded and section.is_brief:
            yield from (
                "",
                f"<details><summary>{escape(table.caption)}</summary>",
                "",
                *_table(table),
                "",
                "</details>",
            )
        else:
            yield from ("", *_table(table))
    if not section.is_brief:
        yield from ("", "</details>")


def _table(table: Table) -> Iterable[str]:
    yield from (f"**{escape(table.caption)}**", "")
    yield _line(escape(column.name) or " " for column in table.columns)
    yield _line("---:" if column.kind == "number" else "---" for column in table.columns)
    for row in table.rows:
        yield _line(_entry(entry) for entry in row)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _entry(entry: Entry) -> str:
    parts = [entry.run] if entry.run else []
    parts.append(escape(entry.text))
    if entry.qualifier:
        parts.append(entry.qualifier)
    under = [f"{TONES[entry.tone]} {entry.note}" if entry.tone in TONES else entry.note] if entry.note else []
    under += [f"({entry.aside})"] if entry.aside else []
    if under:
        parts.append(f"<br>{escape(' '.join(under))}")
    return " ".join(parts)


def escape(value: str) -> str:
    """Text that Markdown and the HTML within it show as it is, on one line; a mention notifies nobody."""
    value = " ".join(value.split("\n"))
    value = value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.isolated(LIVELY.sub("<!-- -->", SPECIAL.sub(r"\\\g<0>", value)))
