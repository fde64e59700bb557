"""One plan: a model, a GPU, a load -> memory, layout, speed, bands. Puts the other modules of this package together.

Every number of time is the formula's, corrected by the published runs near to it, with a band: what held-out runs as near as
these left, nine times out of ten. Constants that were refitted to the user's own sweep stand uncorrected, with its band.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tkit.errors import InputError
from tkit.planner.cost import Cost, Prices, cost, gpus_for_rate
from tkit.planner.engines import DEFAULT_ENGINE, Band, Engine, engine
from tkit.planner.fit import Demand, Layout, choose, concurrency_by_context, contexts, layout, violations
from tkit.planner.gpus import GPUS_PER_NODE, gpu_table
from tkit.planner.memory import kv_bytes_per_sequence, kv_bytes_per_token, stored_bytes
from tkit.planner.neighbours import Correction, Run, metric_of, published
from tkit.planner.precision import KV_DTYPES, KV_MIN_SM, Precision, kv_dtype, precision
from tkit.planner.roofline import Efficiencies, Machine, decode_step, experts_read, machine, prefill_s
from tkit.planner.shapes import ModelShape, num_active_params, num_params
from tkit.planner.speed import MAX_BATCH, Served, idle_ttft_s, marginal_prefill_s, served, throughput, tpot_s, way_in_s
from tkit.specs.hardware import Gpu
from tkit.specs.parallel import Parallel
from tkit.specs.record import SLO_TIERS

PLAN_SCHEMA = "tkit.plan/1"
ALTERNATIVE_QUANTS = ("none", "fp8", "int8_sq", "int8", "int4_awq", "nvfp4")
ACCEPTANCES = (0.6, 0.7, 0.8)
DRAFT_TOKENS = 4
DRAFT_SHARE = 0.05  # of a step's linear layers: a draft model of a twentieth of the size


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the user asked for. None = the planner chooses."""

    gpu: Gpu
    num_gpus: int | None = None
    tp: int | None = None
    pp: int | None = None
    quant: str = "none"
    kv_cache: str = "auto"
    isl: int = 1024
    osl: int = 1024
    concurrency: int = 16
    slo: str | None = None
    requests_s: float | None = None  # the load to size for
    engine: str = DEFAULT_ENGINE
    engine_version: str | None = None
    mixed: Precision | None = None  # `quant` and the modules that differ

    @property
    def weights(self) -> Precision:
        return self.mixed or precision(self.quant)

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, expected at least 1"
            for name in ("num_gpus", "tp", "pp", "isl", "osl", "concurrency")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if self.slo is not None and self.slo not in SLO_TIERS:
            problems.append(f'slo is "{self.slo}", expected one of {", ".join(SLO_TIERS)}')
        if None not in (self.num_gpus, self.tp, self.pp) and self.num_gpus != self.tp * self.pp:  # type: ignore[operator]
            problems.append(f"tp {self.tp} x pp {self.pp} is not num-gpus {self.num_gpus}")
        if problems:
            raise InputError("impossible plan", problems=problems)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """`factor` times the formula's value. `low` to `high` holds the truth nine times out of ten, as `n` held-out rows say."""

    value: float
    low: float
    high: float
    n: int
    factor: float
    source: str  # of the factor and the band


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What is expected of a load: means."""

    ttft_ms: Estimate
    tpot_ms: Estimate
    tok_s: Estimate
    binds: str


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Where prefill and decode stand on the roofline. Intensity in operations per byte of weights and cache read."""

    name: str
    intensity: float
    ridge: float
    seconds: float
    binds: str
    share_of_peak: float  # of the limit that binds
    terms: Mapping[str, float] = field(default_factory=dict)  # seconds


@dataclass(frozen=True, kw_only=True)
class Point:
    """One concurrency of the curve. Milliseconds and tokens per second."""

    concurrency: int
    running: int  # what the KV cache holds of it
    ttft_ms: float  # the median
    tpot_ms: float
    tok_s: float
    tok_s_gpu: float
    tok_s_gpu_low: float  # of the 90 % band at this load
    tok_s_gpu_high: float
    tok_s_user: float
    binds: str


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another quantization of the same model on the same GPU."""

    quant: str
    kv_cache: str
    num_gpus: int | None  # smallest that fits the same load; None = none does
    tp: int | None
    weight_bytes: int
    max_concurrency: int
    decode_speedup: float | None  # at the asked batch, same GPUs where both fit
    prefill_speedup: float | None
    tok_s_gpu: float | None
    is_built: bool


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Drafting `tokens` per step. `gain` at the asked batch; beyond `break_even_batch` it costs more than it gives, None =
    at no batch up to MAX_BATCH: reading long contexts, which drafting saves, outgrows the products."""

    acceptance: float
    tokens: int
    gain: float
    break_even_batch: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    schema: str = PLAN_SCHEMA
    model: str
    model_source: str
    num_params: int
    num_active_params: int
    gpu: str
    quant: str
    kv_cache: str
    isl: int
    osl: int
    concurrency: int
    engine: str
    engine_generation: str
    provenance: str
    fits: bool
    verdict: str
    chosen: Layout
    considered: tuple[Layout, ...]
    stored_bytes: int
    kv_bytes_per_token: int  # of the whole model, whatever TP repeats
    max_concurrency: int
    max_context: int
    max_position: int
    concurrency_by_context: Mapping[int, int]
    kv_bytes_by_context: Mapping[int, int]  # of one sequence on the fullest rank
    ttft_idle_ms: Estimate
    ttft_ms: Estimate  # mean under the load
    ttft_p50_p90_p99_ms: tuple[float, float, float]
    ttft_burst_ms: float  # of the last one when all requests arrive at once
    tpot_ms: Estimate
    tok_s: Estimate
    requests_s: float
    phases: tuple[Phase, ...]
    peak_flops: float  # of one GPU, in the type of the products
    curve: tuple[Point, ...]
    slo: Mapping[str, Any] | None
    alternatives: tuple[Alternative, ...]
    speculation: tuple[Speculation, ...]
    cost: Cost | None
    gpus_for_load: int | None
    notes: tuple[str, ...]


def make_plan(
    shape: ModelShape,
    wish: Wish,
    source: str,
    *,
    prices: Prices | None = None,
    constants: Engine | None = None,
    with_alternatives: bool = True,
) -> Plan:
    """Raises InputError with everything that cannot be, and the nearest that can."""
    weights = wish.weights
    kv = kv_dtype(wish.kv_cache, weights, wish.gpu)
    check(shape, wish, weights, kv)
    used = constants or engine(wish.engine, wish.engine_version)
    demand = Demand(
        isl=wish.isl,
        osl=wish.osl,
        concurrency=wish.concurrency,
        engine=wish.engine,
        reserved_bytes=int(used.efficiencies.reserved_bytes),
    )
    best, considered = choose(shape, weights, kv, wish.gpu, demand, num_gpus=wish.num_gpus, tp=wish.tp, pp=wish.pp)
    if not considered:
        raise _no_layout(shape, wish)
    chosen = best or min(considered, key=lambda item: (item.max_concurrency == 0, -item.max_concurrency))
    e, m = used.efficiencies, machine(shape, weights, kv, wish.gpu, chosen.parallel)
    running = max(min(wish.concurrency, chosen.max_concurrency), 1)
    speed = Speed(shape, weights, kv, wish, used, m, chosen)
    at, run = speed.closed_loop(wish.concurrency), speed.simulated(wish.concurrency)
    tok_s, ttft = at.tok_s, at.ttft_ms
    requests_s = tok_s.value / wish.osl
    return Plan(
        model=shape.name,
        model_source=source,
        num_params=num_params(shape),
        num_active_params=num_active_params(shape),
        gpu=wish.gpu.name,
        quant=wish.quant,
        kv_cache=kv,
        isl=wish.isl,
        osl=wish.osl,
        concurrency=wish.concurrency,
        engine=used.name,
        engine_generation=used.generation,
        provenance=used.provenance,
        fits=best is not None,
        verdict=_verdict(wish, chosen, best, considered),
        chosen=chosen,
        considered=tuple(considered),
        stored_bytes=stored_bytes(shape, weights, chosen.parallel, has_kv_scales=wish.kv_cache in ("fp8", "int8")),
        kv_bytes_per_token=kv_bytes_per_token(shape, kv),
        max_concurrency=chosen.max_concurrency,
        max_context=chosen.max_context,
        max_position=shape.max_position,
        concurrency_by_context=concurrency_by_context(shape, kv, chosen.parallel, chosen.ledger.kv_pool),
        kv_bytes_by_context={
            context: kv_bytes_per_sequence(shape, kv, context, chosen.parallel)
            for context in contexts(shape.max_position)
        },
        ttft_idle_ms=speed.estimate("ttft", 1, 1e3 * float(idle_ttft_s(m, wish.isl, e)), load="static"),
        ttft_ms=ttft,
        ttft_p50_p90_p99_ms=tuple(round(1e3 * ttft.factor * run.percentile(share), 2) for share in (50, 90, 99)),  # type: ignore[arg-type]
        ttft_burst_ms=1e3
        * ttft.factor
        * (float(idle_ttft_s(m, wish.isl, e) + way_in_s(m, running, e)) + (running - 1) * speed.prompt_s),
        tpot_ms=at.tpot_ms,
        tok_s=tok_s,
        requests_s=requests_s,
        phases=speed.phases(running),
        peak_flops=m.flops,
        curve=speed.curve(),
        slo=speed.slo(wish.slo) if wish.slo else None,
        alternatives=tuple(_alternatives(shape, wish, demand, chosen, used)) if with_alternatives else (),
        speculation=tuple(_speculation(m, wish, running, e)),
        cost=cost(wish.gpu, chosen.parallel.world_size, (tok_s.value, tok_s.low, tok_s.high), prices)
        if prices
        else None,
        gpus_for_load=gpus_for_rate(wish.requests_s, requests_s, chosen.parallel.world_size)
        if wish.requests_s
        else None,
        notes=tuple(_notes(shape, wish, weights, kv, chosen, used)),
    )


def check(shape: ModelShape, wish: Wish, weights: Precision, kv: str) -> None:
    """What no engine can do is refused, all of it at once."""
    gpu, problems, hints = wish.gpu, [], []
    if gpu.sm < weights.min_sm:
        able = [name for name in ALTERNATIVE_QUANTS if gpu.sm >= precision(name).min_sm and name != "none"]
        first = next(card for card in gpu_table().values() if card.sm >= weights.min_sm)
        problems.append(f"{wish.quant} needs compute capability {weights.min_sm / 10}, {gpu.name} has {gpu.sm / 10}")
        hints.append(f"--quant {', '.join(able)} run on {gpu.name}; {wish.quant} starts with {first.name}")
    if gpu.sm < KV_MIN_SM[kv]:
        problems.append(f"a {kv} KV cache needs compute capability {KV_MIN_SM[kv] / 10}, {gpu.name} has {gpu.sm / 10}")
        hints.append(f"--kv-cache {', '.join(name for name in KV_DTYPES if gpu.sm >= KV_MIN_SM[name])}")
    if wish.isl + wish.osl > shape.max_position:
        problems.append(
            f"isl {wish.isl} + osl {wish.osl} = {wish.isl + wish.osl} exceeds the {shape.max_position} positions of {shape}"
        )
        hints.append(f"--isl {max(shape.max_position - wish.osl, 1)} --osl {min(wish.osl, shape.max_position - 1)}")
    if wish.tp or wish.pp:
        problems += violations(shape, weights, Parallel(tp_size=wish.tp or 1, pp_size=wish.pp or 1))
    if problems:
        raise InputError(f"{shape} on {gpu.name}: this cannot run", problems=problems, hint="; ".join(hints) or None)


def _no_layout(shape: ModelShape, wish: Wish) -> InputError:
    """TP stays within a node or an NVLink domain, and TP x PP has to give the asked number of GPUs."""
    limit = max(wish.gpu.nvlink_domain if wish.gpu.nvlink_domain >= 72 else GPUS_PER_NODE, GPUS_PER_NODE)
    asked = ", ".join(
        f"{name} {value}" for name, value in (("num-gpus", wish.num_gpus), ("tp", wish.tp), ("pp", wish.pp)) if value
    )
    problems, hint = [], "leave --tp and --pp to auto"
    if wish.tp and wish.tp > limit:
        near = max(size for size in range(1, limit + 1) if wish.tp % size == 0)
        problems.append(f"tp {wish.tp} is more than the {limit} GPUs that a fast link joins")
        hint = f"--tp {near} --pp {wish.tp // near}"
    elif wish.num_gpus and wish.num_gpus % ((wish.tp or 1) * (wish.pp or 1)):
        problems.append(f"{wish.num_gpus} GPUs are no multiple of what was asked for")
    else:
        problems.append(f"no split of {shape.num_heads} heads and {shape.num_layers} layers gives these numbers")
    return InputError(f"{shape} on {wish.gpu.name}: no layout with {asked}", problems=problems, hint=hint)


class Speed:
    """One layout's times, in the units of the plan."""

    def __init__(
        self, shape: ModelShape, weights: Precision, kv: str, wish: Wish, used: Engine, m: Machine, chosen: Layout
    ):
        self.shape, self.weights, self.kv, self.wish, self.used, self.m, self.chosen = (
            shape, weights, kv, wish, used, m, chosen,
        )  # fmt: skip
        self.e = used.efficiencies
        self.prompt_s = float(marginal_prefill_s(m, wish.isl, self.e)) / m.pp
        self._runs: dict[int, Served] = {}

    def running(self, load: int) -> int:
        """What the KV cache holds of it."""
        return max(min(load, self.chosen.max_concurrency), 1)

    def tpot_ms(self, load: int) -> Estimate:
        formula = float(tpot_s(self.m, self.running(load), self.wish.isl, self.wish.osl, self.e))
        return self.estimate("tpot", load, 1e3 * formula)

    def tok_s(self, load: int) -> Estimate:
        return self.estimate("throughput", load, self._formula_tok_s(self.running(load)))

    def estimate(self, metric: str, requests: float, formula: float, load: str = "closed") -> Estimate:
        """`load` as published.Row has it: a closed loop of so many clients, a rate, or static: an engine alone."""
        found = self._correction(metric, requests, load)
        value = found.factor * formula
        return Estimate(
            value=value,
            low=value * found.low,
            high=value * found.high,
            n=found.n,
            factor=found.factor,
            source=found.source,
        )

    def _correction(self, metric: str, requests: float, load: str) -> Correction:
        wish, shape, parallel = self.wish, self.shape, self.chosen.parallel
        if self.used.is_refitted:
            band: Band = self.used.band(
                metric_of(metric, load), wish.gpu.name, dtype_cell(self.weights), shape.num_experts > 0
            )
            return Correction(
                factor=1.0, low=band.low, high=band.high, n=band.n, source=f"the constants alone: {band.cell}"
            )
        asked = Run(
            engine=self.used.name,
            version=self.used.version,
            generation=self.used.generation,
            gpu=wish.gpu.name,
            num_params=num_params(shape),
            num_active_params=num_active_params(shape),
            is_moe=shape.num_experts > 0,
            quant=self.weights.name,
            tp=parallel.tp_size,
            pp=parallel.pp_size,
            has_attention_dp=False,
            isl=wish.isl,
            osl=wish.osl,
            load=load,
            requests=requests,
            metric=metric,
        )
        return published().correction(asked)

    def _formula_tok_s(self, batch: float) -> float:
        return float(throughput(self.m, batch, self.wish.isl, self.wish.osl, self.e))

    def curve(self) -> tuple[Point, ...]:
        highest = max(self.chosen.max_concurrency, 1)
        loads = sorted({2**power for power in range(13) if 2**power <= highest} | {self.wish.concurrency})
        return tuple(self.point(load) for load in loads)

    def point(self, load: int) -> Point:
        running = self.running(load)
        tok_s, tpot, gpus = self.tok_s(load), self.tpot_ms(load).value, self.chosen.parallel.world_size
        return Point(
            concurrency=load,
            running=running,
            ttft_ms=self.ttft_p50_ms(load).value,
            tpot_ms=tpot,
            tok_s=tok_s.value,
            tok_s_gpu=tok_s.value / gpus,
            tok_s_gpu_low=tok_s.low / gpus,
            tok_s_gpu_high=tok_s.high / gpus,
            tok_s_user=1e3 / tpot,
            binds=self.binds(running),
        )

    def binds(self, running: int) -> str:
        """What takes most of a step, with so many sequences in flight."""
        step = decode_step(self.m, running, self.wish.isl + self.wish.osl / 2, self.e)
        return "prefill" if (running - 1) / self.wish.osl * self.prompt_s > float(step.total) else step.binds

    def simulated(self, load: int) -> Served:
        """A run of so many clients in a closed loop; simulated once."""
        if load not in self._runs:
            most = max(self.chosen.max_concurrency, 1)
            self._runs[load] = served(self.m, self.wish.isl, self.wish.osl, most, self.e, concurrency=load)
        return self._runs[load]

    def ttft_p50_ms(self, load: int) -> Estimate:
        """Of a closed loop. The first wave, which the mean holds too, hardly moves it."""
        return self.estimate("ttft", load, 1e3 * self.simulated(load).percentile(50))

    def closed_loop(self, load: int, *, is_warm: bool = False) -> Loaded:
        """So many clients. `is_warm`: without their first wave, which public benchmarks count and `tkit sweep` does not."""
        running = self.running(load)
        ttft = self.simulated(load).ttft[load if is_warm else 0 :]
        return Loaded(
            ttft_ms=self.estimate("ttft", load, 1e3 * float(ttft.mean())),
            tpot_ms=self.tpot_ms(load),
            tok_s=self.tok_s(load),
            binds="room for the KV cache" if running < load else self.binds(running),
        )

    def open_loop(self, rate: float) -> Loaded:
        """Of 500 Poisson arrivals of `rate` requests per second, simulated, latencies from the arrival. Where the engine cannot
        keep up, they are those of such a run, and would grow with a longer one."""
        wish, most = self.wish, max(self.chosen.max_concurrency, 1)
        run = served(self.m, wish.isl, wish.osl, most, self.e, rate=rate, spread=0.0)
        ttft, tpot = float(run.ttft.mean()), float(run.tpot.mean())
        in_flight = max(round(rate * (ttft + wish.osl * tpot)), 1)
        asked, highest = rate * wish.osl, self.tok_s(most).value
        binds = "the arrivals" if asked < highest else self.binds(self.running(most))
        return Loaded(
            ttft_ms=self.estimate("ttft", rate, 1e3 * ttft, load="rate"),
            tpot_ms=self.estimate("tpot", rate, 1e3 * tpot, load="rate"),
            tok_s=self.estimate("throughput", rate, min(asked, highest), load="rate"),
            binds="room for the KV cache" if in_flight > most else binds,
        )

    def phases(self, batch: int) -> tuple[Phase, ...]:
        m, e, wish = self.m, self.e, self.wish
        context = wish.isl + wish.osl / 2
        step = decode_step(m, batch, context, e)
        params = m.dense_params + m.expert_params
        read = m.dense_bytes + m.expert_bytes * float(experts_read(m, batch / m.pp))
        cache = batch / m.pp * (m.full_layers * context + m.windowed_layers * min(context, m.window)) * m.kv_token_bytes
        ridge = m.flops / m.bandwidth
        ideal = max((read + cache) / (m.tp * m.bandwidth), 2 * batch / m.pp * params / (m.tp * m.flops))
        prompt = float(prefill_s(m, wish.isl, e))
        prompt_ideal = 2 * wish.isl * params / (m.tp * m.flops)
        terms = {
            "weights": float(step.weights),
            "products": float(step.products),
            "KV cache": float(step.kv),
            "all-reduce": float(step.communication),
            "host": float(step.host),
        }
        prompt_binds = "tensor cores" if 2 * wish.isl * params / read > ridge else "memory bandwidth (weights)"
        return (
            Phase(name="prefill", intensity=2 * wish.isl * params / read, ridge=ridge, seconds=prompt,
                  binds=prompt_binds, share_of_peak=prompt_ideal / prompt),
            Phase(name="decode", intensity=2 * batch / m.pp * params / (read + cache), ridge=ridge,
                  seconds=float(step.total), binds=step.binds, share_of_peak=ideal / float(step.total), terms=terms),
        )  # fmt: skip

    def slo(self, tier: str) -> dict[str, Any]:
        """The highest concurrency whose median TTFT and mean TPOT stay within the tier: by the estimate, and by the band's
        bad end."""
        limits = SLO_TIERS[tier]
        return {
            "tier": tier,
            "limits_ms": limits,
            "concurrency": self._highest(limits, lambda estimate: estimate.value),
            "concurrency_sure": self._highest(limits, lambda estimate: estimate.high),
        }

    def _highest(self, limits: Mapping[str, float], end: Callable[[Estimate], float]) -> int:
        def holds(load: int) -> bool:
            is_in_time = end(self.tpot_ms(load)) <= limits.get("tpot", np.inf)
            return is_in_time and end(self.ttft_p50_ms(load)) <= limits.get("ttft", np.inf)

        low, high = 0, max(self.chosen.max_concurrency, 0)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if holds(middle) else (low, middle - 1)
        return low


def dtype_cell(weights: Precision) -> str:
    """As published rows name it."""
    return {"fp16": "fp16", "fp8": "fp8", "fp4": "fp4"}.get(weights.math, "fp16")


def _verdict(wish: Wish, chosen: Layout, best: Layout | None, considered: Sequence[Layout]) -> str:
    parallel = chosen.parallel
    where = f"{parallel.world_size} x {wish.gpu.name} (tp {parallel.tp_size}, pp {parallel.pp_size})"
    asked = f"{wish.concurrency} x {wish.isl + wish.osl} tokens"
    if best is None:
        tried = max(item.parallel.world_size for item in considered)
        return f"does not fit: {chosen.binds} on {where} for {asked}; tried up to {tried} GPUs"
    failed = [item for item in considered if not item.fits and item.parallel.world_size < parallel.world_size]
    why = f"; on {failed[-1].parallel.world_size}: {failed[-1].binds} too large" if failed else ""
    return f"fits on {where} for {asked}{why}"


def _alternatives(shape: ModelShape, wish: Wish, demand: Demand, chosen: Layout, used: Engine) -> list[Alternative]:
    """What quantization would change, each with the KV cache that goes with it."""
    found, e = [], used.efficiencies
    base_kv = kv_dtype(wish.kv_cache, wish.weights, wish.gpu)
    base = machine(shape, wish.weights, base_kv, wish.gpu, chosen.parallel)
    for quant in dict.fromkeys([wish.quant, *ALTERNATIVE_QUANTS]):
        weights = wish.weights if quant == wish.quant else precision(quant)
        if wish.gpu.sm < weights.min_sm or (weights.math == "int8" and wish.gpu.int8_ops < wish.gpu.fp16_flops):
            continue
        kv = base_kv if quant == wish.quant else kv_dtype("auto", weights, wish.gpu)
        best, considered = choose(shape, weights, kv, wish.gpu, demand)
        here = layout(shape, weights, kv, wish.gpu, chosen.parallel, demand)
        m = machine(shape, weights, kv, wish.gpu, chosen.parallel)
        both = min(here.max_concurrency, chosen.max_concurrency)
        batch = max(min(wish.concurrency, both), 1)
        context = wish.isl + wish.osl / 2
        comparable = both > 0
        smallest = best or here
        at = machine(shape, weights, kv, wish.gpu, smallest.parallel)
        speed = Speed(shape, weights, kv, wish, used, at, smallest)
        found.append(
            Alternative(
                quant=quant,
                kv_cache=kv,
                num_gpus=best.parallel.world_size if best else None,
                tp=best.parallel.tp_size if best else None,
                weight_bytes=here.ledger.weight_bytes * chosen.parallel.world_size,
                max_concurrency=smallest.max_concurrency,
                decode_speedup=float(
                    decode_step(base, batch, context, e).total / decode_step(m, batch, context, e).total
                )
                if comparable
                else None,
                prefill_speedup=float(prefill_s(base, wish.isl, e) / prefill_s(m, wish.isl, e)) if comparable else None,
                tok_s_gpu=speed.tok_s(wish.concurrency).value / smallest.parallel.world_size if best else None,
                is_built=weights.is_written,
            )
        )
    return found


def speculative_gain(
    m: Machine, batch: float, context: float, acceptance: float, tokens: int, e: Efficiencies
) -> float:
    """Tokens per cycle over the cost of a cycle: (1 - a^(k+1)) / (1 - a) x step / (k draft + verify)  (Leviathan et al. 2023).

    Verifying multiplies k + 1 tokens per sequence but reads weights and cache once."""
    step = decode_step(m, batch, context, e)
    wide = decode_step(m, batch * (tokens + 1), context, e)
    verify = wide.linear + step.kv + wide.communication + step.host
    draft = DRAFT_SHARE * step.linear
    expected = (1 - acceptance ** (tokens + 1)) / (1 - acceptance)
    return float(expected * step.total / (tokens * draft + verify))


def _speculation(m: Machine, wish: Wish, batch: int, e: Efficiencies) -> list[Speculation]:
    context = wish.isl + wish.osl / 2
    found = []
    for acceptance in ACCEPTANCES:
        low, high = 0, MAX_BATCH
        while low < high:
            middle = (low + high + 1) // 2
            gains = speculative_gain(m, middle, context, acceptance, DRAFT_TOKENS, e) > 1
            low, high = (middle, high) if gains else (low, middle - 1)
        found.append(
            Speculation(
                acceptance=acceptance,
                tokens=DRAFT_TOKENS,
                gain=speculative_gain(m, batch, context, acceptance, DRAFT_TOKENS, e),
                break_even_batch=low if low < MAX_BATCH else None,
            )
        )
    return found


def _notes(shape: ModelShape, wish: Wish, weights: Precision, kv: str, chosen: Layout, used: Engine) -> list[str]:
    notes, gpu, tp = [], wish.gpu, chosen.parallel.tp_size
    if shape.note:
        notes.append(f"{shape}: {shape.note}")
    if shape.traits.only_planned:
        notes.append(f"tkit build does not convert {shape.family} models; this is a plan only")
    elif not weights.is_written:
        notes.append(f"tkit build does not write {wish.quant} yet; planned from its storage layout")
    if weights.math != "fp16" and gpu.sm < weights.native_sm:
        notes.append(
            f"{gpu.name} has no {weights.math} tensor cores: {wish.quant} is unpacked to 16 bits, only bytes shrink"
        )
    if gpu.sm < 80 and wish.quant == "none":
        notes.append(f"{gpu.name} has no bfloat16; plan for float16")
    if gpu.sm < 80:
        notes.append(f"current TensorRT-LLM does not support {gpu.arch}")
    if shape.latent is None and tp > shape.num_kv_heads:
        notes.append(f"tp {tp} > {shape.num_kv_heads} KV heads: each is stored {tp // shape.num_kv_heads} times")
    if shape.latent is not None and tp > 1:
        notes.append(f"MLA's cache is the same on all {tp} ranks: TP does not make room for more sequences")
    if wish.isl + wish.osl / 2 > 0 and chosen.parallel.tp_size > 1 and not gpu.has_nvlink_across(tp):
        notes.append(f"TP {tp} crosses {chosen.link}: all-reduce costs more than on NVLink")
    if gpu.name not in used.gpus:
        notes.append(
            f"no published row of {used.name} ran on {gpu.name}: the bands are those of rows that have none near"
        )
    if not chosen.fits:
        notes.append("times are those of as many requests as fit")
    return notes


def as_record(plan: Plan) -> dict[str, Any]:
    """JSON: the plan as it is stored."""
    record = asdict(plan)
    for name in ("concurrency_by_context", "kv_bytes_by_context"):
        record[name] = {str(key): value for key, value in getattr(plan, name).items()}
    record["chosen"]["ledger"]["weight_bytes"] = plan.chosen.ledger.weight_bytes
    return record
