"""One layout under load: the formulas' times, corrected by the published runs near to it, each with its band.

Constants that were refitted to the user's own sweep stand uncorrected, with its band.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tkit.planner.engines import Band, Engine
from tkit.planner.fit import Layout
from tkit.planner.neighbours import Correction, Run, metric_of, published
from tkit.planner.precision import Precision
from tkit.planner.record import Estimate, Loaded, Phase, Point
from tkit.planner.roofline import Machine, decode_step, experts_read, prefill_s
from tkit.planner.shapes import ModelShape, num_active_params, num_params
from tkit.planner.speed import Served, marginal_prefill_s, served, throughput, tpot_s
from tkit.planner.wish import Wish
from tkit.specs.record import SLO_TIERS


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
