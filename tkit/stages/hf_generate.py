"""The baseline that everybody has: an engine's source model under transformers' `generate`, in this process, as a sweep.

Static batches of C prompts, one after the other; no server, no queue, no network. So TTFT is the batch's prefill, TPOT its
decode step, and a request never waits for another: label and identity say so wherever the numbers stand.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

from tkit import __version__
from tkit.errors import InputError
from tkit.loadgen.exchange import RequestRecord
from tkit.loadgen.grid import point_line
from tkit.loadgen.load_trace import LoadTrace
from tkit.loadgen.monitor import rss_bytes
from tkit.loadgen.point import Place, summarise
from tkit.loadgen.profiles import Profile, resolve_profile
from tkit.loadgen.prompts import PromptMaker
from tkit.loadgen.run_directory import utc_now
from tkit.specs.engine import EngineCard
from tkit.specs.progress import Progress
from tkit.specs.recipe import HF_GENERATE, SweepRecipe
from tkit.specs.record import Manifest, PointSummary
from tkit.stages.calibrate import client_machine
from tkit.stages.engines import ENGINES_DIR, find_engine, read_card
from tkit.stages.sweep import REPORTS_DIR, SweepRecord, check_shapes, open_run, run_name, sweep_command
from tkit.stages.target import Target
from tkit.stages.validate import source_directory
from tkit.units import NS_PER_S

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKEN_SOURCE = "token_ids"


def sweep_generate(
    recipe: SweepRecipe,
    engine: str | None,
    *,
    device: str = "auto",
    label: str | None = None,
    out: Path = REPORTS_DIR,
    name: str | None = None,
    resume: bool = False,
    engines_dir: Path = ENGINES_DIR,
    progress: Progress | None = None,
) -> SweepRecord:
    """Measures the model that `engine` was built from (None = the newest engine) and writes `out/<name>`. `resume`: goes on
    with the run `out/<name>`, or the newest in `out`, that was cut off."""
    progress = progress or Progress()
    profile = check_generate(recipe)
    engine_dir = find_engine(engine, engines_dir)
    card = read_card(engine_dir)
    prompts = PromptMaker(engine_dir / "tokenizer", recipe.seed)
    check_shapes(recipe, profile, card.name, card.max_position_embeddings)
    title = label or f"{card.source['model']}, transformers generate"
    progress.note(f"measuring {title} in this process ({HF_GENERATE}), profile {profile.name}")

    import torch
    import transformers

    from tkit.runtime.device import pick_device
    from tkit.runtime.load import load_source

    device = pick_device(device)
    model = load_source(source_directory(card.source), device)
    manifest = Manifest(
        run=name or run_name(f"{card.source['model']}-generate", profile),
        label=title,
        profile=profile.name,
        profile_digest=profile.digest,
        seed=recipe.seed,
        protocol=HF_GENERATE,
        url="this process",
        model=str(card.source["model"]),
        shapes=tuple(map(str, profile.shapes)),
        concurrency=profile.concurrency,
        repeats=profile.repeats,
        requests=recipe.requests,
        duration_s=recipe.duration_s,
        identity={
            "tkit": __version__,
            "source_sha256": source_sha256(card),
            "tokenizer_sha256": prompts.digest,
            "token_source": TOKEN_SOURCE,
            "server": {
                "server": "transformers generate",
                "version": transformers.__version__,
                "torch": torch.__version__,
                "batching": "static batches of C prompts, one after the other; no server and no queue",
                "dtype": str(model.dtype),
                "device": device,
                "threads": torch.get_num_threads(),
            },
            "hardware": client_machine()["cpu"] if device == "cpu" else torch.cuda.get_device_name(),
            "client": client_machine(),
        },
        command=sweep_command(recipe, Target(protocol=HF_GENERATE, engine=card.name, label=label), out),
        started=utc_now(),
    )
    run, manifest, kept = open_run(out, name, manifest, progress, resume=resume)
    points: list[PointSummary] = []
    with contextlib.closing(run), run.sweeping(points, progress, is_resumed=resume):
        for repeat in range(1, profile.repeats + 1):
            for shape in profile.shapes:
                for concurrency in profile.concurrency:
                    place = Place(shape=shape, concurrency=concurrency, repeat=repeat)
                    if place.slug in kept:
                        points.append(kept[place.slug])
                        continue
                    summary, records = _measure(model, place, profile, prompts, progress)
                    run.write_point(place, summary, records)
                    run.journal("point", point=place.slug, is_valid=summary.is_valid)
                    progress.note(f"{shape} {place.load}: {point_line(summary)}")
                    points.append(summary)
        run.write_summary(manifest, points)
    return SweepRecord(directory=str(run.path), manifest=manifest, points=tuple(points))


def _measure(
    model: PreTrainedModel, place: Place, profile: Profile, prompts: PromptMaker, progress: Progress
) -> tuple[PointSummary, list[RequestRecord]]:
    """One batch to warm up, then as many as give the profile's requests and last its time."""
    from tkit.runtime.static_batch import generate_batch

    shape, size = place.shape, place.concurrency
    assert size is not None
    count, started = math.ceil(profile.num_requests(size) / size), utc_now()
    records: list[RequestRecord] = []
    steady_ns = start_ns = end_ns = time.monotonic_ns()
    done = -1  # the warm-up
    while True:
        elapsed_s = (end_ns - steady_ns) / NS_PER_S if done > 0 else 0.0
        is_enough = done >= count and elapsed_s >= profile.min_duration_s
        if is_enough or (profile.max_duration_s is not None and elapsed_s >= profile.max_duration_s):
            break
        first = len(records)
        ids = [
            prompts.encode(prompts.ask(shape, ("generate", size, place.repeat), first + index, 0).prompt)
            for index in range(size)
        ]
        batch = generate_batch(model, ids, shape.osl)
        end_ns = time.monotonic_ns()
        records += [_record(first + index, batch.start_ns, batch.token_ns, end_ns, shape.isl) for index in range(size)]
        done += 1
        if done == 0:
            steady_ns = end_ns
        progress.step(f"{shape} {place.load}", min(done, count), count)
    trace = LoadTrace(
        sent=(),
        start_ns=start_ns,
        steady_start_ns=steady_ns,
        steady_end_ns=end_ns,
        end_ns=end_ns,
        cpu_shares=(0.0,),  # there is no client
        lags_ms=(),
        rss_bytes=rss_bytes(),
        gave_up=False,
    )
    summary = summarise(
        place,
        records,
        trace,
        limits=profile.limits,
        token_source=TOKEN_SOURCE,
        num_gpus=1 if model.device.type == "cuda" else None,
        started=started,
    )
    return summary, records


def _record(index: int, start_ns: int, token_ns: tuple[int, ...], end_ns: int, isl: int) -> RequestRecord:
    return RequestRecord(
        id=index,
        scheduled_ns=start_ns,
        sent_ns=start_ns,
        first_byte_ns=token_ns[0],
        first_token_ns=token_ns[0],
        last_token_ns=token_ns[-1],
        end_ns=end_ns,
        isl_asked=isl,
        isl=isl,
        osl_asked=len(token_ns),
        osl=len(token_ns),
        n_first=1,
        chunks=len(token_ns),
        status="ok",
        error=None,
        detail="",
        token_ns=array("q", token_ns),
        token_counts=array("q", [1] * len(token_ns)),
    )


def check_generate(recipe: SweepRecipe) -> Profile:
    """What will be measured. Raises InputError that lists what static batches cannot do; loads nothing."""
    profile, problems = resolve_profile(recipe), []
    if not profile.concurrency or profile.rates or profile.find_max:
        problems.append("it runs batches of a fixed size: give --concurrency, not --rate or --find-max")
    if any(shape.spread != 1 or shape.unit != "tokens" for shape in profile.shapes) or recipe.dataset is not None:
        problems.append("the prompts of a batch have one length: give --shape ISL/OSL alone")
    if problems:
        raise InputError(f"--protocol {HF_GENERATE} cannot measure this", problems=problems)
    return profile


def source_sha256(card: EngineCard) -> str:
    """Of the files that the engine was built from, so that engines of one model share its measurement."""
    return hashlib.sha256(json.dumps(card.source["files"], sort_keys=True).encode()).hexdigest()
