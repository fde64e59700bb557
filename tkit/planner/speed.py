"""Latency and throughput of a load, from the seconds of steps and prefills. Floats, or arrays of equal length.

    TPOT       = step(B) + (B - 1) / OSL x prefill     each sequence waits for the prompts that start beside it;
                                                       half of them when all start together and none follows
    throughput = B OSL / (B prefill / pp + OSL step)   B sequences in flight, always replaced
    B          = min(asked, what the KV cache holds, the engine's limit)
    idle TTFT  = prefill alone, on the engine; a server adds its way in and out

Under load a prompt's price is the marginal one: it shares its step, and the reading of the weights, with others. TTFT under
load has no closed formula: `served` simulates it.
"""

from __future__ import annotations

import numpy as np

from tkit.planner.arrivals import Floats, Served, lengths, poisson, simulate
from tkit.planner.roofline import Efficiencies, Machine, Number, decode_step, host_s, prefill_s

MAX_NUM_TOKENS = 8192  # of one step; TensorRT-LLM's and vLLM's default
MAX_BATCH = 4096


def idle_ttft_s(m: Machine, isl: Number, e: Efficiencies) -> Number:
    """One request on an idle engine, without the server around it (`way_in_s`)."""
    return prefill_s(m, isl, e) + host_s(m, e)


def marginal_prefill_s(m: Machine, isl: Number, e: Efficiencies) -> Number:
    """What one more prompt adds while others run."""
    together = np.maximum(MAX_NUM_TOKENS / isl, 1)
    return prefill_s(m, isl, e, requests=together) / together


def tpot_s(m: Machine, batch: Number, isl: Number, osl: Number, e: Efficiencies, share: Number = 1.0) -> Number:
    """`share` of the other sequences' prompts are read while one decodes."""
    step = decode_step(m, batch, isl + osl / 2, e).total
    return step + share * (batch - 1) / osl * marginal_prefill_s(m, isl, e) / m.pp


def throughput(m: Machine, batch: Number, isl: Number, osl: Number, e: Efficiencies) -> Number:
    """Output tokens per second of all GPUs of the engine, with `batch` sequences always in flight."""
    step = decode_step(m, batch, isl + osl / 2, e).total
    return batch * osl / (batch * marginal_prefill_s(m, isl, e) / m.pp + osl * step)


def offline_throughput(
    m: Machine, capacity: Number, isl: Number, osl: Number, num_requests: Number, e: Efficiencies
) -> Number:
    """Of a finite run whose requests are all there at the start: N / B waves, and a last one that is half full on average."""
    batch = np.clip(np.minimum(np.minimum(capacity, MAX_BATCH * m.pp), num_requests), 1, None)
    waves = num_requests / batch
    context = isl + osl / 2
    full = decode_step(m, batch, context, e).total
    half = decode_step(m, np.maximum(batch / 2, 1), context, e).total
    seconds = (
        num_requests * marginal_prefill_s(m, isl, e) / m.pp
        + osl * waves * full
        + osl * np.clip(waves - 1, 0, 1) * (half - full / 2)
    )
    return num_requests * osl / seconds


def way_in_s(m: Machine, in_flight: Number, e: Efficiencies) -> Number:
    """A request's way in and its first token's way out, outside the model; servers slow down with the requests they hold."""
    return np.where(np.asarray(m.num_moe_layers) > 0, e.moe_request_s, e.request_s) + in_flight * e.request_in_flight_s


def served(
    m: Machine,
    isl: int,
    osl: int,
    capacity: float,
    e: Efficiencies,
    *,
    concurrency: int | None = None,
    rate: float | None = None,
    num_requests: int | None = None,
    spread: float = 0.2,
    seed: int = 0,
) -> Served:
    """A simulated run of one machine, not an array: `concurrency` requests always in flight, or `rate` per second (infinite
    = all at once). Ten requests per client, as the public benchmark scripts send, the first ones all together; fewer for
    many clients.
    """
    rng = np.random.default_rng(seed)
    clients = concurrency or 50
    count = num_requests or (max(10 * clients, 20) if clients <= 256 else max(2560, 3 * clients))
    arrivals: Floats | None = None
    if rate is not None:
        arrivals = np.zeros(count) if np.isinf(rate) else poisson(rate, count, rng)
    max_batch = int(max(1, min(capacity, MAX_BATCH, concurrency or count)))
    batches = np.arange(max_batch + 1)
    steps = decode_step(m, np.maximum(batches, 1), isl + osl / 2, e).total + 0.0 * batches
    per_token = float(marginal_prefill_s(m, isl, e)) / isl / m.pp
    alone = max(float(prefill_s(m, isl, e)) - per_token * isl, 0.0)
    result = simulate(
        lambda batch: float(steps[batch]),
        lambda tokens: per_token * tokens,
        lengths(isl, spread, count, rng),
        lengths(osl, spread, count, rng),
        concurrency=concurrency,
        arrivals_s=arrivals,
        max_batch=max_batch,
        max_num_tokens=MAX_NUM_TOKENS,
    )
    in_flight = (
        concurrency if concurrency is not None else float(np.sum(result.ttft + result.tpot * osl)) / result.duration_s
    )
    return Served(
        ttft=(result.ttft + alone) * e.waiting + float(way_in_s(m, in_flight, e)),
        tpot=result.tpot,
        duration_s=result.duration_s,
    )
