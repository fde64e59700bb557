"""What a build will do, resolved and checked on headers before a byte is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tkit import __version__, demo
from tkit.architectures.config import spec_from_hf, trtllm_config
from tkit.architectures.formats import MIXED, trtllm_quant_cfg
from tkit.architectures.moves import count_params, fitted_precision, plan_moves
from tkit.architectures.source_formats import Forms, carried_moves, carried_precision, source_format
from tkit.architectures.table import ARCHITECTURES
from tkit.architectures.unified_hf import combined, plan_hf_outputs
from tkit.backends.llm_api import format_problems
from tkit.checkpoints.convert import check_sources, checkpoint_bytes, file_layouts
from tkit.checkpoints.load_simulation.config import config_problems, with_layer_config
from tkit.checkpoints.reader import (
    HF_QUANT_CONFIG,
    TensorFiles,
    check_model_files,
    file_signature,
    open_source,
    read_config,
)
from tkit.errors import InputError
from tkit.files import sha256_file
from tkit.runtime.carried import check_carried, zero_biases
from tkit.runtime.corpus import calibration_tokens
from tkit.specs.model import ModelSpec
from tkit.specs.moves import Move
from tkit.specs.parallel import Parallel
from tkit.specs.precision import UNQUANTIZED, Precision
from tkit.specs.progress import Progress
from tkit.specs.quantization import QuantFormat
from tkit.specs.recipe import RUNTIME_FIELDS, EngineRecipe
from tkit.specs.source_format import SourceFormat
from tkit.stages.models import TOKENIZER_FILES, ModelSource, check_hub_digests, copy_tokenizer, has_safetensors


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
    with open_model(source.directory, is_pickled) as files:
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


def open_model(directory: Path, is_pickled: bool) -> TensorFiles:
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


def _config_notes(config: Mapping[str, Any]) -> list[str]:
    if config.get("auto_map"):
        return [f"auto_map was ignored: {config['architectures'][0]} is built in, the model's own code is never run"]
    return []


def build_command(plan: BuildPlan) -> str:
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
