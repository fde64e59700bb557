"""A comparison -> the sentences that stand first. A sentence claims only what was called: certain, and large enough."""

from __future__ import annotations

from tkit.report import text
from tkit.report.compare import MEASURES, Cell, Comparison, Group, RunFacts, Verdict
from tkit.report.statistics import Change

HEADLINE = ("output_tok_s", "ttft_p50", "tpot_p50")
LABELS = {
    "output_tok_s": "output tok/s",
    "tok_s_device": "tok/s per device",
    "tok_s_user": "tok/s per user",
    "ttft_p50": "TTFT p50",
    "ttft_tail": "TTFT tail",
    "tpot_p50": "TPOT p50",
    "tpot_tail": "TPOT tail",
    "e2e_p50": "E2E p50",
    "e2e_tail": "E2E tail",
}


def verdicts(comparison: Comparison) -> tuple[Verdict, ...]:
    """One per run and comparable shape; the baseline itself has none, unless it stands alone."""
    found: list[Verdict] = []
    for run in comparison.runs:
        if run.id == comparison.baseline:
            continue
        groups = [group for group in comparison.groups if run.id in group.runs]
        if comparison.baseline is None:
            found.extend(_alone(run, group) for group in groups)
        else:
            found.extend(_against(comparison, run, comparison.facts(comparison.baseline), group) for group in groups)
    return tuple(found)


def judgement(name: str, change: Change, threshold: float) -> str:
    """better | worse | same (the whole interval is within the threshold) | undecided"""
    if change.is_called:
        return "better" if (change.relative > 0) == MEASURES[name].is_higher_better else "worse"
    if change.low is not None and change.high is not None and -threshold < change.low and change.high < threshold:
        return "same"
    return "undecided"


def _against(comparison: Comparison, run: RunFacts, baseline: RunFacts, group: Group) -> Verdict:
    pair = f"{text.shorten(run.name)} against {text.shorten(baseline.name)}, {group.shape}"
    details = (*_quality(run, baseline), _validity(run))
    cells = [cell for level in group.levels for cell in level.cells if cell.run == run.id and cell.changes]
    if not cells:
        reason = (
            "the baseline was not measured under the same definitions"
            if comparison.baseline not in group.runs
            else "no load is valid in both"
        )
        return Verdict(run=run.id, tone="undecided", text=f"{pair}: not comparable, {reason}.", details=details)
    last = cells[-1]
    judged = {
        name: judgement(name, last.changes[name], comparison.threshold) for name in HEADLINE if name in last.changes
    }
    clauses = [_clause(name, last.changes[name], judged[name], comparison.threshold) for name in judged]
    return Verdict(
        run=run.id,
        tone=_tone(list(judged.values())),
        text=f"{pair} at C = {last.concurrency}: {', '.join(clauses)}.",
        details=(*_over_loads(cells, comparison.threshold), *details),
    )


def _clause(name: str, change: Change, judged: str, threshold: float) -> str:
    if change.low is None or change.high is None:
        return f"{LABELS[name]} {text.percent(change.relative)} (too few requests for an interval)"
    span = f"(95 % CI {text.signed(change.low)} to {text.signed(change.high)})"
    words = {"same": f", equal within {threshold:.0%}".replace("%", " %"), "undecided": ", not decided"}.get(judged, "")
    return f"{LABELS[name]} {text.percent(change.relative)} {span}{words}"


def _tone(judged: list[str]) -> str:
    if "better" in judged and "worse" in judged:
        return "mixed"
    return next((tone for tone in ("better", "worse", "undecided", "same") if tone in judged), "undecided")


def _over_loads(cells: list[Cell], threshold: float) -> tuple[str, ...]:
    if len(cells) < 2:
        return ()
    counts = []
    for name in HEADLINE:
        judged = [judgement(name, cell.changes[name], threshold) for cell in cells if name in cell.changes]
        told = [f"{judged.count(word)} {word}" for word in ("better", "worse", "same", "undecided") if word in judged]
        counts.append(f"{LABELS[name]} {', '.join(told)}")
    return (f"Over {len(cells)} loads: {'; '.join(counts)}.",)


def _alone(run: RunFacts, group: Group) -> Verdict:
    cells = [cell for level in group.levels for cell in level.cells if cell.run == run.id and cell.is_valid]
    name = text.shorten(run.name)
    if not cells:
        return Verdict(
            run=run.id, tone="none", text=f"{name}, {group.shape}: no valid point.", details=(_validity(run),)
        )
    rates = [(rate.value, cell) for cell in cells if (rate := cell.estimates["output_tok_s"]) is not None]
    clauses = []
    if rates:
        peak, cell = max(rates, key=lambda pair: pair[0])
        clauses.append(f"highest output rate {text.number(peak)} tok/s, at C = {cell.concurrency}")
    first = cells[0]
    latencies = [
        f"{LABELS[key]} {text.number(value.value)} ms"
        for key in ("ttft_p50", "tpot_p50")
        if (value := first.estimates[key]) is not None
    ]
    if latencies:
        clauses.append(f"{' and '.join(latencies)} at C = {first.concurrency}")
    return Verdict(
        run=run.id,
        tone="none",
        text=f"{name}, {group.shape}: {'; '.join(clauses)}.",
        details=(*_quality(run, None), _validity(run)),
    )


def _quality(run: RunFacts, baseline: RunFacts | None) -> tuple[str, ...]:
    if run.validation is None:
        return ("Quality: not validated.",) if run.engine is not None else ()
    facts = run.validation
    line = (
        f"Quality against its source: KL {text.number(facts['kl'])} nats per token, "
        f"perplexity ratio {text.ratio(facts['ppl_ratio'])}, top-1 agreement {text.share(facts['top1'])}"
    )
    if baseline is not None and baseline.validation is not None:
        line += f" (baseline: KL {text.number(baseline.validation['kl'])})"
    return (line + ".",)


def _validity(run: RunFacts) -> str:
    total = run.num_points + len(run.missing)
    wrong = [
        *([f"{run.num_invalid} invalid"] if run.num_invalid else []),
        *([f"{len(run.missing)} missing"] if run.missing else []),
    ]
    return f"{', '.join(wrong)} of {text.plural(total, 'point')}." if wrong else f"{_all(total)} valid."


def _all(total: int) -> str:
    return "The one point is" if total == 1 else f"All {total} points are"
