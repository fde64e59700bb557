"""A comparison -> the sentences that stand first. A sentence claims only what was called: certain, and large enough."""

from __future__ import annotations

from tkit.report import text
from tkit.report.record import MEASURES, Cell, Claim, Comparison, Group, RunFacts, Verdict
from tkit.report.statistics import Change

# what a claim is about
HEADLINE = ("output_tok_s", "ttft_p50", "tpot_p50")
OPEN_HEADLINE = ("ttft_sched_p50", "tpot_p50")  # there the rate is the one asked for
ALL = {2: "Both", 3: "All three"}
TITLES = {  # Verdict.tone -> what a reader sees: nothing but speed is judged
    "better": "faster",
    "worse": "slower",
    "mixed": "faster and slower",
    "same": "equally fast",
    "undecided": "speed not decided",
}
JUDGED = {"better": "better", "worse": "worse", "same": "equal", "undecided": "not decided"}
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
    "ttft_sched_p50": "TTFT p50 from schedule",
    "ttft_sched_tail": "TTFT tail from schedule",
    "e2e_sched_p50": "E2E p50 from schedule",
    "e2e_sched_tail": "E2E tail from schedule",
}


def verdicts(comparison: Comparison) -> tuple[Verdict, ...]:
    """One per run; the baseline itself has none, unless it stands alone."""
    runs = [run for run in comparison.runs if run.id != comparison.baseline]
    return tuple(_verdict(comparison, run) for run in runs)


def _verdict(comparison: Comparison, run: RunFacts) -> Verdict:
    groups = [group for group in comparison.groups if run.id in group.runs]
    details = (*_not_measured(comparison, groups), *_quality(comparison, run), _validity(run))
    if comparison.baseline is None:
        return Verdict(run=run.id, tone="none", claims=tuple(_alone(run, group) for group in groups), details=details)
    found = [_against(comparison, run, group, is_first=group is groups[0]) for group in groups]
    return Verdict(
        run=run.id,
        tone=_tone(
            [word for _, words in found for word in words],
            [word for group in groups for cell in _compared(group, run) for word in _judged(comparison, cell).values()],
        ),
        claims=tuple(claim for claim, _ in found),
        details=details,
    )


def judgement(name: str, change: Change, threshold: float) -> str:
    """better | worse | same (the whole interval is within the threshold) | undecided"""
    if change.is_called:
        return "better" if (change.relative > 0) == MEASURES[name].is_higher_better else "worse"
    if change.low is not None and change.high is not None and -threshold < change.low and change.high < threshold:
        return "same"
    return "undecided"


def _compared(group: Group, run: RunFacts) -> list[Cell]:
    """Its cells at the loads that are valid in both."""
    return [cell for level in group.levels for cell in level.cells if cell.run == run.id and cell.changes]


def _judged(comparison: Comparison, cell: Cell) -> dict[str, str]:
    """What a claim is about -> better, worse, same or undecided."""
    return {
        name: judgement(name, cell.changes[name], comparison.threshold)
        for name in _headline(cell)
        if name in cell.changes
    }


def _against(comparison: Comparison, run: RunFacts, group: Group, *, is_first: bool) -> tuple[Claim, list[str]]:
    """The claim, and what each of its changes was judged. It is made at the highest load that is valid in both."""
    assert comparison.baseline is not None
    baseline = comparison.facts(comparison.baseline)
    pair = f"{text.shorten(run.name)} against {text.shorten(baseline.name)}, " if is_first else ""
    cells = _compared(group, run)
    if not cells:
        return Claim(text=f"{pair}{group.title}: not comparable, {_obstacle(comparison, group)}."), []
    last = cells[-1]
    judged = _judged(comparison, last)
    clauses = [
        _clause(name, last.changes[name], word, comparison.threshold, is_first=name == next(iter(judged)))
        for name, word in judged.items()
    ]
    claim = f"{pair}{group.shape} at {last.load}: {', '.join(clauses)}."
    total = sum(cell.run == baseline.id for level in group.levels for cell in level.cells)
    partly = f"Compared at {len(cells)} of the baseline's {text.plural(total, 'load')}." if len(cells) < total else ""
    over_loads = f"{partly} {_over_loads([_judged(comparison, cell) for cell in cells], _headline(last))}".strip()
    return Claim(text=claim, over_loads=over_loads), list(judged.values())


def _obstacle(comparison: Comparison, group: Group) -> str:
    """Why nothing in the group can be held against the baseline."""
    if comparison.baseline in group.runs:
        return "no load is valid in both"
    its = [
        f"{other.token_source} under {other.definitions}"
        for other in comparison.groups
        if comparison.baseline in other.runs and (other.shape, other.arrivals) == (group.shape, group.arrivals)
    ]
    if not its:
        return "the baseline was not measured so"
    return f"tokens counted by {group.token_source} under {group.definitions}, the baseline's by {' and '.join(its)}"


def _not_measured(comparison: Comparison, groups: list[Group]) -> tuple[str, ...]:
    """What only the baseline was measured with: the verdict is silent about it."""
    measured = {group.title for group in groups}
    absent = dict.fromkeys(
        group.title for group in comparison.groups if comparison.baseline in group.runs and group.title not in measured
    )
    return (f"Not measured, unlike the baseline: {'; '.join(absent)}.",) if absent else ()


def _headline(cell: Cell) -> tuple[str, ...]:
    return HEADLINE if cell.load.rate is None else OPEN_HEADLINE


def _clause(name: str, change: Change, judged: str, threshold: float, *, is_first: bool) -> str:
    if change.low is None or change.high is None:
        return f"{LABELS[name]} {text.percent(change.relative)} (too few requests for an interval)"
    span = f"({'95 % CI ' if is_first else ''}{text.signed(change.low)} to {text.signed(change.high)})"
    words = {"same": f" equal within {threshold * 100:.0f} %", "undecided": " not decided"}.get(judged, "")
    return f"{LABELS[name]} {text.percent(change.relative)} {span}{words}"


def _tone(headlines: list[str], everywhere: list[str]) -> str:
    """A loss at any load counts, a gain only at the highest: whoever reads no further must not be surprised."""
    if "worse" in everywhere:
        return "mixed" if "better" in everywhere else "worse"
    return next((tone for tone in ("better", "undecided", "same") if tone in headlines), "undecided")


def _over_loads(judged: list[dict[str, str]], names: tuple[str, ...]) -> str:
    if len(judged) < 2:
        return ""
    counts = []
    seen = {word for words in judged for word in words.values()}
    for name in names:
        found = [words[name] for words in judged if name in words]
        told = [f"{title} at {found.count(word)}" for word, title in JUDGED.items() if word in found]
        counts.append(f"{LABELS[name]} {', '.join(told)}")
    if len(seen) == 1:
        return f"{ALL[len(counts)]} are {JUDGED[seen.pop()]} at each of the {len(judged)} loads."
    return f"Over {len(judged)} loads: {'; '.join(counts)}."


def _alone(run: RunFacts, group: Group) -> Claim:
    cells = [cell for level in group.levels for cell in level.cells if cell.run == run.id and cell.is_valid]
    name = text.shorten(run.name)
    rates = [(rate.value, cell) for cell in cells if (rate := cell.estimates["output_tok_s"]) is not None]
    if not rates:
        return Claim(text=f"{name}, {group.title}: no valid point.")
    peak, cell = max(rates, key=lambda pair: pair[0])
    clauses = [f"highest output rate {text.number(peak)} tok/s, at {cell.load}"]
    latencies = [
        f"{LABELS[key]} {text.number(value.value)} ms"
        for key in _headline(cells[0])[-2:]
        if (value := cells[0].estimates[key]) is not None
    ]
    if latencies:
        clauses.append(f"{' and '.join(latencies)} at {cells[0].load}")
    return Claim(text=f"{name}, {group.title}: {'; '.join(clauses)}.")


def _quality(comparison: Comparison, run: RunFacts) -> tuple[str, ...]:
    if run.validation is None:
        return ("Quality: not validated.",) if run.engine is not None else ()
    facts = run.validation
    line = (
        f"Quality against its source: KL {text.number(facts['kl'])} nats per token, "
        f"perplexity ratio {text.fixed(facts['ppl_ratio'], 4)}, top-1 agreement {text.share(facts['top1'])}"
    )
    if comparison.baseline is not None and (its := comparison.facts(comparison.baseline).validation) is not None:
        line += f" (baseline: KL {text.number(its['kl'])})"
    return (line + ".",)


def _validity(run: RunFacts) -> str:
    total = run.num_points + len(run.missing)
    early = f" The sweep ended early: {text.isolated(run.ended_early)}." if run.ended_early else ""
    wrong = [
        f"{count} {word}" for count, word in ((run.num_invalid, "invalid"), (len(run.missing), "missing")) if count
    ]
    if wrong:
        return f"{', '.join(wrong)} of {text.plural(total, 'point')}.{early}"
    return f"{'The one point is' if total == 1 else f'All {total} points are'} valid.{early}"
