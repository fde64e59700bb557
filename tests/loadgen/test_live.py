"""What is told of a load while it runs."""

from __future__ import annotations

import dataclasses
import time
from array import array
from pathlib import Path

import pytest

from tkit.loadgen.exchange import Exchange
from tkit.loadgen.live import Live, LiveCounter
from tkit.loadgen.mock_server import running_mock
from tkit.loadgen.point import Place
from tkit.loadgen.profiles import Shape, find_profile
from tkit.loadgen.prompts import CharacterPrompts
from tkit.loadgen.session import Session

MS = 1_000_000


def exchange(*, chunks: int, osl: int, error: str | None = None, is_uniform: bool = True) -> Exchange:
    made = Exchange(index=0, request=b"", isl=1, osl=osl, sent_ns=1000 * MS, is_uniform=is_uniform, error=error)
    made.times = array("q", [(1050 + i) * MS for i in range(chunks)])
    return made


def test_tokens_in_flight_count_as_those_that_have_ended() -> None:
    """Requests that ended had two tokens per chunk, so 30 chunks in flight are 60 tokens, of which the rate is made."""
    counter = LiveCounter()
    counter.ended(exchange(chunks=10, osl=20))
    counter.ended(exchange(chunks=0, osl=20, error="refused"))
    began = time.monotonic()
    counter.live([], 1, 8, None)
    time.sleep(0.05)
    live = counter.live([exchange(chunks=10, osl=99), exchange(chunks=20, osl=99)], 1, 8, 7.4)
    assert 60 / (time.monotonic() - began) <= live.tok_s <= 60 / 0.05
    assert (live.done, live.total, live.in_flight, live.errors) == (1, 8, 2, 1)
    assert str(dataclasses.replace(live, tok_s=1234.4)) == "1234 tok/s, TTFT 50 ms, 2 in flight, 1 error, 7.0 s left"


def test_first_bytes_are_no_ttft_where_tokens_were_not_counted() -> None:
    counter = LiveCounter()
    counter.ended(exchange(chunks=10, osl=20, is_uniform=False))
    assert "first bytes 50 ms, 0 in flight, 0 errors, warming up" in str(counter.live([], 0, 8, None))


@pytest.mark.parametrize("place", [{"concurrency": 4}, {"rate": 20.0}])
def test_a_point_tells_how_far_it_is(place: dict[str, float], tmp_path: Path) -> None:
    shape = Shape(isl=64, osl=16, unit="characters")
    profile = dataclasses.replace(find_profile("quick"), shapes=(shape,), requests=40, max_duration_s=None)
    told: list[Live] = []
    with (
        running_mock() as url,
        Session("openai", url, "exact", prompts=CharacterPrompts(0), profile=profile) as session,
    ):
        session.probe(shape)
        point = session.measure(Place(shape=shape, repeat=1, **place), told.append)  # type: ignore[arg-type]
    assert len(told) >= 4, "some times a second"
    assert [live.done for live in told] == sorted(live.done for live in told)
    assert {live.total for live in told} == {40}
    left = [live.left_s for live in told if live.left_s is not None]
    assert left and left[-1] < left[0]
    assert max(live.in_flight for live in told) >= 3
    rates = sorted(live.tok_s for live in told[2:])
    assert rates[len(rates) // 2] == pytest.approx(point.summary.output_tok_s, rel=0.5)
