"""`tkit report`."""

from __future__ import annotations

from pathlib import Path

import click

from tkit.cli.output import Output, output_options


@click.command("report")
@click.argument("runs", metavar="[RUN]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory to write.  [default: reports/report-<UTC time>]",
)
@click.option(
    "--baseline",
    metavar="RUN",
    help="Run to compare with: directory, name, label, engine or quantization.  [default: the first]",
)
@click.option("--png", "with_png", is_flag=True, help="Also write pareto.png.")
@click.option(
    "--fail-on",
    metavar="GATES",
    help="Exit 3 when one of these is so: METRIC<NUMBER or METRIC>NUMBER, separated by commas; with %, a change against "
    "the baseline. Example: output_tok_s<-5%,ttft_p99>+10%,kl>0.01",
)
@click.option(
    "--junit",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write points and gates as JUnit XML.",
)
@click.option(
    "--prices",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="YAML of dated prices, as tkit plan takes it.",
)
@click.option(
    "--step-summary",
    envvar="GITHUB_STEP_SUMMARY",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Append the report's open parts, Markdown, to this file.  [default: $GITHUB_STEP_SUMMARY when set]",
)
@output_options
def command(
    output: Output,
    runs: tuple[Path, ...],
    out: Path | None,
    baseline: str | None,
    with_png: bool,
    fail_on: str | None,
    junit: Path | None,
    prices: Path | None,
    step_summary: Path | None,
) -> None:
    """Compare the sweeps in RUN, directories or names under reports/ (default: the newest of every engine).

    Writes report.html, report.md, report.csv and report.json. What cannot be read is named and left out.
    """
    from tkit.report.gates import parse_gates
    from tkit.stages.report import check_gates, report

    path, comparison = report(
        runs,
        output,
        out=out,
        baseline=baseline,
        with_png=with_png,
        gates=parse_gates(fail_on, "--fail-on") if fail_on is not None else (),
        junit=junit,
        prices=prices,
        step_summary=step_summary,
    )
    lines = []
    for verdict in comparison.verdict:
        lines += [f"{claim.text} {claim.over_loads}".strip() for claim in verdict.claims]
        lines += verdict.details
    lines += [f"left out: {left.path}: {left.reason}" for left in comparison.left_out]
    output.record(comparison, "\n".join(lines), last_line=str(path))
    check_gates(comparison, path)
