"""The card of an engine: everything a later stage, or a reader next year, needs to know about the directory it lies in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tkit.errors import InputError

CARD_FILE = "engine.json"
CARD_SCHEMA = "tkit.engine/1"


@dataclass(frozen=True, kw_only=True)
class EngineCard:
    """`engine.json`. Written last, so its presence means the directory is complete.

    `files` maps each path inside the directory to {"bytes", "sha256"}; the card itself is not in it.
    `build` holds what the build took (docs/files.md); `tkit validate` writes the quality into a file of its own.
    """

    schema: str = CARD_SCHEMA
    name: str
    key: str  # sha256 over recipe, source digests and tkit version: equal key, equal engine
    created: str  # UTC, ISO 8601
    backend: str
    architecture: str
    dtype: str
    quant: str
    quant_algo: str | None
    tp_size: int
    pp_size: int
    num_params: int
    weight_bytes: int  # of all weight files, those of both checkpoints where both were written
    max_position_embeddings: int
    vocab_size: int
    recipe: Mapping[str, Any]
    source: Mapping[str, Any]  # {"model", "path", "revision", "quantized", "files": {name: {"bytes", "sha256"}}}
    files: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    command: str
    build: Mapping[str, Any]
    # of an engine that trtllm-build made: {"sm", "gpu", "num_gpus", "version", "max_batch_size", ..., "arguments"}
    compiled: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        problems = [
            f"files: {name}: expected its bytes and its sha256"
            for name, facts in self.files.items()
            if not isinstance(facts.get("bytes"), int) or not isinstance(facts.get("sha256"), str)
        ]
        if problems:
            raise InputError("impossible card", problems=problems)
