"""Verify: is an engine still what was built, and would TensorRT-LLM load it? Hashes every file, then simulates the load."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tkit.checkpoints.load_simulation.load import simulate_load
from tkit.errors import InputError, TkitError
from tkit.specs.engine import EngineCard
from tkit.specs.progress import Progress
from tkit.stages.engines import is_engine, read_card, verify_files

VERIFICATION_SCHEMA = "tkit.verification/1"
_CHECKPOINT = "checkpoint"  # the TensorRT-LLM checkpoint's directory within an engine


@dataclass(frozen=True, kw_only=True)
class VerificationRecord:
    """`changed` lists files that are not as built, `refused` what TensorRT-LLM's loader would not take: None where there
    is no checkpoint for it. `key` is None for a checkpoint without a card, of which nobody knows what it was."""

    schema: str = VERIFICATION_SCHEMA
    engine: str
    path: str
    key: str | None
    command: str | None = None  # builds it again
    files: int
    bytes: int
    world_size: int
    seconds: float
    changed: tuple[str, ...]
    refused: tuple[str, ...] | None


def verify(engine_dir: Path, progress: Progress) -> VerificationRecord:
    """Reads every byte of the engine once. Raises only when there is neither a card nor a checkpoint to verify."""
    if not is_engine(engine_dir):
        return _verify_checkpoint(engine_dir)
    started = time.monotonic()
    card = read_card(engine_dir)
    changed = [*_changed_files(engine_dir, card, progress), *_unlisted_files(engine_dir, card)]
    has_checkpoint = any(PurePosixPath(name).parts[0] == _CHECKPOINT for name in card.files)
    return VerificationRecord(
        engine=card.name,
        path=str(engine_dir),
        key=card.key,
        command=card.command,
        files=len(card.files),
        bytes=sum(facts["bytes"] for facts in card.files.values()),
        world_size=card.tp_size * card.pp_size,
        seconds=round(time.monotonic() - started, 3),
        changed=tuple(changed),
        refused=tuple(simulate_load(engine_dir / _CHECKPOINT)) if has_checkpoint else None,
    )


def _verify_checkpoint(directory: Path) -> VerificationRecord:
    started = time.monotonic()
    ranks = sorted(directory.glob("rank*.safetensors"))
    if not ranks:
        raise InputError(f"{directory}: neither an engine nor a TensorRT-LLM checkpoint, it holds no rank0.safetensors")
    return VerificationRecord(
        engine=directory.name,
        path=str(directory),
        key=None,
        files=len(ranks),
        bytes=sum(path.stat().st_size for path in ranks),
        world_size=len(ranks),
        seconds=round(time.monotonic() - started, 3),
        changed=(),
        refused=tuple(simulate_load(directory)),
    )


def check_verified(record: VerificationRecord) -> None:
    """Raises with the whole list: InputError when files changed, TkitError when what was built would not load."""
    refused = [f"TensorRT-LLM would not load it: {problem}" for problem in record.refused or ()]
    if record.changed:
        raise InputError(
            f"{record.path}: not as built",
            problems=[*record.changed, *refused],
            hint=f"rebuild the engine: {record.command} --force",
        )
    if refused and record.key is None:
        raise TkitError(
            f"{record.path}: TensorRT-LLM would not load it, or take it for another model",
            problems=record.refused or (),
        )
    if refused:
        raise TkitError(
            f"{record.path}: as built, but TensorRT-LLM would not load it",
            problems=record.refused or (),
            hint=f"rebuild it with this tkit: {record.command} --force",
        )


def _changed_files(engine_dir: Path, card: EngineCard, progress: Progress) -> tuple[str, ...]:
    try:
        verify_files(engine_dir, card, progress)
    except InputError as error:
        return error.problems
    return ()


def _unlisted_files(engine_dir: Path, card: EngineCard) -> list[str]:
    """Strangers in the directories that the build filled; what tkit adds later lies beside the card."""
    directories = {PurePosixPath(name).parts[0] for name in card.files if len(PurePosixPath(name).parts) > 1}
    found = [
        path.relative_to(engine_dir).as_posix()
        for directory in sorted(directories)
        for path in sorted((engine_dir / directory).rglob("*"))
        if not path.is_dir()
    ]
    return [f"{name}: not in the card" for name in found if name not in card.files]
