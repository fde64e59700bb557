"""Run directories as a sweep would leave them: a closed loop against a server that slows down as it fills.

The simulation shares no code with tkit.report, so that a report's numbers have something to be checked against.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tkit.specs.record import CHUNK_COLUMNS, REQUEST_COLUMNS

SUPPORTED_FROM = {50: 1, 90: 64, 95: 130, 99: 662}
MS = 1_000_000


def card(quant: str = "none", *, tp_size: int = 1, key: str | None = None, **overrides: Any) -> dict[str, Any]:
    """An engine card of the demo's size."""
    bits = {"none": 16, "fp8": 8, "int4_awq": 4}.get(quant, 8)
    rank_bytes = 2_400_000 * bits // 16 // tp_size
    values = {
        "schema": "tkit.engine/1",
        "name": f"demo-{quant}-tp{tp_size}-3f9c2a",
        "key": key or f"{quant}{tp_size}".encode().hex().ljust(64, "0"),
        "created": "2025-06-01T10:00:00Z",
        "backend": "reference",
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "quant": quant,
        "quant_algo": {"none": None, "fp8": "FP8", "int4_awq": "W4A16_AWQ"}.get(quant),
        "tp_size": tp_size,
        "pp_size": 1,
        "num_params": 1_200_000,
        "weight_bytes": rank_bytes * tp_size,
        "max_position_embeddings": 2048,
        "vocab_size": 4096,
        "recipe": {"quant": quant, "tp_size": tp_size, "pp_size": 1, "calib_samples": 16},
        "source": {
            "model": "demo",
            "path": "demo",
            "revision": None,
            "files": {"model.safetensors": {"bytes": 2_400_000, "sha256": "ab" * 32}},
        },
        "files": {
            "checkpoint/config.json": {"bytes": 2100, "sha256": "cd" * 32},
            **{
                f"checkpoint/rank{rank}.safetensors": {"bytes": rank_bytes + 5000, "sha256": f"{rank:02d}" * 32}
                for rank in range(tp_size)
            },
            "tokenizer/tokenizer.json": {"bytes": 310_000, "sha256": "ef" * 32},
        },
        "versions": {"tkit": "0.1.0", "torch": "2.9.0"},
        "command": f"tkit build --tp {tp_size} --quant {quant}",
        "build": {"seconds": 12.5, "peak_memory_bytes": 310_000_000, "source_bytes": 2_400_000},
        "notes": [],
    }
    return values | overrides


def validation(*, kl: float = 0.004, ppl: float = 21.3, ppl_source: float = 21.1) -> dict[str, Any]:
    return {
        "schema": "tkit.validation/1",
        "ppl": ppl,
        "ppl_source": ppl_source,
        "ppl_ratio": ppl / ppl_source,
        "kl": kl,
        "top1": 0.973,
        "tokens": 8192,
        "text": "the text that ships with tkit",
    }


def make_run(
    reports: Path,
    name: str,
    *,
    label: str | None = None,
    engine: Mapping[str, Any] | None = None,
    quality: Mapping[str, Any] | None = None,
    shapes: Sequence[str] = ("128/64",),
    concurrency: Sequence[int] = (1, 4, 16),
    repeats: int = 1,
    requests: int | None = None,
    speed: float = 1.0,
    ttft_speed: float | None = None,
    noise: float = 0.05,
    seed: int = 0,
    has_gpu: bool = False,
    token_source: str = "server_usage",
    error_rate: float = 0.0,
    invalid: Mapping[int, str] | None = None,
    **manifest: Any,
) -> Path:
    """One run directory. `speed` scales every time; `invalid` maps a concurrency to the reason its points are invalid."""
    directory = reports / name
    generator = np.random.default_rng(seed)
    label = label or (engine["name"] if engine else "demo-model")
    for shape in shapes:
        for level in concurrency:
            for repeat in range(1, repeats + 1):
                count = requests or max(10 * level, 40)
                table, gaps = simulate(generator, shape, level, count, (ttft_speed or speed, speed), noise, error_rate)
                write_point(
                    directory / "points" / f"{shape.replace('/', 'x')}-c{level}-r{repeat}",
                    table,
                    gaps,
                    shape=shape,
                    concurrency=level,
                    repeat=repeat,
                    num_gpus=(engine["tp_size"] if engine else 1) if has_gpu else None,
                    token_source=token_source,
                    reasons=[invalid[level]] if invalid and level in invalid else [],
                )
    values = {
        "schema": "tkit.sweep/1",
        "definitions": "tkit.definitions/1",
        "run": name,
        "label": label,
        "profile": "quick/1",
        "profile_digest": "9a" * 32,
        "seed": 0,
        "protocol": "triton-grpc",
        "url": "grpc://127.0.0.1:8001",
        "model": "ensemble",
        "shapes": list(shapes),
        "concurrency": list(concurrency),
        "repeats": repeats,
        "requests": requests,
        "duration_s": None,
        "engine": engine,
        "validation": quality,
        "identity": {
            "tkit": "0.1.0",
            "server": {"name": "triton", "version": "2.51.0"},
            "host": {"cpu": "Xeon 2 cores", "gpus": ["H100"] if has_gpu else []},
        },
        "command": "tkit sweep --shape 128/64",
        "started": "2025-06-01T12:00:00Z",
    }
    write(directory / "manifest.json", values | manifest)
    return directory


def as_open_loop(run: Path, rate: float) -> Path:
    """Its points, all of one concurrency, as if they had been driven at a rate; every request was due 30 ms earlier."""
    edit(run / "manifest.json", concurrency=[], rates=[rate], arrivals="poisson")
    for point in sorted((run / "points").iterdir()):
        edit(
            point / "point.json", concurrency=None, rate=rate, arrivals="poisson", client={"delivered_concurrency": 4.0}
        )
        table = pq.read_table(point / "requests.parquet")
        due = pa.array([sent.as_py() - 30_000_000 for sent in table["sent_ns"]], pa.int64())
        index = table.column_names.index("scheduled_ns")
        pq.write_table(table.set_column(index, "scheduled_ns", due), point / "requests.parquet")
        point.rename(point.with_name(point.name.replace("-c4-", f"-rate{rate:g}-")))
    return run


def simulate(
    generator: np.random.Generator,
    shape: str,
    level: int,
    count: int,
    speeds: tuple[float, float],
    noise: float,
    error_rate: float,
) -> tuple[dict[str, list[Any]], dict[str, list[int]]]:
    """`level` streams, each sending its next request when the last one has ended; a warm-up of one round.

    `speeds` scale the time to the first token and the time per token.
    """
    isl, osl = (int(part) for part in shape.split("/"))
    free = np.zeros(level)
    rows: dict[str, list[Any]] = {name: [] for name in REQUEST_COLUMNS}
    gaps: dict[str, list[int]] = {name: [] for name in CHUNK_COLUMNS}
    drift = 0.0
    origin = 5_000_000_000_000
    for index in range(level + count):
        drift = 0.8 * drift + generator.normal(0, 0.2 * noise)
        slot = int(free.argmin())
        sent = free[slot]
        slow = np.exp(generator.normal(0, noise) + drift)
        ttft = (20 + 0.05 * isl + 3 * level) * slow * speeds[0]
        tpot = (5 + 0.35 * level) * slow * speeds[1]
        steps = tpot * generator.gamma(20, 1 / 20, size=osl - 1)
        first, last = sent + ttft, sent + ttft + steps.sum()
        failed = index >= level and generator.random() < error_rate
        if failed:  # cut off after its first token
            last = first
        free[slot] = last + 0.2
        times = {
            "scheduled": sent,
            "sent": sent,
            "first_byte": first,
            "first_token": first,
            "last_token": last,
            "end": last + 0.1,
        }
        for key, value in times.items():
            rows[f"{key}_ns"].append(origin + int(value * MS))
        for key, value in {
            "id": index, "phase": "warmup" if index < level else "measured", "isl_asked": isl, "isl": isl, "osl_asked": osl,
            "osl": 1 if failed else osl, "n_first": 1, "chunks": 1 if failed else osl,
            "status": "error" if failed else "ok", "error": "truncated" if failed else None, "worker": 0,
        }.items():  # fmt: skip
            rows[key].append(value)
        if not failed and index >= level:
            gaps["request"].extend([index] * (osl - 1))
            gaps["gap_ns"].extend(int(step * MS) for step in steps)
    return rows, gaps


def write_point(
    directory: Path,
    rows: Mapping[str, list[Any]],
    gaps: Mapping[str, list[int]],
    *,
    shape: str,
    concurrency: int,
    repeat: int,
    num_gpus: int | None,
    token_source: str,
    reasons: Sequence[str],
) -> None:
    isl, osl = (int(part) for part in shape.split("/"))
    write_parquet(directory / "requests.parquet", rows, REQUEST_COLUMNS)
    write_parquet(directory / "chunks.parquet", gaps, CHUNK_COLUMNS)
    taken = [i for i, phase in enumerate(rows["phase"]) if phase == "measured"]
    good = [i for i in taken if rows["status"][i] == "ok"]

    def ms(later: str, earlier: str, per: Sequence[int] | None = None) -> list[float]:
        return [(rows[later][i] - rows[earlier][i]) / MS / (per[n] if per else 1) for n, i in enumerate(good)]

    ttft, e2e = ms("first_token_ns", "sent_ns"), ms("last_token_ns", "sent_ns")
    tpot = ms("last_token_ns", "first_token_ns", [rows["osl"][i] - rows["n_first"][i] for i in good])
    window = (max(rows["end_ns"][i] for i in taken) - min(rows["sent_ns"][i] for i in taken)) / 1e9
    output = sum(rows["osl"][i] for i in good) / window
    attained = {
        tier: sum(first <= limits[0] and per <= limits[1] for first, per in zip(ttft, tpot, strict=True))
        for tier, limits in {"interactive": (500, 30), "conversational": (2000, 100), "batch": (1e9, 1e9)}.items()
    }
    errors = [rows["error"][i] for i in taken if rows["status"][i] == "error"]
    write(
        directory / "point.json",
        {
            "schema": "tkit.point/1",
            "definitions": "tkit.definitions/1",
            "shape": shape,
            "isl": isl,
            "osl": osl,
            "concurrency": concurrency,
            "repeat": repeat,
            "requests": len(taken),
            "errors": {error: errors.count(error) for error in sorted(set(errors))},
            "token_source": token_source,
            "window_s": window,
            "output_tok_s": output,
            "output_tok_s_whole": output * 0.99,
            "input_tok_s": len(good) * isl / window,
            "requests_s": len(good) / window,
            "tok_s_user": 1000 / float(np.median(tpot)) if tpot else None,
            "tok_s_gpu": output / num_gpus if num_gpus else None,
            "goodput": {
                tier: {"requests_s": n / window, "attainment": n / len(taken), "low": 0.0, "high": 1.0}
                for tier, n in attained.items()
            },
            "ttft": distribution(ttft),
            "ttfb": distribution(ttft),
            "tpot": distribution(tpot),
            "chunk_gap": distribution([gap / MS for gap in gaps["gap_ns"]]),
            "e2e": distribution(e2e),
            "client": {"cpu_share": 0.08, "loop_lag_p99_ms": 0.4, "delivered_concurrency": 0.999},
            "is_valid": not reasons,
            "invalid_reasons": list(reasons),
            "started": "2025-06-01T12:00:30Z",
            "duration_s": window + 1,
        },
    )


def distribution(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return dict.fromkeys(("mean", "min", "p50", "p90", "p95", "p99", "max")) | {"n": 0}
    return {
        "n": len(values),
        "mean": float(np.mean(values)),
        "min": min(values),
        "max": max(values),
        **{
            f"p{p}": float(np.percentile(values, p)) if len(values) >= fewest else None
            for p, fewest in SUPPORTED_FROM.items()
        },
    }


def write(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def edit(path: Path, **changes: Any) -> None:
    """Replaces keys of a JSON file."""
    write(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def write_parquet(path: Path, columns: Mapping[str, list[Any]], types: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(name, pa.type_for_alias(alias)) for name, alias in types.items()])
    pq.write_table(pa.table(dict(columns), schema=schema), path)
