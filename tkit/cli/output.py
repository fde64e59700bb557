"""What every command shares: `--json`, `--quiet`, progress on stderr, records on stdout."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import click

from tkit.files import to_json
from tkit.specs.progress import Progress

PLAIN_LINE_EVERY_S = 10.0  # without a terminal, of a step that tells details


def is_terminal(stream: TextIO | None) -> bool:
    """None stands for a stream that was closed before the command started."""
    return stream is not None and stream.isatty()


class Output(Progress):
    """Data to stdout, everything else to stderr. A bar on a terminal, one line per step without one."""

    def __init__(self, *, as_json: bool, quiet: bool):
        self.as_json = as_json
        self.quiet = quiet
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._announced: dict[str, float] = {}  # when the step was last told of

    def record(self, record: Any, text: str, last_line: str | None = None) -> None:
        """`--json` prints the record as it is stored; otherwise the text, and `last_line` for scripts on stdout."""
        self.close()  # a bar would be drawn again below what is printed
        if self.as_json:
            click.echo(to_json(record), nl=False)
            return
        if text and not self.quiet:
            click.echo(text, err=last_line is not None)
        if last_line is not None:
            click.echo(last_line)

    def step(self, what: str, done: int, total: int, detail: str = "") -> None:
        if self.quiet:
            return
        if is_terminal(sys.stderr):
            self._draw(what, done, total, detail)
        elif what not in self._announced:
            self._announced[what] = time.monotonic()
            click.echo(f"{what} ...", err=True)
        elif detail and time.monotonic() - self._announced[what] >= PLAIN_LINE_EVERY_S:
            self._announced[what] = time.monotonic()
            click.echo(f"{what}: {done}/{total}, {detail}", err=True)

    def note(self, text: str) -> None:
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            click.echo(text, err=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._tasks.clear()

    def _draw(self, what: str, done: int, total: int, detail: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

        from tkit.cli.bars import Bars

        if self._bar is None:
            # few redraws: while a sweep runs, this process is the one that measures
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Bars(*columns, console=Console(stderr=True), refresh_per_second=4)
            self._bar.start()
        if what not in self._tasks:
            if self._bar.detail:  # a line with its result stands above: a bar per point would fill the screen
                self._bar.update(list(self._tasks.values())[-1], visible=False)
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.detail = detail
        self._bar.update(self._tasks[what], completed=done, total=total)


class FiniteFloat(click.FloatRange):
    """A float within a range. NaN lies in every range of click's, and a limit that is NaN is never exceeded."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


# of commands that write a run
reports_option = click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    default="reports",
    show_default=True,
    help="Reports directory.",
)


def output_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds `--json` and `--quiet`; the command receives them as one `output` argument, closed when it returns."""

    @click.option("--json", "as_json", is_flag=True, help="Print the stored record as JSON on stdout.")
    @click.option("--quiet", is_flag=True, help="No progress, no summary; errors only.")
    @functools.wraps(function)
    def wrapper(*, as_json: bool, quiet: bool, **arguments: Any) -> None:
        output = Output(as_json=as_json, quiet=quiet)
        try:
            function(output=output, **arguments)
        finally:
            output.close()

    return wrapper
