"""What differs between runs besides the result. Knows which facts a comparison is about and which may explain it instead."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from tkit.report.read import Run
from tkit.report.record import Difference

# facts of the card that change what is served, in the order a reader asks for them; sizes have a table of their own
ENGINE_FACTS = (
    "quant", "quant_algo", "tp_size", "pp_size", "backend", "dtype", "architecture", "num_params",
    "max_position_embeddings", "vocab_size", "recipe", "versions",
)  # fmt: skip
CONDITIONS = (
    "profile", "profile_digest", "seed", "protocol", "model", "shapes", "concurrency", "repeats", "requests",
    "duration_s", "definitions",
)  # fmt: skip
# parts of the identity that differ between any two engines or any two starts of a server
NOT_CONDITIONS = {"engine_card_sha256", "server.parameters.engine_dir", "server.parameters.instance"}


def differences(runs: Mapping[str, Run]) -> tuple[Difference, ...]:
    """The facts in which the runs are known not to be equal: what a run does not tell is not a difference."""
    found: list[Difference] = []
    sources: tuple[tuple[str, Callable[[Run], dict[str, str]]], ...] = (
        ("engine", _engine_facts),
        ("model", _model_facts),
        ("conditions", _condition_facts),
    )
    for kind, facts_of in sources:
        facts = {run_id: facts_of(run) for run_id, run in runs.items()}
        for name in dict.fromkeys(name for values in facts.values() for name in values):
            values = {run_id: facts[run_id].get(name) for run_id in runs}
            if len(set(values.values()) - {None}) > 1:
                found.append(Difference(kind=kind, name=name, values=values))
    return tuple(found)


def _engine_facts(run: Run) -> dict[str, str]:
    if run.engine is None:
        return {}
    card = asdict(run.engine)
    recipe = {key: value for key, value in card["recipe"].items() if key not in card}  # not twice
    return dict(flat_facts({key: card[key] for key in ENGINE_FACTS} | {"recipe": recipe}))


def _model_facts(run: Run) -> dict[str, str]:
    source = run.engine.source if run.engine else {}
    facts = dict(flat_facts({key: source[key] for key in ("model", "revision") if key in source}))
    if source.get("files"):
        digest = hashlib.sha256(json.dumps(source["files"], sort_keys=True).encode()).hexdigest()
        facts["source files (sha256)"] = digest[:16]
    return facts


def _condition_facts(run: Run) -> dict[str, str]:
    facts = dict(flat_facts({key: getattr(run.manifest, key) for key in CONDITIONS}))
    facts["host"] = run.manifest.url.rpartition(":")[0] or run.manifest.url  # ports are handed out as they come
    facts["token_source"] = ", ".join(sorted({point.summary.token_source for point in run.points}))
    return facts | {name: value for name, value in flat_facts(run.manifest.identity) if name not in NOT_CONDITIONS}


def flat_facts(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """`{"host": {"cpu": "x"}}` -> ("host.cpu", "x")"""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat_facts(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", ", ".join(str(item) for item in value)
        else:
            yield f"{prefix}{key}", "none" if value is None else str(value)
