"""Run: everything a recipe asks for, in order: build and validate each engine, serve and sweep each, sweep what they are
compared with, one report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tkit import __version__
from tkit.backends.nvidia import Machine
from tkit.errors import InputError, ServerError, did_you_mean
from tkit.files import check_writable, read_json
from tkit.loadgen.datasets import read_dataset
from tkit.loadgen.profiles import resolve_profile
from tkit.loadgen.run_directory import MANIFEST_FILE, RunDirectory
from tkit.planner.gpus import gpu_of_device
from tkit.report.gates import parse_gates
from tkit.specs.engine import EngineCard
from tkit.specs.progress import Progress
from tkit.specs.recipe import HF_GENERATE, OtherEngine, Recipe
from tkit.specs.record import Manifest
from tkit.specs.server import ServeOptions
from tkit.stages.backends import EnginePlan, build_engine, plan_engine
from tkit.stages.calibrate import client_machine
from tkit.stages.doctor import diagnose
from tkit.stages.engines import ENGINES_DIR
from tkit.stages.hf_generate import check_generate, source_sha256, sweep_generate
from tkit.stages.models import ModelSource, fetch_model, find_recipe
from tkit.stages.plan import plan
from tkit.stages.report import (
    BASELINES,
    REPORTS_DIR,
    baseline_directory,
    check_gates,
    copy_directory,
    find_baseline_directory,
    report,
)
from tkit.stages.serve import running_server
from tkit.stages.sweep import SweepRecord, check_shapes, run_sweep
from tkit.stages.target import Target, check_target, normal_url
from tkit.stages.validate import stored_validation, validate
from tkit.units import format_seconds

SERVING = ServeOptions(http_port=0, grpc_port=0, metrics_port=0, openai_port=0)  # beside whatever else is served here


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    recipe: str
    engines: tuple[str, ...]
    sweeps: tuple[str, ...]
    report: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """`baseline`: what the runs are compared with in place of the recipe's, as `tkit report --baseline` takes it.

    `save_baseline`: the name under which the recipe's baseline is kept, once every gate has passed. `is_fresh`: what was
    validated and measured before is done again.
    """

    device: str = "auto"
    backend: str = "auto"
    baseline: str | None = None
    save_baseline: str | None = None
    fail_on: str | None = None  # in place of the recipe's gates
    junit: Path | None = None
    is_fresh: bool = False


def run_recipe(recipe_name: str, progress: Progress, machine: Machine, options: RunOptions) -> RunRecord:
    """What is done is not done again: engines, validations and whole sweeps of the same inputs are reused, a sweep that was
    cut off goes on. Every engine is served on ports of its own. Gates hold for the engines, not for what they are compared
    with.

    Raises GateFailed, after the report is written, unless every gate passes.
    """
    started = time.monotonic()
    name, recipe = find_recipe(recipe_name)
    fail_on, where = (
        (options.fail_on, "--fail-on")
        if options.fail_on is not None
        else (recipe.report.fail_on, f"{name}: report: fail_on")
    )
    gates = parse_gates(fail_on, where) if fail_on is not None else ()
    _check_baseline(options.baseline, recipe)
    _check_sweep(recipe, name)
    _check_others(recipe, name)
    out = Path(recipe.report.out) if recipe.report.out else REPORTS_DIR / name
    for directory in (ENGINES_DIR, REPORTS_DIR):
        check_writable(directory, f"run it where {directory}/ can be written")
    check_writable(out, f"{name}: report: choose another out")
    kept = baseline_directory(options.save_baseline) if options.save_baseline is not None else None
    if options.device == "cuda":
        from tkit.runtime.device import pick_device  # imports torch

        pick_device(options.device)
    if options.backend != "auto":
        _check_serving(options.backend, machine)
    source = fetch_model(recipe, name)
    plans = _plan_engines(source, recipe, progress, machine, options.backend)  # all are checked before one is built
    if options.backend == "auto":
        _check_serving(plans[0].backend, machine)
    _check_shapes(plans, recipe)
    _note_predictions(recipe_name, recipe, progress, machine)
    engines: list[tuple[Path, EngineCard]] = []
    for engine_plan in plans:
        directory, card, existed = build_engine(engine_plan, progress, machine, out=ENGINES_DIR, device=options.device)
        seconds = format_seconds(card.build["seconds"])
        progress.note(f"{card.name}: {'exists' if existed else f'built in {seconds}'}")
        quality = None if options.is_fresh else stored_validation(directory, card)
        quality = quality or validate(directory, progress, device=options.device)
        progress.note(
            f"{card.name}: perplexity {quality.ppl:.3f} (source {quality.ppl_source:.3f}), KL {quality.kl:.2e}, "
            f"top-1 {quality.top1:.2%}"
        )
        engines.append((directory, card))
    sweeps = [_sweep_engine(directory, card, recipe, progress, options) for directory, card in engines]
    others = [_sweep_other(other, engines[0], recipe, progress, options) for other in recipe.compare_with]
    measured = [*sweeps, *others]
    own = measured[recipe.names.index(recipe.report.baseline)] if recipe.report.baseline else sweeps[0]
    labels = {other.label: str(path) for other, path in zip(recipe.compare_with, others, strict=True)}
    path, comparison = report(
        measured,
        progress,
        out=out,
        baseline=labels.get(options.baseline or "", options.baseline) or str(own),
        spared=others,
        with_png=True,
        gates=gates,
        junit=options.junit,
    )
    check_gates(comparison, path)
    if kept is not None:
        copy_directory(own, kept)
        progress.note(f"{own} kept as {kept}")
    return RunRecord(
        recipe=name,
        engines=tuple(str(directory) for directory, _ in engines),
        sweeps=tuple(map(str, measured)),
        report=str(path),
        seconds=time.monotonic() - started,
    )


def _check_baseline(baseline: str | None, recipe: Recipe) -> None:
    """Before hours are spent on what it would be compared with."""
    if baseline is None or baseline in recipe.names or find_baseline_directory(baseline) is not None:
        return
    kept = [path.name for path in (REPORTS_DIR / BASELINES).glob("[!.]*") if path.is_dir()]
    raise InputError(
        f'--baseline: "{baseline}" is no directory, no kept baseline and nothing that the recipe measures'
        f"{did_you_mean(baseline, [*kept, *recipe.names])}",
        hint=f"known: {', '.join(sorted([*kept, *recipe.names]))}; keep one with tkit run RECIPE --save-baseline NAME",
    )


def _check_sweep(recipe: Recipe, name: str) -> None:
    """Whether the load can be made: before hours are spent on what is to bear it."""
    try:
        resolve_profile(recipe.sweep)
        if recipe.sweep.dataset is not None:
            read_dataset(Path(recipe.sweep.dataset))
    except InputError as error:
        raise InputError(f"{name}: sweep: {error.message}", problems=error.problems, hint=error.hint) from error


def _check_serving(backend: str, machine: Machine) -> None:
    """Whether this machine can serve such engines: before hours are spent on building them."""
    checks = diagnose("serve", backend, machine, SERVING).checks
    problems = [f"{check.name}: {check.found}; {check.fix}" for check in checks if check.status == "fail"]
    if problems:
        raise ServerError(
            f"engines of the {backend} backend cannot be served here, and tkit run measures what it builds",
            problems=problems,
            hint="go to a machine that can, or choose another --backend; tkit build builds without serving",
        )


def _check_shapes(plans: Sequence[EnginePlan], recipe: Recipe) -> None:
    profile = resolve_profile(recipe.sweep)
    for checkpoint in (engine.checkpoint for engine in plans):
        if checkpoint is not None:
            check_shapes(recipe.sweep, profile, checkpoint.name, checkpoint.spec.max_position_embeddings)


def _check_others(recipe: Recipe, name: str) -> None:
    """Whether each can be measured as the engines are; asks nobody, since it may be started later."""
    problems: list[str] = []
    for other in recipe.compare_with:
        try:
            if other.protocol == HF_GENERATE:
                check_generate(recipe.sweep)
            else:
                check_target(_target(other, None))
        except InputError as error:
            hint = f" ({error.hint})" if error.hint else ""
            problems += [f"{other.label}: {line}{hint}" for line in (error.problems or (error.message,))]
    if problems:
        raise InputError(f"{name}: compare_with: {len(problems)} problem{'s' * (len(problems) > 1)}", problems=problems)


def _note_predictions(recipe_name: str, recipe: Recipe, progress: Progress, machine: Machine) -> None:
    """What `tkit plan` says of each engine on this machine's GPU: before the hours are spent."""
    gpu = gpu_of_device(machine.gpus[0].name) if machine.gpus else None
    if gpu is None:
        return
    profile = resolve_profile(recipe.sweep)
    load = {
        "isl": profile.shapes[0].isl,
        "osl": profile.shapes[0].osl,
        "concurrency": max(profile.concurrency, default=1),
    }
    for engine in recipe.engines:
        layout = {"tp": engine.tp_size, "pp": engine.pp_size, "quant": engine.quant}
        try:
            found = plan(recipe_name, {"gpu": gpu, **layout, **load})
            rate = f"{found.tok_s.value:,.0f} tok/s ({found.tok_s.low:,.0f} to {found.tok_s.high:,.0f})"
            progress.note(f"plan {engine.quant}: {found.verdict}; {rate}")
        except InputError as error:
            progress.note(f"plan {engine.quant}: {'; '.join((error.message, *error.problems))}")


def _sweep_engine(directory: Path, card: EngineCard, recipe: Recipe, progress: Progress, options: RunOptions) -> Path:
    def is_same(manifest: Manifest) -> bool:
        return (manifest.engine or {}).get("key") == card.key and manifest.validation is not None

    def measure(name: str | None, resume: bool) -> SweepRecord:
        with running_server(directory, replace(SERVING, device=options.device), progress=progress):
            target = Target(engine=str(directory))
            return run_sweep(recipe.sweep, target, name=name, resume=resume, progress=progress)

    return _sweep(card.name, Target.protocol, is_same, measure, recipe, progress, options)


def _sweep_other(
    other: OtherEngine, first: tuple[Path, EngineCard], recipe: Recipe, progress: Progress, options: RunOptions
) -> Path:
    """`first`: the recipe's first engine, which names the model and has its tokenizer."""
    directory, card = first
    target = _target(other, directory / "tokenizer")

    def is_same(manifest: Manifest) -> bool:
        if other.protocol == HF_GENERATE:
            return manifest.identity.get("source_sha256") == source_sha256(card)
        is_there = manifest.url == normal_url(other.protocol, str(other.url))
        return is_there and manifest.label == other.label and other.model in (None, manifest.model)

    def measure(name: str | None, resume: bool) -> SweepRecord:
        if other.protocol == HF_GENERATE:
            return sweep_generate(
                recipe.sweep, str(directory), device=options.device, label=other.name, name=name, resume=resume,
                progress=progress,
            )  # fmt: skip
        return run_sweep(recipe.sweep, target, name=name, resume=resume, progress=progress)

    return _sweep(other.label, other.protocol, is_same, measure, recipe, progress, options)


def _sweep(
    label: str,
    protocol: str,
    is_same: Callable[[Manifest], bool],
    measure: Callable[[str | None, bool], SweepRecord],
    recipe: Recipe,
    progress: Progress,
    options: RunOptions,
) -> Path:
    """The directory of the sweep that is there, or that `measure(name, resume)` makes or completes."""
    there = None if options.is_fresh else _earlier_sweep(is_same, protocol, recipe, options.baseline)
    if there is not None and not there.is_unfinished():
        progress.note(f"{label}: measured in {there.path}; --fresh measures it again")
        return there.path
    return Path(measure(there.path.name if there is not None else None, there is not None).directory)


def _target(other: OtherEngine, tokenizer: Path | None) -> Target:
    return Target(
        url=other.url,
        protocol=other.protocol,
        model=other.model,
        label=other.label,
        tokenizer=Path(other.tokenizer) if other.tokenizer else tokenizer,
        num_gpus=other.num_gpus,
        api_key_file=Path(other.api_key_file) if other.api_key_file else None,
        metrics_url=other.metrics_url,
    )


def _earlier_sweep(
    is_same: Callable[[Manifest], bool], protocol: str, recipe: Recipe, baseline: str | None
) -> RunDirectory | None:
    """The newest sweep of the same with this profile, by this tkit on this machine. Never the one that is kept as
    `baseline`: nothing is compared with itself."""
    compared = find_baseline_directory(baseline, REPORTS_DIR) if baseline else None
    wanted = (
        protocol, resolve_profile(recipe.sweep).digest, recipe.sweep.seed, __version__, client_machine()["cpu"],
    )  # fmt: skip
    found: list[tuple[str, RunDirectory]] = []
    for path in REPORTS_DIR.glob(f"*/{MANIFEST_FILE}"):
        run = RunDirectory(path.parent)
        try:
            manifest = run.read_manifest()
        except InputError:
            continue
        identity = manifest.identity
        measured = (
            manifest.protocol, manifest.profile_digest, manifest.seed, identity.get("tkit"),
            (identity.get("client") or {}).get("cpu"),
        )  # fmt: skip
        is_baseline = compared is not None and read_json(compared / MANIFEST_FILE) == read_json(path)
        if measured == wanted and is_same(manifest) and not is_baseline:
            found.append((manifest.started, run))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _plan_engines(
    source: ModelSource, recipe: Recipe, progress: Progress, machine: Machine, backend: str
) -> list[EnginePlan]:
    """All for one backend: a comparison across backends would be one of backends."""
    plans = [plan_engine(source, engine, progress, machine, backend=backend) for engine in recipe.engines]
    reasons = {plan.backend: plan.reason for plan in plans}
    if len(reasons) > 1:
        reasons = {"reference": f"not every engine runs on {' or '.join(sorted(reasons))}"}
        plans = [plan_engine(source, engine, progress, machine, backend="reference") for engine in recipe.engines]
    for name, reason in reasons.items():
        progress.note(f"backend {name}: {reason}")
    return plans
