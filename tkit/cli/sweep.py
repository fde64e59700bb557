"""`tkit sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tkit.cli.output import Output, output_options, reports_option
from tkit.cli.sections import SectionedCommand

if TYPE_CHECKING:
    from tkit.specs.recipe import SweepRecipe
    from tkit.specs.record import FoundMax, SloStep
    from tkit.stages.sweep import SweepRecord


class _Words(click.ParamType):
    """`128/64,1024/1024` -> ("128/64", "1024/1024")."""

    name = "list"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return tuple(word.strip() for word in str(value).split(",") if word.strip())


class _Numbers(_Words):
    """`1,4,16` -> (1, 4, 16)."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:  # type: ignore[override]
        words = super().convert(value, param, ctx)
        try:
            return tuple(int(word) for word in words)
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers like 1,4,16", param, ctx)


class _Rates(_Words):
    """`0.5,2` -> (0.5, 2.0)."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:  # type: ignore[override]
        words = super().convert(value, param, ctx)
        try:
            return tuple(float(word) for word in words)
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers like 0.5,2,4", param, ctx)


class _Workers(click.ParamType):
    """`4` -> 4; `auto` -> None, as if nothing had been given."""

    name = "workers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "auto":
            return None
        if not str(value).isdecimal():
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)
        return int(str(value))


SECTIONS = {
    "Server": "url protocol model api_key_file tokenizer engine metrics_url num_gpus",
    "Requests": "shapes isl_chars prefix_shares spread dataset seed",
    "Load": "concurrency rates arrivals max_outstanding find_max slo_share",
    "How long": "requests duration_s repeats timeout_s reconnect_s",
    "Client": "num_workers calibrate",
}


@click.command("sweep", cls=SectionedCommand, sections=SECTIONS)
@click.argument("profile", required=False)
@click.option("--url", metavar="HOST:PORT", help="Server to measure.  [default: the newest that tkit serve started]")
@click.option("--protocol", metavar="NAME",
              help="triton-grpc, triton-http, or openai, openai-chat: streamed completions or chat of any server that "
              "speaks it, at HOST:PORT or https://HOST/v1; hf-generate: no server, but static batches of the "
              "engine's source model through transformers' generate.  [default: triton-grpc]")  # fmt: skip
@click.option("--model", metavar="NAME", help="Served model's name.  [default: ensemble; openai: the only one served]")
@click.option("--api-key-file", type=click.Path(path_type=Path), metavar="FILE",
              help="File with the key that openai is sent.  [default: none]")  # fmt: skip
@click.option("--shape", "shapes", type=_Words(), metavar="ISL/OSL[,..]",
              help="Input/output tokens.  [default: profile]")  # fmt: skip
@click.option("--isl-chars", is_flag=True, default=None,
              help="The inputs of --shape are characters: no tokenizer is needed.")  # fmt: skip
@click.option("--prefix-share", "prefix_shares", type=_Rates(), metavar="P[,..]",
              help="Share of the input, from its beginning, that all requests have in common.  [default: 0]")  # fmt: skip
@click.option("--spread", type=float, metavar="S",
              help="Draw lengths from S times those of --shape up to them.  [default: 1]")  # fmt: skip
@click.option("--dataset", type=click.Path(), metavar="FILE",
              help="Requests from a file instead of --shape: conversations (ShareGPT) or a trace (Mooncake).")  # fmt: skip
@click.option("--concurrency", type=_Numbers(), metavar="C[,..]", help="Streams at a time.  [default: profile]")
@click.option("--rate", "rates", type=_Rates(), metavar="R[,..]",
              help="Open loop: requests per second, sent when they are due.  [default: profile]")  # fmt: skip
@click.option("--arrivals", metavar="PROCESS",
              help="poisson, constant, gamma:CV, ramp, or trace (the data set's times).  [default: poisson]")  # fmt: skip
@click.option("--max-outstanding", type=int, metavar="N",
              help="Requests in flight at most in open loop; a point that reaches it is invalid.  [default: 512]")  # fmt: skip
@click.option("--find-max", metavar="TIER",
              help="Instead of the grid: the largest load whose requests meet interactive or conversational. Doubles and "
              "bisects --concurrency C or, in open loop, --rate R.")  # fmt: skip
@click.option("--attainment", "slo_share", type=float, metavar="SHARE",
              help="Share of the requests that must meet it.  [default: 0.99]")  # fmt: skip
@click.option("--requests", type=int, metavar="N", help="Requests measured per point.  [default: profile]")
@click.option("--duration", "duration_s", type=float, metavar="S",
              help="Seconds measured per point; with --requests: at most.  [default: profile]")  # fmt: skip
@click.option("--repeats", type=int, metavar="N", help="Times round the grid.  [default: profile]")
@click.option("--seed", type=int, metavar="N", help="Seed of the prompts.  [default: 0]")
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="DIR",
              help="Directory of the served model's tokenizer.json.  [default: the engine's]")  # fmt: skip
@click.option("--engine", metavar="DIR", help="Engine that is served, as a path or a name.  [default: from the server]")
@click.option("--label", metavar="TEXT", help="What reports call it.  [default: the engine's name, or the model's]")
@click.option("--gpus", "num_gpus", type=int, metavar="N", help="GPUs for tok/s/GPU.  [default: the engine's]")
@click.option("--metrics-url", metavar="URL",
              help="The server's Prometheus metrics, kept with the run.  [default: where such servers have them]")  # fmt: skip
@click.option("--workers", "num_workers", type=_Workers(), metavar="N",
              help="Processes that send; auto: one per 256 streams, or per as many as --calibrate saw one follow, no more "
              "than there are cores.  [default: auto]")  # fmt: skip
@click.option("--timeout", "timeout_s", type=float, metavar="S",
              help="Seconds without a message before a request counts as failed.  [default: 60]")  # fmt: skip
@click.option("--reconnect", "reconnect_s", type=float, metavar="S",
              help="Seconds to wait for a server that stopped answering, before the sweep ends.  [default: 60]")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with the newest run that was cut off, or with --name.")
@reports_option
@click.option("--name", metavar="NAME", help="Name of the run's directory.  [default: engine, profile and time]")
@click.option("--calibrate", is_flag=True,
              help="Measure this client instead, against a server whose times are known.")  # fmt: skip
@output_options
def command(output: Output, out: Path, name: str | None, resume: bool, calibrate: bool, **given: object) -> None:
    """Measure latency and throughput of a running server.

    PROFILE is quick (default; within a minute) or standard. The last line of stdout is the run's directory.
    Points whose numbers should not be believed are kept, marked invalid, with the reason.
    """
    import dataclasses
    import gc

    # What a sweep imports lives to its end: with Python's own threshold of 700, a quarter of the time to the first request
    # goes into looking for garbage among it.
    gc.set_threshold(200_000)
    if calibrate:
        _calibrate(output, out, given | {"resume": resume or None})
        return

    from tkit.specs.recipe import HF_GENERATE, SweepRecipe
    from tkit.stages.sweep import run_sweep
    from tkit.stages.target import Target

    values = {key: value for key, value in given.items() if value is not None}
    recipe_fields = {field.name for field in dataclasses.fields(SweepRecipe)}
    recipe = SweepRecipe(**{key: value for key, value in values.items() if key in recipe_fields})  # type: ignore[arg-type]
    if given["protocol"] == HF_GENERATE:
        record = _sweep_generate(output, out, name, resume, recipe, values)
        output.record(record, _table(record), last_line=record.directory)
        return
    target = Target(**{key: value for key, value in values.items() if key not in recipe_fields})  # type: ignore[arg-type]
    record = run_sweep(recipe, target, out=out, name=name, resume=resume, progress=output)
    output.record(record, _table(record), last_line=record.directory)


def _sweep_generate(
    output: Output, out: Path, name: str | None, resume: bool, recipe: SweepRecipe, values: dict[str, object]
) -> SweepRecord:
    import dataclasses

    from tkit.specs.recipe import HF_GENERATE
    from tkit.specs.recipe import SweepRecipe as Fields
    from tkit.stages.hf_generate import sweep_generate

    known = {"protocol", "engine", "label", *(field.name for field in dataclasses.fields(Fields))}
    others = [_option(key) for key in values if key not in known]
    if others:
        raise click.UsageError(f"--protocol {HF_GENERATE} has no server: leave out {', '.join(others)}")
    engine, label = (str(values[key]) if key in values else None for key in ("engine", "label"))
    return sweep_generate(recipe, engine, label=label, out=out, name=name, resume=resume, progress=output)


def _option(name: str) -> str:
    """How an argument of the command is typed."""
    return next(parameter.opts[0] for parameter in command.params if parameter.name == name)


def _calibrate(output: Output, out: Path, given: dict[str, object]) -> None:
    from tkit.stages.calibrate import run_calibration

    others = [_option(name) for name, value in given.items() if value is not None and name != "protocol"]
    if others:
        raise click.UsageError(f"--calibrate measures this client alone: leave out {', '.join(others)}")
    protocol = given["protocol"]
    record = run_calibration(out, None if protocol is None else str(protocol), progress=output)
    rows = [["protocol", "TTFT error p50", "p99", "gap error p50", "p99", "us CPU/token", "streams", "tok/s"]]
    rows += [
        [
            row.protocol,
            *(_milliseconds(row.ttft_error_ms[name], 2) for name in ("p50", "p99")),
            *(_milliseconds(row.gap_error_ms[name], 2) for name in ("p50", "p99")),
            f"{row.cpu_us_per_token:.1f}",
            "-" if row.max_streams is None else str(row.max_streams),
            "-" if row.max_tok_s is None else f"{row.max_tok_s:.0f}",
        ]
        for row in record.protocols
    ]
    limits = "\n".join(f"{row.protocol}: {row.limit}" for row in record.protocols)
    output.record(record, f"{_aligned(rows)}\n{limits}", last_line=str(out / "client.json"))


def _table(record: SweepRecord) -> str:
    """One row per point."""
    rows = [["shape", "load", "tok/s", "TTFT p50", "TPOT p50", "E2E p50", "errors", "valid"]]
    rows += [
        [
            point.shape,
            str(point.load),
            f"{point.output_tok_s:.1f}",
            *(_milliseconds(metric.p50) for metric in (point.ttft, point.tpot, point.e2e)),
            str(sum(point.errors.values())),
            "yes" if point.is_valid else "no",
        ]
        for point in record.points
    ]
    return "\n".join([_aligned(rows), *map(_found, record.found)])


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def _found(found: FoundMax) -> str:
    """`128/64 interactive: C = 12 (99.4 % of 640 requests, 95 % CI 98.4 to 99.8); C = 13 fails with 97.1 %`"""

    def share(step: SloStep) -> str:
        told = f"{step.attainment:.1%} of {step.requests} requests, 95 % CI {step.low:.1%} to {step.high:.1%}"
        return told if step.is_certain else f"{told}, so not certain"

    failing = found.first_failing
    if failing is None:
        end = "the end of the search"
    elif failing.reason is not None:
        end = f"{failing.load} was not valid: {failing.reason}"
    else:
        end = f"{failing.load} fails: {share(failing)}"
    best = f"{found.best.load} ({share(found.best)})" if found.best is not None else "no load"
    return f"{found.shape}, largest load with {found.target:.0%} {found.tier}: {best}; {end}"


def _milliseconds(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f} ms"
