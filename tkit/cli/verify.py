"""`tkit verify`."""

from __future__ import annotations

import click

from tkit.cli.output import Output, output_options
from tkit.units import format_bytes, format_seconds


@click.command("verify")
@click.argument("engine", required=False)
@output_options
def command(output: Output, engine: str | None) -> None:
    """Hash every file of ENGINE (default: the newest) again, and check that TensorRT-LLM would load its checkpoint.

    ENGINE may also be the directory of a TensorRT-LLM checkpoint that somebody else wrote: then only the latter.
    Exits 2 with the list of files that are not as built, 1 when they are but TensorRT-LLM would refuse them.
    """
    from tkit.stages.engines import find_checkpoint
    from tkit.stages.verify import check_verified, verify

    record = verify(find_checkpoint(engine), output)
    ranks = f"; TensorRT-LLM would load {record.world_size} rank{'s' * (record.world_size > 1)}"
    text = (
        f"{record.engine}: {record.files} files, {format_bytes(record.bytes)}{', all as built' if record.key else ''}"
        f"{'' if record.refused is None else ranks} ({format_seconds(record.seconds)})"
    )
    output.record(record, "" if record.changed or record.refused else text)
    check_verified(record)
