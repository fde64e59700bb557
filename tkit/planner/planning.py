"""One plan: a model, a GPU, a load -> memory, layout, speed, bands. Puts the other modules of this package together."""

from __future__ import annotations

from collections.abc import Sequence

from tkit.planner.alternatives import alternatives
from tkit.planner.cost import Prices, cost, gpus_for_rate
from tkit.planner.engines import Engine, engine
from tkit.planner.estimates import Speed
from tkit.planner.fit import Demand, Layout, choose, concurrency_by_context, contexts
from tkit.planner.memory import kv_bytes_per_sequence, kv_bytes_per_token, stored_bytes
from tkit.planner.precision import Precision, kv_dtype
from tkit.planner.record import Plan
from tkit.planner.roofline import machine
from tkit.planner.shapes import ModelShape, num_active_params, num_params
from tkit.planner.speculation import speculation
from tkit.planner.speed import idle_ttft_s, way_in_s
from tkit.planner.wish import Wish, check, no_layout


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
        raise no_layout(shape, wish)
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
        alternatives=tuple(alternatives(shape, wish, demand, chosen, used)) if with_alternatives else (),
        speculation=tuple(speculation(m, wish, running, e)),
        cost=cost(wish.gpu, chosen.parallel.world_size, (tok_s.value, tok_s.low, tok_s.high), prices)
        if prices
        else None,
        rate=wish.requests_s,
        gpus_for_load=_gpus_for_rate(wish, chosen, tok_s.value),
        gpus_for_load_sure=_gpus_for_rate(wish, chosen, tok_s.low),
        notes=tuple(_notes(shape, wish, weights, kv, chosen, used)),
    )


def _gpus_for_rate(wish: Wish, chosen: Layout, tok_s: float) -> int | None:
    if wish.requests_s is None:
        return None
    return gpus_for_rate(wish.requests_s, tok_s / wish.osl, chosen.parallel.world_size)


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
