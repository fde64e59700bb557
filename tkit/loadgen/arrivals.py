"""Arrival times. Knows rates and seeds; never sees a request."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tkit.errors import InputError, did_you_mean

# name -> what it is. All but `ramp` and `trace` stay the same over time, so a point has a warm-up and a steady window.
PROCESSES = {
    "poisson":  "independent users: exponential gaps",
    "constant": "equal gaps",
    "gamma":    "bursts: gaps of the given coefficient of variation, gamma:CV (1 is poisson)",
    "ramp":     "poisson, from nothing up to the rate in a straight line",
    "trace":    "the timestamps of the data set, stretched to the rate",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    process: str
    cv: float = 1.0  # standard deviation of the gaps over their mean; of gamma only

    def __str__(self) -> str:
        return f"{self.process}:{self.cv:g}" if self.process == "gamma" else self.process

    @property
    def is_steady(self) -> bool:
        return self.process not in ("ramp", "trace")


def parse_arrivals(text: str) -> Arrivals:
    """`poisson`, `constant`, `gamma:2`, `ramp` or `trace`."""
    process, _, cv = text.partition(":")
    if process not in PROCESSES:
        raise InputError(
            f'--arrivals: unknown process "{process}"{did_you_mean(process, PROCESSES)}',
            hint=f"known: {', '.join(PROCESSES)}; gamma takes its coefficient of variation: gamma:2",
        )
    if process != "gamma":
        if cv:
            raise InputError(f"--arrivals: {process} takes no parameter, found {text!r}")
        return Arrivals(process=process)
    try:
        value = float(cv)
    except ValueError:
        value = math.nan
    if not 0.05 <= value <= 20:
        raise InputError(f"--arrivals is {text!r}, expected gamma:CV with CV from 0.05 to 20")
    return Arrivals(process=process, cv=value)


def arrival_times(
    arrivals: Arrivals, rate: float, name: str, *, ramp_s: float = 0.0, timestamps: Sequence[float] = ()
) -> Iterator[float]:
    """Seconds from the start, in order; without an end, except that a trace has one. Equal names give equal times.

    A ramp reaches `rate` after `ramp_s` and stays there. `timestamps` are a trace's own seconds.
    """
    generator = random.Random(name)
    match arrivals.process:
        case "constant":
            return (i / rate for i in itertools.count(1))
        case "gamma":
            shape = 1 / arrivals.cv**2
            return itertools.accumulate(generator.gammavariate(shape, 1 / (shape * rate)) for _ in itertools.count())
        case "ramp":
            return (_ramp_time(number, rate, ramp_s) for number in _unit_poisson(generator))
        case "trace":
            scale = trace_rate(timestamps) / rate
            return ((timestamp - timestamps[0]) * scale for timestamp in timestamps)
        case _:
            return (number / rate for number in _unit_poisson(generator))


def trace_rate(timestamps: Sequence[float]) -> float:
    """Requests per second of a trace as it was recorded."""
    span = timestamps[-1] - timestamps[0]
    return (len(timestamps) - 1) / span if span > 0 else float(len(timestamps))


def _unit_poisson(generator: random.Random) -> Iterator[float]:
    return itertools.accumulate(-math.log(1 - generator.random()) for _ in itertools.count())


def _ramp_time(number: float, rate: float, ramp_s: float) -> float:
    """When the expected number of arrivals, rate t^2 / (2 ramp_s) during the ramp, reaches `number`."""
    at_end = rate * ramp_s / 2
    return math.sqrt(2 * ramp_s * number / rate) if number < at_end else ramp_s + (number - at_end) / rate
