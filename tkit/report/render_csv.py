"""A comparison -> CSV: one flat row per run and load, numbers unrounded, no text that a spreadsheet would execute."""

from __future__ import annotations

import csv
import io
from typing import Any

from tkit.report.record import FAILED, MEASURES, NOT_EVALUATED, TELEMETRY, Cell, Comparison, Group, Level
from tkit.specs.record import SLO_TIERS

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\N{FULLWIDTH EQUALS SIGN}")


def render_csv(comparison: Comparison) -> str:
    rows = [
        _row(comparison, group, level, cell)
        for group in comparison.groups
        for level in group.levels
        for cell in level.cells
    ]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: neutral(value) for key, value in row.items()} for row in rows)
    return file.getvalue()


def neutral(value: Any) -> Any:
    """Text that no spreadsheet takes for a formula: a leading apostrophe, as spreadsheets mark text themselves."""
    if isinstance(value, str) and value.lstrip(" \n").startswith(FORMULA_STARTS):
        return f"'{value}"
    return value


def _row(comparison: Comparison, group: Group, level: Level, cell: Cell) -> dict[str, Any]:
    run = comparison.facts(cell.run)
    engine = run.engine
    row: dict[str, Any] = {
        "id": run.id,
        "run": run.run,
        "name": run.name,
        "engine": engine.name if engine else None,
        "backend": engine.backend if engine else None,
        "quant": engine.quant if engine else None,
        "tp": engine.tp_size if engine else None,
        "pp": engine.pp_size if engine else None,
        "device": comparison.device,
        "num_devices": run.num_devices,
        "protocol": run.protocol,
        "profile": run.profile,
        "shape": group.shape,
        "token_source": group.token_source,
        "definitions": group.definitions,
        "concurrency": cell.load.concurrency,
        "rate": cell.load.rate,
        "arrivals": cell.load.arrivals,
        "repeats": cell.repeats,
        "requests": cell.requests,
        "requests_s": cell.requests_s,
        "in_flight": cell.in_flight,
        "ttft_mean": cell.ttft_mean.value if cell.ttft_mean else None,
        "errors": sum(cell.errors.values()),
        "is_valid": cell.is_valid,
        "invalid_reasons": "; ".join(cell.invalid_reasons),
        "is_on_frontier": cell.is_on_frontier,
        "tail_percentile": level.tail,
        "baseline": comparison.baseline,
    }
    for name in MEASURES:
        value, change = cell.estimates[name], cell.changes.get(name)
        row |= {
            name: value.value if value else None,
            f"{name}_low": value.low if value else None,
            f"{name}_high": value.high if value else None,
            f"{name}_change": change.relative if change else None,
            f"{name}_change_low": change.low if change else None,
            f"{name}_change_high": change.high if change else None,
            f"{name}_is_called": change.is_called if change else None,
        }
    for tier in SLO_TIERS:
        goodput = cell.goodput.get(tier)
        row |= {
            f"goodput_{tier}": goodput.requests_s if goodput else None,
            f"attainment_{tier}": goodput.attainment if goodput else None,
            f"attainment_{tier}_low": goodput.low if goodput else None,
            f"attainment_{tier}_high": goodput.high if goodput else None,
        }
    row |= {name: cell.telemetry.get(name) for name in TELEMETRY}
    wall = cell.wall
    row |= {
        "limit_tok_s": wall.limit_tok_s if wall else None,
        "limit_tpot_ms": wall.limit_tpot_ms if wall else None,
        "limit_ttft_ms": wall.limit_ttft_ms if wall else None,
        "limit_binds": wall.limit_binds if wall else None,
        "limit_ttft_binds": wall.limit_ttft_binds if wall else None,
    }
    predictions = {
        "predicted_tok_s": wall.predicted_tok_s if wall else None,
        "predicted_tpot_ms": wall.predicted_tpot_ms if wall else None,
        "predicted_ttft_ms": wall.predicted_ttft_ms if wall else None,
    }
    for name, predicted in predictions.items():
        row |= {
            name: predicted.value if predicted else None,
            f"{name}_low": predicted.low if predicted else None,
            f"{name}_high": predicted.high if predicted else None,
        }
    row["predicted_binds"] = wall.predicted_binds if wall else None
    cost = cell.cost
    row |= {
        "usd_per_million_tokens": cost.usd_per_million.value if cost else None,
        "usd_per_million_tokens_low": cost.usd_per_million.low if cost else None,
        "usd_per_million_tokens_high": cost.usd_per_million.high if cost else None,
        "joules_per_token_low": cost.joules_per_token[0] if cost else None,
        "joules_per_token_high": cost.joules_per_token[1] if cost else None,
    }
    for state in (FAILED, NOT_EVALUATED):
        row[f"gates_{state.replace(' ', '_')}"] = "; ".join(_gates(comparison, group, cell, state))
    facts = run.validation or {}
    return row | {name: facts.get(name) for name in ("ppl_ratio", "kl", "top1")}


def _gates(comparison: Comparison, group: Group, cell: Cell, state: str) -> list[str]:
    """The gates that came out so at this point, or for the whole run."""
    return [
        outcome.gate.text
        for outcome in comparison.gates
        if any(
            check.state == state
            and check.run == cell.run
            and check.shape in (None, group.shape)
            and check.load in (None, cell.load)
            for check in outcome.checks
        )
    ]
