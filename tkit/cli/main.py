"""The `tkit` command. A table of names, so that `tkit --help` imports nothing but click."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Any

import click

from tkit import __version__
from tkit.errors import TkitError, did_you_mean

# name -> (module with a click command named `command`, help line)
COMMANDS = {
    "plan":     ("tkit.cli.plan",     "Predict memory, layout, speed and cost before building."),
    "build":    ("tkit.cli.build",    "Convert and quantize a Hugging Face checkpoint into an engine directory."),
    "validate": ("tkit.cli.validate", "Run a built engine against its source: perplexity, KL divergence, top-1 agreement."),
    "inspect":  ("tkit.cli.inspect",  "Show what is in an engine: its card, sizes, tensors."),
    "verify":   ("tkit.cli.verify",   "Hash an engine again, and check that TensorRT-LLM would load it."),
    "serve":    ("tkit.cli.serve",    "Serve an engine with Triton Inference Server."),
    "status":   ("tkit.cli.status",   "Show the servers that run: ports, health, requests."),
    "stop":     ("tkit.cli.stop",     "Stop a running server."),
    "sweep":    ("tkit.cli.sweep",    "Measure latency and throughput of a running server."),
    "import":   ("tkit.cli.import_",  "Make a run of another load generator's results."),
    "report":   ("tkit.cli.report",   "Compare sweeps in one report."),
    "doctor":   ("tkit.cli.doctor",   "Say what this machine can do, and how to mend what it cannot."),
    "run":      ("tkit.cli.run",      "Build, validate, serve, sweep and report every engine of a recipe."),
}  # fmt: skip


class _CommandTable(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(COMMANDS[name][0]).command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS:
            ctx.fail(f'no such command "{args[0]}"{did_you_mean(args[0], COMMANDS)}')
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TkitError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except ModuleNotFoundError as error:  # of the base install, which lacks what the extras bring
            package = (error.name or "tkit").partition(".")[0]
            if package == "tkit":
                raise
            click.echo(f"error: {package} is not installed, which tkit {ctx.invoked_subcommand} needs", err=True)
            click.echo("hint: pip install 'tkit[convert]', or 'tkit[all]' to serve as well", err=True)
            ctx.exit(TkitError.exit_code)
        except BrokenPipeError:  # `| head` has seen enough; click ends quietly
            raise
        except OSError as error:  # a full disk, a directory that is read-only: no stage knows more about it
            what = f"{error.filename}: " if error.filename is not None else ""
            click.echo(f"error: {what}{error.strerror or error}", err=True)
            ctx.exit(TkitError.exit_code)


@click.group(cls=_CommandTable, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="tkit")
def cli() -> None:
    """From a Hugging Face checkpoint to a proven TensorRT-LLM deployment.

    \b
    tkit build --tp 2 --quant int4_awq    convert and quantize the demo model
    tkit serve                            serve the newest engine (another terminal, or --detach)
    tkit sweep                            measure it
    tkit report                           compare what was measured
    """


def main() -> None:
    """Entry point of the `tkit` script. Ctrl-C exits 130, SIGTERM 143, a closed terminal 129: all after `finally` blocks."""
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup's wish
        signal.signal(signal.SIGHUP, _terminated)
    try:
        sys.exit(cli.main(standalone_mode=False))  # the code that ctx.exit() was given
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(128 + signal.SIGINT)


def _terminated(signum: int, frame: Any) -> None:
    sys.exit(128 + signum)
