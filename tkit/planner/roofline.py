"""Seconds of a decode step and of a prefill, from bytes, operations and what of the hardware's limits engines reach.

    step    = max(weights read / (tp BW e_m), 2 P_active b / (tp F e_c(b)))    the linear layers
            + b context kv / (tp BW e_kv)                                      the cache
            + 2 L (alpha + 2 (tp-1)/tp b hidden 2 B / (link e_l))              all-reduce, twice a layer
            + host + b host_per_sequence                                       scheduling, sampling
    prefill = 2 P_active T / (tp F e_c(T)) + 2 sum_layers(T context H d) / (tp F16 e_a) + all-reduce + host
    e_c(b)  = e_c b / (b + ramp (1 - exp(-b / ramp))): small products do not fill the tensor cores

With pipeline stages a batch B runs as pp micro-batches of b = B / pp, so a token takes step(B / pp) on tp GPUs. A MoE reads
dense + experts (1 - (1 - k/E)^b): the experts that b tokens are expected to touch.

Works on floats and, for fitting, on NumPy arrays of equal length. Knows no model and no engine by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tkit.planner.memory import resident_bytes
from tkit.planner.precision import KV_DTYPES, Precision
from tkit.planner.shapes import ModelShape, kv_values_per_token_layer, matrix_params
from tkit.specs.hardware import Gpu
from tkit.specs.parallel import Parallel

Number = Any  # float or an array of floats
# what the best measured product reaches of the peak on most cards; where it is published it replaces the data sheet
MEASURED_SHARE = {"fp16": 0.80, "fp8": 0.72}
MATH = ("fp16", "fp8", "int8", "fp4")


# of Efficiencies: what is added, not a share of something
_COSTS = (
    "alpha_nvlink_s", "alpha_pcie_s", "host_s", "host_per_sequence_s", "moe_layer_s", "moe_host_s", "request_s",
    "moe_request_s", "request_in_flight_s", "kv_heads", "reserved_bytes",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Efficiencies:
    """What an engine reaches of the hardware's limits. One file per engine in `data/engines/`; fitted, never guessed.

    Shares of a peak are dimensionless, `_s` are seconds.
    """

    memory: float  # of the bandwidth, reading weights
    memory_fp4: float  # of that, when the weights are 4-bit floating point with a scale per 16
    kv: float  # of the bandwidth, reading the cache
    gemm_fp16: float  # of the dense peak, at large batch
    gemm_fp8: float
    gemm_int8: float
    gemm_fp4: float
    ramp: float  # tokens' worth of time that a large product loses to filling the tensor cores
    attention: float  # of the 16-bit peak, in prefill
    nvlink: float
    pcie: float
    pcie_far: float  # of that, when more than four ranks cross between CPU sockets
    alpha_nvlink_s: float  # one all-reduce of nothing
    alpha_pcie_s: float
    host_s: float  # per step
    host_per_sequence_s: float
    moe_gemm: float  # expert products relative to dense ones
    moe_layer_s: float  # routing and the launch of grouped products, per MoE layer and step
    moe_host_s: float  # in place of host_s
    prefill: float  # products of a prefill relative to those of a decode batch of as many tokens
    request_s: float  # a request's way in and its first token's way out, outside the model; of dense models
    moe_request_s: float
    request_in_flight_s: float  # the same, per request that the server holds
    waiting: float  # waits under load, relative to the simulated ones
    kv_heads: float  # KV heads per rank at which reading the cache reaches half of its efficiency
    reserved_bytes: float  # what the engine holds besides weights, activations and the ledger's overhead

    def replaced(self, **values: float) -> Efficiencies:
        return dataclasses.replace(self, **values)


# nothing lost: shares of 1, and no time between
IDEAL = Efficiencies(
    **{field.name: 1.0 for field in dataclasses.fields(Efficiencies)} | {name: 0.0 for name in _COSTS} | {"ramp": 1e-9}
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A model on GPUs, reduced to the numbers that cost time. Every field may be an array."""

    tp: Number
    pp: Number
    dense_bytes: Number  # read in every step, all ranks of a TP group together
    expert_bytes: Number
    num_experts: Number
    experts_per_token: Number
    dense_params: Number
    expert_params: Number  # active, per token
    lm_head_params: Number  # of the dense ones; a prefill needs them for its last token alone
    num_layers: Number
    num_moe_layers: Number
    hidden_size: Number
    kv_token_bytes: Number  # per token of context in a layer, all ranks of a TP group together
    full_layers: Number  # layers whose attention sees everything
    windowed_layers: Number
    window: Number
    attention_width: Number  # heads x head size
    bandwidth: Number
    flops: Number  # of the products' type
    fp16_flops: Number
    link: Number
    is_nvlink: Number
    kv_heads: Number  # per rank
    math: Number  # index into MATH


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What no engine can beat: every byte read once per step at full bandwidth, every operation at the peak rate, and all
    of them at the same time. `binds` is what limits the rate. TTFT is that of a prompt on an idle engine.
    """

    tok_s: float
    tpot_s: float
    ttft_s: float
    binds: str
    ttft_binds: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of one decode step, by term. `total` is what a token costs."""

    weights: Number  # reading them
    products: Number  # multiplying with them; the slower of the two counts
    kv: Number
    communication: Number
    host: Number

    @property
    def linear(self) -> Number:
        return np.maximum(self.weights, self.products)

    @property
    def total(self) -> Number:
        return self.linear + self.kv + self.communication + self.host

    @property
    def binds(self) -> str:
        terms = {
            "memory bandwidth (weights)": self.weights if self.weights >= self.products else 0.0,
            "tensor cores": self.products if self.products > self.weights else 0.0,
            "memory bandwidth (KV cache)": self.kv,
            "all-reduce": self.communication,
            "host": self.host,
        }
        return max(terms, key=lambda name: terms[name])


def machine(
    shape: ModelShape,
    precision: Precision,
    kv_dtype: str,
    gpu: Gpu,
    parallel: Parallel,
    has_attention_dp: bool = False,
) -> Machine:
    """`has_attention_dp`: every rank runs the attention of its own sequences, and only the experts are shared out."""
    kinds, _ = resident_bytes(shape, precision, Parallel(tp_size=1))
    experts = kinds.get("experts", 0)
    first_token = kinds.get("embedding", 0)  # rows are looked up, not multiplied
    lm_head_bytes = 0 if "lm_head" in kinds else first_token  # tied: the same bytes, but multiplied
    dense, expert_params = matrix_params(shape)
    share = shape.experts_per_token / shape.num_experts if shape.num_experts else 0.0
    math = precision.math if gpu.sm >= precision.native_sm and gpu.flops(precision.math) else "fp16"
    peak = gpu.flops(math)
    measured = {"fp16": gpu.fp16_measured, "fp8": gpu.fp8_measured}.get(math, 0.0)
    if measured:
        peak = measured / MEASURED_SHARE[math]
    windows = [layer.window for layer in shape.layers if layer.has_attention and layer.window]
    num_attention = sum(layer.has_attention for layer in shape.layers)
    tp = parallel.tp_size
    width = shape.num_heads * shape.head_size
    kv_values = kv_values_per_token_layer(shape) if has_attention_dp else tp * kv_values_per_token_layer(shape, tp)
    attention = kinds.get("attention", 0) if has_attention_dp else 0
    if shape.latent is not None:
        width = shape.num_heads * (shape.latent.kv_lora + shape.latent.qk_rope)
    return Machine(
        tp=tp,
        pp=parallel.pp_size,
        dense_bytes=sum(kinds.values()) - experts - first_token + lm_head_bytes + (tp - 1) * attention,
        expert_bytes=experts,
        num_experts=max(shape.num_experts, 1),
        experts_per_token=shape.experts_per_token,
        dense_params=dense,
        expert_params=expert_params * share,
        lm_head_params=shape.hidden_size * shape.vocab_size,
        num_layers=shape.num_layers,
        num_moe_layers=sum(layer.has_experts for layer in shape.layers),
        hidden_size=shape.hidden_size,
        kv_token_bytes=kv_values * KV_DTYPES[kv_dtype],
        full_layers=num_attention - len(windows),
        windowed_layers=len(windows),
        window=max(windows, default=1),
        attention_width=width,
        bandwidth=gpu.bandwidth,
        flops=peak,
        fp16_flops=gpu.fp16_flops,
        link=gpu.link_bandwidth(tp),
        is_nvlink=float(gpu.has_nvlink_across(tp)),
        kv_heads=max(shape.num_kv_heads / tp, 1) if shape.latent is None else 8.0,
        math=MATH.index(math),
    )


def stacked(machines: Sequence[Machine]) -> Machine:
    """Many as one of arrays."""
    names = [field.name for field in dataclasses.fields(Machine)]
    return Machine(**{name: np.array([getattr(item, name) for item in machines], dtype=float) for name in names})


def experts_read(m: Machine, tokens: Number) -> Number:
    """The share of experts that `tokens` tokens are expected to touch, routed independently."""
    return 1 - (1 - m.experts_per_token / m.num_experts) ** np.maximum(tokens, 1)


def layer_contexts(m: Machine, context: Number) -> Number:
    """Sum over layers of the tokens that one query attends to."""
    return m.full_layers * context + m.windowed_layers * np.minimum(context, m.window)


def decode_step(m: Machine, batch: Number, context: Number, e: Efficiencies) -> Step:
    """One token for each of `batch` sequences, of `context` tokens on average."""
    b = np.maximum(batch / m.pp, 1)
    weights = _reading(m, b, e)
    kv_share = m.kv_heads / (m.kv_heads + e.kv_heads)
    return Step(
        weights=weights,
        products=_products(m, b, m.dense_params, e),
        kv=b * layer_contexts(m, context) * m.kv_token_bytes / (m.tp * m.bandwidth * e.kv * kv_share),
        communication=_all_reduce(m, b, e),
        host=host_s(m, e) + b * e.host_per_sequence_s + m.num_moe_layers * e.moe_layer_s,
    )


def prefill_s(m: Machine, tokens: Number, e: Efficiencies, cached: Number = 0, requests: Number = 1) -> Number:
    """Seconds of one prefill step: `tokens` new tokens, behind `cached` ones, for each of `requests` prompts at once.
    All pipeline stages in turn."""
    count = tokens * requests
    products = _products(m, count, m.dense_params - m.lm_head_params, e) / e.prefill
    weights = _reading(m, count, e)
    return np.maximum(products, weights) + _attention_s(m, tokens, cached, requests, e) + _all_reduce(m, count, e)


def _attention_s(m: Machine, tokens: Number, cached: Number, requests: Number, e: Efficiencies) -> Number:
    """Of prefills. Causal: on average half of the new tokens are visible."""
    seen = layer_contexts(m, cached + tokens / 2)
    return 4 * tokens * requests * seen * m.attention_width / (m.tp * m.fp16_flops * e.attention)


def limit(m: Machine, batch: float, isl: int, osl: int) -> Limit:
    """Of `batch` sequences in flight, always replaced. Prompts are read along with decode steps and cost operations only.

    One machine, not an array of them.
    """
    step = decode_step(m, batch, isl + osl / 2, IDEAL)
    prompt = _products(m, isl, m.dense_params - m.lm_head_params, IDEAL) + _attention_s(m, isl, 0, 1, IDEAL)
    prompts = batch / m.pp / osl  # that one step has to take in
    terms = {
        "memory bandwidth": float(step.weights + step.kv),
        "compute": float(step.products + prompts * prompt),
        "interconnect": float(step.communication + prompts * _all_reduce(m, isl, IDEAL)),
    }
    binds = max(terms, key=lambda name: terms[name])
    if binds == "memory bandwidth":
        binds += " (weights)" if step.weights >= step.kv else " (KV cache)"
    first = {
        "memory bandwidth (weights)": float(
            _reading(m, isl, IDEAL)
        ),  # of every stage in turn: the last token passes them all
        "compute": float(prompt / m.pp),  # the parts of a prompt can be in all stages at once
        "interconnect": float(_all_reduce(m, isl, IDEAL) / m.pp),
    }
    ttft_binds = max(first, key=lambda name: first[name])
    return Limit(
        tok_s=batch / max(terms.values()),
        tpot_s=float(max(step.weights + step.kv, step.products, step.communication)),
        ttft_s=first[ttft_binds],
        binds=binds,
        ttft_binds=ttft_binds,
    )


def host_s(m: Machine, e: Efficiencies) -> Number:
    """Of one step, whatever the batch."""
    return np.where(np.asarray(m.num_moe_layers) > 0, e.moe_host_s, e.host_s)


def _reading(m: Machine, tokens: Number, e: Efficiencies) -> Number:
    share = e.memory * np.where(np.asarray(m.math) == MATH.index("fp4"), e.memory_fp4, 1.0)
    return (m.dense_bytes + m.expert_bytes * experts_read(m, tokens)) / (m.tp * m.bandwidth * share)


def _products(m: Machine, tokens: Number, dense_params: Number, e: Efficiencies) -> Number:
    peak = np.choose(np.asarray(m.math, dtype=int), [e.gemm_fp16, e.gemm_fp8, e.gemm_int8, e.gemm_fp4])
    rate = m.tp * m.flops * peak * tokens / (tokens + e.ramp * (1 - np.exp(-tokens / e.ramp)))
    return 2 * tokens * (dense_params + m.expert_params / e.moe_gemm) / rate


def _all_reduce(m: Machine, tokens: Number, e: Efficiencies) -> Number:
    """Ring: every rank sends 2 (tp-1)/tp of the 16-bit residual, twice a layer."""
    ring = 2 * (m.tp - 1) / m.tp * tokens * m.hidden_size * 2
    share = np.where(m.is_nvlink > 0, e.nvlink, e.pcie * np.where(np.asarray(m.tp) > 4, e.pcie_far, 1.0))
    alpha = np.where(m.is_nvlink > 0, e.alpha_nvlink_s, e.alpha_pcie_s)
    return np.where(np.asarray(m.tp) > 1, 2 * m.num_layers * (alpha + ring / (m.link * share)), 0.0)
