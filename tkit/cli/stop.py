"""`tkit stop`: end a server and remove what it left behind."""

from __future__ import annotations

import click

from tkit.cli.output import Output, output_options


@click.command("stop")
@click.argument("engine", required=False)
@output_options
def command(output: Output, engine: str | None) -> None:
    """Stop the server of ENGINE; default: the only one that runs.

    Requests in flight may finish for a few seconds; then the server is killed. What a crashed server left behind is
    removed as well.
    """
    from tkit.stages.serve import stop_server

    stopped = stop_server(engine)
    lines = []
    for server in stopped:
        if not server.was_running:
            lines.append(f"{server.engine}: had ended already; removed what it left behind")
        else:
            how = "killed, it did not end in time" if server.was_killed else "stopped"
            lines.append(f"{server.engine}: {how} (pid {server.pid})")
    output.record(stopped, "\n".join(lines))
