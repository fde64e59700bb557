"""A command whose `--help` lists its options under headings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click


class SectionedCommand(click.Command):
    """`sections` is {heading: "names of parameters"}, in the order shown; the others stand last, under Options."""

    def __init__(self, *args: Any, sections: Mapping[str, str], **settings: Any):
        super().__init__(*args, **settings)
        self.sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        records = {option.name: option.get_help_record(ctx) for option in options}
        named = {heading: [records.pop(name) for name in names.split()] for heading, names in self.sections.items()}
        for heading, rows in {**named, "Options": list(records.values())}.items():
            with formatter.section(heading):
                formatter.write_dl([row for row in rows if row is not None])
