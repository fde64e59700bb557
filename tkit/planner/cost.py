"""Dollars and joules from a rate, a price and a data sheet. Prices are the user's, from a dated file; none is built in.

$ per million tokens = 1e6 n price / (3600 tok/s utilisation)
energy per token     = n TDP wall / tok/s        wall 1.13-1.31: servers, fans and losses on top of the GPUs
                                                 (MLPerf Inference v5.1 power, 8 x B200)
TCO per year         = capex / years + power PUE 8760 h price per kWh + hosting
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tkit.errors import InputError, did_you_mean
from tkit.files import from_mapping, read_yaml
from tkit.planner.gpus import find_gpu
from tkit.specs.hardware import Gpu

WALL_POWER = (1.13, 1.31)  # of the sum of the GPUs' TDP, under load
HOURS_PER_YEAR = 8760


@dataclass(frozen=True, kw_only=True)
class GpuPrice:
    usd_per_hour: float | None = None  # rented
    capex_usd: float | None = None  # bought, with its share of server and network
    hosting_usd_per_month: float = 0.0

    def __post_init__(self) -> None:
        if self.usd_per_hour is None and self.capex_usd is None:
            raise InputError("a price needs usd_per_hour or capex_usd")
        problems = [
            f"{name} is {value}, expected at least 0"
            for name in ("usd_per_hour", "capex_usd", "hosting_usd_per_month")
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf
        ]
        if problems:
            raise InputError("impossible price", problems=problems)


@dataclass(frozen=True, kw_only=True)
class Prices:
    """The file of `--prices`."""

    date: str  # of the prices: they age faster than anything else here
    gpus: Mapping[str, GpuPrice]
    usd_per_kwh: float = 0.0
    pue: float = 1.3
    years: float = 4.0  # of amortisation
    utilisation: float = 0.6  # share of the hours in which the GPUs work at the planned rate
    source: str = ""

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.usd_per_kwh < math.inf:
            problems.append(f"usd_per_kwh is {self.usd_per_kwh}, expected at least 0")
        if not 1 <= self.pue < math.inf:
            problems.append(f"pue is {self.pue}, expected at least 1")
        if not 0 < self.years < math.inf:
            problems.append(f"years is {self.years}, expected more than 0")
        if not 0 < self.utilisation <= 1:
            problems.append(f"utilisation is {self.utilisation}, expected more than 0, at most 1")
        if problems:
            raise InputError("impossible prices", problems=problems)

    def of(self, gpu: Gpu) -> GpuPrice:
        if gpu.name not in self.gpus:
            raise InputError(
                f"--prices: no price for {gpu.name}{did_you_mean(gpu.name, self.gpus)}",
                hint=f"priced: {', '.join(self.gpus) or 'none'}",
            )
        return self.gpus[gpu.name]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """`usd_per_million` counts output tokens. A pair is (low, high)."""

    prices_date: str
    usd_per_hour: float
    usd_per_million: tuple[float, float]  # over the band of the throughput
    utilisation: float
    joules_per_token: tuple[float, float]
    wall_kw: tuple[float, float]
    usd_per_year: float
    tco_usd: float
    years: float
    parts: Mapping[str, float] = field(default_factory=dict)  # of a year


def read_prices(path: Path) -> Prices:
    raw = read_yaml(path)
    gpus = raw.pop("gpus", None) if isinstance(raw, dict) else None
    if not isinstance(gpus, dict) or not gpus:
        raise InputError(f"{path}: gpus is missing", hint="gpus: {H100-SXM: {usd_per_hour: 2.5}}")
    priced = {
        find_gpu(str(name), f"{path}: gpus").name: from_mapping(GpuPrice, values, f"{path}: gpus: {name}")
        for name, values in gpus.items()
    }
    if "date" in raw:
        raw["date"] = str(raw["date"])  # YAML reads 2026-11-01 as a date
    return from_mapping(Prices, {**raw, "gpus": priced}, str(path))


def usd_per_million_tokens(usd_per_gpu_hour: float, num_gpus: int, tok_s: float, utilisation: float = 1.0) -> float:
    return 1e6 * num_gpus * usd_per_gpu_hour / (3600 * tok_s * utilisation)


def joules_per_token(gpu: Gpu, num_gpus: int, tok_s: float) -> tuple[float, float]:
    return tuple(num_gpus * gpu.tdp_w * share / tok_s for share in WALL_POWER)  # type: ignore[return-value]


def gpus_for_rate(requests_s: float, requests_s_per_engine: float, gpus_per_engine: int) -> int:
    """Whole engines, for a target rate of requests."""
    return math.ceil(requests_s / requests_s_per_engine) * gpus_per_engine


def cost(gpu: Gpu, num_gpus: int, tok_s: tuple[float, float, float], prices: Prices) -> Cost:
    """`tok_s`: (expected, low, high) output tokens per second of the engine."""
    price = prices.of(gpu)
    kilowatts = tuple(num_gpus * gpu.tdp_w * share / 1000 for share in WALL_POWER)
    # idle GPUs still draw about a third
    mean_kw = sum(kilowatts) / 2 * (prices.utilisation + (1 - prices.utilisation) / 3)
    power = mean_kw * prices.pue * HOURS_PER_YEAR * prices.usd_per_kwh
    if price.usd_per_hour is not None:
        parts = {"rent": price.usd_per_hour * HOURS_PER_YEAR * num_gpus}
    else:
        assert price.capex_usd is not None
        parts = {"capex": price.capex_usd * num_gpus / prices.years, "power": power}
    parts["hosting"] = price.hosting_usd_per_month * 12 * num_gpus
    per_year = sum(parts.values())
    per_hour = per_year / HOURS_PER_YEAR
    _, low, high = tok_s
    return Cost(
        prices_date=prices.date,
        usd_per_hour=per_hour,
        usd_per_million=(
            usd_per_million_tokens(per_hour, 1, high, prices.utilisation),
            usd_per_million_tokens(per_hour, 1, low, prices.utilisation),
        ),
        utilisation=prices.utilisation,
        joules_per_token=joules_per_token(gpu, num_gpus, tok_s[0]),
        wall_kw=(kilowatts[0], kilowatts[1]),
        usd_per_year=per_year,
        tco_usd=per_year * prices.years,
        years=prices.years,
        parts=parts,
    )
