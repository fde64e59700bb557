"""`tkit plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tkit.cli.output import FiniteFloat, Output, output_options
from tkit.cli.sections import SectionedCommand


class _SizeOrAuto(click.ParamType):
    """A number of GPUs, or `auto`."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "auto":
            return None
        try:
            number = int(value)
        except ValueError:
            self.fail(f'"{value}" is neither a whole number nor auto', param, ctx)
        if number < 1:
            self.fail(f"{number} is less than 1", param, ctx)
        return number


SECTIONS = {
    "Hardware": "gpu num_gpus tp pp engine engine_version",
    "Model": "quant kv_cache",
    "Load": "isl osl concurrency requests_s slo",
    "Cost and comparison": "prices axes html",
    "How good it is": "run table",
}


@click.command("plan", cls=SectionedCommand, sections=SECTIONS)
@click.argument("words", metavar="[MODEL]", nargs=-1)
@click.option(
    "--gpu",
    metavar="NAME",
    default="h100",
    show_default=True,
    help="GPU of the table: h100, h200, b200, l40s, a100, ...",
)
@click.option(
    "--num-gpus", type=click.IntRange(min=1), metavar="N", help="GPUs to use.  [default: the fewest that fit]"
)
@click.option("--tp", type=_SizeOrAuto(), help="Tensor-parallel size, in GPUs, or auto.  [default: auto]")
@click.option("--pp", type=_SizeOrAuto(), help="Pipeline-parallel size, in GPUs, or auto.  [default: auto]")
@click.option("--quant", metavar="QUANT", help="Weight quantization.  [default: the recipe's first engine]")
@click.option(
    "--kv-cache", metavar="TYPE", help="auto, fp16, fp8, int8 or nvfp4.  [default: the recipe's first engine, or auto]"
)
@click.option(
    "--isl", type=click.IntRange(min=1), metavar="N", default=1024, show_default=True, help="Tokens of a prompt."
)
@click.option(
    "--osl", type=click.IntRange(min=1), metavar="N", default=1024, show_default=True, help="Tokens of an answer."
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 1_000_000),
    metavar="N",
    default=16,
    show_default=True,
    help="Requests in flight.",
)
@click.option("--slo", metavar="TIER", help="Tier whose TTFT and TPOT must hold: interactive, conversational or batch.")
@click.option("--rate", "requests_s", metavar="R", type=FiniteFloat(min=0, min_open=True),
              help="Requests per second to size for.")  # fmt: skip
@click.option(
    "--engine", metavar="NAME", default="tensorrt-llm", show_default=True, help="tensorrt-llm, vllm or sglang."
)
@click.option(
    "--engine-version", metavar="VERSION", help="Version of the engine.  [default: the newest that was measured]"
)
@click.option(
    "--prices", type=click.Path(path_type=Path), metavar="FILE", help="YAML of dated prices: $ per GPU hour, or capex."
)
@click.option(
    "--compare",
    "axes",
    multiple=True,
    metavar="AXIS=A,B",
    help="gpu=a,b quant=x,y tp=1,2: every combination, as a table.",
)
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Also write a page with the plots."
)
@click.option(
    "--calibrate", "run", type=click.Path(path_type=Path), metavar="RUN", help="A sweep's directory: refit to it first."
)
@click.option("--selfcheck", "table", is_flag=False, flag_value="", metavar="[CSV]",
              help="Predict every row of a published table and print the errors; without CSV the shipped rows.")  # fmt: skip
@output_options
def command(
    output: Output,
    words: tuple[str, ...],
    gpu: str,
    prices: Path | None,
    axes: tuple[str, ...],
    html: Path | None,
    run: Path | None,
    table: str | None,
    **wish: Any,
) -> None:
    """Predict memory, layout, speed and cost of serving MODEL, before anything is built.

    MODEL is a directory with config.json, a Hugging Face hub id, or the name of a recipe in model_configs/; nothing is
    downloaded. `tkit plan --selfcheck` shows how well the predictions hold on published measurements.
    """
    if table is not None:
        _selfcheck(output, table)
        return
    if axes and (html is not None or run is not None):
        raise click.UsageError(
            f"{'--html' if html is not None else '--calibrate'} takes one plan, --compare makes many"
        )
    from tkit.planner.gpus import find_gpu
    from tkit.stages import plan as stage

    wish["gpu"] = find_gpu(gpu)
    model = next((word for word in words if "=" not in word), None)
    # after `--compare gpu=a,b` the shell gives `quant=x,y` as a word of its own
    more_axes = [word for word in words if "=" in word]
    if len(words) - len(more_axes) > 1 or (more_axes and not axes):
        raise click.UsageError(f"expected one MODEL, found {' '.join(words)}")
    if axes:
        from tkit.planner.compare import comparison_record, render

        combined = [word for axis in (*axes, *more_axes) for word in axis.split()]
        comparison = stage.compare(model, wish, combined, prices)
        output.record(comparison_record(comparison), render(comparison))
        return
    from tkit.planner.record import as_record
    from tkit.planner.text import render as render_plan

    plan = stage.plan(model, wish, prices=prices, run=run)
    if html is not None:
        from tkit.files import write_atomic
        from tkit.planner.page import render_html

        write_atomic(html, render_html(plan))
        output.note(f"wrote {html}")
    output.record(as_record(plan), render_plan(plan))


def _selfcheck(output: Output, table: str) -> None:
    from tkit.errors import GateFailed
    from tkit.planner.selfcheck import render
    from tkit.stages.plan import check_published

    check = check_published(Path(table) if table else None)
    output.record(check, render(check))
    if not table and check.failed:
        raise GateFailed("the shipped rows are predicted worse than they were", problems=check.failed)
