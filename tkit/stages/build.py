"""Build: Hugging Face checkpoint -> engine directory. Resolve, plan, check on headers, convert, write the card, rename.

A directory under `engines/` with a card is complete and is never changed again; until then the build lives in
`engines/.tmp-<key>-<pid>`, which the next build removes if this one is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from tkit import __version__, demo
from tkit.architectures.config import spec_from_hf, trtllm_config
from tkit.architectures.formats import MIXED, trtllm_quant_cfg
from tkit.architectures.moves import count_params, fitted_precision, plan_moves
from tkit.architectures.source_formats import Forms, carried_moves, carried_precision, source_format
from tkit.architectures.table import ARCHITECTURES
from tkit.architectures.unified_hf import (
    combined,
    hf_index,
    hf_quant_config,
    plan_hf_outputs,
    quantization_config,
)
from tkit.backends.llm_api import LLM_API_FILE, format_problems, llm_api_options, llm_api_yaml
from tkit.checkpoints.convert import LayerQuantizer, check_sources, checkpoint_bytes, convert, file_layouts
from tkit.checkpoints.load_simulation.config import LAYER_CONFIG_FILE, config_problems, with_layer_config
from tkit.checkpoints.load_simulation.load import check_load
from tkit.checkpoints.reader import (
    HF_QUANT_CONFIG,
    TensorFiles,
    check_model_files,
    file_signature,
    open_source,
    read_config,
)
from tkit.cores import usable_cores
from tkit.errors import InputError
from tkit.files import check_writable, read_json, sha256_file, sync_directory, write_atomic, write_json
from tkit.runtime.carried import CarriedQuantizer, check_carried, zero_biases
from tkit.runtime.corpus import calibration_tokens
from tkit.specs.engine import CARD_FILE, EngineCard
from tkit.specs.model import ModelSpec
from tkit.specs.moves import Move
from tkit.specs.parallel import Parallel
from tkit.specs.precision import UNQUANTIZED, Precision
from tkit.specs.progress import Progress
from tkit.specs.quantization import QuantFormat
from tkit.specs.recipe import RUNTIME_FIELDS, EngineRecipe
from tkit.specs.source_format import SourceFormat
from tkit.stages.engines import ENGINES_DIR, read_card
from tkit.stages.memory import peak_gpu_memory_bytes, peak_memory_bytes, reset_peak_memory
from tkit.stages.models import (
    TOKENIZER_FILES,
    ModelSource,
    check_hub_digests,
    copy_tokenizer,
    has_safetensors,
)
from tkit.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """Everything a build will do, known before a byte is written."""

    name: str
    key: str
    source: ModelSource
    source_files: dict[str, dict[str, Any]]
    recipe: EngineRecipe
    backend: str
    spec: ModelSpec
    precision: Precision
    moves: Sequence[Move]
    calib_file: Path | None
    calibration: list[list[int]]  # windows of its tokens
    hash_seconds: float
    signatures: dict[Path, tuple[int, ...]]  # of the source's files, from before they were hashed
    notes: tuple[str, ...]  # what the config holds that a reader of the card could not guess
    is_pickled: bool  # the weights lie in pytorch_model*.bin
    carried: SourceFormat | None  # what the source is quantized in already
    num_params: int

    @property
    def config(self) -> dict[str, Any]:
        return trtllm_config(self.spec, self.precision, self.recipe.parallel)

    @property
    def layer_config(self) -> dict[str, Any] | None:
        """`quant_cfg.json` of a checkpoint in several formats."""
        return trtllm_quant_cfg(self.spec, self.precision, self.recipe.parallel)

    @property
    def formats(self) -> dict[str, QuantFormat]:
        return _formats(self.moves)

    @property
    def quant(self) -> str:
        """The recipe's, or what is there instead when nothing has that."""
        formats = self.formats
        return self.recipe.quant if self.recipe.quant in formats else next(iter(formats), "none")

    @property
    def quant_algo(self) -> str | None:
        algorithms = [format.algo for format in self.formats.values()]
        return MIXED if len(algorithms) > 1 else next(iter(algorithms), None)

    @property
    def num_bytes(self) -> int:
        return checkpoint_bytes(self.moves, self.spec.dtype)

    def record(self) -> dict[str, Any]:
        """What `--dry-run` prints: the engine's name, its config.json and every tensor of every rank."""
        layouts = file_layouts(self.moves, self.spec.dtype)
        return {
            "name": self.name,
            "key": self.key,
            "bytes": self.num_bytes,
            "config": self.config,
            "layer_config": self.layer_config,
            "moves": [
                {
                    "module": move.module,
                    "format": (move.format or move.build_format or UNQUANTIZED).name,
                    "sources": move.sources,
                    "outputs": [output.name for output in move.outputs],
                }
                for move in self.moves
            ],
            "files": {
                name: {tensor: {"dtype": dtype, "shape": shape} for tensor, (dtype, shape) in tensors.items()}
                for name, tensors in sorted(layouts.items())
            },
        }


def plan_build(
    source: ModelSource,
    recipe: EngineRecipe,
    progress: Progress,
    *,
    backend: str = "reference",
    allow_pickle: bool = False,
) -> BuildPlan:
    """Resolves and checks. Raises InputError with everything that is wrong with the config, the layout or the weights.

    `backend` is "reference", whose engine is also what trtllm-build compiles, or "pytorch".
    """
    recipe = _for_backend(recipe, backend)
    config_path = source.directory / "config.json"
    check_model_files(source.directory, (config_path.name, HF_QUANT_CONFIG, *TOKENIZER_FILES))
    config = read_config(source.directory)
    spec = spec_from_hf(config, str(config_path))
    is_pickled = allow_pickle and not has_safetensors(source.directory)
    with _open_source(source.directory, is_pickled) as files:
        carried = source_format(config, files.entries.keys(), str(config_path))
        forms = {name: (entry.dtype, entry.shape) for name, entry in files.entries.items()}
        precision = _precision(recipe, spec, carried, forms, config_path)
        smaller_groups: list[str] = []
        if carried is None:
            precision, smaller_groups = fitted_precision(spec, precision, recipe.parallel)
        moves = _plan_formats(spec, precision, recipe)
        if backend == "pytorch" and (problems := _pytorch_problems(moves, precision, recipe, spec)):
            raise InputError("--backend pytorch cannot run this", problems=problems)
        problems = _config_problems(spec, precision, recipe.parallel) if recipe.format != "hf" else []
        if problems:
            raise InputError(f"{config_path}: TensorRT-LLM has no engine for this model", problems=problems)
        num_params = count_params(moves)
        ignored, notes = ARCHITECTURES[spec.architecture].ignored, [*_config_notes(config), *smaller_groups]
        if carried is None:
            check_sources(files, moves, ignored)
        else:
            moves = carried_moves(moves, carried, forms)
            check_sources(files, moves, (*ignored, *carried.ignored, *zero_biases(files, moves)))
            notes += check_carried(files, moves, carried, spec)
        paths = files.files
    for note in smaller_groups:
        progress.note(note)
    with (
        tempfile.TemporaryDirectory() as scratch
    ):  # read before the weights are, which takes minutes where they are many
        tokenizer = copy_tokenizer(source.directory, Path(scratch) / "tokenizer", spec.vocab_size)
    calib_file = _calibration_file(recipe, spec, any(move.needs_calibration for move in moves))
    calibration: list[list[int]] = []
    if calib_file is not None:
        calibration = calibration_tokens(
            calib_file, tokenizer, recipe.calib_samples, recipe.calib_len, recipe.seed, spec.vocab_size
        )
    used = [config_path, *paths, *(source.directory / name for name in (HF_QUANT_CONFIG, *TOKENIZER_FILES))]
    used = [path for path in used if path.exists()]
    signatures = {path: file_signature(path) for path in used}
    hash_started = time.monotonic()
    source_files = _digests(source.directory, used, progress)
    hash_seconds = time.monotonic() - hash_started
    check_hub_digests(source.directory, source_files)
    inputs = {
        "backend": backend,
        "tkit": __version__,
        "recipe": dataclasses.asdict(dataclasses.replace(recipe, name=None, calib=None)),
        "quant_overrides": list(recipe.quant_overrides.items()),  # their order counts
        "calib": sha256_file(calib_file) if calib_file else None,
        "source": {name: facts["sha256"] for name, facts in source_files.items()},
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return BuildPlan(
        name=recipe.name
        or _engine_name(source.name, carried.target.name if carried else recipe.quant, recipe, backend, key),
        key=key,
        source=source,
        source_files=source_files,
        recipe=recipe,
        backend=backend,
        spec=spec,
        precision=precision,
        moves=moves,
        calib_file=calib_file,
        calibration=calibration,
        hash_seconds=hash_seconds,
        signatures=signatures,
        notes=tuple(notes),
        is_pickled=is_pickled,
        carried=carried,
        num_params=num_params,
    )


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
    with _open_source(plan.source.directory, plan.is_pickled) as source:
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
        command=_command(plan),
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


def _open_source(directory: Path, is_pickled: bool) -> TensorFiles:
    if not is_pickled:
        return open_source(directory)
    from tkit.runtime.pickled import PickledFiles  # torch reads pickles, and nothing else here needs it

    return PickledFiles(directory)


def _for_backend(recipe: EngineRecipe, backend: str) -> EngineRecipe:
    """What changes this backend's bytes, and nothing else: equal bytes, equal name."""
    if backend == "pytorch":
        return dataclasses.replace(recipe, format="hf" if recipe.format == "trtllm" else recipe.format)
    default = EngineRecipe()
    return dataclasses.replace(recipe, **{name: getattr(default, name) for name in RUNTIME_FIELDS})


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


def _precision(
    recipe: EngineRecipe, spec: ModelSpec, carried: SourceFormat | None, forms: Forms, config_path: Path
) -> Precision:
    """What the recipe says, or what the source is in already."""
    if carried is None:
        return recipe.precision
    if recipe.precision != Precision.of("none"):
        raise InputError(
            f"{config_path}: quantized already ({carried}); --quant {recipe.quant} would quantize it a second time"
            if recipe.quant != "none"
            else f"{config_path}: quantized already ({carried}); its layers and its KV cache stay as they are",
            hint="leave the options out to carry it over as it is, or name the model it was made from",
        )
    if recipe.format != "hf" and not carried.has_trtllm_form:
        raise InputError(
            f"{config_path}: {carried}: TensorRT-LLM's engines have no such layers, and any others would be another model",
            hint="use --format hf, or name the model it was made from",
        )
    return carried_precision(plan_moves(spec, Precision.of("none"), Parallel()), carried, forms, str(config_path))


def _formats(moves: Sequence[Move]) -> dict[str, QuantFormat]:
    """Those in use, by name; empty when nothing is quantized."""
    used = (move.format or move.build_format for move in moves)
    return {format.name: format for format in used if format is not None}


def _pytorch_problems(moves: Sequence[Move], precision: Precision, recipe: EngineRecipe, spec: ModelSpec) -> list[str]:
    algorithms = {format.algo for format in _formats(moves).values()} or {None}
    problems = {line for algo in algorithms for line in format_problems(algo, precision.kv_cache_algo)}
    limit = spec.max_position_embeddings
    if recipe.max_seq_len is not None and recipe.max_seq_len > limit:
        problems.add(f"max_seq_len is {recipe.max_seq_len}, the model's limit is {limit}")
    return sorted(problems)


def _config_problems(spec: ModelSpec, precision: Precision, parallel: Parallel) -> list[str]:
    """What TensorRT-LLM refuses by the configuration alone."""
    config = trtllm_config(spec, precision, parallel)
    return config_problems(with_layer_config(config, trtllm_quant_cfg(spec, precision, parallel)))


def _plan_formats(spec: ModelSpec, precision: Precision, recipe: EngineRecipe) -> list[Move]:
    """The moves of every checkpoint asked for, each in its directory: one pass over the source writes them all."""
    moves = plan_moves(spec, precision, recipe.parallel)
    plans = {}
    if recipe.format in ("trtllm", "both"):
        plans["checkpoint"] = moves
    if recipe.format in ("hf", "both"):
        plans["hf"] = plan_hf_outputs(moves, spec)
    return combined(plans)


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


def _calibration_file(recipe: EngineRecipe, spec: ModelSpec, is_needed: bool) -> Path | None:
    """None where nothing is calibrated; a file that is named must be one even then."""
    path = demo.CALIBRATION if recipe.calib is None else Path(recipe.calib)
    if not path.is_file():
        raise InputError(f"--calib {path}: {'no file' if path.exists() else 'no such file'}")
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"--calib {path}: expected .txt (one text) or .jsonl (a text per line)")
    if not is_needed:
        return None
    if recipe.calib_len > spec.max_position_embeddings:
        raise InputError(
            f"--calib-len {recipe.calib_len}: the model has {spec.max_position_embeddings} positions",
            hint=f"--calib-len {spec.max_position_embeddings} is the most it can take",
        )
    return path


def _digests(directory: Path, paths: Sequence[Path], progress: Progress) -> dict[str, dict[str, Any]]:
    """{file name: {"bytes", "sha256"}}; several files at once, hashlib releases the interpreter."""
    facts = {}
    with ThreadPoolExecutor() as pool:
        for done, (path, digest) in enumerate(zip(paths, pool.map(sha256_file, paths), strict=True), start=1):
            progress.step("hash source", done, len(paths))
            facts[str(path.relative_to(directory))] = {"bytes": path.stat().st_size, "sha256": digest}
    return facts


def _engine_name(model: str, quant: str, recipe: EngineRecipe, backend: str, key: str) -> str:
    slug = re.sub(r"[^a-z0-9.]+", "-", model.lower()).strip("-.") or "model"
    runs_on = "" if backend == "reference" else f"-{backend}"
    pipeline = f"-pp{recipe.pp_size}" if recipe.pp_size > 1 else ""
    mixed = "-mixed" if recipe.quant_overrides or recipe.exclude else ""
    cache = f"-kv_{recipe.kv_cache}" if recipe.kv_cache != "auto" else ""
    return f"{slug}-{quant}{mixed}{cache}-tp{recipe.tp_size}{pipeline}{runs_on}-{key[:6]}"


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


def _config_notes(config: Mapping[str, Any]) -> list[str]:
    if config.get("auto_map"):
        return [f"auto_map was ignored: {config['architectures'][0]} is built in, the model's own code is never run"]
    return []


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


def _command(plan: BuildPlan) -> str:
    """The command line that builds this engine again."""
    recipe, default = plan.recipe, EngineRecipe()
    command = ["tkit", "build", plan.source.model, "--tp", str(recipe.tp_size), "--pp", str(recipe.pp_size)]
    command += ["--quant", recipe.quant]
    for pattern in recipe.exclude:
        command += ["--exclude", pattern]
    for pattern, quant in recipe.quant_overrides.items():
        command += ["--quant-override", f"{pattern}={quant}"]
    if recipe.kv_cache != default.kv_cache:
        command += ["--kv-cache", recipe.kv_cache]
    if recipe.moe_ep_size != default.moe_ep_size:
        command += ["--moe-ep", str(recipe.moe_ep_size)]
    if recipe.format != default.format:
        command += ["--format", recipe.format]
    if plan.calib_file is not None:
        command += ["--calib", recipe.calib] if recipe.calib else []
        for option, field in (("--calib-samples", "calib_samples"), ("--calib-len", "calib_len"), ("--seed", "seed")):
            if getattr(recipe, field) != getattr(default, field):
                command += [option, str(getattr(recipe, field))]
    if plan.is_pickled:
        command.append("--allow-pickle")
    if plan.backend != "reference":
        command += ["--backend", plan.backend, *runtime_options(recipe)]
    if recipe.name:
        command += ["--name", recipe.name]
    return shlex.join(command)


def runtime_options(recipe: EngineRecipe) -> list[str]:
    """The options of `tkit build` that give a recipe's RUNTIME_FIELDS."""
    given = {
        name: getattr(recipe, name) for name in RUNTIME_FIELDS if getattr(recipe, name) != getattr(EngineRecipe, name)
    }
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
