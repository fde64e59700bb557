"""Where a model fits: layouts in order of preference, what binds, and how much concurrency x context is left.

"One GPU if it fits, one node if it fits": tensor parallelism inside the fastest link first, pipeline stages across slower ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tkit.planner.gpus import GPUS_PER_NODE
from tkit.planner.memory import Ledger, kv_bytes_per_sequence, ledger
from tkit.planner.precision import Precision
from tkit.planner.shapes import ModelShape
from tkit.specs.hardware import Gpu
from tkit.specs.parallel import Parallel

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What has to fit at once."""

    isl: int
    osl: int
    concurrency: int
    max_num_tokens: int = 8192  # of one prefill step: the engine's default
    engine: str = "tensorrt-llm"
    reserved_bytes: int = 0  # of the engine, per GPU

    @property
    def context(self) -> int:
        return self.isl + self.osl


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to place the model. `binds` is None when the demand fits."""

    parallel: Parallel
    link: str  # what the ranks of one TP group talk over
    ledger: Ledger
    max_concurrency: int  # at the asked context
    max_context: int  # at the asked concurrency; 0 = not even one block
    binds: str | None
    violations: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.binds is None


def violations(shape: ModelShape, precision: Precision, parallel: Parallel) -> tuple[str, ...]:
    """The divisibility rules that a layout breaks, as the converter would name them."""
    tp, problems = parallel.tp_size, []
    if shape.num_heads % tp:
        problems.append(f"{shape.num_heads} attention heads do not divide by tp {tp}; {_near(shape.num_heads, tp)}")
    kv = shape.num_kv_heads
    if shape.latent is None and kv % tp and tp % kv:
        problems.append(f"{kv} KV heads and tp {tp}: neither is a multiple of the other")
    sizes = {layer.intermediate_size for layer in shape.layers if layer.intermediate_size}
    sizes |= {size for size in (shape.shared_expert_size, shape.expert_size // parallel.moe_ep_size) if size}
    for size in sorted(sizes):
        if size % tp and not (size == shape.expert_size and shape.num_experts % tp == 0):
            problems.append(f"MLP size {size} does not divide by tp {tp}; {_near(size, tp)}")
    if parallel.pp_size > shape.num_layers:
        problems.append(f"pp {parallel.pp_size} exceeds {shape.num_layers} layers")
    if parallel.pp_size > 1 and not shape.traits.has_pipeline:
        problems.append(f"pp {parallel.pp_size}: TensorRT-LLM has no pipeline parallelism for {shape.family}; use pp 1")
    return tuple(problems)


def _near(size: int, tp: int) -> str:
    below = max(n for n in range(1, tp + 1) if size % n == 0)
    return f"nearest that does: tp {below}"


def layout(
    shape: ModelShape, precision: Precision, kv_dtype: str, gpu: Gpu, parallel: Parallel, demand: Demand
) -> Layout:
    book = ledger(
        shape,
        precision,
        kv_dtype,
        gpu,
        parallel,
        context=demand.context,
        engine=demand.engine,
        max_num_tokens=demand.max_num_tokens,
        max_batch=max(demand.concurrency, 1),
        reserved_bytes=demand.reserved_bytes,
    )
    fixed = book.weight_bytes + book.activations + book.overhead
    binds = None
    if book.weight_bytes > gpu.usable_bytes:
        binds = "weights"
    elif fixed > gpu.usable_bytes:
        binds = "weights + activations + overhead"
    elif book.max_sequences < demand.concurrency:
        binds = "KV cache"
    return Layout(
        parallel=parallel,
        link=link_name(gpu, parallel.tp_size),
        ledger=book,
        max_concurrency=book.max_sequences,
        max_context=max_context(shape, kv_dtype, parallel, book.kv_pool // max(demand.concurrency, 1)),
        binds=binds,
        violations=violations(shape, precision, parallel),
    )


def link_name(gpu: Gpu, tp_size: int) -> str:
    if tp_size == 1:
        return "none"
    if gpu.has_nvlink_across(tp_size):
        return f"NVLink {gpu.nvlink_bandwidth / 1e9:.0f} GB/s"
    return f"PCIe {gpu.pcie_bandwidth / 1e9:.0f} GB/s" if tp_size <= GPUS_PER_NODE else "network"


def layouts(
    shape: ModelShape, precision: Precision, gpu: Gpu, num_gpus: int | None, tp: int | None, pp: int | None
) -> Iterator[Parallel]:
    """From the fewest GPUs up; for equal counts the widest TP that a fast link carries comes first."""
    counts = [num_gpus] if num_gpus else [1, 2, 4, 8, 16, 32, 64]
    if tp and pp:
        counts = [tp * pp]
    domain = gpu.nvlink_domain if gpu.nvlink_domain > 1 else GPUS_PER_NODE
    domain = min(domain, GPUS_PER_NODE) if gpu.nvlink_domain < 72 else domain
    for count in counts:
        sizes = [tp] if tp else [size for size in range(count, 0, -1) if count % size == 0]
        if not tp:  # inside the link's domain first, then inside the node, both widest first
            sizes.sort(key=lambda size: (size > domain, size > GPUS_PER_NODE, -size))
        for size in sizes:
            if count % size or (pp and count // size != pp) or size > max(domain, GPUS_PER_NODE):
                continue
            parallel = Parallel(tp_size=size, pp_size=count // size)
            if not violations(shape, precision, parallel):
                yield parallel


def choose(
    shape: ModelShape,
    precision: Precision,
    kv_dtype: str,
    gpu: Gpu,
    demand: Demand,
    *,
    num_gpus: int | None = None,
    tp: int | None = None,
    pp: int | None = None,
) -> tuple[Layout | None, list[Layout]]:
    """(the smallest layout that fits, every layout that was considered up to the one after it)."""
    considered: list[Layout] = []
    best: Layout | None = None
    for parallel in layouts(shape, precision, gpu, num_gpus, tp, pp):
        considered.append(layout(shape, precision, kv_dtype, gpu, parallel, demand))
        if best is not None:
            if considered[-1].fits:
                break
        elif considered[-1].fits:
            best = considered[-1]
    return best, considered


def max_context(shape: ModelShape, kv_dtype: str, parallel: Parallel, bytes_per_sequence: int) -> int:
    """The longest sequence whose cache stays within the bytes, in tokens; at most what the model can read."""
    low, high = 0, shape.max_position
    while low < high:
        middle = (low + high + 1) // 2
        if kv_bytes_per_sequence(shape, kv_dtype, middle, parallel) <= bytes_per_sequence:
            low = middle
        else:
            high = middle - 1
    return low


def contexts(max_position: int) -> list[int]:
    """The powers of two that a model can read."""
    return [context for context in CONTEXTS if context <= max_position] or [max_position]


def concurrency_by_context(shape: ModelShape, kv_dtype: str, parallel: Parallel, pool: int) -> dict[int, int]:
    """{context: sequences}."""
    return {
        context: pool // max(kv_bytes_per_sequence(shape, kv_dtype, context, parallel), 1)
        for context in contexts(shape.max_position)
    }
