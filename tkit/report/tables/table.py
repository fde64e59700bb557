"""What a table is: entries with their intervals and tones, in columns that say what they mean. Knows no run."""

from __future__ import annotations

from dataclasses import dataclass


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


def text_columns(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name=name, kind="text") for name in names)
