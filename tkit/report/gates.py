"""Gates: `output_tok_s<-5%,ttft_p99>+10%,kl>0.01` -> what failed, where, and by how much. Reads and writes no file.

    gates = gate ("," gate)*
    gate  = METRIC ("<" | ">") NUMBER ["%"]     the condition under which the comparison fails

With % the number is a change against the baseline; without, it is in the metric's own unit (METRICS; bytes for
weight_bytes, nats per token for kl, a share from 0 to 1 for top1). Every run but the baseline, and but those that a recipe
only compares with, is held against every gate, at every point that it or the baseline has; without a baseline, every run.

A check fails
    a change of a measured metric    when the change itself lies beyond the limit, and it is called: its 95 % interval
                                     excludes zero, and it exceeds the practical threshold. A limit of 1 % therefore acts
                                     as one of 3 %.
    a change that is demanded        (`output_tok_s<+10%`: no change at all would fail) when the whole interval lies
                                     beyond the limit: the demand is refuted, not just unproven.
    a measured number                when it lies beyond the limit, whatever its interval: the limit is the user's, and a
                                     wide interval is no licence to exceed it.
    kl, ppl_ratio, top1, weight_bytes, or their change    when it lies beyond the limit; they have no interval.

What cannot be evaluated is never a pass: an invalid or missing point, on either side; a percentile that the requests do
not support; a change without an interval or without a baseline; a run that was not validated, or could not be read.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tkit.errors import InputError, did_you_mean
from tkit.report import text
from tkit.report.compare import ASKABLE, OFFERED
from tkit.report.record import (
    FAILED,
    MEASURES,
    NOT_EVALUATED,
    PASSED,
    Cell,
    Comparison,
    GateCheck,
    GateOutcome,
    RunFacts,
)
from tkit.report.statistics import Change, Estimate, min_requests
from tkit.specs.gate import Gate
from tkit.specs.record import METRICS, SLO_TIERS, Load

# what a run has once -> unit
FACTS = {"kl": "nats/token", "ppl_ratio": "", "top1": "", "weight_bytes": "bytes"}
# a gate's metric -> the key of a cell's estimates, where they differ
KEYS = {"tok_s_gpu": "tok_s_device"}
SCHEDULED = tuple(name for name in MEASURES if "_sched_" in name)  # of open loops only
MEASURED = tuple(
    dict.fromkeys(
        ("output_tok_s", "tok_s_user", "tok_s_gpu", *ASKABLE, "ttft_tail", "tpot_tail", "e2e_tail", *SCHEDULED)
    )
)
SUFFIXES = {"p50", "p90", "p95", "p99", "tail", *SLO_TIERS}
GATE = re.compile(r"(\w+)\s*(<=|>=|==|!=|=|<|>)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(%?)", re.ASCII)


def parse_gates(expression: str, where: str) -> tuple[Gate, ...]:
    """The gates of an expression; lists everything that is wrong with it at once. `where`: `--fail-on`."""
    problems: list[str] = []
    gates = [_parse(part.strip(), problems) for part in expression.split(",")]
    if problems:
        raise InputError(
            f'{where} "{expression}": {text.plural(len(problems), "problem")}',
            problems=problems,
            hint="a gate is METRIC<NUMBER or METRIC>NUMBER, with % for a change against the baseline: ttft_p99>+10%",
        )
    return tuple(gate for gate in gates if gate is not None)


def _parse(part: str, problems: list[str]) -> Gate | None:
    if not part:
        problems.append("a gate is empty")
        return None
    match = GATE.fullmatch(part)
    if match is None:
        problems.append(f'"{part}" is not a gate')
        return None
    metric, side, number, percent = match.groups()
    limit = float(number) / (100 if percent else 1)
    found = []
    if (unknown := _unknown(metric)) is not None:
        found.append(unknown)
    if side not in "<>":
        found.append(f'"{part}": unknown comparison {side}, expected < or >')
    elif not math.isfinite(limit):
        found.append(f'"{part}": {number} is too large')
    elif percent and limit <= -1:
        found.append(f'"{part}": no change is below \N{MINUS SIGN}100 %')
    elif not percent and limit < 0:
        found.append(f'"{part}": {metric} is never negative (did you mean {metric}{side}{number}%?)')
    problems.extend(found)
    return None if found else Gate(text=part, metric=metric, side=side, limit=limit, is_relative=bool(percent))


def _unknown(metric: str) -> str | None:
    if metric in MEASURED or metric in FACTS:
        return None
    if metric == "chunk_gap" or metric.startswith("chunk_gap_"):
        return f"{metric}: gaps are pooled over requests and have no interval; gate on tpot_p50 or tpot_p99"
    if metric in METRICS:
        return f"{metric}: which one? {', '.join(name for name in MEASURED if name.rpartition('_')[0] == metric)}"
    return f'unknown metric "{metric}"{did_you_mean(metric, (*MEASURED, *FACTS))}'


def asked(gates: Iterable[Gate]) -> tuple[str, ...]:
    """What a comparison has to estimate for these gates beyond MEASURES."""
    return tuple(dict.fromkeys(gate.metric for gate in gates if gate.metric in ASKABLE and gate.metric not in MEASURES))


def evaluate(gates: Sequence[Gate], comparison: Comparison, spared: Collection[str] = ()) -> tuple[GateOutcome, ...]:
    """One outcome per gate. The comparison was made with `asked` of these gates. `spared`: ids of runs that none is held
    against."""
    candidates = [run for run in comparison.runs if run.id != comparison.baseline and run.id not in spared]
    unread = [
        GateCheck(run=None, state=NOT_EVALUATED, text=f"{left.path} was left out: {left.reason}")
        for left in comparison.left_out
        if Path(left.path).parent.name != "points"
    ]
    outcomes = []
    for gate in gates:
        checks = [check for run in candidates for check in _checks(gate, comparison, run)] + unread
        states = {check.state for check in checks}
        state = FAILED if FAILED in states else NOT_EVALUATED if NOT_EVALUATED in states else PASSED
        outcomes.append(GateOutcome(gate=gate, state=state, checks=tuple(checks)))
    return tuple(outcomes)


def failures(comparison: Comparison) -> list[str]:
    """What failed, then what could not be evaluated, a line each; none when every gate passed."""
    return [
        f"{outcome.gate.text}: {line}"
        for state in (FAILED, NOT_EVALUATED)
        for outcome in comparison.gates
        for line in described(comparison, outcome, state)
    ]


def worst(comparison: Comparison) -> str:
    """Of the states of its gates."""
    states = {outcome.state for outcome in comparison.gates}
    return next((state for state in (FAILED, NOT_EVALUATED) if state in states), PASSED)


def summary(comparison: Comparison) -> str:
    """`1 of 3 gates failed, 1 of 3 gates could not be evaluated`, or that all passed."""
    counts = {state: sum(outcome.state == state for outcome in comparison.gates) for state in (FAILED, NOT_EVALUATED)}
    total = text.plural(len(comparison.gates), "gate")
    words = {FAILED: "failed", NOT_EVALUATED: "could not be evaluated"}
    parts = [f"{counts[state]} of {total} {words[state]}" for state in words if counts[state]]
    return ", ".join(parts) or f"{total} passed"


def described(comparison: Comparison, outcome: GateOutcome, state: str) -> list[str]:
    """`demo-fp8-tp1, 128/64 at C = 4: +18.2 % (95 % CI +9.1 to +28.0)`, a line per finding in that state."""
    lines = []
    for checks in findings(outcome):
        first = checks[0]
        if first.state != state:
            continue
        where = [text.shorten(comparison.facts(first.run).name)] if first.run is not None else []
        where += [place(checks)] if first.shape is not None else []
        parts = [", ".join(where)] * bool(where) + ["not evaluated"] * (state == NOT_EVALUATED) + [first.text]
        lines.append(": ".join(parts))
    return lines


def findings(outcome: GateOutcome) -> list[tuple[GateCheck, ...]]:
    """Its checks, those of one run and shape together that found the same at several loads."""
    found: dict[tuple[object, ...], list[GateCheck]] = {}
    for check in outcome.checks:
        arrivals = check.load.arrivals if check.load is not None else None
        found.setdefault((check.run, check.shape, arrivals, check.state, check.text), []).append(check)
    return [tuple(checks) for checks in found.values()]


def place(checks: Sequence[GateCheck]) -> str:
    """`128/64 at C = 4, 16`; "" of what a run has once."""
    loads = [check.load for check in checks if check.load is not None]
    if not loads:
        return ""
    numbers = ", ".join(load.number for load in loads)
    return f"{checks[0].shape} at {f'C = {numbers}' if loads[0].rate is None else f'{numbers} req/s'}"


def closest(outcome: GateOutcome) -> GateCheck | None:
    """The check whose value came nearest to the gate's limit, or went furthest beyond it."""
    known = [(check.value, check) for check in outcome.checks if check.value is not None]
    sign = -1 if outcome.gate.side == "<" else 1
    return max(known, key=lambda pair: sign * pair[0], default=(0.0, None))[1]


# ---- one run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A point that a run should have; `cell` and `baseline` are what it and the baseline have there."""

    shape: str
    load: Load
    tail: int | None = None
    cell: Cell | None = None
    baseline: Cell | None = None
    note: str = ""  # why the baseline's result, although there is one, is not comparable


def _checks(gate: Gate, comparison: Comparison, run: RunFacts) -> list[GateCheck]:
    if gate.metric in FACTS:
        return [_fact(gate, comparison, run)]
    places = _places(comparison, run)
    if gate.metric in SCHEDULED:
        places = [found for found in places if found.load.rate is not None]
        if not places:
            return [GateCheck(run=run.id, state=NOT_EVALUATED, text="no open-loop point")]
    if gate.is_relative and KEYS.get(gate.metric, gate.metric) in OFFERED:
        places = [found for found in places if found.load.rate is None]
        if not places:
            reason = "no closed-loop point: in an open loop the rate is the one asked for"
            return [GateCheck(run=run.id, state=NOT_EVALUATED, text=reason)]
    return [_point(gate, comparison, run, found) for found in places]


def _places(comparison: Comparison, run: RunFacts) -> list[_Place]:
    """What the run has or set out to have, and what the baseline has; not what only other runs have."""
    places: list[_Place] = []
    told: set[tuple[str, Load]] = set()
    missing = {(entry.shape, entry.load) for entry in run.missing}
    for group in comparison.groups:
        if run.id not in group.runs:
            continue
        note = ""
        if comparison.baseline is not None and comparison.baseline not in group.runs:
            note = f"the baseline was not measured with tokens from {group.token_source} under {group.definitions}"
        for level in group.levels:
            cells = {cell.run: cell for cell in level.cells}
            cell, baseline = cells.get(run.id), cells.get(comparison.baseline or "")
            if cell is None and baseline is None:
                continue
            told.add((group.shape, level.load))
            places.append(
                _Place(
                    shape=group.shape,
                    load=level.load,
                    tail=level.tail,
                    cell=cell,
                    baseline=baseline,
                    note=note,
                )
            )
    elsewhere = {
        (group.shape, cell.load)
        for group in comparison.groups
        for level in group.levels
        for cell in level.cells
        if cell.run == comparison.baseline
    }
    order = {group.shape: index for index, group in enumerate(comparison.groups)}

    def position(key: tuple[str, Load]) -> tuple[int, str, str, float]:
        shape, load = key
        return order.get(shape, len(order)), shape, load.arrivals or "", load.order

    absent = sorted((elsewhere | missing) - told, key=position)
    return places + [_Place(shape=shape, load=load) for shape, load in absent]


def _point(gate: Gate, comparison: Comparison, run: RunFacts, found: _Place) -> GateCheck:
    check = functools.partial(GateCheck, run=run.id, shape=found.shape, load=found.load)
    obstacle = _obstacle(gate, comparison, run, found)
    if obstacle is not None:
        return check(state=NOT_EVALUATED, text=obstacle)
    return (_change if gate.is_relative else _number)(gate, comparison, found, check)


def _obstacle(gate: Gate, comparison: Comparison, run: RunFacts, found: _Place) -> str | None:
    """Why the gate cannot be evaluated there."""
    sides = [("", run, found.cell)]
    if gate.is_relative:
        if comparison.baseline is None:
            return "one run alone has no baseline"
        if not found.note:
            sides.append(("the baseline's ", comparison.facts(comparison.baseline), found.baseline))
    for whose, facts, cell in sides:
        if cell is None:
            early = f": the sweep ended early: {text.isolated(facts.ended_early)}" if facts.ended_early else ""
            return f"{whose}point is missing{early}"
        if not cell.is_valid:
            return f"{whose}point is invalid: {'; '.join(cell.invalid_reasons)}"
    if gate.is_relative and found.note:
        return found.note
    if gate.metric == "tok_s_gpu" and comparison.device != "GPU":
        return "how many GPUs each run used was not told"
    for whose, _, cell in sides:
        if cell is not None and _estimate(gate, cell) is None:
            return f"{whose}{_no_number(gate.metric, cell)}"
    return None


def _estimate(gate: Gate, cell: Cell) -> Estimate | None:
    value = cell.estimates[KEYS.get(gate.metric, gate.metric)]
    kind, tier = ASKABLE.get(gate.metric, ("", ""))
    if value is None and kind == "goodput" and str(tier) in cell.goodput and not gate.is_relative:
        return Estimate(value=cell.goodput[str(tier)].requests_s)  # zero, which no ratio can be taken of
    return value


def _number(gate: Gate, comparison: Comparison, found: _Place, check: Callable[..., GateCheck]) -> GateCheck:
    value = _estimate(gate, found.cell) if found.cell is not None else None
    assert value is not None
    span = f" (95 % CI {text.interval(value.low, value.high)})" if value.low is not None else ""
    words = f"{_percentile(gate, found)}{text.number(value.value)} {unit(gate.metric)}{span}"
    state = FAILED if gate.is_crossed(value.value) else PASSED
    return check(state=state, text=words, value=value.value, low=value.low, high=value.high)


def _change(gate: Gate, comparison: Comparison, found: _Place, check: Callable[..., GateCheck]) -> GateCheck:
    assert found.cell is not None and found.baseline is not None
    mine, its = _estimate(gate, found.cell), _estimate(gate, found.baseline)
    assert mine is not None and its is not None
    change = found.cell.changes[KEYS.get(gate.metric, gate.metric)]
    words = f"{_percentile(gate, found)}{text.percent(change.relative)}"
    if change.low is None or change.high is None:
        return check(state=NOT_EVALUATED, text=f"{words}, too few requests for an interval")
    words += (
        f" (95 % CI {text.change_interval(change.low, change.high)}), "
        f"{text.number(mine.value)} against {text.number(its.value)} {unit(gate.metric)}"
    )
    words += _once(found.cell, found.baseline)
    doubt = _doubt(gate, change, change.low, change.high, comparison.threshold)
    state = FAILED if gate.is_crossed(change.relative) and not doubt else PASSED
    return check(state=state, text=words + doubt, value=change.relative, low=change.low, high=change.high)


def _once(cell: Cell, baseline: Cell) -> str:
    """Whose interval is that of its requests and of what repeats are expected to scatter, not of repeats."""
    single = [name for name, side in (("the run", cell), ("the baseline", baseline)) if side.repeats == 1]
    return f", {' and '.join(single)} measured once" if single else ""


def _doubt(gate: Gate, change: Change, low: float, high: float, threshold: float) -> str:
    """Why a change beyond the limit does not fail the gate; "" when it does, or is not beyond it."""
    if not gate.is_crossed(change.relative):
        return ""
    if gate.is_crossed(0.0):  # an improvement is demanded
        is_refuted = gate.is_crossed(low) and gate.is_crossed(high)
        return "" if is_refuted else "; not decided: the interval reaches the limit"
    if change.is_called:
        return ""
    if low <= 0 <= high:
        return "; not significant: the interval includes no change"
    return f"; within the practical threshold of {threshold * 100:.0f} %"


def _percentile(gate: Gate, found: _Place) -> str:
    """Which one the tail is."""
    return f"p{found.tail} " if gate.metric.endswith("_tail") else ""


def _no_number(metric: str, cell: Cell) -> str:
    percentile = ASKABLE.get(metric, ("", ""))[1]
    answered = text.count(cell.requests - sum(cell.errors.values()))
    if isinstance(percentile, int) and percentile > 50:
        return f"p{percentile} needs {min_requests(percentile)} requests, the point has {answered}"
    if metric.endswith("_tail"):
        return f"the tail needs {min_requests(90)} requests in every run, the point has {answered}"
    return f"{metric} is zero or was not measured"


def _fact(gate: Gate, comparison: Comparison, run: RunFacts) -> GateCheck:
    baseline = comparison.facts(comparison.baseline) if comparison.baseline is not None else None
    if gate.is_relative and baseline is None:
        return GateCheck(run=run.id, state=NOT_EVALUATED, text="one run alone has no baseline")
    value = _fact_value(gate.metric, run)
    its = _fact_value(gate.metric, baseline) if gate.is_relative and baseline is not None else None
    for whose, number, facts in (("", value, run), ("the baseline: ", its, baseline)):
        if number is None and facts is not None and (facts is run or gate.is_relative):
            return GateCheck(run=run.id, state=NOT_EVALUATED, text=f"{whose}{_no_fact(gate.metric, facts)}")
    assert value is not None
    words = f"{_fact_text(gate.metric, value)}"
    if its is not None:
        words += f" against {_fact_text(gate.metric, its)}"
        if its == 0:
            return GateCheck(run=run.id, state=NOT_EVALUATED, text=f"{words}: nothing is a percentage of zero")
        value = value / its - 1
        words = f"{text.percent(value)}, {words}"
    state = FAILED if gate.is_crossed(value) else PASSED
    return GateCheck(run=run.id, state=state, text=words, value=value)


def _fact_value(metric: str, run: RunFacts) -> float | None:
    facts: Mapping[str, object] = run.validation or {}
    value = (run.engine.weight_bytes if run.engine else None) if metric == "weight_bytes" else facts.get(metric)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _no_fact(metric: str, run: RunFacts) -> str:
    if run.engine is None:
        return "the run has no engine card"
    return "not validated (tkit validate, then sweep again)" if metric != "weight_bytes" else "not in the engine card"


def _fact_text(metric: str, value: float) -> str:
    if metric == "weight_bytes":
        return f"{text.count(round(value))} bytes"
    if metric == "kl":
        return f"{text.number(value)} {FACTS[metric]}"
    return text.fixed(value, 4)


def unit(metric: str) -> str:
    """Of a metric that gates know, without its percentile or tier."""
    if metric in FACTS:
        return FACTS[metric]
    base, _, suffix = metric.rpartition("_")
    return METRICS[base if suffix in SUFFIXES else metric][0]
