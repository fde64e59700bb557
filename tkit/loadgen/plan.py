"""Which point comes next, given what the points so far have shown. Knows loads and summaries; never a server or a file.

A plan yields a Place and is sent its PointSummary. It depends on nothing else, so a run that was cut off is taken up again
by sending it the summaries that are on disk.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from tkit.loadgen.metrics import wilson_interval
from tkit.loadgen.point import Place
from tkit.loadgen.profiles import Profile, Shape
from tkit.specs.record import FoundMax, PointSummary, SloStep

MAX_CONCURRENCY = 4096
MIN_RATE, MAX_RATE = 0.01, 16_384.0  # requests/s
BISECTION = 0.05  # ends when the load that holds and the one that fails are no further apart
# The loosest tier that has limits: a server that fails it twice in a row is past any load of interest.
LAST_TIER = "conversational"
SETTLED_WITHIN = {"output_tok_s": 0.02, "ttft_p50": 0.05}  # half of the 95 % interval over the value


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A repeat that is not needed: those before it agree, each within narrow limits. It is not measured."""

    place: Place


Plan = Generator[Place | Settled, Any, tuple[FoundMax, ...]]  # sent the summary of each Place


def sweep_plan(profile: Profile) -> Plan:
    """The profile's grid; or its search for the largest load that holds a tier, and what that found, per shape."""
    if profile.find_max is None:
        yield from _grid(profile)
        return ()
    found = []
    for shape in profile.shapes:
        found.append((yield from _find_max(profile, shape, profile.find_max)))
    return tuple(found)


# ---- the grid -----------------------------------------------------------------------------------------------------


def _grid(profile: Profile) -> Generator[Place | Settled, Any, None]:
    """Repeats go round the whole grid, so that a slow minute of the machine does not hit all repeats of one point."""
    points: dict[Place, list[PointSummary]] = {}  # by the place of the first repeat
    for shape in profile.shapes:
        yield from _first_round(profile, shape, points)
    for repeat in range(2, profile.repeats + 1):
        for first, summaries in points.items():
            place = dataclasses.replace(first, repeat=repeat)
            if profile.stops_early and is_settled(summaries):
                yield Settled(place=place)
            else:
                summaries.append((yield place))


def _first_round(
    profile: Profile, shape: Shape, points: dict[Place, list[PointSummary]]
) -> Generator[Place, PointSummary, None]:
    """Finds the loads that the profile leaves open: streams are doubled, then rates are shares of the highest seen."""
    closed: list[PointSummary] = []
    concurrencies = list(profile.concurrency)
    for concurrency in concurrencies:
        place = Place(shape=shape, concurrency=concurrency, repeat=1)
        closed.append((yield place))
        points[place] = [closed[-1]]
        is_last = concurrency == concurrencies[-1]
        if is_last and profile.doubles_above and concurrency < MAX_CONCURRENCY and gains(closed, profile.doubles_above):
            concurrencies.append(2 * concurrency)
    peak = max((point.requests_s for point in closed if point.is_valid), default=0.0)
    shares = [float(f"{share * peak:.3g}") for share in profile.open_shares if peak]
    for rate in dict.fromkeys((*profile.rates, *shares)):
        place = Place(shape=shape, rate=rate, repeat=1)
        points[place] = [(yield place)]


def gains(points: Sequence[PointSummary], least: float) -> bool:
    """Whether twice as many streams may bring more: the last point is sound, brought more than the best before it by the
    share `least`, and has not failed the last tier for the second time."""
    last, earlier = points[-1], points[:-1]
    best = max((point.output_tok_s for point in earlier), default=0.0)
    fails = [point.goodput[LAST_TIER]["attainment"] < Profile.slo_share for point in points]
    return last.is_valid and last.output_tok_s > (1 + least) * best and fails[-2:] != [True, True]


def is_settled(points: Sequence[PointSummary]) -> bool:
    """At least two valid repeats whose 95 % intervals are narrow, and which are no further apart than that."""
    valid = [point for point in points if point.is_valid]
    if len(valid) < 2:
        return False
    for name, limit in SETTLED_WITHIN.items():
        values = [point.output_tok_s if name == "output_tok_s" else point.ttft.p50 or 0.0 for point in valid]
        middle = statistics.median(values)
        is_apart = max(values) - min(values) > 2 * limit * middle
        if is_apart or any(point.half_width.get(name, 1.0) > limit for point in valid):
            return False
    return True


# ---- the largest load that holds a tier ---------------------------------------------------------------------------


def _find_max(profile: Profile, shape: Shape, tier: str) -> Generator[Place, PointSummary, FoundMax]:
    """Doubles the load until the tier fails, or halves it until it holds, then bisects between the two.

    Ends: the loads are bounded, and every step of the bisection halves what is between.
    """
    is_open = bool(profile.rates)
    least, most = (MIN_RATE, MAX_RATE) if is_open else (1.0, float(MAX_CONCURRENCY))
    load = profile.rates[0] if is_open else float(profile.concurrency[0])
    steps: dict[float, SloStep] = {}
    holding: float | None = None
    failing: float | None = None
    while load not in steps and least <= load <= most:
        steps[load] = yield from _step(profile, shape, tier, load)
        if steps[load].holds:
            holding = load
        else:
            failing = load
        if failing is None:
            load *= 2
        elif holding is None:
            load /= 2
        elif failing - holding <= BISECTION * holding:
            break
        else:
            load = (holding + failing) / 2
        load = float(f"{load:.3g}") if is_open else float(int(load))
    best = steps[holding] if holding is not None else None
    return FoundMax(
        shape=str(shape),
        tier=tier,
        target=profile.slo_share,
        best=best,
        first_failing=steps[failing] if failing is not None else None,
        steps=tuple(steps.values()),
    )


def _step(profile: Profile, shape: Shape, tier: str, load: float) -> Generator[Place, PointSummary, SloStep]:
    """Repeats, at most as often as the profile does, until the interval of the share lies on one side of the target; once
    more when no repeat was valid. Whether it holds is told by the share itself: `is_certain` says what the interval says."""
    points: list[PointSummary] = []
    for repeat in range(1, profile.repeats + 2):
        kind: dict[str, Any] = {"rate": load} if profile.rates else {"concurrency": int(load)}
        points.append((yield Place(shape=shape, repeat=repeat, **kind)))
        valid = [point for point in points if point.is_valid]
        used = valid or points
        total = sum(point.requests for point in used)
        met = round(sum(point.goodput[tier]["attainment"] * point.requests for point in used))
        low, high = wilson_interval(met, total)
        is_certain = high < profile.slo_share or (low >= profile.slo_share and bool(valid))
        if is_certain or (repeat >= profile.repeats and valid):
            break
    share = met / total if total else 0.0
    return SloStep(
        load=points[0].load,
        requests=total,
        attainment=share,
        low=low,
        high=high,
        holds=share >= profile.slo_share and bool(valid),
        is_certain=is_certain,
        reason=None if valid else "; ".join(points[-1].invalid_reasons),
    )
