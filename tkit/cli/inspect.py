"""`tkit inspect`."""

from __future__ import annotations

import io
import itertools
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from tkit.cli.output import Output, is_terminal, output_options
from tkit.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from tkit.specs.engine import EngineCard
    from tkit.stages.inspect import CheckpointFacts, FileFacts, InspectionRecord, TensorFacts

LEAST_WIDTH = 80  # a narrower terminal folds lines, which loses nothing; a narrower table loses columns
_LAYER = re.compile(r"(?<=\.layers\.)\d+|(?<=\.h\.)\d+")


@click.command("inspect")
@click.argument("engine", required=False)
@click.option("--tensors", is_flag=True, help="List every tensor of every file, not one line for all layers.")
@output_options
def command(output: Output, engine: str | None, tensors: bool) -> None:
    """Show what is in ENGINE (default: the newest): its card, the size of each part, its tensors.

    ENGINE may also be the directory of a Hugging Face or TensorRT-LLM checkpoint, whoever wrote it. Layers of equal dtype
    and shape share a line, and files with the same tensors a table.
    """
    from tkit.stages.engines import find_checkpoint
    from tkit.stages.inspect import inspect

    record = inspect(find_checkpoint(engine))
    tables = [
        _Table(record.path, ("", ""), list(_facts(record))),
        _size_table(record),
        *_tensor_tables(record, is_grouped=not tensors),
    ]
    output.record(record, "\n\n".join(map(_drawn if is_terminal(sys.stdout) else _plain, tables)))


@dataclass(frozen=True)
class _Table:
    title: str
    columns: Sequence[str]  # a leading ">" = aligned right; all empty = no header
    rows: Sequence[Sequence[str]]


def _facts(record: InspectionRecord) -> Iterator[tuple[str, str]]:
    if record.card is not None:
        yield from _card_facts(record.card)
    if record.checkpoint is not None:
        yield from _checkpoint_facts(record.checkpoint)
        yield "weights", format_bytes(sum(record.kinds.values()))


def _checkpoint_facts(checkpoint: CheckpointFacts) -> Iterator[tuple[str, str]]:
    yield "format", f"{checkpoint.format} checkpoint, no engine card"
    yield "architecture", checkpoint.architecture
    yield "dtype", checkpoint.dtype
    yield "quantization", checkpoint.quantization
    if checkpoint.format == "TensorRT-LLM":
        yield "layout", _layout(checkpoint.tp_size, checkpoint.pp_size)
    yield "layers", str(checkpoint.num_layers)
    yield "parameters", f"{checkpoint.num_params / 1e6:,.1f} M"
    yield "context", f"{checkpoint.max_position_embeddings} tokens"
    yield "vocabulary", f"{checkpoint.vocab_size} tokens"


def _layout(tp_size: int, pp_size: int) -> str:
    num_gpus = tp_size * pp_size
    return f"tp {tp_size}, pp {pp_size}: {num_gpus} GPU{'s' * (num_gpus > 1)}"


def _card_facts(card: EngineCard) -> list[tuple[str, str]]:
    revision = f" @ {card.source['revision']}" if card.source.get("revision") else ""
    return [
        ("architecture", card.architecture),
        ("dtype", card.dtype),
        ("quantization", f"{card.quant} ({card.quant_algo})" if card.quant_algo else card.quant),
        ("KV cache", card.recipe.get("kv_cache", "auto").replace("auto", card.dtype)),
        ("layout", _layout(card.tp_size, card.pp_size)),
        ("parameters", f"{card.num_params / 1e6:,.1f} M"),
        ("weights", format_bytes(card.weight_bytes)),
        ("context", f"{card.max_position_embeddings} tokens"),
        ("vocabulary", f"{card.vocab_size} tokens"),
        ("backend", card.backend),
        ("source", f"{card.source.get('model', 'unknown')}{revision}"),
        ("built", f"{card.created}{_cost(card.build)}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in card.versions.items())),
        ("command", card.command),
        ("key", card.key),
        *(("note", note) for note in card.notes),
    ]


def _cost(build: object) -> str:
    facts = build if isinstance(build, dict) else {}
    parts = [format_seconds(facts["seconds"])] if "seconds" in facts else []
    parts += [f"peak memory {format_bytes(facts['peak_memory_bytes'])}"] if "peak_memory_bytes" in facts else []
    gpu_peak = facts.get("peak_gpu_memory_bytes")
    parts += [f"of the GPU {format_bytes(gpu_peak)}"] if gpu_peak else []
    return f" in {', '.join(parts)}" if parts else ""


def _size_table(record: InspectionRecord) -> _Table:
    kinds = [kind for kind, num_bytes in record.kinds.items() if num_bytes]
    rows = [
        (_short_name(file), *(format_bytes(file.kinds[kind]) for kind in kinds), format_bytes(file.bytes))
        for file in record.files
    ]
    total = sum(file.bytes for file in record.files)
    if len(rows) > 1:
        rows.append(("all", *(format_bytes(record.kinds[kind]) for kind in kinds), format_bytes(total)))
    return _Table("sizes", ("file", *(f">{kind}" for kind in kinds), ">file size"), rows)


def _short_name(file: FileFacts) -> str:
    return file.name.removeprefix("checkpoint/").removesuffix(".safetensors")


def _tensor_tables(record: InspectionRecord, is_grouped: bool) -> Iterator[_Table]:
    """One table for all files that hold the same lines."""
    names: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for file in record.files:
        names.setdefault(tuple(_tensor_rows(file, is_grouped)), []).append(_short_name(file))
    columns = ("tensor", "dtype", ">shape", ">count", ">bytes")
    for rows, files in names.items():
        title = f"tensors of {files[0]}" if len(files) == 1 else f"tensors of each of {', '.join(files)}"
        yield _Table(title, columns, rows)


def _tensor_rows(file: FileFacts, is_grouped: bool) -> Iterator[tuple[str, ...]]:
    groups: dict[tuple[str, str, tuple[int, ...]], list[TensorFacts]] = {}
    for tensor in file.tensors:
        name = _LAYER.sub("*", tensor.name) if is_grouped else tensor.name
        groups.setdefault((name, tensor.dtype, tensor.shape), []).append(tensor)
    for (name, dtype, shape), tensors in groups.items():
        layers = _ranges(int(match[0]) for tensor in tensors if (match := _LAYER.search(tensor.name)))
        size = sum(tensor.bytes for tensor in tensors)
        shown = name.replace("*", layers, 1) if is_grouped else name
        yield shown, dtype, " x ".join(map(str, shape)) or "scalar", str(len(tensors)), format_bytes(size)


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 -> `0-2,5`."""
    parts = []
    for _, run in itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        parts.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
    return ",".join(parts)


def _plain(table: _Table) -> str:
    """Columns of spaces, for pipes and files."""
    header = [[column.removeprefix(">") for column in table.columns]] if any(table.columns) else []
    rows = [*header, *table.rows]
    widths = [max(len(row[index]) for row in rows) for index in range(len(table.columns))]
    lines = [table.title]
    for row in rows:
        cells = [
            cell.rjust(width) if column.startswith(">") else cell.ljust(width)
            for cell, width, column in zip(row, widths, table.columns, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _drawn(table: _Table) -> str:
    """The same on a terminal: as wide as it is, in colour unless NO_COLOR is set."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(table.title, style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0),
                  pad_edge=False, header_style="underline", show_header=any(table.columns))  # fmt: skip
    for index, column in enumerate(table.columns):
        is_number = column.startswith(">")
        longest = max((len(row[index]) for row in table.rows), default=0)
        drawn.add_column(column.removeprefix(">"), justify="right" if is_number else "left", no_wrap=is_number,
                         overflow="fold", min_width=min(longest, 12))  # fmt: skip
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    text = io.StringIO()
    Console(file=text, force_terminal=True, width=max(shutil.get_terminal_size().columns, LEAST_WIDTH)).print(drawn)
    return text.getvalue().rstrip("\n")
