"""`tkit import`."""

from __future__ import annotations

from pathlib import Path

import click

from tkit.cli.output import Output, output_options, reports_option


@click.command("import")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--label", metavar="TEXT", help="What a report calls it.  [default: the model's name]")
@reports_option
@click.option("--name", metavar="NAME", help="Name of the run's directory.  [default: the tool and the file]")
@output_options
def command(output: Output, files: tuple[Path, ...], label: str | None, out: Path, name: str | None) -> None:
    """Make a run that `tkit report` reads out of another load generator's results: AIPerf (profile_export.jsonl), vLLM
    and SGLang bench serve (with details), guidellm (benchmarks.json), GenAI-Perf (profile_export.json).

    The files of one run come from one tool. The last line of stdout is the run's directory.
    """
    from tkit.stages.importing import import_results

    record = import_results(files, out=out, label=label, name=name)
    points = len(record.points)
    text = f"{points} point{'s' * (points != 1)} under the definitions of {record.manifest.definitions}"
    output.record(record, text, last_line=record.directory)
