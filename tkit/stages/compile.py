"""Compile: an engine directory with a TensorRT-LLM checkpoint -> one that holds compiled engines too, through trtllm-build.

A published directory never changes, so the result is an engine of its own: hard links to the checkpoint and the tokenizer,
`trt/` beside them, and a name that says for which GPU and which TensorRT-LLM. One checkpoint may so be compiled for many.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tkit.backends.nvidia import PROGRAM, Machine, container_table, is_engine_builder
from tkit.backends.trtllm_build import TrtllmBuildArguments, build_arguments
from tkit.errors import InputError, TkitError
from tkit.files import check_writable, read_json, sha256_file, sync_directory, write_json
from tkit.planner.gpus import GPUS_PER_NODE, find_gpu
from tkit.specs.engine import CARD_FILE, EngineCard
from tkit.specs.progress import Progress
from tkit.specs.recipe import RUNTIME_FIELDS, EngineRecipe
from tkit.stages.build import existing_engine, publish
from tkit.stages.build_plan import runtime_options
from tkit.stages.engines import complete_engines, read_card, verify_files
from tkit.triton.launcher import last_lines, stop_group
from tkit.units import format_seconds

BACKEND = "tensorrt"
HEARTBEAT_S = 30.0
GRACE_S = 5.0  # what an interrupted trtllm-build gets to end its workers
# Inside the engine directory; build.log is what trtllm-build said, model.cache the kernel timings it took.
ENGINE_DIR, LOG, TIMING_CACHE = "trt", "build.log", "model.cache"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What an engine is compiled for."""

    sm: int
    gpu: str
    num_gpus: int
    version: str  # of TensorRT-LLM


@dataclass(frozen=True, kw_only=True)
class CompilePlan:
    """Everything a compilation will do. The paths in `arguments` are relative to the engines directory."""

    name: str
    key: str
    config: Mapping[str, Any]
    recipe: EngineRecipe
    target: Target
    arguments: TrtllmBuildArguments

    @property
    def world_size(self) -> int:
        return int(self.config["mapping"]["world_size"])

    def record(self) -> dict[str, Any]:
        """What `--dry-run` prints."""
        return {
            "name": self.name,
            "key": self.key,
            "target": dataclasses.asdict(self.target),
            "command": self.arguments.argv(),
        }


def machine_target(machine: Machine) -> Target:
    """The GPUs and the TensorRT-LLM of this machine; raises InputError with everything that is missing."""
    problems = machine_problems(machine)
    if problems or machine.trtllm_version is None:
        raise InputError(
            "--backend tensorrt: this machine cannot compile engines",
            problems=problems,
            hint="run this command in NVIDIA's container on the target GPU (docs/backends.md), or use --backend reference",
        )
    gpu = machine.gpus[0]
    return Target(sm=gpu.sm, gpu=gpu.name, num_gpus=len(machine.gpus), version=machine.trtllm_version)


def named_target(gpu: str, machine: Machine) -> Target:
    """For a dry run: a GPU of the planner's table, and TensorRT-LLM as it is here, or the last that compiles."""
    row = find_gpu(gpu)
    version = machine.trtllm_version or next(filter(is_engine_builder, container_table().values()))
    return Target(sm=row.sm, gpu=row.name, num_gpus=GPUS_PER_NODE, version=version)


def machine_problems(machine: Machine) -> list[str]:
    """Why this machine cannot compile engines, one line each."""
    problems = []
    if machine.gpus_problem:
        problems.append(f"no GPU: {machine.gpus_problem}")
    if len(machine.sms) > 1:
        found = ", ".join(f"GPU {gpu.index} {gpu.name} (SM {gpu.sm})" for gpu in machine.gpus)
        problems.append(f"GPUs of different generations: {found}; choose with CUDA_VISIBLE_DEVICES")
    if machine.trtllm_build is None:
        problems.append(f"no {PROGRAM} on PATH; TensorRT-LLM 1.0 to 1.2 has it")
    elif machine.trtllm_version is None:
        problems.append(f"{machine.trtllm_build}: the Python behind it has no package tensorrt_llm")
    elif not is_engine_builder(machine.trtllm_version):
        problems.append(f"TensorRT-LLM {machine.trtllm_version}: the checkpoint is for 1.0 to 1.2")
    return problems


def plan_compile(
    checkpoint_name: str, checkpoint_key: str, config: Mapping[str, Any], recipe: EngineRecipe, target: Target
) -> CompilePlan:
    """`config` is the checkpoint's config.json. Raises InputError with everything that trtllm-build would refuse."""
    arguments = build_arguments(
        config,
        recipe,
        sm=target.sm,
        num_gpus=target.num_gpus,
        checkpoint_dir=Path(checkpoint_name, "checkpoint"),
        output_dir=Path(ENGINE_DIR),
    )
    # Neither where files lie nor how many workers write them changes what is in them.
    settings = {
        name: value
        for name, value in arguments.values.items()
        if name != "workers" and not name.endswith(("_dir", "_cache"))
    }
    inputs = {"checkpoint": checkpoint_key, "arguments": settings, "sm": target.sm, "version": target.version}
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    name = recipe.name or f"{checkpoint_name}-sm{target.sm}-trtllm{target.version}-{key[:6]}"
    output_dir = Path(name, ENGINE_DIR)
    arguments = dataclasses.replace(
        arguments, output_dir=str(output_dir), output_timing_cache=str(output_dir / TIMING_CACHE)
    )
    return CompilePlan(name=name, key=key, config=config, recipe=recipe, target=target, arguments=arguments)


def compile_engine(
    plan: CompilePlan, checkpoint_engine: Path, program: Path, progress: Progress, *, out: Path, force: bool = False
) -> tuple[Path, EngineCard, bool]:
    """(engine directory, card, whether it was there already), as `build` gives them."""
    target = out / plan.name
    if not force and (existing := existing_engine(target, plan.key)) is not None:
        return target, existing, True
    source_card = read_card(checkpoint_engine)
    verify_files(checkpoint_engine, source_card, progress)
    started = time.monotonic()
    check_writable(out, "choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    work = out / f".tmp-{plan.key[:12]}-{os.getpid()}"
    try:
        _link_files(checkpoint_engine, work, source_card)
        (work / ENGINE_DIR).mkdir()
        arguments = dataclasses.replace(
            plan.arguments,
            checkpoint_dir=str(work / "checkpoint"),
            output_dir=str(work / ENGINE_DIR),
            output_timing_cache=str(work / ENGINE_DIR / TIMING_CACHE),
            input_timing_cache=_earlier_timings(out, plan.target),
        )
        _run(arguments.argv(str(program)), work / ENGINE_DIR, out / f".{plan.name}.log", plan.world_size, progress)
        engine_config = _checked_config(work / ENGINE_DIR, plan)
        card = _write_card(plan, source_card, work, engine_config, time.monotonic() - started)
        return target, publish(work, target, card, force), False
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _link_files(source: Path, work: Path, card: EngineCard) -> None:
    """Hard links, which cost no space; copies where the file system has none or is another."""
    for name in card.files:
        destination = work / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            destination.hardlink_to(source / name)
        except OSError:
            shutil.copyfile(source / name, destination)


def _earlier_timings(out: Path, target: Target) -> str | None:
    """Of the last engine that was compiled for this GPU with this version: kernels that it timed are not timed again."""
    found = []
    for directory in complete_engines(out):
        with contextlib.suppress(InputError):  # an engine of an older tkit
            card = read_card(directory)
            built_for = card.compiled or {}
            same = (built_for.get("gpu"), built_for.get("version")) == (target.gpu, target.version)
            if same and (directory / ENGINE_DIR / TIMING_CACHE).is_file():
                found.append((card.created, directory / ENGINE_DIR / TIMING_CACHE))
    return str(max(found)[1].resolve()) if found else None


def _run(command: list[str], output_dir: Path, failed_log: Path, world_size: int, progress: Progress) -> None:
    """Runs to the end, or ends it with everything it started. A failure keeps the log, as `failed_log`."""
    log = output_dir / LOG
    with open(log, "wb") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = _wait(process, output_dir, log, world_size, progress)
        except BaseException:
            stop_group(process.pid, GRACE_S)
            process.wait()
            raise
    if code:
        lines = "".join(f"\n  | {line}" for line in last_lines(log))
        log.replace(failed_log)
        raise TkitError(
            f"{PROGRAM} ended with exit code {code}; its last lines:{lines}", hint=f"the whole log: {failed_log}"
        )
    failed_log.unlink(missing_ok=True)


def _wait(process: subprocess.Popen[bytes], output_dir: Path, log: Path, world_size: int, progress: Progress) -> int:
    started = heartbeat = time.monotonic()
    while True:
        done = len(list(output_dir.glob("rank*.engine")))
        progress.step(PROGRAM, min(done, world_size), world_size)
        try:
            return process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if now - heartbeat > HEARTBEAT_S:
            heartbeat = now
            said = "".join(last_lines(log, 1))
            progress.note(f"{PROGRAM}: {done} of {world_size} ranks after {format_seconds(now - started)}: {said}")


def _checked_config(engine_dir: Path, plan: CompilePlan) -> dict[str, Any]:
    """config.json as trtllm-build wrote it, after making sure that what was asked for is there."""
    problems = [
        f"{path.name} is missing or empty"
        for rank in range(plan.world_size)
        if not (path := engine_dir / f"rank{rank}.engine").is_file() or not path.stat().st_size
    ]
    config: dict[str, Any] = {}
    if (engine_dir / "config.json").is_file():
        config = read_json(engine_dir / "config.json")
        if config.get("version") != plan.target.version:
            problems.append(f"config.json is of version {config.get('version')}, expected {plan.target.version}")
    else:
        problems.append("config.json is missing")
    if problems:
        raise TkitError(f"{PROGRAM} ended well, but did not write what it was asked for", problems=problems)
    return config


def _write_card(
    plan: CompilePlan, source: EngineCard, work: Path, engine_config: Mapping[str, Any], seconds: float
) -> EngineCard:
    compiled_files = sorted(path for path in (work / ENGINE_DIR).rglob("*") if path.is_file())
    limits = {name: getattr(plan.arguments, name) for name in ("max_batch_size", "max_num_tokens", "max_seq_len")}
    card = dataclasses.replace(
        source,
        name=plan.name,
        key=plan.key,
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        backend=BACKEND,
        recipe={**source.recipe, **{name: getattr(plan.recipe, name) for name in RUNTIME_FIELDS}},
        files={
            **source.files,
            **{
                str(path.relative_to(work)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                for path in compiled_files
            },
        },
        versions={**source.versions, "tensorrt_llm": engine_config["version"]},
        command=_command(source.command, plan),
        build={
            **source.build,
            "seconds": round(seconds, 3),
            "stages": {"trtllm-build": round(seconds, 3)},
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        },
        compiled={
            **dataclasses.asdict(plan.target),
            **limits,
            "goal": plan.recipe.goal,
            "checkpoint_engine": source.name,
            "arguments": plan.arguments.argv(),
        },
    )
    for path in compiled_files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    for directory in {path.parent for path in compiled_files} | {work}:
        sync_directory(directory)
    write_json(work / CARD_FILE, card)
    return card


def _command(checkpoint_command: str, plan: CompilePlan) -> str:
    """The checkpoint's command with what compiling adds."""
    return shlex.join([*shlex.split(checkpoint_command), "--backend", BACKEND, *runtime_options(plan.recipe)])
