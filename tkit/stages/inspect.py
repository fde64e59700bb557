"""Inspect: what is in an engine. Reads its card and the headers of its weight files, no data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tkit.checkpoints.reader import TensorEntry, read_header
from tkit.errors import InputError
from tkit.specs.engine import EngineCard
from tkit.stages.engines import read_card

INSPECTION_SCHEMA = "tkit.inspection/1"

# kind -> what names of its tensors contain; the first that matches counts, so scales and norms of a module come before it
_KINDS = {
    "scales": r"(_scaling_factor(_2)?|_scale(_2)?|\.zero|\.smoother|\.scale_to_int)$",
    "norms": r"(norm|\.ln_)",
    "lm_head": r"^lm_head\.",
    "embedding": r"(embedding|embed_tokens|\.wte|\.wpe)\.",
    "attention": r"\.(attention|self_attn|self_attention|attn)\.",
    "mlp": r"\.(mlp|block_sparse_moe)\.",
}
KINDS = ("embedding", "attention", "mlp", "norms", "scales", "lm_head", "other")


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    kind: str


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """One weight file. `bytes` is the file's, header included; `kinds` sums its tensors."""

    name: str
    bytes: int
    kinds: Mapping[str, int]
    tensors: tuple[TensorFacts, ...]


@dataclass(frozen=True, kw_only=True)
class InspectionRecord:
    schema: str = INSPECTION_SCHEMA
    path: str
    card: EngineCard
    kinds: Mapping[str, int]
    files: tuple[FileFacts, ...]


def inspect(engine_dir: Path) -> InspectionRecord:
    """Raises InputError listing every weight file that is missing or has no readable header."""
    card = read_card(engine_dir)
    files, problems = [], []
    for name in sorted(filter(_is_weight_file, card.files), key=_natural_order):
        try:
            files.append(_file_facts(name, engine_dir / name))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError(f"{engine_dir}: unreadable weights", problems=problems, hint="tkit verify checks every file")
    return InspectionRecord(path=str(engine_dir), card=card, kinds=_summed(files), files=tuple(files))


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name)), "other")


def _is_weight_file(name: str) -> bool:
    return name.endswith(".safetensors")


def _natural_order(name: str) -> list[tuple[int, str]]:
    """rank10 after rank9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _file_facts(name: str, path: Path) -> FileFacts:
    tensors = tuple(_tensor_facts(tensor, entry) for tensor, entry in read_header(path).items())
    kinds = {kind: sum(tensor.bytes for tensor in tensors if tensor.kind == kind) for kind in KINDS}
    return FileFacts(name=name, bytes=path.stat().st_size, kinds=kinds, tensors=tensors)


def _tensor_facts(name: str, entry: TensorEntry) -> TensorFacts:
    return TensorFacts(name=name, dtype=entry.dtype, shape=entry.shape, bytes=entry.num_bytes, kind=kind_of(name))


def _summed(files: list[FileFacts]) -> dict[str, int]:
    return {kind: sum(file.kinds[kind] for file in files) for kind in KINDS}
