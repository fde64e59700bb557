"""`tkit run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tkit.cli.output import Output, output_options
from tkit.specs.device import DEVICES
from tkit.specs.recipe import BACKENDS
from tkit.units import format_seconds


@click.command("run")
@click.argument("recipe")
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="auto",
    show_default=True,
    help="Where models are calibrated, validated and served.",
)
@click.option(
    "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What will run the engines."
)
@click.option(
    "--baseline",
    metavar="RUN",
    help="Compare with this instead of the recipe's baseline: a name that --save-baseline gave, a directory, or a run.",
)
@click.option(
    "--save-baseline",
    metavar="NAME",
    help="Once every gate has passed, keep the sweep of the recipe's baseline as reports/baselines/NAME.",
)
@click.option("--fail-on", metavar="GATES", help="In place of the recipe's gates, as tkit report takes them.")
@click.option(
    "--junit",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write points and gates as JUnit XML.",
)
@click.option("--fresh", "is_fresh", is_flag=True, help="Validate and measure again what was done before.")
@output_options
def command(output: Output, recipe: str, **options: Any) -> None:
    """Build, validate, serve, sweep and report every engine of RECIPE, a YAML file or its name in model_configs/.

    What is done is not done again: engines, validations and sweeps of the same inputs on this machine are reused, and what
    was cut off goes on. The last line of stdout is the report's path.
    """
    from tkit.backends.nvidia import this_machine
    from tkit.stages.run import RunOptions, run_recipe

    record = run_recipe(recipe, output, this_machine(), RunOptions(**options))
    text = f"{record.recipe}: {len(record.engines)} engines in {format_seconds(record.seconds)}"
    output.record(record, text, last_line=record.report)
