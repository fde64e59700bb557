"""Which backend an engine is built for, and its build from end to end: a checkpoint, and where that is asked for, compiled."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tkit.backends.nvidia import Machine, has_llm_api
from tkit.errors import InputError
from tkit.files import from_mapping, read_json
from tkit.planner.precision import KV_MIN_SM, precision
from tkit.specs.engine import CARD_FILE, EngineCard
from tkit.specs.progress import Progress
from tkit.specs.recipe import RUNTIME_FIELDS, EngineRecipe
from tkit.stages.build import build
from tkit.stages.build_plan import BuildPlan, plan_build
from tkit.stages.compile import CompilePlan, Target, compile_engine, machine_problems, machine_target, plan_compile
from tkit.stages.engines import read_card
from tkit.stages.models import ModelSource
from tkit.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """`backend` and why it was chosen. The checkpoint is built, or lies in `checkpoint_engine` already."""

    backend: str
    reason: str
    checkpoint: BuildPlan | None = None
    checkpoint_engine: Path | None = None
    compilation: CompilePlan | None = None

    def summary(self) -> str:
        """What `--dry-run` prints for people."""
        lines = []
        if self.checkpoint is not None:
            files = self.checkpoint.record()["files"]
            num_tensors = sum(map(len, files.values()))
            size = format_bytes(self.checkpoint.num_bytes)
            lines.append(
                f"{self.checkpoint.name}: {num_tensors} tensors, {size} in {len(files)} file{'s' * (len(files) > 1)}"
            )
        if self.compilation is not None:
            lines += [
                f"{self.compilation.name}, made in the engines directory by",
                shlex.join(self.compilation.arguments.argv()),
            ]
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """What `--dry-run --json` prints."""
        checkpoint = self.checkpoint.record() if self.checkpoint else {}
        if self.compilation is None:
            return {"backend": self.backend, **checkpoint}
        return {"backend": self.backend, **checkpoint, **self.compilation.record()}


def plan_engine(
    source: ModelSource,
    recipe: EngineRecipe,
    progress: Progress,
    machine: Machine,
    *,
    backend: str = "auto",
    target: Target | None = None,
    allow_pickle: bool = False,
) -> EnginePlan:
    """Resolves the backend and checks everything that it needs. `target`: another machine's, for a dry run."""
    _check_gpu(recipe, machine, backend, target)

    def plan_checkpoint(recipe: EngineRecipe, backend: str = "reference") -> BuildPlan:
        return plan_build(source, recipe, progress, backend=backend, allow_pickle=allow_pickle)

    if backend == "pytorch" or (backend == "auto" and _runs_pytorch(recipe, machine)):
        reason = "asked for" if backend == "pytorch" else f"TensorRT-LLM {machine.trtllm_version} and a GPU"
        return EnginePlan(backend="pytorch", reason=reason, checkpoint=plan_checkpoint(recipe, "pytorch"))
    if backend == "reference":
        return EnginePlan(backend=backend, reason="asked for", checkpoint=plan_checkpoint(recipe))
    problems = _tensorrt_problems(recipe, machine) if target is None else []
    if backend == "auto" and problems:
        return EnginePlan(backend="reference", reason=problems[0], checkpoint=plan_checkpoint(recipe))
    if recipe.format == "hf":
        raise InputError("--backend tensorrt compiles the TensorRT-LLM checkpoint", hint="use --format trtllm or both")
    target = target or machine_target(machine)
    checkpoint = plan_checkpoint(dataclasses.replace(recipe, name=None))
    try:
        compilation = plan_compile(checkpoint.name, checkpoint.key, checkpoint.config, recipe, target)
    except InputError as error:
        if backend == "tensorrt":
            raise
        reason = "; ".join(error.problems or (error.message,))
        if recipe.name is not None:
            checkpoint = plan_checkpoint(recipe)
        return EnginePlan(backend="reference", reason=reason, checkpoint=checkpoint)
    reason = f"{target.gpu} (SM {target.sm}), TensorRT-LLM {target.version}"
    return EnginePlan(backend="tensorrt", reason=reason, checkpoint=checkpoint, compilation=compilation)


def _check_gpu(recipe: EngineRecipe, machine: Machine, backend: str, target: Target | None) -> None:
    """Raises InputError for formats that the GPU has no kernels for. The reference engine runs them all."""
    if target is not None:
        gpus = {target.sm: target.gpu}
    elif backend in ("tensorrt", "pytorch"):
        gpus = {gpu.sm: gpu.name for gpu in machine.gpus}
    else:
        return
    formats = dict.fromkeys((recipe.quant, *recipe.quant_overrides.values()))
    needs = {f"--quant {name}": precision(name).min_sm for name in formats}
    needs[f"--kv-cache {recipe.kv_cache}"] = KV_MIN_SM.get(recipe.kv_cache, 0)
    problems = [
        f"{option} needs SM {least}, {gpu} has SM {sm}"
        for sm, gpu in gpus.items()
        for option, least in needs.items()
        if sm < least
    ]
    if problems:
        raise InputError(
            "the GPU has no kernels for these formats", problems=problems, hint="--backend reference runs every format"
        )


def plan_from_engine(
    engine_dir: Path, overrides: Mapping[str, Any], machine: Machine, *, backend: str, target: Target | None = None
) -> EnginePlan:
    """Compiles the checkpoint of an engine that exists, such as one that was built on another machine."""
    foreign = [name for name in overrides if name not in (*RUNTIME_FIELDS, "name")]
    if foreign or backend in ("reference", "pytorch"):
        raise InputError(
            f"{engine_dir} is an engine: it can be compiled, not changed",
            problems=[f"{name} is part of its checkpoint" for name in foreign],
            hint="use --backend tensorrt on it, or name the model that it was built from",
        )
    if not (engine_dir / "checkpoint" / "config.json").is_file():
        raise InputError(f"{engine_dir}: no TensorRT-LLM checkpoint in it to compile")
    card = read_card(engine_dir)
    recipe = from_mapping(EngineRecipe, {**card.recipe, "name": None, **overrides}, "tkit build")
    target = target or machine_target(machine)
    config = read_json(engine_dir / "checkpoint" / "config.json")
    return EnginePlan(
        backend="tensorrt",
        reason="asked for",
        checkpoint_engine=engine_dir,
        compilation=plan_compile(card.name, card.key, config, recipe, target),
    )


def build_engine(
    plan: EnginePlan,
    progress: Progress,
    machine: Machine,
    *,
    out: Path,
    device: str = "cpu",
    workers: int | None = None,
    force: bool = False,
    allow_zeros: bool = False,
) -> tuple[Path, EngineCard, bool]:
    """(engine directory, card, whether it was there already)."""
    directory = plan.checkpoint_engine
    if plan.checkpoint is not None:
        is_last = plan.compilation is None
        directory, card, existed = build(
            plan.checkpoint,
            progress,
            out=out,
            device=device,
            workers=workers,
            force=force and is_last,  # a checkpoint of the same inputs is the same; forced is what was asked for
            allow_zeros=allow_zeros,
        )
        if is_last:
            return directory, card, existed
    assert plan.compilation is not None and directory is not None and machine.trtllm_build is not None
    return compile_engine(plan.compilation, directory, machine.trtllm_build, progress, out=out, force=force)


def find_checkpoint_engine(model: str | None) -> Path | None:
    """The directory, where MODEL is an engine."""
    return Path(model) if model is not None and (Path(model) / CARD_FILE).is_file() else None


def _runs_pytorch(recipe: EngineRecipe, machine: Machine) -> bool:
    """Auto chooses it for a unified checkpoint, which nothing else compiles, where this machine can run it."""
    if recipe.format != "hf" or not machine.gpus:
        return False
    version = machine.trtllm_version
    return version is not None and has_llm_api(version)


def _tensorrt_problems(recipe: EngineRecipe, machine: Machine) -> list[str]:
    is_hf = recipe.format == "hf"
    return [*(["a unified checkpoint is not compiled"] if is_hf else []), *machine_problems(machine)]
