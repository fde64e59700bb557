"""What a sweep leaves on disk, and what a report reads: schemas, columns, definitions. Files are listed in `docs/files.md`.

reports/<run>/
  manifest.json                         Manifest: profile, identity, grid, seeds, client
  points/<shape>-c<C>-r<k>/             <shape>-rate<R>-r<k>/ in open loop
    requests.parquet                    one row per request, columns REQUEST_COLUMNS
    chunks.parquet                      gaps between chunks, columns CHUNK_COLUMNS
    server.parquet  gpu.parquet         samples, columns SERVER_COLUMNS and GPU_COLUMNS, when there
    point.json                          PointSummary
  summary.csv  summary.json             one flat row per point
  state.jsonl                           append-only journal
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tkit.errors import InputError

SWEEP_SCHEMA = "tkit.sweep/1"
POINT_SCHEMA = "tkit.point/1"
FIND_MAX_SCHEMA = "tkit.find_max/1"
FIND_MAX_FILE = "find_max.json"  # beside manifest.json, after `tkit sweep --find-max`
VALIDATION_SCHEMA = "tkit.validation/1"
VALIDATION_FILE = "validation.json"  # beside engine.json
DEFINITIONS = "tkit.definitions/1"  # the version of METRICS below

# name -> (unit, what it means). Every number in a report carries its definition from here.
METRICS = {
    "ttft":         ("ms", "request sent -> first chunk carrying at least one generated token"),
    "ttfb":         ("ms", "request sent -> first byte of the response"),
    "tpot":         ("ms", "per request (last token - first token) / (N - tokens in the first chunk)"),
    "chunk_gap":    ("ms", "gaps between consecutive chunks, pooled over requests"),
    "e2e":          ("ms", "request sent -> last token"),
    "ttft_sched":   ("ms", "open loop: as ttft, from the scheduled time, sent then or not"),
    "e2e_sched":    ("ms", "open loop: as e2e, from the scheduled time, sent then or not"),
    "output_tok_s": ("tok/s", "output tokens / time, over the steady window"),
    "input_tok_s":  ("tok/s", "input tokens / time, over the steady window"),
    "requests_s":   ("req/s", "requests completed / time, over the steady window"),
    "tok_s_user":   ("tok/s", "1 / median tpot"),
    "tok_s_gpu":    ("tok/s", "output_tok_s / GPUs of the engine"),
    "goodput":      ("req/s", "requests per second that meet every limit of an SLO tier; open loop: from the schedule"),
}  # fmt: skip

# tool -> how what `tkit import` reads of it was counted and timed. TPOT is always (last - first) / (N - 1).
OTHER_DEFINITIONS = {
    "aiperf": {
        "tokens": "its tokenizer, over the text; with --use-server-token-count the server",
        "ttft": "request sent -> first response with content",
        "output_tok_s": "first request sent -> last answered, without its warm-up",
    },
    "vllm": {
        "tokens": "the server; its tokenizer where the server sent no usage, which the file does not tell",
        "ttft": "request sent -> first chunk with a choice, also an empty one such as a chat's role",
        "output_tok_s": "the whole benchmark, from the first request on",
    },
    "sglang": {
        "tokens": "the server; the length asked for where the server sent no usage, which the file does not tell",
        "ttft": "request sent -> first chunk with text",
        "output_tok_s": "the whole benchmark, from the first request on",
    },
    "guidellm": {
        "tokens": "the server; chunks with text where the server sent no usage",
        "ttft": "request sent -> first chunk with content",
        "output_tok_s": "first request sent -> last answered, errors included",
    },
    "genai-perf": {
        "tokens": "chunks with text, one token each",
        "ttft": "request sent -> first response with text; an empty first one is skipped",
        "output_tok_s": "first request sent -> last answered",
    },
}
# who counted the output tokens -> whose count it is: those of different counters are not compared
TOKEN_SOURCES = {
    "server_usage": "the model's own",  # the server said how many
    "token_ids":    "the model's own",  # the ids themselves were received
    "tokenizer":    "a tokenizer's",    # the text was encoded again: rarely the tokens it was generated in
    "chunks":       "the chunks",       # a chunk with text was taken for a token
}  # fmt: skip

# requests.parquet; times are nanoseconds of one monotonic clock, null when it did not happen
REQUEST_COLUMNS = {
    "id": "int64",
    # warmup | measured | drain. Measured: sent and answered in the steady window, or failed; open loop: scheduled in it
    "phase": "string",
    "scheduled_ns": "int64",
    "sent_ns": "int64",
    "first_byte_ns": "int64",
    "first_token_ns": "int64",
    "last_token_ns": "int64",
    "end_ns": "int64",
    "isl_asked": "int32",
    "isl": "int32",
    "osl_asked": "int32",
    "osl": "int32",
    "n_first": "int32",  # tokens in the first chunk
    "chunks": "int32",
    "status": "string",  # ok | error
    "error": "string",  # null, or a named error: refused, timeout, truncated, server, ...
    "worker": "int32",
}
CHUNK_COLUMNS = {"request": "int64", "gap_ns": "int64"}
# server.parquet, gpu.parquet: samples of one second, on the clock of the requests; there when something answered
SERVER_COLUMNS = {"when_ns": "int64", "metric": "string", "labels": "string", "value": "double"}
GPU_COLUMNS = {
    "when_ns": "int64",
    "gpu": "int32",
    "power_w": "double",
    "sm_clock_mhz": "double",
    "memory_clock_mhz": "double",
    "utilisation": "double",  # 0 to 1
    "memory_bytes": "double",
    "temperature_c": "double",
}

# tier -> limits in ms (MLPerf llama3.1-8b)
SLO_TIERS: dict[str, dict[str, float]] = {
    "interactive": {"ttft": 500.0, "tpot": 30.0},
    "conversational": {"ttft": 2000.0, "tpot": 100.0},
    "batch": {},
}


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a server is driven with: requests in flight in closed loop, requests/s and how they arrive in open loop."""

    concurrency: int | None = None
    rate: float | None = None
    arrivals: str | None = None  # poisson, constant, gamma:<CV>, ramp, trace; None in closed loop

    def __str__(self) -> str:
        return f"C = {self.number}" if self.rate is None else f"{self.number} req/s"

    @property
    def number(self) -> str:
        return f"{self.order:g}"

    @property
    def slug(self) -> str:
        """The load in a file name."""
        return f"c{self.number}" if self.rate is None else f"rate{self.number}"

    @property
    def order(self) -> float:
        """By which loads of one kind are sorted."""
        return float(self.concurrency or 0) if self.rate is None else self.rate


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Milliseconds. A percentile that `n` does not support is None: p99 needs n >= 662."""

    n: int
    mean: float | None
    min: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True, kw_only=True)
class PointSummary:
    """`point.json`: one shape at one load, one repeat. Every load has either a concurrency or a rate."""

    schema: str = POINT_SCHEMA
    definitions: str = DEFINITIONS
    shape: str  # "ISL/OSL", or how it is called when it is more than that
    isl: int  # asked, of a data set the mean; in `isl_unit`
    osl: int
    isl_unit: str = "tokens"  # or "characters"
    concurrency: int | None = None  # requests in flight, closed loop; None in open loop
    arrivals: str | None = None  # open loop: poisson, constant, gamma:<CV>, ramp, trace
    rate: float | None = None  # open loop: requests/s asked
    repeat: int
    requests: int  # measured, without warm-up
    errors: Mapping[str, int]  # named error -> count
    token_source: str
    window_s: float  # length of the steady window
    output_tok_s: float
    output_tok_s_whole: float  # over the whole run, beside the steady window
    input_tok_s: float | None  # None where nobody counted the input
    requests_s: float
    offered_requests_s: float | None = None  # open loop: scheduled in the steady window / its length
    tok_s_user: float | None
    tok_s_gpu: float | None
    goodput: Mapping[str, Mapping[str, float]]  # tier -> {"requests_s", "attainment", "low", "high"} (95 % Wilson)
    ttft: Distribution
    ttfb: Distribution
    tpot: Distribution
    chunk_gap: Distribution
    e2e: Distribution
    ttft_sched: Distribution | None = None
    e2e_sched: Distribution | None = None
    # half of the 95 % interval over the value, of output_tok_s and ttft_p50; none where the requests are too few
    half_width: Mapping[str, float] = field(default_factory=dict)
    # workers, cpu_share (of a core, the busiest worker's), cpu_cores (of all), {loop,schedule}_lag_p{50,90,95,99}_ms,
    # rss_bytes, delivered_concurrency, {tok_s,tpot}_drift;
    # open loop: num_held_back, num_unsent
    client: Mapping[str, float]
    # means over the point, all GPUs together: gpus, gpu_{power_w,memory_bytes,utilisation,sm_clock_mhz},
    # joules_per_output_token; none without NVML
    telemetry: Mapping[str, float] = field(default_factory=dict)
    is_valid: bool
    invalid_reasons: tuple[str, ...] = ()
    started: str  # UTC, ISO 8601
    duration_s: float

    @property
    def load(self) -> Load:
        return Load(concurrency=self.concurrency, rate=self.rate, arrivals=self.arrivals)


@dataclass(frozen=True, kw_only=True)
class SloStep:
    """The share of requests at one load, all its valid repeats together, that met a tier; 95 % Wilson interval."""

    load: Load
    requests: int
    attainment: float
    low: float
    high: float
    holds: bool  # the share is at least the target, and the load was measured validly
    is_certain: bool  # the whole interval lies on the same side
    reason: str | None = None  # why no repeat was valid


@dataclass(frozen=True, kw_only=True)
class FoundMax:
    """The largest load of one shape that holds an SLO tier; none when even the least load tried does not."""

    shape: str
    tier: str
    target: float  # share of the requests
    best: SloStep | None
    first_failing: SloStep | None  # the least load above it that does not hold; None when the search's end was reached
    steps: tuple[SloStep, ...]  # in the order measured


@dataclass(frozen=True, kw_only=True)
class FindMaxRecord:
    """`find_max.json`"""

    schema: str = FIND_MAX_SCHEMA
    found: tuple[FoundMax, ...]  # one per shape


@dataclass(frozen=True, kw_only=True)
class HostSpeed:
    """What a processor reached with all threads that it was given, measured before the sweep."""

    num_bytes: int  # read again and again, so caches count where they hold as much
    bytes_per_s: float
    flops: float  # float32

    def __post_init__(self) -> None:
        if not (self.num_bytes > 0 and 0 < self.bytes_per_s < float("inf") and 0 < self.flops < float("inf")):
            raise InputError(f"impossible processor: {self}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json`. `identity` says what was measured: endpoint, model, engine card digest, server, hardware, tkit."""

    schema: str = SWEEP_SCHEMA
    definitions: str = DEFINITIONS
    run: str  # the directory's name
    label: str  # what a legend shows: the engine's name, or the model behind a URL
    profile: str  # "quick/1"
    profile_digest: str
    seed: int
    protocol: str
    url: str
    model: str
    shapes: tuple[str, ...]
    concurrency: tuple[int, ...]
    rates: tuple[float, ...] = ()  # open loop, requests/s
    arrivals: str | None = None
    repeats: int
    requests: int | None = None
    duration_s: float | None = None
    engine: Mapping[str, Any] | None = None  # the whole engine card, so that a report needs nothing else
    validation: Mapping[str, Any] | None = None  # the engine's validation record, when there was one
    identity: Mapping[str, Any] = field(default_factory=dict)
    host_speed: HostSpeed | None = None  # of the processor, where that serves the engine and is this machine's
    command: str
    started: str
