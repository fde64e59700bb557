"""A recipe: one model, the engines to build from it, how to measure and compare them. One YAML file in `model_configs/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from tkit.errors import InputError
from tkit.files import name_problem
from tkit.specs.parallel import Parallel
from tkit.specs.precision import Precision

BACKENDS = ("auto", "reference", "tensorrt", "pytorch")
FORMATS = ("trtllm", "hf", "both")  # TensorRT-LLM checkpoint, unified Hugging Face checkpoint
GOALS = ("throughput", "latency")
HF_GENERATE = "hf-generate"  # the protocol without a server: transformers' generate, in the sweep's process
# What only the backends of TensorRT-LLM ask for: a checkpoint is the same whatever they are.
RUNTIME_FIELDS = ("goal", "max_batch_size", "max_num_tokens", "max_seq_len")

# field -> its least value; a sequence is a token of prompt and one of answer
_LEAST = {"calib_samples": 1, "calib_len": 1, "max_batch_size": 1, "max_num_tokens": 1, "max_seq_len": 2}


@dataclass(frozen=True, kw_only=True)
class EngineRecipe:
    """What changes an engine's bytes. Equal recipes and equal sources give an equal engine name."""

    quant: str = "none"
    quant_overrides: Mapping[str, str] = field(default_factory=dict)  # module pattern -> quantization, the first counts
    exclude: tuple[str, ...] = ()  # module patterns that stay in 16 bits
    kv_cache: str = "auto"  # fp8, int8, or the model's own 16 bits
    tp_size: int = 1
    pp_size: int = 1
    moe_ep_size: int = 1  # of the tp ranks, how many hold different experts
    format: str = "trtllm"
    calib: str | None = None  # .txt or .jsonl; None = the text that ships with tkit
    calib_samples: int = 16
    calib_len: int = 256  # tokens per sample
    seed: int = 0
    goal: str = "throughput"  # what a compiled engine is tuned for
    max_batch_size: int | None = None  # requests that run at once; None = by goal
    max_num_tokens: int | None = None  # tokens of one step, over all requests; None = by goal
    max_seq_len: int | None = None  # prompt and answer of one request; None = the model's own limit
    name: str | None = None  # None = made from model, quantization and parallel layout

    def __post_init__(self) -> None:
        problems: list[str] = []
        for check in (lambda: self.precision, lambda: self.parallel):  # refuse unknown formats and impossible sizes
            try:
                check()
            except InputError as error:
                problems += error.problems or (error.message,)
        problems += [
            f"{name} is {value}, expected at least {least}"
            for name, least in _LEAST.items()
            if (value := getattr(self, name)) is not None and value < least
        ]
        if self.goal not in GOALS:
            problems.append(f'goal is "{self.goal}", expected one of {", ".join(GOALS)}')
        if self.format not in FORMATS:
            problems.append(f'format is "{self.format}", expected one of {", ".join(FORMATS)}')
        if self.name is not None and (problem := name_problem(self.name)):
            problems.append(f"name {problem}")
        if problems:
            raise InputError("impossible engine", problems=problems)

    @property
    def precision(self) -> Precision:
        return Precision.of(self.quant, self.quant_overrides, self.exclude, self.kv_cache)

    @property
    def parallel(self) -> Parallel:
        return Parallel(tp_size=self.tp_size, pp_size=self.pp_size, moe_ep_size=self.moe_ep_size)


@dataclass(frozen=True, kw_only=True)
class SweepRecipe:
    """Overrides of the named profile; None keeps the profile's value."""

    profile: str = "quick"
    shapes: tuple[str, ...] | None = None  # "ISL/OSL"
    concurrency: tuple[int, ...] | None = None
    rates: tuple[float, ...] | None = None  # requests/s, open loop
    arrivals: str | None = None  # as `tkit sweep --arrivals` takes them
    max_outstanding: int | None = None  # requests in flight, open loop
    find_max: str | None = None  # an SLO tier: the largest load that holds it is sought, instead of the grid
    slo_share: float | None = None  # of the requests, to hold it
    isl_chars: bool = False  # the shapes' inputs are characters, so that no tokenizer is needed
    prefix_shares: tuple[float, ...] | None = None  # of the input that all requests have in common
    spread: float | None = None  # lengths are drawn from this share of the shape's up to them
    dataset: str | None = None  # a file of conversations or a trace, instead of shapes
    requests: int | None = None  # measured, per point
    duration_s: float | None = None  # measured, per point; with `requests`: at most
    repeats: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class OtherEngine:
    """What tkit did not build, measured as the engines are: a server at a URL, or transformers' generate."""

    protocol: str = "openai"  # as `tkit sweep --protocol` takes it
    url: str | None = None  # host:port; over HTTP also https://host/v1
    name: str | None = None  # in the report; None = the protocol, or the URL
    model: str | None = None  # None = the only one served
    num_gpus: int | None = None  # for rates per GPU
    tokenizer: str | None = None  # directory; None = the first engine's
    api_key_file: str | None = None
    metrics_url: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.protocol != HF_GENERATE and self.url is None:
            problems.append(f"{self.protocol} needs the server's url")
        given = [
            item.name for item in fields(self) if item.name not in ("protocol", "name") and getattr(self, item.name)
        ]
        if self.protocol == HF_GENERATE and given:
            problems.append(f"{HF_GENERATE} has no server: leave out {', '.join(given)}")
        if problems:
            raise InputError("impossible entry", problems=problems)

    @property
    def label(self) -> str:
        return self.name or self.url or self.protocol


@dataclass(frozen=True, kw_only=True)
class ReportRecipe:
    out: str | None = None  # None = reports/<recipe name>
    baseline: str | None = None  # quant of an engine, or name of an entry of compare_with; None = the first engine
    fail_on: str | None = None  # gates, as `tkit report --fail-on` takes them


@dataclass(frozen=True, kw_only=True)
class Recipe:
    model: str  # a directory, a hub id, or "demo"
    revision: str | None = None
    description: str = ""
    engines: tuple[EngineRecipe, ...] = (EngineRecipe(),)
    compare_with: tuple[OtherEngine, ...] = ()
    sweep: SweepRecipe = field(default_factory=SweepRecipe)
    report: ReportRecipe = field(default_factory=ReportRecipe)

    def __post_init__(self) -> None:
        problems = []
        if not self.model:
            problems.append('model is empty, expected a directory, a hub id, or "demo"')
        if not self.engines:
            problems.append("engines is empty, expected at least one")
        elif self.report.baseline is not None and self.report.baseline not in self.names:
            problems.append(f'report: baseline is "{self.report.baseline}", expected one of {", ".join(self.names)}')
        problems += [
            f"engines[{index}] is engines[{self.engines.index(engine)}] once more"
            for index, engine in enumerate(self.engines)
            if self.engines.index(engine) < index
        ]
        others = [other.label for other in self.compare_with]
        problems += [
            f'compare_with: "{label}" stands twice or is a quantization of the recipe; give it a name of its own'
            for label in dict.fromkeys(others)
            if self.names.count(label) > 1
        ]
        if problems:
            raise InputError("impossible recipe", problems=problems)

    @property
    def names(self) -> list[str]:
        """What a baseline can be called, in the order measured."""
        return [*(engine.quant for engine in self.engines), *(other.label for other in self.compare_with)]
