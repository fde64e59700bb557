"""Build: a plan (`build_plan.py`) -> engine directory. Convert, write the card, rename.

A directory under `engines/` with a card is complete and is never changed again; until then the build lives in
`engines/.tmp-<key>-<pid>`, which the next build removes if this one is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil

from tkit import __version__
from tkit.architectures.unified_hf import hf_index, hf_quant_config, quantization_config
from tkit.backends.llm_api import LLM_API_FILE, llm_api_options, llm_api_yaml
from tkit.checkpoints.convert import LayerQuantizer, convert, file_layouts
from tkit.checkpoints.load_simulation.config import LAYER_CONFIG_FILE
from tkit.checkpoints.load_simulation.load import check_load
from tkit.checkpoints.reader import HF_QUANT_CONFIG, TensorFiles, file_signature
from tkit.cores import usable_cores
from tkit.errors import InputError
from tkit.files import check_writable, read_json, sha256_file, sync_directory, write_atomic, write_json
from tkit.runtime.carried import CarriedQuantizer
from tkit.specs.engine import CARD_FILE, EngineCard
from tkit.specs.model import ModelSpec
from tkit.specs.progress import Progress
from tkit.stages.build_plan import BuildPlan, build_command, open_model
from tkit.stages.engines import ENGINES_DIR, read_card
from tkit.stages.memory import peak_gpu_memory_bytes, peak_memory_bytes, reset_peak_memory
from tkit.stages.models import copy_tokenizer
from tkit.units import format_bytes


def build(
    plan: BuildPlan,
    progress: Progress,
    *,
    out: Path = ENGINES_DIR,
    device: str = "cpu",
    workers: int | None = None,
    force: bool = False,
    allow_zeros: bool = False,
) -> tuple[Path, EngineCard, bool]:
    """(engine directory, card, whether it was there already). Equal inputs give the engine that exists, unless `force`."""
    started = time.monotonic()
    target = out / plan.name
    if not force and (card := existing_engine(target, plan.key)) is not None:
        return target, card, True
    reset_peak_memory()
    check_writable(out, "choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    work = _work_directory(out, plan, progress)
    try:
        _check_disk(out, plan)
        card = _write_engine(plan, work, device, workers or usable_cores(), allow_zeros, started, progress)
        return target, publish(work, target, card, force), False
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_engine(
    plan: BuildPlan, work: Path, device: str, workers: int, allow_zeros: bool, started: float, progress: Progress
) -> EngineCard:
    journal = work / "journal.jsonl"
    copy_tokenizer(plan.source.directory, work / "tokenizer", plan.spec.vocab_size)
    device = _calibration_device(plan, device)
    quantizer = _quantizer(plan, work, device, workers)
    _write_configs(plan, work)
    convert_started = time.monotonic()
    with open_model(plan.source.directory, plan.is_pickled) as source:
        converted = convert(
            source, plan.moves, plan.spec.dtype, work, quantizer, progress,
            num_threads=workers, journal=journal, allow_zeros=allow_zeros,
        )  # fmt: skip
        notes = (*_notes(plan, source), *(quantizer.notes() if quantizer is not None else ()))
    _check_unchanged(plan)
    journal.unlink()
    convert_seconds = time.monotonic() - convert_started
    if plan.recipe.format in ("trtllm", "both"):
        check_load(work / "checkpoint")
    files = dict(converted)
    for path in sorted(path for path in work.rglob("*") if path.is_file()):
        name = str(path.relative_to(work))
        if name not in files:
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    weight_bytes = sum(int(facts["bytes"]) for facts in converted.values())
    seconds = time.monotonic() - started
    card = EngineCard(
        name=plan.name,
        key=plan.key,
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        backend=plan.backend,
        architecture=plan.spec.architecture,
        dtype=plan.spec.dtype,
        quant=plan.carried.target.name if plan.carried else plan.quant,
        quant_algo=plan.carried.target.algo if plan.carried else plan.quant_algo,
        tp_size=plan.recipe.tp_size,
        pp_size=plan.recipe.pp_size,
        num_params=plan.num_params,
        weight_bytes=weight_bytes,
        max_position_embeddings=plan.spec.max_position_embeddings,
        vocab_size=plan.spec.vocab_size,
        recipe=dataclasses.asdict(plan.recipe),
        source={
            "model": plan.source.model,
            "path": str(plan.source.directory),
            "revision": plan.source.revision,
            "quantized": str(plan.carried) if plan.carried else None,
            "files": plan.source_files,
            "config": read_json(plan.source.directory / "config.json"),
        },
        files=files,
        versions=_versions(),
        command=build_command(plan),
        build={
            "seconds": round(seconds, 3),
            "cpu_seconds": round(time.process_time(), 3),  # of the whole command
            "stages": {"hash source": round(plan.hash_seconds, 3), "convert": round(convert_seconds, 3)},
            "peak_memory_bytes": peak_memory_bytes(),
            "peak_gpu_memory_bytes": peak_gpu_memory_bytes(),
            "source_bytes": sum(facts["bytes"] for facts in plan.source_files.values()),
            "kv_bytes_per_token": kv_bytes_per_token(plan.spec, plan.precision.kv_cache),
            "device": device,
        },
        notes=notes,
    )
    for directory in (path for path in work.iterdir() if path.is_dir()):
        sync_directory(directory)
    write_json(work / CARD_FILE, card)
    return card


def _check_unchanged(plan: BuildPlan) -> None:
    """The digests in the card are of the bytes that were converted, or there is no card."""
    changed = [
        f"{path.name} was written to or replaced"
        for path, signature in plan.signatures.items()
        if not path.exists() or file_signature(path) != signature
    ]
    if changed:
        raise InputError(
            f"{plan.source.directory}: the model changed while it was read",
            problems=changed,
            hint="build again when nothing writes to it",
        )


def _write_configs(plan: BuildPlan, work: Path) -> None:
    """The JSON files that say what the tensors are, for each reader under its own name."""
    if plan.recipe.format in ("trtllm", "both"):
        write_json(work / "checkpoint" / "config.json", plan.config)
        if plan.layer_config is not None:
            write_json(work / "checkpoint" / LAYER_CONFIG_FILE, plan.layer_config)
    if plan.recipe.format in ("hf", "both"):
        config = read_json(plan.source.directory / "config.json")
        config.pop("auto_map", None)  # the code it names is not copied
        quant_config = hf_quant_config(plan.moves, __version__)
        added = {"quantization_config": quantization_config(plan.moves, __version__), "dtype": plan.spec.dtype}
        if plan.carried is not None and plan.carried.is_unified:  # a copy keeps its own words
            added = {"dtype": plan.spec.dtype}
            path = plan.source.directory / HF_QUANT_CONFIG
            quant_config = read_json(path) if path.exists() else None
        write_json(work / "hf" / "config.json", config | {key: value for key, value in added.items() if value})
        for name, content in (
            ("model.safetensors.index.json", hf_index(plan.moves, "hf")),
            (HF_QUANT_CONFIG, quant_config),
        ):
            if content is not None:
                write_json(work / "hf" / name, content)
        for path in (work / "tokenizer").iterdir():
            shutil.copyfile(path, work / "hf" / path.name)
    if plan.backend == "pytorch":
        options = llm_api_options(plan.recipe, plan.spec.max_position_embeddings, plan.precision.kv_cache_algo)
        write_atomic(work / LLM_API_FILE, llm_api_yaml(options))


def existing_engine(target: Path, key: str) -> EngineCard | None:
    """The card of the engine that these inputs gave before. Raises InputError when the name belongs to other inputs."""
    if not (target / CARD_FILE).exists():
        return None
    card = read_card(target)
    if card.key != key:
        raise InputError(
            f"{target}: an engine of that name was built from other inputs",
            hint="choose another --name, or replace it with --force",
        )
    return card


def publish(work: Path, target: Path, card: EngineCard, force: bool) -> EngineCard:
    """Renames the finished directory into place. When another process was first with the same inputs, its engine stays."""
    if force and target.exists():
        old = target.with_name(f".tmp-old-{target.name}-{os.getpid()}")
        target.rename(old)
        work.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        try:
            work.rename(target)
        except OSError as error:
            with contextlib.suppress(InputError):
                winner = read_card(target)
                if winner.key == card.key:
                    return winner
            raise InputError(
                f"{target}: in the way: {error.strerror}", hint="move it, or choose another --name"
            ) from error
    sync_directory(target.parent)
    return card


def _calibration_device(plan: BuildPlan, device: str) -> str:
    """Formats without calibration are made on the CPU."""
    if plan.calib_file is None:
        return "cpu"
    from tkit.runtime.device import pick_device

    return pick_device(device)


def _quantizer(plan: BuildPlan, work: Path, device: str, workers: int) -> LayerQuantizer | None:
    """None where weights are only moved; torch is imported only where it computes."""
    if plan.carried is not None:
        return CarriedQuantizer(plan.carried, plan.spec)
    if not any(move.is_computed for move in plan.moves):
        return None
    if plan.calib_file is None:
        from tkit.runtime.data_free import DataFreeQuantizer

        return DataFreeQuantizer(workers)
    import torch

    from tkit.runtime.calibration import CalibratedQuantizer

    tokens = torch.tensor(plan.calibration)
    return CalibratedQuantizer(plan.spec, tokens, device, workers, spill_directory=work)


def _check_disk(out: Path, plan: BuildPlan) -> None:
    """What a resumed build has reserved already counts as needed too: the error comes a little early, never late."""
    free = shutil.disk_usage(out).free
    if free < plan.num_bytes:
        raise InputError(
            f"{out}: {format_bytes(free)} free, the engine needs {format_bytes(plan.num_bytes)}",
            hint="free some space or build elsewhere with --out",
        )


def _work_directory(out: Path, plan: BuildPlan, progress: Progress) -> Path:
    """A directory of this process: what a killed build of the same engine left, or a new one. Other leftovers go."""
    work = out / f".tmp-{plan.key[:12]}-{os.getpid()}"
    for path in out.glob(".tmp-*"):
        pid = path.name.rsplit("-", 1)[-1]
        if not pid.isdigit() or psutil.pid_exists(int(pid)):
            continue
        with contextlib.suppress(OSError):  # another build was faster
            if path.name.startswith(f".tmp-{plan.key[:12]}-") and not work.exists():
                path.rename(work)
                progress.note(f"resuming the build that process {pid} left")
            else:
                shutil.rmtree(path)
    for directory in {Path(name).parent for name in file_layouts(plan.moves, plan.spec.dtype)}:
        (work / directory).mkdir(parents=True, exist_ok=True)
    return work


def _notes(plan: BuildPlan, source: TensorFiles) -> tuple[str, ...]:
    """What a reader of the card could not guess."""
    notes = list(plan.notes)
    dtypes = sorted({entry.dtype for entry in source.entries.values()})
    if dtypes == ["F32"]:
        notes.append(f"the source is float32; weights were rounded to {plan.spec.dtype}")
    if plan.is_pickled:
        notes.append("the weights were pickled; torch.load(weights_only=True) read their tensors and nothing else")
    if "int8" in plan.formats:
        notes.append("W8A16 ships as plain 16-bit weights; trtllm-build quantizes them for the GPU it runs on")
    if any(move.num_experts and move.format and move.format.name == "int4_gptq" for move in plan.moves):
        notes.append("int4_gptq compensates experts within 128 channels, as int4_awq does")
    if plan.recipe.kv_cache == "int8" and plan.recipe.format != "hf":
        notes.append("an INT8 KV cache has no paged context kernel: trtllm-build --use_paged_context_fmha disable")
    return tuple(notes)


def _versions() -> dict[str, str]:
    versions = {"tkit": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def kv_bytes_per_token(spec: ModelSpec, kv_cache: str) -> int:
    """Keys and values of one token in all layers; over all ranks, repeated KV heads not counted."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_size * (2 if kv_cache == "auto" else 1)
