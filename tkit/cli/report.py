"""`tkit report`."""

from __future__ import annotations

from pathlib import Path

import click

from tkit.cli.output import Output, output_options


@click.command("report")
@click.argument("runs", metavar="[RUN]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Directory to write.  [default: reports/report-<UTC time>]"
)
@click.option(
    "--baseline", help="Run to compare with: directory, name, label, engine or quantization.  [default: the first]"
)
@click.option("--png", "with_png", is_flag=True, help="Also write pareto.png.")
@output_options
def command(output: Output, runs: tuple[Path, ...], out: Path | None, baseline: str | None, with_png: bool) -> None:
    """Compare the sweeps in RUN, directories or names under reports/ (default: the newest of every engine).

    Writes report.html, report.md, report.csv and report.json. What cannot be read is named and left out.
    """
    from tkit.stages.report import report

    path, comparison = report(runs, output, out=out, baseline=baseline, with_png=with_png)
    lines = []
    for verdict in comparison.verdict:
        lines += [f"{claim.text} {claim.over_loads}".strip() for claim in verdict.claims]
        lines += verdict.details
    lines += [f"left out: {left.path}: {left.reason}" for left in comparison.left_out]
    output.record(comparison, "\n".join(lines), last_line=str(path))
