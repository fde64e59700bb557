"""Arrival times against the distributions that they are named for."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest

from tkit.errors import InputError
from tkit.loadgen.arrivals import Arrivals, arrival_times, parse_arrivals, trace_rate


def times(text: str, rate: float, count: int, **options: object) -> np.ndarray:
    return np.fromiter(
        itertools.islice(arrival_times(parse_arrivals(text), rate, "name", **options), count),  # type: ignore[arg-type]
        dtype=float,
    )


@pytest.mark.parametrize(("text", "cv"), [("poisson", 1.0), ("gamma:2", 2.0), ("gamma:0.5", 0.5), ("gamma:1", 1.0)])
def test_gaps_have_the_mean_and_the_variation_that_were_asked_for(text: str, cv: float) -> None:
    gaps = np.diff(times(text, 5.0, 20_000), prepend=0)
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06)


def test_poisson_gaps_are_exponential() -> None:
    """Kolmogorov-Smirnov against 1 - exp(-rate t): beyond 1.63 / sqrt(n) with a chance of 1 %."""
    gaps = np.sort(np.diff(times("poisson", 5.0, 5_000), prepend=0))
    steps = np.arange(1, len(gaps) + 1) / len(gaps)
    assert np.abs(1 - np.exp(-5 * gaps) - steps).max() < 1.63 / np.sqrt(len(gaps))


def test_constant_gaps_are_equal() -> None:
    assert times("constant", 4.0, 3).tolist() == [0.25, 0.5, 0.75]


def test_a_ramp_rises_in_a_straight_line_to_its_rate() -> None:
    """The number of arrivals until t is rate t^2 / (2 T): a quarter of them in the first half. Then the rate stays."""
    seen = times("ramp", 100.0, 15_000, ramp_s=100)
    assert int((seen < 100).sum()) == pytest.approx(5000, rel=0.05)
    assert int((seen < 50).sum()) == pytest.approx(1250, rel=0.1)
    assert int(((seen > 100) & (seen < 150)).sum()) == pytest.approx(5000, rel=0.05)


def test_a_trace_keeps_its_gaps_and_is_stretched_to_a_rate() -> None:
    recorded = [7.0, 8.0, 8.5, 12.0]
    assert trace_rate(recorded) == pytest.approx(3 / 5)
    assert times("trace", 3 / 5, 9, timestamps=recorded).tolist() == pytest.approx([0, 1, 1.5, 5])
    assert times("trace", 6 / 5, 9, timestamps=recorded).tolist() == pytest.approx([0, 0.5, 0.75, 2.5])


def test_equal_names_give_equal_times_in_another_process() -> None:
    program = (
        "import itertools; from tkit.loadgen.arrivals import arrival_times, parse_arrivals\n"
        "print(*itertools.islice(arrival_times(parse_arrivals('gamma:2'), 5.0, 'name'), 50))"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert there == " ".join(map(str, times("gamma:2", 5.0, 50).tolist())) + "\n"
    other = itertools.islice(arrival_times(Arrivals(process="gamma", cv=2.0), 5.0, "another"), 50)
    assert list(other) != times("gamma:2", 5.0, 50).tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("posson", 'unknown process "posson" (did you mean "poisson"?)'),
        ("gamma", "--arrivals is 'gamma', expected gamma:CV with CV from 0.05 to 20"),
        ("gamma:x", "expected gamma:CV"),
        ("gamma:99", "expected gamma:CV"),
        ("constant:2", "constant takes no parameter, found 'constant:2'"),
    ],
)
def test_what_is_no_arrival_process(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_arrivals(text)
    assert message in str(caught.value)
