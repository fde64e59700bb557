"""`tkit validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tkit.cli.output import FiniteFloat, Output, output_options
from tkit.specs.device import DEVICES

if TYPE_CHECKING:  # a command imports what it needs when it runs
    from tkit.stages.validate import ValidationRecord


@click.command("validate")
@click.argument("engine", required=False)
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Model directory to compare with.  [default: from the card]",
)
@click.option(
    "--text", type=click.Path(path_type=Path), metavar="FILE", help="Held-out text.  [default: ships with tkit]"
)
@click.option(
    "--windows", type=click.IntRange(min=1), metavar="N", default=16, show_default=True, help="Windows of 512 tokens."
)
@click.option(
    "--max-kl",
    type=FiniteFloat(min=0),
    metavar="X",
    help="Exit 3 when the mean KL divergence, in nats per token, is larger.",
)
@click.option(
    "--max-ppl-ratio",
    type=FiniteFloat(min=0),
    metavar="X",
    help="Exit 3 when perplexity / source perplexity is larger.",
)
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="auto",
    show_default=True,
    help="Where both models run.",
)
@output_options
def command(
    output: Output,
    engine: str | None,
    source: Path | None,
    text: Path | None,
    windows: int,
    max_kl: float | None,
    max_ppl_ratio: float | None,
    device: str,
) -> None:
    """Run ENGINE (default: the newest) against its source model on held-out text.

    ENGINE may also be the directory of any TensorRT-LLM or Hugging Face checkpoint, quantized or not; --source then names
    the model to compare with.
    """
    from tkit.stages.engines import find_checkpoint
    from tkit.stages.validate import check_gates, validate

    record = validate(find_checkpoint(engine), output, source=source, text=text, num_windows=windows, device=device)
    output.record(record, _text(record))
    check_gates(record, max_kl=max_kl, max_ppl_ratio=max_ppl_ratio)


WORST_LAYERS = 3


def _text(record: ValidationRecord) -> str:
    lines = [
        f"{record.engine}: perplexity {record.ppl:.3f} (source {record.ppl_source:.3f}, ratio {record.ppl_ratio:.4f}), "
        f"KL {record.kl:.2e} nats/token, top-1 agreement {record.top1:.2%} over {record.tokens} tokens"
    ]
    ranked = sorted((snr, layer) for layer, snr in enumerate(record.layer_snr_db) if snr is not None)
    if ranked:
        worst = ", ".join(f"layer {layer} {snr:.1f} dB" for snr, layer in ranked[:WORST_LAYERS])
        lines.append(f"least signal to noise: {worst}")
    for sample in record.samples:
        lines += [
            f"prompt: {_one_line(sample.prompt)}",
            f"  source: {_one_line(sample.source)}",
            f"  engine: {_one_line(sample.engine)}"
            + ("" if sample.same_tokens == sample.tokens else f"  (differs from token {sample.same_tokens + 1})"),
        ]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())
