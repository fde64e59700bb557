"""`tkit status`: the servers that run, and those that should."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from tkit.cli.output import Output, output_options

if TYPE_CHECKING:
    from tkit.stages.status import ServerStatus


@click.command("status")
@click.argument("engine", required=False)
@output_options
def command(output: Output, engine: str | None) -> None:
    """Show the servers: engine, state, ports, since when, requests. Exits 1 when one of them does not serve.

    ENGINE is the name of one; default: all.
    """
    from tkit.stages.status import server_statuses

    statuses = server_statuses(engine)
    output.record(statuses, "\n".join(map(_lines, statuses)) if statuses else "no server is running")
    if any(status.state in ("failing", "dead") for status in statuses):
        click.get_current_context().exit(1)


def _lines(status: ServerStatus) -> str:
    record = status.record
    lines = [f"{status.engine}: {status.state}{f', {status.problem}' if status.problem else ''}"]
    if record is not None and status.state != "dead":
        lines[0] += f"; since {record.started[:19].replace('T', ' ')} UTC, pid {record.pid}"
        ports = (
            ("HTTP", record.http_port),
            ("gRPC", record.grpc_port),
            ("OpenAI", record.openai_port),
            ("metrics", record.metrics_port),
        )
        lines.append(f"  {record.host}: {', '.join(f'{name} {port}' for name, port in ports)}")
    if status.requests is not None:
        lines.append(f"  requests: {', '.join(f'{count} {what}' for what, count in status.requests.items())}")
    if status.problem:
        lines.append(f"  its log: {status.log}; remove what is left of it: tkit stop {status.engine}")
    return "\n".join(lines)
