"""Profiles and what an option may change of them."""

from __future__ import annotations

import pytest

from tkit.errors import InputError
from tkit.loadgen.profiles import PROFILES, Shape, find_profile, resolve_profile
from tkit.loadgen.protocols import PROTOCOLS, find_protocol
from tkit.specs.recipe import SweepRecipe


def test_a_profile_without_a_version_is_the_newest() -> None:
    assert find_profile("quick") is find_profile("quick/1") is PROFILES["quick/1"]


def test_quick_stays_small() -> None:
    """18 000 output tokens in all: 20 s of a server that gives 1 000 tok/s."""
    quick = find_profile("quick")
    requests = [quick.num_warmup(c) + quick.num_requests(c) + 2 * c for c in quick.concurrency]
    assert quick.repeats * sum(requests) * quick.shapes[0].osl < 19_000
    assert all(quick.num_requests(c) >= 10 * c for c in quick.concurrency)


def test_standard_is_the_documented_one() -> None:
    standard = find_profile("standard/1")
    assert [str(shape) for shape in standard.shapes] == ["1024/1024", "8192/1024"]
    assert standard.concurrency == (1, 4, 16, 64, 256)
    assert (standard.repeats, standard.min_duration_s, standard.max_duration_s) == (3, 60, 600)
    assert (standard.doubles_above, standard.open_shares) == (0.05, (0.5, 0.7, 0.85, 0.95))
    assert standard.stops_early and str(standard.arrivals) == "poisson"
    asked = resolve_profile(SweepRecipe(profile="standard", concurrency=(2,), repeats=3))
    assert (asked.doubles_above, asked.open_shares, asked.stops_early) == (None, (), False), (
        "what is typed is what is done"
    )
    assert [(standard.num_warmup(c), standard.num_requests(c)) for c in (1, 64)] == [(16, 10), (128, 640)]


def test_overrides() -> None:
    changed = resolve_profile(SweepRecipe(shapes=("8/4", "16/4"), concurrency=(2,), requests=5, repeats=2))
    assert changed.shapes == (Shape(isl=8, osl=4), Shape(isl=16, osl=4))
    assert changed.num_requests(2) == 5
    assert (changed.min_duration_s, changed.max_duration_s) == (0, None), "an exact count is not cut off"
    timed = resolve_profile(SweepRecipe(profile="standard", duration_s=5))
    assert (timed.min_duration_s, timed.max_duration_s, timed.requests) == (5, 5, None)
    both = resolve_profile(SweepRecipe(requests=7, duration_s=5))
    assert (both.min_duration_s, both.max_duration_s, both.requests) == (0, 5, 7)


def test_rates_replace_the_closed_loop_unless_both_are_asked_for() -> None:
    assert resolve_profile(SweepRecipe(rates=(2.0,))).concurrency == ()
    assert resolve_profile(SweepRecipe(rates=(2.0,), concurrency=(4,))).concurrency == (4,)


def test_the_digest_tells_overrides_apart() -> None:
    changes = ({}, {"concurrency": (2,)}, {"requests": 9}, {"profile": "standard"})
    assert len({resolve_profile(SweepRecipe(**change)).digest for change in changes}) == 4  # type: ignore[arg-type]
    assert resolve_profile(SweepRecipe(shapes=("128/64",))).digest == resolve_profile(SweepRecipe()).digest


def test_everything_wrong_is_said_at_once() -> None:
    recipe = SweepRecipe(
        shapes=("128", "0/5", "a/b", "8/8"), concurrency=(4, 0, 4), requests=0, repeats=-1, duration_s=-2.0
    )
    with pytest.raises(InputError) as caught:
        resolve_profile(recipe)
    assert caught.value.problems == (
        'shape "128": expected input/output tokens, 1 to 10,000,000 each, like 128/64',
        'shape "0/5": expected input/output tokens, 1 to 10,000,000 each, like 128/64',
        'shape "a/b": expected input/output tokens, 1 to 10,000,000 each, like 128/64',
        "concurrency holds a value twice: 4, 0, 4",
        "concurrency is 4, 0, 4, expected at least 1 each, at most 65,535",
        "requests is 0, expected at least 1",
        "repeats is -1, expected at least 1",
        "duration is -2.0 s, expected more than 0",
    )


def test_empty_lists_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        resolve_profile(SweepRecipe(shapes=(), concurrency=()))
    assert len(caught.value.problems) == 2


def test_unknown_names() -> None:
    with pytest.raises(InputError, match=r'no profile "quik" \(did you mean "quick"\?\)'):
        find_profile("quik")
    with pytest.raises(InputError, match=r'unknown protocol "triton-grcp" \(did you mean "triton-grpc"\?\)'):
        find_protocol("triton-grcp")
    assert set(PROTOCOLS) == {"triton-grpc", "triton-http", "openai", "openai-chat"}
