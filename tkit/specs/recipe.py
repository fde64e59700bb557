"""A recipe: one model, the engines to build from it, how to measure and compare them. One YAML file in `model_configs/`."""

from __future__ import annotations

from dataclasses import dataclass, field

from tkit.errors import InputError
from tkit.specs.parallel import Parallel
from tkit.specs.quantization import quant_format

BACKENDS = ("auto", "reference")
FORMATS = ("trtllm", "hf", "both")  # TensorRT-LLM checkpoint, unified Hugging Face checkpoint


@dataclass(frozen=True, kw_only=True)
class EngineRecipe:
    """What changes an engine's bytes. Equal recipes and equal sources give an equal engine name."""

    quant: str = "none"
    tp_size: int = 1
    pp_size: int = 1
    moe_ep_size: int = 1  # of the tp ranks, how many hold different experts
    format: str = "trtllm"
    calib: str | None = None  # .txt or .jsonl; None = the text that ships with tkit
    calib_samples: int = 16
    calib_len: int = 256  # tokens per sample
    seed: int = 0
    name: str | None = None  # None = made from model, quantization and parallel layout

    def __post_init__(self) -> None:
        quant_format(self.quant, where="quant")
        _ = self.parallel  # refuses impossible sizes
        problems = [
            f"{name} is {value}, expected at least 1"
            for name, value in (("calib_samples", self.calib_samples), ("calib_len", self.calib_len))
            if value < 1
        ]
        if self.format not in FORMATS:
            problems.append(f'format is "{self.format}", expected one of {", ".join(FORMATS)}')
        if problems:
            raise InputError("impossible engine", problems=problems)

    @property
    def parallel(self) -> Parallel:
        return Parallel(tp_size=self.tp_size, pp_size=self.pp_size, moe_ep_size=self.moe_ep_size)


@dataclass(frozen=True, kw_only=True)
class SweepRecipe:
    """Overrides of the named profile; None keeps the profile's value."""

    profile: str = "quick"
    shapes: tuple[str, ...] | None = None  # "ISL/OSL"
    concurrency: tuple[int, ...] | None = None
    requests: int | None = None  # measured, per point
    duration_s: float | None = None  # measured, per point; with `requests`: at most
    repeats: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ReportRecipe:
    out: str | None = None  # None = reports/<recipe name>
    baseline: str | None = None  # quant name of the engine the others are compared with; None = the first engine
    fail_on: str | None = None  # gates, as `tkit report --fail-on` takes them


@dataclass(frozen=True, kw_only=True)
class Recipe:
    model: str  # a directory, a hub id, or "demo"
    revision: str | None = None
    description: str = ""
    engines: tuple[EngineRecipe, ...] = (EngineRecipe(),)
    sweep: SweepRecipe = field(default_factory=SweepRecipe)
    report: ReportRecipe = field(default_factory=ReportRecipe)

    def __post_init__(self) -> None:
        problems = []
        quants = [engine.quant for engine in self.engines]
        if not quants:
            problems.append("engines is empty, expected at least one")
        elif self.report.baseline is not None and self.report.baseline not in quants:
            problems.append(f'report: baseline is "{self.report.baseline}", expected one of {", ".join(quants)}')
        if problems:
            raise InputError("impossible recipe", problems=problems)
