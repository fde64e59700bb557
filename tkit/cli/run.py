"""`tkit run`."""

from __future__ import annotations

import click

from tkit.cli.output import Output, output_options
from tkit.specs.recipe import BACKENDS
from tkit.units import format_seconds


@click.command("run")
@click.argument("recipe")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What will run the engines."
)
@output_options
def command(output: Output, recipe: str, device: str, backend: str) -> None:
    """Build, validate, serve, sweep and report every engine of RECIPE, a YAML file or its name in model_configs/.

    The last line of stdout is the report's path.
    """
    from tkit.backends.nvidia import this_machine
    from tkit.stages.run import run_recipe

    record = run_recipe(recipe, output, this_machine(), device=device, backend=backend)
    text = f"{record.recipe}: {len(record.engines)} engines in {format_seconds(record.seconds)}"
    output.record(record, text, last_line=record.report)
