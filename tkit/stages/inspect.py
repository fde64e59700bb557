"""Inspect: what is in an engine or in a checkpoint. Reads cards, configs and the headers of weight files, no data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tkit.architectures.config import parallel_from_trtllm, spec_from_hf, spec_from_trtllm
from tkit.architectures.moves import count_params, plan_moves
from tkit.architectures.source_formats import source_format
from tkit.checkpoints.reader import TensorEntry, check_model_files, open_source, read_config, read_header
from tkit.errors import InputError
from tkit.files import read_json
from tkit.specs.engine import EngineCard
from tkit.specs.model import ModelSpec
from tkit.specs.parallel import Parallel
from tkit.specs.precision import Precision
from tkit.stages.engines import is_engine, read_card

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
class CheckpointFacts:
    """A checkpoint without a card, by its own config."""

    format: str  # Hugging Face | TensorRT-LLM
    architecture: str
    dtype: str
    quantization: str
    tp_size: int
    pp_size: int
    num_layers: int
    num_params: int
    max_position_embeddings: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class InspectionRecord:
    """`card` of an engine, `checkpoint` of anything else; the other one is None."""

    schema: str = INSPECTION_SCHEMA
    path: str
    card: EngineCard | None
    checkpoint: CheckpointFacts | None = None
    kinds: Mapping[str, int]
    files: tuple[FileFacts, ...]


def inspect(directory: Path) -> InspectionRecord:
    """An engine, or a checkpoint of Hugging Face's or TensorRT-LLM's. Raises InputError listing every weight file that is
    missing or has no readable header."""
    card, checkpoint = None, None
    if is_engine(directory):
        card = read_card(directory)
        names = list(filter(_is_weight_file, card.files))
    elif (directory / "rank0.safetensors").exists():
        checkpoint, names = _trtllm_checkpoint(directory)
    else:
        checkpoint, names = _hf_checkpoint(directory)
    files, problems = [], []
    for name in sorted(names, key=_natural_order):
        try:
            files.append(_file_facts(name, directory / name))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError(f"{directory}: unreadable weights", problems=problems, hint="tkit verify checks every file")
    return InspectionRecord(
        path=str(directory), card=card, checkpoint=checkpoint, kinds=_summed(files), files=tuple(files)
    )


def _hf_checkpoint(directory: Path) -> tuple[CheckpointFacts, list[str]]:
    check_model_files(directory, ["config.json"])
    config, path = read_config(directory), str(directory / "config.json")
    spec = spec_from_hf(config, path)
    with open_source(directory) as files:
        quantization = source_format(config, files.entries.keys(), path)
        names = [file.name for file in files.files]
    return _checkpoint("Hugging Face", spec, str(quantization or "none"), Parallel()), names


def _trtllm_checkpoint(directory: Path) -> tuple[CheckpointFacts, list[str]]:
    path = directory / "config.json"
    config = read_json(path)
    try:
        spec, parallel = spec_from_trtllm(config), parallel_from_trtllm(config)
        quantization = config["quantization"]["quant_algo"] or "none"
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not a TensorRT-LLM config: {error!r}", hint=f"tkit verify {directory}") from error
    names = [f"rank{rank}.safetensors" for rank in range(parallel.world_size)]
    return _checkpoint("TensorRT-LLM", spec, quantization, parallel), names


def _checkpoint(format: str, spec: ModelSpec, quantization: str, parallel: Parallel) -> CheckpointFacts:
    return CheckpointFacts(
        format=format,
        architecture=spec.architecture,
        dtype=spec.dtype,
        quantization=quantization,
        tp_size=parallel.tp_size,
        pp_size=parallel.pp_size,
        num_layers=spec.num_layers,
        num_params=count_params(plan_moves(spec, Precision.of("none"), Parallel())),
        max_position_embeddings=spec.max_position_embeddings,
        vocab_size=spec.vocab_size,
    )


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
