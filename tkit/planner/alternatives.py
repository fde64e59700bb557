"""What another quantization of the same model on the same GPU would change."""

from __future__ import annotations

from tkit.planner.engines import Engine
from tkit.planner.estimates import Speed
from tkit.planner.fit import Demand, Layout, choose, layout
from tkit.planner.precision import kv_dtype, precision
from tkit.planner.record import Alternative
from tkit.planner.roofline import decode_step, machine, prefill_s
from tkit.planner.shapes import ModelShape
from tkit.planner.wish import ALTERNATIVE_QUANTS, Wish


def alternatives(shape: ModelShape, wish: Wish, demand: Demand, chosen: Layout, used: Engine) -> list[Alternative]:
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
