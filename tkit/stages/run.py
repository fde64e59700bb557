"""Run: everything a recipe asks for, in order: build and validate each engine, serve and sweep each, one report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from tkit.backends.nvidia import Machine
from tkit.report.gates import parse_gates
from tkit.specs.progress import Progress
from tkit.specs.recipe import Recipe
from tkit.specs.server import ServeOptions
from tkit.stages.backends import EnginePlan, build_engine, plan_engine
from tkit.stages.engines import ENGINES_DIR
from tkit.stages.models import ModelSource, fetch_model, find_recipe
from tkit.stages.report import REPORTS_DIR, check_gates, report
from tkit.stages.serve import running_server
from tkit.stages.sweep import Target, run_sweep
from tkit.stages.validate import validate
from tkit.units import format_seconds


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    recipe: str
    engines: tuple[str, ...]
    sweeps: tuple[str, ...]
    report: str
    seconds: float


def run_recipe(
    recipe_name: str, progress: Progress, machine: Machine, *, device: str = "auto", backend: str = "auto"
) -> RunRecord:
    """Engines that exist are reused; every engine is validated and measured anew, on ports of its own.

    Raises GateFailed, after the report is written, unless every gate of the recipe passes.
    """
    started = time.monotonic()
    name, recipe = find_recipe(recipe_name)
    gates = parse_gates(recipe.report.fail_on, f"{name}: report: fail_on") if recipe.report.fail_on is not None else ()
    source = fetch_model(recipe, name)
    plans = _plan_engines(source, recipe, progress, machine, backend)  # all are checked before one is built
    engines: list[Path] = []
    for plan in plans:
        directory, card, existed = build_engine(plan, progress, machine, out=ENGINES_DIR, device=device)
        seconds = format_seconds(card.build["seconds"])
        progress.note(f"{card.name}: {'exists' if existed else f'built in {seconds}'}")
        quality = validate(directory, progress, device=device)
        progress.note(
            f"{card.name}: perplexity {quality.ppl:.3f} (source {quality.ppl_source:.3f}), KL {quality.kl:.2e}, "
            f"top-1 {quality.top1:.2%}"
        )
        engines.append(directory)
    sweeps: list[Path] = []
    for directory in engines:
        options = ServeOptions(device=device, http_port=0, grpc_port=0, metrics_port=0, openai_port=0)
        with running_server(directory, options, progress=progress):
            sweep = run_sweep(recipe.sweep, Target(engine=str(directory)), progress=progress)
        sweeps.append(Path(sweep.directory))
    quants = [engine.quant for engine in recipe.engines]
    baseline = sweeps[quants.index(recipe.report.baseline)] if recipe.report.baseline else sweeps[0]
    path, comparison = report(
        sweeps,
        progress,
        out=Path(recipe.report.out) if recipe.report.out else REPORTS_DIR / name,
        baseline=str(baseline),
        with_png=True,
        gates=gates,
    )
    check_gates(comparison, path)
    return RunRecord(
        recipe=name,
        engines=tuple(map(str, engines)),
        sweeps=tuple(map(str, sweeps)),
        report=str(path),
        seconds=time.monotonic() - started,
    )


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
