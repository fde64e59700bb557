"""What `report.json` holds, as it stands (schema tkit.report/1), and what every rendering is drawn from.

Numbers are unrounded. Times are milliseconds, rates per second, changes fractions of the baseline. A run is named by its
`id`, a letter; measures by the keys of MEASURES, tiers by those of `specs.record.SLO_TIERS`. What gates ask for beyond
MEASURES (`ttft_p95`, `goodput_interactive`) stands among a cell's estimates and changes under the gate's own name.

`gates` holds one GateOutcome per gate, in the order written, each with a GateCheck per run and point that it looked at;
it is empty when there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tkit.report.read import LeftOut
from tkit.report.statistics import Change, Estimate
from tkit.specs.engine import EngineCard
from tkit.specs.gate import Gate
from tkit.specs.record import FoundMax, HostSpeed, Load
from tkit.specs.wall import PlannedMemory, TokenCost, Wall

REPORT_SCHEMA = "tkit.report/1"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """`percentile`: "p50", or "tail": the highest of p99, p95, p90 that the requests of every run support."""

    metric: str  # of specs.record.METRICS
    percentile: str | None = None
    is_higher_better: bool = False


# fmt: off
MEASURES = {
    "output_tok_s": Measure(metric="output_tok_s", is_higher_better=True),
    "tok_s_device": Measure(metric="tok_s_gpu",    is_higher_better=True),
    "tok_s_user":   Measure(metric="tok_s_user",   is_higher_better=True),
    "ttft_p50":     Measure(metric="ttft", percentile="p50"),
    "ttft_tail":    Measure(metric="ttft", percentile="tail"),
    "tpot_p50":     Measure(metric="tpot", percentile="p50"),
    "tpot_tail":    Measure(metric="tpot", percentile="tail"),
    "e2e_p50":      Measure(metric="e2e",  percentile="p50"),
    "e2e_tail":     Measure(metric="e2e",  percentile="tail"),
    # of open loops only
    "ttft_sched_p50":  Measure(metric="ttft_sched", percentile="p50"),
    "ttft_sched_tail": Measure(metric="ttft_sched", percentile="tail"),
    "e2e_sched_p50":   Measure(metric="e2e_sched",  percentile="p50"),
    "e2e_sched_tail":  Measure(metric="e2e_sched",  percentile="tail"),
}
# fmt: on

LATENCY_NAMES = {
    "ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E", "ttft_sched": "TTFT from schedule", "e2e_sched": "E2E from schedule",
}  # fmt: skip

# what server and GPUs said of themselves at a load -> what it is
TELEMETRY = {
    "gpu_power_w": "of all GPUs together, the mean",
    "joules_per_output_token": "the GPUs' mean power / output tok/s",
    "gpu_utilisation": "share of the time in which a kernel ran, the mean over GPUs",
    "gpu_sm_clock_mhz": "the mean over GPUs",
    "gpu_memory_bytes": "of all GPUs together, the mean",
    "running_mean": "requests running in the server",
    "waiting_mean": "requests waiting in the server",
    "waiting_max": "the most requests that waited in the server",
    "kv_share_max": "of the KV cache, the highest share in use",
    "server_bytes_max": "resident memory of the engine's process, the highest",
}

# how a gate, and each of its checks, can come out
PASSED, FAILED, NOT_EVALUATED = "passed", "failed", "not evaluated"

# Comparison.device -> what a rate per device is
DEVICES = {
    "GPU": "output tok/s / GPUs of the engine",
    "device": "output tok/s / GPUs of the engine; an engine without GPUs is one device",
    "server": "output tok/s; how many GPUs are behind the server was not told",
}


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Requests per second within a tier's limits, the share of requests that were, and that share's 95 % interval."""

    requests_s: float
    attainment: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run at one load: its valid repeats joined, or all of them when none is valid."""

    run: str  # RunFacts.id
    load: Load
    repeats: int
    requests: int
    errors: Mapping[str, int]
    is_valid: bool
    invalid_reasons: tuple[str, ...]
    is_on_frontier: bool = False  # closed loops only: in an open one the rate is the one asked for
    requests_s: float  # answered, median of the repeats
    in_flight: float  # C; in an open loop the mean
    ttft_mean: Estimate | None  # in an open loop from the schedule
    estimates: Mapping[str, Estimate | None]  # by MEASURES, and by what gates ask for
    output_tok_s_repeats: tuple[float, ...]
    goodput: Mapping[str, Goodput]  # by tier
    changes: Mapping[str, Change] = field(default_factory=dict)  # as `estimates`, against the baseline
    telemetry: Mapping[str, float] = field(default_factory=dict)  # by TELEMETRY, and `gpus`; empty without samples
    wall: Wall | None = None
    cost: TokenCost | None = None


@dataclass(frozen=True, kw_only=True)
class Level:
    """`tail`: the percentile that stands for p99 here, None when the requests support none."""

    load: Load
    tail: int | None
    cells: tuple[Cell, ...]  # in the order of the runs; a run without a readable point here has none


@dataclass(frozen=True, kw_only=True)
class Group:
    """What may be compared: one shape, one kind of load, one way to count tokens, one version of the definitions."""

    shape: str
    arrivals: str | None = None  # as in Load
    token_source: str
    definitions: str
    runs: tuple[str, ...]
    levels: tuple[Level, ...]
    note: str | None = None  # why another group of the same shape stands apart

    @property
    def title(self) -> str:
        return self.shape if self.arrivals is None else f"{self.shape}, {self.arrivals} arrivals"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """`kind`: "engine" is what a comparison is usually about; "model" and "conditions" may explain a result instead."""

    kind: str
    name: str
    values: Mapping[str, str | None]  # run id -> value


@dataclass(frozen=True, kw_only=True)
class MissingPoint:
    shape: str
    load: Load
    repeat: int

    def __str__(self) -> str:
        return f"{self.shape} {self.load} repeat {self.repeat}"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    id: str  # A, B, ...
    name: str
    run: str
    directory: str
    label: str
    started: str
    profile: str
    protocol: str
    url: str
    model: str
    command: str
    num_points: int
    num_invalid: int
    missing: tuple[MissingPoint, ...]  # grid points without a readable result
    ended_early: str | None  # the sweep's own reason for them
    found: tuple[FoundMax, ...] = ()  # `tkit sweep --find-max`
    num_devices: int
    engine: EngineCard | None
    validation: Mapping[str, Any] | None
    identity: Mapping[str, Any]
    host_speed: HostSpeed | None
    hardware: str  # what the walls of its cells were computed from, or why there are none
    memory: PlannedMemory | None
    definitions: str
    files: Mapping[str, str]  # path inside the run -> sha256


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence about one load of one group, and how the other loads agree."""

    text: str
    over_loads: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`tone`, of the speed against the baseline: worse or mixed (also better) where it is so at any load, else better, same
    or undecided at the highest; "none" without a baseline.

    `claims`: one per comparable group. `details`: quality and validity.
    """

    run: str
    tone: str
    claims: tuple[Claim, ...]
    details: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class GateCheck:
    """One gate at one point of one run; `shape` and `load` are None for what a run has once, such as `kl`.

    `value`, `low` and `high`: what was held against the limit, a change as a fraction or a number in the metric's unit,
    and its 95 % interval where it has one. `text` says it in words, or why it could not be said.
    """

    run: str | None  # RunFacts.id; None for a directory that was left out
    shape: str | None = None
    load: Load | None = None
    state: str  # PASSED, FAILED, NOT_EVALUATED
    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class GateOutcome:
    """`state`: FAILED when a check failed, else NOT_EVALUATED when one could not be made, else PASSED."""

    gate: Gate
    state: str
    checks: tuple[GateCheck, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    schema: str = REPORT_SCHEMA
    created: str  # UTC, ISO 8601
    tkit: str
    device: str  # what a rate per device is divided by: a key of DEVICES
    prices: str | None = None  # where from, and of which day; None = no costs were asked for
    threshold: float  # smaller changes are never called
    baseline: str | None  # run id
    verdict: tuple[Verdict, ...] = ()
    gates: tuple[GateOutcome, ...] = ()
    runs: tuple[RunFacts, ...]
    differences: tuple[Difference, ...]
    groups: tuple[Group, ...]
    left_out: tuple[LeftOut, ...]  # runs and points

    def facts(self, run_id: str) -> RunFacts:
        return next(run for run in self.runs if run.id == run_id)
