"""`tkit build`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from tkit.cli.output import Output, output_options
from tkit.cli.sections import SectionedCommand
from tkit.specs.device import DEVICES
from tkit.specs.quantization import QUANT_FORMATS
from tkit.specs.recipe import BACKENDS, FORMATS, GOALS, RUNTIME_FIELDS, EngineRecipe
from tkit.units import format_bytes, format_seconds

SECTIONS = {
    "Layout": "tp_size pp_size moe_ep_size",
    "Quantization": "quant quant_overrides exclude kv_cache calib calib_samples calib_len seed device",
    "What will run it": "format backend goal max_batch_size max_num_tokens max_seq_len gpu",
    "Sources": "allow_pickle allow_zeros",
}


@click.command("build", cls=SectionedCommand, sections=SECTIONS)
@click.argument("model", required=False)
@click.option(
    "--tp", "tp_size", type=click.IntRange(min=1), metavar="N", help="Tensor-parallel size, in GPUs.  [default: 1]"
)
@click.option("--moe-ep", "moe_ep_size", type=click.IntRange(min=1), metavar="N",
              help="Of the tp ranks, how many hold different experts.  [default: 1]")  # fmt: skip
@click.option(
    "--pp", "pp_size", type=click.IntRange(min=1), metavar="N", help="Pipeline-parallel size, in GPUs.  [default: 1]"
)
@click.option("--quant", metavar="QUANT", help=f"{', '.join(QUANT_FORMATS)}.  [default: none]")
@click.option("--quant-override", "quant_overrides", multiple=True, metavar="PATTERN=QUANT",
              help="Another quantization for some modules: '*.attention.*=int8'. The first match counts.")  # fmt: skip
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Modules that stay in 16 bits: 'layers.0.*'.")
@click.option("--kv-cache", type=click.Choice(["auto", "fp8", "int8"]),
              help="Keys and values in 8 bits, with calibrated scales; auto: 16 bits.  [default: auto]")  # fmt: skip
@click.option(
    "--format",
    type=click.Choice(FORMATS),
    help="TensorRT-LLM checkpoint, unified Hugging Face checkpoint, or both.  [default: trtllm]",
)
@click.option(
    "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What will run the engine."
)
@click.option(
    "--goal", type=click.Choice(GOALS), help="What it is tuned for; tensorrt and pytorch.  [default: throughput]"
)
@click.option("--max-batch-size", type=click.IntRange(min=1), metavar="N",
              help="Requests that run at once; tensorrt and pytorch.  [default: 512, latency: 16]")  # fmt: skip
@click.option("--max-num-tokens", type=click.IntRange(min=1), metavar="N",
              help="Tokens of one step over all requests; tensorrt and pytorch.  [default: 8192]")  # fmt: skip
@click.option("--max-seq-len", type=click.IntRange(min=2), metavar="N",
              help="Prompt and answer of one request; tensorrt and pytorch.  [default: the model's own limit]")  # fmt: skip
@click.option(
    "--gpu", metavar="NAME", help="With --dry-run: compile for this GPU, such as H100.  [default: this machine's]"
)
@click.option(
    "--calib", type=click.Path(), metavar="FILE", help="Calibration text, .txt or .jsonl.  [default: ships with tkit]"
)
@click.option("--calib-samples", type=click.IntRange(min=1), metavar="N", help="Calibration samples.  [default: 16]")
@click.option(
    "--calib-len", type=click.IntRange(min=1), metavar="N", help="Tokens per calibration sample.  [default: 256]"
)
@click.option("--seed", type=int, metavar="N", help="Seed of the calibration windows.  [default: 0]")
@click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True,
              help="Where calibration runs; CUDA_VISIBLE_DEVICES says on which GPU.")  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(1, 256), metavar="N", help="Threads that hash and write.  [default: one per core]"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    default="engines",
    show_default=True,
    help="Engines directory.",
)
@click.option(
    "--name", metavar="NAME", help="Engine name.  [default: made from model, quantization, layout and inputs]"
)
@click.option("--force", is_flag=True, help="Build again even when the engine exists.")
@click.option("--allow-zeros", is_flag=True, help="Build although a weight matrix is all zeros.")
@click.option("--allow-pickle", is_flag=True,
              help="Read pytorch_model*.bin where there are no safetensors; only its tensors are loaded.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print what would be written, and stop.")
@output_options
def command(
    output: Output,
    model: str | None,
    backend: str,
    device: str,
    workers: int | None,
    out: Path,
    force: bool,
    allow_zeros: bool,
    allow_pickle: bool,
    dry_run: bool,
    gpu: str | None,
    quant_overrides: tuple[str, ...],
    exclude: tuple[str, ...],
    **overrides: object,
) -> None:
    """Convert and quantize MODEL into an engine directory, and compile it where there is a GPU with TensorRT-LLM.

    MODEL is a directory, a Hugging Face hub id, or the name of a recipe in model_configs/; the demo model when left out.
    An engine directory is compiled for this machine. Options that are not given come from the recipe's first engine. The
    last line of stdout is the engine's path.
    """
    from tkit.backends.nvidia import this_machine
    from tkit.errors import InputError
    from tkit.files import from_mapping
    from tkit.stages.backends import build_engine, find_checkpoint_engine, plan_engine, plan_from_engine
    from tkit.stages.compile import named_target
    from tkit.stages.models import fetch_model, find_recipe

    given = {key: value for key, value in overrides.items() if value is not None}
    if exclude:
        given["exclude"] = exclude
    if quant_overrides:
        given["quant_overrides"] = _pairs(quant_overrides)
    if gpu is not None and not dry_run:
        raise InputError("--gpu: an engine is compiled on the GPU it is for", hint="add --dry-run to see the command")
    machine = this_machine()
    target = named_target(gpu, machine) if gpu is not None else None
    if engine_dir := find_checkpoint_engine(model):
        plan = plan_from_engine(engine_dir, given, machine, backend=backend, target=target)
    else:
        name, recipe = find_recipe(model)
        engine_recipe = from_mapping(EngineRecipe, {**dataclasses.asdict(recipe.engines[0]), **given}, "tkit build")
        source = fetch_model(recipe, name, allow_pickle=allow_pickle)
        plan = plan_engine(
            source, engine_recipe, output, machine, backend=backend, target=target, allow_pickle=allow_pickle
        )
    output.note(f"backend {plan.backend}: {plan.reason}")
    ignored = [f"--{name.replace('_', '-')}" for name in RUNTIME_FIELDS if name in given]
    if ignored and plan.backend == "reference":
        output.note(f"{', '.join(ignored)}: not of a reference engine; say so again when it is compiled")
    if dry_run:
        output.record(plan.record(), plan.summary())
        return
    directory, card, existed = build_engine(
        plan, output, machine, out=out, device=device, workers=workers, force=force, allow_zeros=allow_zeros
    )
    if existed:
        text = f"{card.name} exists, built from the same inputs"
    else:
        seconds, peak = card.build["seconds"], card.build["peak_memory_bytes"]
        gpu_peak = card.build.get("peak_gpu_memory_bytes")
        ratio = card.weight_bytes / sum(
            f["bytes"] for n, f in card.source["files"].items() if n.endswith((".safetensors", ".bin"))
        )
        carried = f"carried over from {card.source['quantized']}, " if card.source["quantized"] else ""
        text = (
            f"{card.name}: {format_bytes(card.weight_bytes)} of weights ({ratio:.2f} x the source), "
            f"{card.num_params / 1e6:.1f} M parameters, {card.quant_algo or card.dtype}, "
            f"{carried}tp {card.tp_size} pp {card.pp_size}, {format_seconds(seconds)}, peak memory {format_bytes(peak)}"
            + (f", of the GPU {format_bytes(gpu_peak)}" if gpu_peak else "")
        )
    output.record(card, text, last_line=str(directory))


def _pairs(overrides: tuple[str, ...]) -> dict[str, str]:
    from tkit.errors import InputError

    problems = [f'"{override}"' for override in overrides if not all(override.rpartition("="))]
    if problems:
        raise InputError("--quant-override: expected PATTERN=QUANT, found", problems=problems)
    return {pattern: quant for pattern, _, quant in (override.rpartition("=") for override in overrides)}
