"""`tkit doctor`."""

from __future__ import annotations

import click

from tkit.cli.output import Output, output_options
from tkit.specs.diagnosis import ASKABLE
from tkit.specs.recipe import BACKENDS


@click.command("doctor")
@click.argument("what", type=click.Choice(ASKABLE), default="serve")
@click.option(
    "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What will run the engine."
)
@output_options
@click.pass_context
def command(ctx: click.Context, output: Output, what: str, backend: str) -> None:
    """Say whether this machine can do WHAT (default: serve), line by line, and how to mend what it cannot.

    A line fails, and the exit code is 1, only when WHAT needs it on this backend; everything else is a warning.
    """
    from tkit.backends.nvidia import this_machine
    from tkit.specs.server import ServeOptions
    from tkit.stages.doctor import diagnose

    diagnosis = diagnose(what, backend, this_machine(), ServeOptions())
    lines = []
    for check in diagnosis.checks:
        lines.append(f"{check.status:4}  {check.name:<13} {check.found}")
        if check.fix is not None:
            lines.append(f"{'':20}{check.fix}")
    can = "can" if diagnosis.is_able else "cannot"
    lines.append(f"this machine {can} tkit {what} with the {diagnosis.backend} backend")
    output.record(diagnosis, "\n".join(lines))
    if not diagnosis.is_able:
        ctx.exit(1)
