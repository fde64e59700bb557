"""`tkit serve`: a running Triton for an engine, in the foreground or left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tkit.cli.output import Output, output_options
from tkit.cli.sections import SectionedCommand
from tkit.specs.device import DEVICES
from tkit.specs.server import MODEL_NAME, RENDER_TARGETS, ServeOptions, ServerRecord


def _option(name: str, default: Any, text: str, **more: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(name, default=default, show_default=True, help=text, **more)


SECTIONS = {
    "Ports": "host http_port grpc_port metrics_port openai_port api_key_file",
    "Limits": "device max_batch_size max_queue_size kv_cache_fraction timeout",
    "Where it runs": "replaces detach render out",
}


@click.command("serve", cls=SectionedCommand, sections=SECTIONS)
@click.argument("engine", required=False)
@_option("--host", ServeOptions.host, "IPv4 address to listen on.", metavar="ADDRESS")
@_option("--http-port", ServeOptions.http_port, "HTTP port; 0 = any free one.", metavar="PORT")
@_option("--grpc-port", ServeOptions.grpc_port, "gRPC port; 0 = any free one.", metavar="PORT")
@_option("--metrics-port", ServeOptions.metrics_port, "Prometheus metrics; 0 = any free port.", metavar="PORT")
@_option("--openai-port", ServeOptions.openai_port, "OpenAI-compatible HTTP; 0 = any free port.", metavar="PORT")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Holds the key that OpenAI clients must send.",
)
@_option("--device", ServeOptions.device, "Where the model runs.", type=click.Choice(DEVICES))
@_option(
    "--max-batch-size",
    ServeOptions.max_batch_size,
    "Requests that run at once; a compiled engine has its own limit.",
    metavar="N",
)
@_option("--max-queue-size", ServeOptions.max_queue_size, "Requests that may wait; more are refused.", metavar="N")
@_option("--kv-cache-fraction", ServeOptions.kv_cache_fraction,
         "Of the GPU memory that is free once the engine is loaded; TensorRT-LLM's backends.", metavar="SHARE")  # fmt: skip
@_option(
    "--timeout", ServeOptions.timeout_s, "Seconds until the server must have generated a first token.", metavar="S"
)
@click.option(
    "--replace",
    "replaces",
    is_flag=True,
    help="Take the place of the server that runs, on its ports; it goes on until this one has generated.",
)
@click.option("--detach", is_flag=True, help="Return when it is ready; end it with tkit stop.")
@click.option("--render", type=click.Choice(RENDER_TARGETS),
              help="Write and print the launch of NVIDIA's container, instead of serving.")  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="With --render: directory.  [default: deploy/ENGINE]"
)
@output_options
def command(
    output: Output,
    engine: str | None,
    detach: bool,
    replaces: bool,
    timeout: float,
    render: str | None,
    out: Path | None,
    **options: Any,
) -> None:
    """Serve ENGINE with Triton Inference Server until Ctrl-C.

    ENGINE is a directory or a name under engines/; default: the newest engine. The model is called `ensemble` and takes
    the requests of TensorRT-LLM's own Triton models; in front of it stands an OpenAI-compatible API.
    """
    from tkit.stages.engines import find_engine
    from tkit.stages.serve import serve, serve_detached

    if render is None and out is not None:
        raise click.UsageError("--out goes with --render")
    if render is not None and (detach or replaces):
        raise click.UsageError(f"--render starts nothing; leave out {'--detach' if detach else '--replace'}")
    serve_options = ServeOptions(timeout_s=timeout, **options)
    engine_dir = find_engine(engine)
    if render is not None:
        from tkit.stages.render import render_docker

        launch = render_docker(engine_dir, serve_options, out)
        output.record(launch, launch.text())
        return
    if detach:
        record = serve_detached(engine_dir, serve_options, replaces=replaces, progress=output)
        output.record(record, _summary(record, is_detached=True))
        return

    def announce(record: ServerRecord) -> None:
        output.record(record, _summary(record, is_detached=False))

    serve(engine_dir, serve_options, announce, replaces=replaces, progress=output)
    output.note("the server was stopped")


def _summary(record: ServerRecord, is_detached: bool) -> str:
    url = f"http://{record.host}:{record.http_port}/v2/models/{MODEL_NAME}"
    end = f"tkit stop {Path(record.engine).name}" if is_detached else "Ctrl-C"
    return "\n".join(
        (
            f"serving {record.engine}",
            f"  HTTP     {url}/generate_stream",
            f"  gRPC     {record.host}:{record.grpc_port}",
            f"  OpenAI   http://{record.host}:{record.openai_port}/v1",
            f"  metrics  http://{record.host}:{record.metrics_port}/metrics",
            f"  log      {record.log}",
            f"""  try      curl -s {url}/generate -d '{{"text_input": "Hello", "max_tokens": 16}}'""",
            f"  end      {end}",
        )
    )
