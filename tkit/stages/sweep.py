"""The sweep: find the server, check that it is the right one, measure every point of the grid, keep every number."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tkit import __version__
from tkit.backends.nvidia import visible_gpus
from tkit.errors import InputError
from tkit.files import read_api_key, read_json, sha256_file
from tkit.loadgen.arrivals import trace_rate
from tkit.loadgen.grid import Grid, server_difference
from tkit.loadgen.http import http_address, is_loopback
from tkit.loadgen.profiles import Profile, resolve_profile
from tkit.loadgen.protocols import find_protocol
from tkit.loadgen.run_directory import RunDirectory, utc_now
from tkit.loadgen.session import Session
from tkit.loadgen.telemetry import Sampler
from tkit.loadgen.workload import Workload, make_workload
from tkit.specs.client import ClientCalibration
from tkit.specs.engine import CARD_FILE
from tkit.specs.progress import Progress
from tkit.specs.recipe import SweepRecipe
from tkit.specs.record import VALIDATION_FILE, FoundMax, HostSpeed, Manifest, PointSummary
from tkit.stages.calibrate import client_machine, find_calibration
from tkit.stages.engines import ENGINES_DIR
from tkit.stages.host_speed import host_speed
from tkit.stages.target import Endpoint, Target, check_target, find_endpoint, refuse_stranger

REPORTS_DIR = Path("reports")
MAX_LABEL = 100  # characters of it in a directory's name, which file systems bound


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    directory: str
    manifest: Manifest
    points: tuple[PointSummary, ...]
    found: tuple[FoundMax, ...] = ()  # by --find-max, per shape


def run_sweep(
    recipe: SweepRecipe,
    target: Target,
    *,
    out: Path = REPORTS_DIR,
    name: str | None = None,
    resume: bool = False,
    engines_dir: Path = ENGINES_DIR,
    progress: Progress | None = None,
) -> SweepRecord:
    """Measures and writes `out/<name>`. Points that are not valid are kept and say why. `resume`: goes on with the run
    `out/<name>`, or the newest in `out`, that was cut off or has holes.

    Raises InputError before anything is sent when what was asked for cannot be; ServerError when no server answers, it
    is not the one that was meant, or it stops answering. What was measured until then stays.
    """
    progress = progress or Progress()
    profile = resolve_profile(recipe)
    check_target(target, name)
    api_key = read_api_key(target.api_key_file) if target.api_key_file is not None else None
    endpoint = find_endpoint(target, engines_dir)
    if endpoint.card is not None:
        check_shapes(recipe, profile, endpoint.card.name, endpoint.card.max_position_embeddings)
    workload = make_workload(
        profile.shapes,
        Path(recipe.dataset) if recipe.dataset is not None else None,
        _tokenizer_dir(recipe, target, endpoint),
        recipe.seed,
        endpoint.card.max_position_embeddings if endpoint.card else None,
    )
    profile = _with_workload(profile, workload)
    num_gpus = _num_gpus(target, endpoint)
    calibration = find_calibration(out, target.protocol)
    chosen = f", the newest of {endpoint.num_servers} running servers" if endpoint.num_servers > 1 else ""
    progress.note(
        f"measuring {_label(target, endpoint)} at {endpoint.url} ({target.protocol}){chosen}, profile {profile.name}"
    )
    with Session(
        target.protocol,
        endpoint.url,
        endpoint.model,
        prompts=workload.source,
        profile=profile,
        timestamps=workload.timestamps,
        seed=recipe.seed,
        idle_timeout_s=target.timeout_s,
        num_gpus=num_gpus,
        api_key=api_key,
        calibration=calibration,
        num_workers=target.num_workers,
    ) as session:
        endpoint = dataclasses.replace(endpoint, model=session.model)
        refuse_stranger(endpoint, session.identity)
        for shape in profile.shapes:
            session.probe(shape)
        identity = _identity(endpoint, session, workload, num_gpus, calibration)
        manifest = _manifest(recipe, target, endpoint, profile, session, identity, out, name)
        run, manifest, kept = open_run(out, name, manifest, progress, resume=resume)
        with contextlib.closing(run), _sampler(target, endpoint) as sampler:
            grid = Grid(session, profile, run, manifest, progress, reconnect_s=target.reconnect_s, sampler=sampler)
            grid.measure(kept)
    if grid.num_holes:
        progress.note(f"{grid.num_holes} points have no result; to measure them: {manifest.command} --resume")
    return SweepRecord(directory=str(run.path), manifest=manifest, points=tuple(grid.points.values()), found=grid.found)


def _manifest(
    recipe: SweepRecipe,
    target: Target,
    endpoint: Endpoint,
    profile: Profile,
    session: Session,
    identity: Mapping[str, Any],
    out: Path,
    name: str | None,
) -> Manifest:
    return Manifest(
        run=name or run_name(_label(target, endpoint), profile),
        label=_label(target, endpoint),
        profile=profile.name,
        profile_digest=profile.digest,
        seed=recipe.seed,
        protocol=target.protocol,
        url=endpoint.url,
        model=session.model,
        shapes=tuple(map(str, profile.shapes)),
        concurrency=profile.concurrency,
        rates=profile.rates,
        arrivals=str(profile.arrivals) if profile.rates or profile.open_shares else None,
        repeats=profile.repeats,
        requests=recipe.requests,
        duration_s=recipe.duration_s,
        engine=dataclasses.asdict(endpoint.card) if endpoint.card else None,
        validation=_validation(endpoint),
        identity=identity,
        host_speed=_host_speed(endpoint, session),
        command=sweep_command(recipe, target, out),
        started=utc_now(),
    )


# What must be equal for a run to go on: field of the manifest -> option.
SAME = {
    "profile": "PROFILE", "shapes": "--shape", "concurrency": "--concurrency", "rates": "--rate", "arrivals": "--arrivals",
    "repeats": "--repeats", "requests": "--requests", "duration_s": "--duration", "seed": "--seed",
    "protocol": "--protocol", "model": "--model", "profile_digest": "the profile's other settings",
}  # fmt: skip


def open_run(
    out: Path, name: str | None, manifest: Manifest, progress: Progress, *, resume: bool
) -> tuple[RunDirectory, Manifest, Mapping[str, PointSummary]]:
    """(the run, its manifest, the points that it has): a new one with this manifest, or the one to go on with."""
    if not resume:
        run = RunDirectory.create(out, manifest.run, is_fixed=name is not None)
        manifest = dataclasses.replace(manifest, run=run.path.name)
        try:
            run.write_manifest(manifest)
        except BaseException:
            run.remove()
            raise
        return run, manifest, {}
    run = RunDirectory.unfinished(out, name)
    try:
        manifest, kept = _resumed(run, manifest)
    except BaseException:
        run.close()
        raise
    progress.note(f"resuming {run.path}: points kept: {len(kept)}")
    return run, manifest, kept


def _resumed(run: RunDirectory, typed: Manifest) -> tuple[Manifest, Mapping[str, PointSummary]]:
    """The run's own manifest and the points to keep. Raises InputError unless the same is to be measured again."""
    manifest = run.read_manifest()
    problems = [
        f"{option}: {getattr(manifest, name)} then, {getattr(typed, name)} now"
        for name, option in SAME.items()
        if getattr(manifest, name) != getattr(typed, name)
    ]
    if len(problems) > 1:
        problems = [problem for problem in problems if not problem.startswith(SAME["profile_digest"])]
    problems += [
        f"{what} is not the same: {manifest.identity.get(name)} then, {typed.identity.get(name)} now"
        for name, what in (
            ("engine_card_sha256", "the engine"),
            ("source_sha256", "the model"),
            ("tokenizer_sha256", "the tokenizer"),
            ("dataset", "the data set"),
        )
        if manifest.identity.get(name) != typed.identity.get(name)
    ]
    if stranger := server_difference(manifest.identity.get("server", {}), typed.identity.get("server", {})):
        problems.append(stranger)
    if problems:
        raise InputError(
            f"{run.path} measured something else",
            problems=problems,
            hint=f"to go on with it: {manifest.command} --resume --name {manifest.run}",
        )
    return manifest, run.kept_points()


def _sampler(target: Target, endpoint: Endpoint) -> Sampler:
    """Servers of OpenAI's API have their metrics beside it, under /metrics. One that does not answer gives none."""
    url = target.metrics_url or endpoint.metrics_url
    if url is None and find_protocol(target.protocol).lists_models:
        address = http_address(endpoint.url)
        url = f"{'https' if address.is_tls else 'http'}://{address.authority}/metrics"
    return Sampler(url, asks_gpus=is_loopback(endpoint.url))


def check_shapes(recipe: SweepRecipe, profile: Profile, engine: str, limit: int) -> None:
    """Raises InputError for shapes longer than the `limit` positions of the engine. Data sets are cut to fit."""
    if recipe.dataset is not None:
        return
    problems = [
        f"{shape} needs {shape.isl + shape.osl} positions"
        for shape in profile.shapes
        if shape.unit == "tokens" and shape.isl + shape.osl > limit
    ]
    if problems:
        raise InputError(
            f"{engine} has {limit} positions, too few for {len(problems)} of {len(profile.shapes)} shapes",
            problems=problems,
            hint="choose shorter ones: --shape ISL/OSL, or shapes in the recipe's sweep",
        )


def _with_workload(profile: Profile, workload: Workload) -> Profile:
    """What a data set brings: its mean shape, and the rate at which a trace was recorded."""
    profile = dataclasses.replace(profile, shapes=workload.shapes)
    if profile.arrivals.process != "trace":
        return profile
    if not workload.timestamps:
        raise InputError(
            "--arrivals is trace, but the data set has no timestamps", hint="give a trace, or another process"
        )
    if profile.rates:
        return profile
    return dataclasses.replace(profile, rates=(trace_rate(workload.timestamps),))


def _tokenizer_dir(recipe: SweepRecipe, target: Target, endpoint: Endpoint) -> Path | None:
    """None where lengths are told in characters, or may be told by a data set."""
    if recipe.isl_chars:
        return None
    if target.tokenizer is not None:
        return target.tokenizer
    if endpoint.engine_dir is not None:
        return endpoint.engine_dir / "tokenizer"
    if recipe.dataset is not None:
        return None
    raise InputError(
        "prompts of an exact length need the served model's tokenizer",
        hint="give its directory: --tokenizer DIR, or the engine: --engine DIR; or count characters: --isl-chars",
    )


def _num_gpus(target: Target, endpoint: Endpoint) -> int | None:
    """The reference backend runs all ranks on one device, often a CPU: per-GPU figures of it would be invented."""
    if target.num_gpus is not None or endpoint.card is None or endpoint.card.backend == "reference":
        return target.num_gpus
    return endpoint.card.tp_size * endpoint.card.pp_size


def _label(target: Target, endpoint: Endpoint) -> str:
    return target.label or (endpoint.card.name if endpoint.card else endpoint.model or "the model")


def run_name(label: str, profile: Profile) -> str:
    """Of a run's directory: safe, and new every second."""
    label = re.sub(r"[^A-Za-z0-9._-]+", "_", label).lstrip(".")[:MAX_LABEL]
    return f"{label}-{profile.name.partition('/')[0]}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


def _validation(endpoint: Endpoint) -> Mapping[str, Any] | None:
    path = endpoint.engine_dir / VALIDATION_FILE if endpoint.engine_dir else None
    return read_json(path) if path is not None and path.is_file() else None


def _identity(
    endpoint: Endpoint,
    session: Session,
    workload: Workload,
    num_gpus: int | None,
    calibration: ClientCalibration | None,
) -> dict[str, Any]:
    card_path = endpoint.engine_dir / CARD_FILE if endpoint.engine_dir else None
    client = {
        **client_machine(),
        "calibration": dataclasses.asdict(calibration) if calibration is not None else None,
        "packages": {name: importlib.metadata.version(name) for name in ("uvloop", "hpack", "tokenizers")},
    }
    return {
        "tkit": __version__,
        "engine_card_sha256": sha256_file(card_path) if card_path else None,
        **workload.identity,
        "token_source": session.token_source,
        "server": dict(session.identity),
        "hardware": _hardware(endpoint, session),
        "num_gpus": num_gpus,
        "client": client,
    }


def _hardware(endpoint: Endpoint, session: Session) -> str | None:
    """The name of what runs the engine, where that is a part of this machine; None where nobody tells."""
    if _runs_on_this_cpu(endpoint, session):
        return client_machine()["cpu"]
    gpus, _ = visible_gpus() if endpoint.card is not None and is_loopback(endpoint.url) else ((), None)
    return gpus[0].name if gpus else None


def _runs_on_this_cpu(endpoint: Endpoint, session: Session) -> bool:
    """The reference engine, told to or left without a GPU."""
    device = session.identity.get("parameters", {}).get("device")
    return is_loopback(endpoint.url) and (device == "cpu" or (device == "auto" and not visible_gpus()[0]))


def _host_speed(endpoint: Endpoint, session: Session) -> HostSpeed | None:
    if endpoint.card is None or not _runs_on_this_cpu(endpoint, session):
        return None
    return host_speed(4 * endpoint.card.num_params)


def sweep_command(recipe: SweepRecipe, target: Target, out: Path) -> str:
    """The command line that repeats a sweep."""
    options = {
        "url": target.url,
        "protocol": target.protocol if target.protocol != Target.protocol else None,
        "model": target.model,
        "label": target.label,
        "shape": ",".join(recipe.shapes) if recipe.shapes else None,
        "concurrency": ",".join(map(str, recipe.concurrency)) if recipe.concurrency else None,
        "isl-chars": "" if recipe.isl_chars else None,
        "prefix-share": ",".join(f"{share:g}" for share in recipe.prefix_shares) if recipe.prefix_shares else None,
        "spread": recipe.spread,
        "dataset": recipe.dataset,
        "rate": ",".join(f"{rate:g}" for rate in recipe.rates) if recipe.rates else None,
        "arrivals": recipe.arrivals,
        "max-outstanding": recipe.max_outstanding,
        "find-max": recipe.find_max,
        "attainment": recipe.slo_share,
        "requests": recipe.requests,
        "duration": recipe.duration_s,
        "repeats": recipe.repeats,
        "seed": recipe.seed or None,
        "tokenizer": target.tokenizer,
        "engine": target.engine,
        "gpus": target.num_gpus,
        "api-key-file": target.api_key_file,
        "metrics-url": target.metrics_url,
        "workers": target.num_workers,
        "timeout": target.timeout_s if target.timeout_s != Target.timeout_s else None,
        "reconnect": target.reconnect_s if target.reconnect_s != Target.reconnect_s else None,
        "out": out if out != REPORTS_DIR else None,
    }
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value)) if word]
    return shlex.join(["tkit", "sweep", recipe.profile, *words])
