"""Which point comes next, driven by servers whose answers are known."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from tkit.errors import InputError
from tkit.loadgen.plan import Settled, is_settled, sweep_plan
from tkit.loadgen.point import Place
from tkit.loadgen.profiles import Profile, Shape, find_profile, resolve_profile
from tkit.specs.recipe import SweepRecipe
from tkit.specs.record import Distribution, FoundMax, PointSummary

SHAPE = Shape(isl=8, osl=4)
NOTHING = Distribution(n=0, mean=None, min=None, p50=None, p90=None, p95=None, p99=None, max=None)


def summary(
    place: Place, *, tok_s: float = 100.0, share: float = 1.0, requests: int = 1000, **changes: Any
) -> PointSummary:
    good = {"requests_s": 1.0, "attainment": share, "low": 0.0, "high": 1.0}
    values: dict[str, Any] = dict(
        shape=str(place.shape), isl=8, osl=4, concurrency=place.concurrency, rate=place.rate, repeat=place.repeat,
        requests=requests, errors={}, token_source="server_usage", window_s=1.0, output_tok_s=tok_s,
        output_tok_s_whole=tok_s, input_tok_s=1.0, requests_s=tok_s / 4, tok_s_user=None, tok_s_gpu=None,
        goodput={"interactive": good, "conversational": good}, ttft=dataclasses.replace(NOTHING, p50=10.0), ttfb=NOTHING,
        tpot=NOTHING, chunk_gap=NOTHING, e2e=NOTHING, client={}, is_valid=True, started="", duration_s=1.0,
    )  # fmt: skip
    return PointSummary(**values | changes)


def followed(profile: Profile, answer: Callable[[Place], PointSummary]) -> tuple[list[str], tuple[FoundMax, ...]]:
    """The slugs in order, settled ones in brackets, and what a search found."""
    plan = sweep_plan(profile)
    slugs = []
    try:
        step = next(plan)
        while True:
            assert len(slugs) < 300, "does not end"
            if isinstance(step, Settled):
                slugs.append(f"({step.place.slug})")
                step = next(plan)
            else:
                slugs.append(step.slug)
                step = plan.send(answer(step))
    except StopIteration as end:
        return slugs, end.value


def profile(**changes: Any) -> Profile:
    return dataclasses.replace(find_profile("quick"), **{"shapes": (SHAPE,), **changes})


def test_repeats_go_round_the_grid() -> None:
    other = Shape(isl=16, osl=4)
    slugs, found = followed(profile(shapes=(SHAPE, other), concurrency=(1, 4), rates=(2.5,), repeats=2), summary)
    one_round = ["8x4-c1", "8x4-c4", "8x4-rate2.5", "16x4-c1", "16x4-c4", "16x4-rate2.5"]
    assert slugs == [f"{slug}-r{repeat}" for repeat in (1, 2) for slug in one_round]
    assert found == ()


def test_streams_are_doubled_while_that_pays_and_then_shares_of_the_peak_follow() -> None:
    """100 tok/s per stream up to 8 streams, 4 % more at 16: two repeats of what the first round found."""
    rates = {1: 100.0, 2: 200.0, 4: 400.0, 8: 800.0, 16: 832.0}
    used = profile(concurrency=(1, 2), repeats=2, doubles_above=0.05, open_shares=(0.5, 0.95))
    slugs, _ = followed(used, lambda place: summary(place, tok_s=rates.get(place.concurrency or 0, 1.0)))
    one_round = ["c1", "c2", "c4", "c8", "c16", "rate104", "rate198"]  # of 832 / 4 requests per second
    assert slugs == [f"8x4-{load}-r{repeat}" for repeat in (1, 2) for load in one_round]


def test_doubling_ends_when_a_tier_fails_twice_or_the_client_does() -> None:
    used = profile(concurrency=(1, 2), doubles_above=0.05)
    late = lambda place: summary(place, tok_s=place.concurrency * 100.0, share=1.0 if place.concurrency < 4 else 0.5)  # noqa: E731
    assert [slug.split("-")[1] for slug in followed(used, late)[0]] == ["c1", "c2", "c4", "c8"]
    unsound = lambda place: summary(place, tok_s=place.concurrency * 100.0, is_valid=place.concurrency < 8)  # noqa: E731
    assert [slug.split("-")[1] for slug in followed(used, unsound)[0]] == ["c1", "c2", "c4", "c8"]
    always = lambda place: summary(place, tok_s=place.concurrency * 100.0)  # noqa: E731
    assert followed(used, always)[0][-1] == "8x4-c4096-r1", "and at the latest here"


def test_what_agrees_is_not_repeated() -> None:
    narrow = {"output_tok_s": 0.015, "ttft_p50": 0.04}
    used = profile(concurrency=(1, 4), repeats=3, stops_early=True)
    settled = lambda place: summary(place, half_width=narrow if place.concurrency == 4 else {})  # noqa: E731
    assert followed(used, settled)[0][4:] == ["8x4-c1-r3", "(8x4-c4-r3)"]
    assert followed(dataclasses.replace(used, stops_early=False), settled)[0][4:] == ["8x4-c1-r3", "8x4-c4-r3"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"tok_s": 103.9}, True),
        ({"tok_s": 105.0}, False),
        ({"half_width": {"output_tok_s": 0.021, "ttft_p50": 0.01}}, False),
        ({"half_width": {"output_tok_s": 0.01}}, False),
        ({"is_valid": False}, False),
    ],
)
def test_settled_is_narrow_and_near(changes: dict[str, Any], expected: bool) -> None:
    place = Place(shape=SHAPE, concurrency=1, repeat=1)
    narrow = {"half_width": {"output_tok_s": 0.02, "ttft_p50": 0.05}}
    assert is_settled([summary(place, **narrow), summary(place, **narrow | changes)]) is expected
    assert not is_settled([summary(place, **narrow)]), "one alone shows nothing of how the next would differ"


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 100, 129, 4096])
def test_the_largest_concurrency(capacity: int) -> None:
    used = resolve_profile(SweepRecipe(shapes=("8/4",), find_max="interactive"))
    slugs, (found,) = followed(used, lambda place: summary(place, share=1.0 if place.concurrency <= capacity else 0.4))
    assert found.best is not None and found.best.load.concurrency is not None
    assert 0.95 * capacity <= found.best.load.concurrency <= capacity
    assert found.best.is_certain
    if capacity < 4096:
        assert found.first_failing is not None and found.first_failing.load.concurrency is not None
        assert capacity < found.first_failing.load.concurrency <= max(capacity * 1.06, capacity + 1)
    assert len(slugs) == len(set(slugs)) <= 2 * math.log2(max(capacity, 2)) + 6


@pytest.mark.parametrize(("capacity", "start"), [(0.3, 1.0), (7.77, 1.0), (7.77, 100.0), (900.0, 1.0)])
def test_the_largest_rate(capacity: float, start: float) -> None:
    used = resolve_profile(SweepRecipe(shapes=("8/4",), find_max="interactive", rates=(start,)))
    slugs, (found,) = followed(used, lambda place: summary(place, share=1.0 if (place.rate or 0) <= capacity else 0.4))
    assert found.best is not None and found.best.load.rate is not None
    assert 0.94 * capacity <= found.best.load.rate <= capacity
    assert len(slugs) < 25


def test_a_search_that_finds_nothing_ends() -> None:
    for rates in (None, (1.0,)):
        used = resolve_profile(SweepRecipe(shapes=("8/4",), find_max="interactive", rates=rates))
        _, (found,) = followed(used, lambda place: summary(place, share=0.0))
        assert found.best is None and found.first_failing is not None
        assert found.first_failing.load.order == (1 if rates is None else 0.0156)


def test_a_share_near_the_target_is_measured_again_and_pooled() -> None:
    """197 of 200 is 0.985, with an interval from 0.957 to 0.995: undecided at 0.99, so all three repeats are made."""
    used = resolve_profile(SweepRecipe(shapes=("8/4",), find_max="interactive", repeats=3))
    few = {1: (1.0, 1000), 2: (0.985, 200)}
    slugs, (found,) = followed(
        used,
        lambda place: summary(place, share=few[place.concurrency or 0][0], requests=few[place.concurrency or 0][1]),
    )
    assert slugs == ["8x4-c1-r1", "8x4-c2-r1", "8x4-c2-r2", "8x4-c2-r3"]
    assert found.first_failing is not None
    assert (found.first_failing.requests, found.first_failing.is_certain) == (600, False)
    assert found.first_failing.attainment == pytest.approx(0.985)
    assert (found.first_failing.low, found.first_failing.high) == pytest.approx((0.9718, 0.9921), abs=1e-4)


def test_a_load_that_was_not_measured_validly_does_not_hold() -> None:
    """It is tried once more than a valid one would be."""
    used = resolve_profile(SweepRecipe(shapes=("8/4",), find_max="interactive"))
    invalid = {"is_valid": False, "invalid_reasons": ("client CPU",)}
    slugs, (found,) = followed(used, lambda place: summary(place, **invalid if (place.concurrency or 0) > 1 else {}))
    assert slugs == ["8x4-c1-r1", "8x4-c2-r1", "8x4-c2-r2"]
    assert found.best is not None and found.best.load.concurrency == 1
    assert found.first_failing is not None and found.first_failing.reason == "client CPU"


def test_searches_that_cannot_be() -> None:
    with pytest.raises(InputError) as caught:
        resolve_profile(SweepRecipe(find_max="interactve", concurrency=(1, 2), slo_share=1.0))
    assert caught.value.problems == (
        'no tier "interactve" with limits (did you mean "interactive"?), expected one of interactive, conversational',
        "the search for the largest load starts from one: give one rate, or one concurrency",
        "attainment is 1, expected more than 0 and less than 1",
    )
    with pytest.raises(InputError, match="no tier to find"):
        resolve_profile(SweepRecipe(slo_share=0.9))
    with pytest.raises(InputError, match='no tier "batch" with limits'):
        resolve_profile(SweepRecipe(find_max="batch"))
