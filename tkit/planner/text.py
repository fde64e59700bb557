"""A plan as one screen of text. Decimal and binary units are named; a band stands behind every estimate."""

from __future__ import annotations

from collections.abc import Sequence

from tkit.planner.record import Estimate, Plan, Speculation

BAR = 30


def both_units(num_bytes: float) -> str:
    """`35.7 GB (33.2 GiB)`."""
    if abs(num_bytes) < 1e8:
        return f"{num_bytes / 1e6:.2f} MB ({num_bytes / 2**20:.2f} MiB)"
    if abs(num_bytes) < 1e12:
        return f"{num_bytes / 1e9:.1f} GB ({num_bytes / 2**30:.1f} GiB)"
    return f"{num_bytes / 1e12:.2f} TB ({num_bytes / 2**40:.2f} TiB)"


def render(plan: Plan) -> str:
    blocks = [_head(plan), _ledger(plan), _fit(plan), _speed(plan), _curve(plan), _alternatives(plan)]
    blocks += [_speculation(plan), _money(plan), [f"note: {note}" for note in plan.notes]]
    return "\n".join(line.rstrip() for block in blocks for line in block)


def _head(plan: Plan) -> list[str]:
    active = f", {plan.num_active_params / 1e9:.1f} B active" if plan.num_active_params != plan.num_params else ""
    return [
        f"{plan.model}: {plan.num_params:,} parameters{active}  [{plan.model_source}]",
        f"{plan.quant} weights, {plan.kv_cache} KV cache, {plan.concurrency} requests of {plan.isl} in + {plan.osl} out",
        f"VERDICT  {plan.verdict}",
    ]


def _ledger(plan: Plan) -> list[str]:
    book = plan.chosen.ledger
    lines = [
        "",
        f"memory of one {book.gpu}, the fullest of {book.num_gpus}",
    ]
    visible = book.weight_bytes / 1000
    rows = [(f"weights: {kind}", size) for kind, size in book.weights.items() if size >= visible]
    small = sum(size for size in book.weights.values() if size < visible)
    if small:
        rows.append(("weights: other", small))
    rows += [
        ("activations, logits", book.activations),
        ("engine: context, graphs, NCCL", book.overhead),
        (f"KV cache: {book.kv_rule}", book.kv_pool),
        ("kept free" if book.unused >= 0 else "MISSING", book.unused),
    ]
    for name, size in rows:
        filled = round(BAR * max(size, 0) / book.usable)
        lines.append(f"  {name:<56} {both_units(size):>24}  {'#' * min(filled, BAR)}")
    lines.append(f"  {'= usable':<56} {both_units(book.usable):>24}")
    dtypes = ", ".join(f"{_dtype(name)} {size / 1e9:.2f} GB" for name, size in book.weights_by_dtype.items())
    lines.append(f"  weights {both_units(book.weight_bytes)} per GPU: {dtypes}; stored {both_units(plan.stored_bytes)}")
    return lines


def _dtype(name: str) -> str:
    return "16-bit" if name == "model" else name


def _fit(plan: Plan) -> list[str]:
    table = "  ".join(f"{_k(context)}:{count:,}" for context, count in plan.concurrency_by_context.items())
    lines = [
        f"KV cache {plan.kv_bytes_per_token:,} B per token ({plan.kv_bytes_per_token / 2**20:.4f} MiB); "
        f"room for {plan.max_concurrency:,} x {plan.isl + plan.osl} tokens; "
        f"{plan.concurrency} users may use {plan.max_context:,} of {plan.max_position:,}",
        f"  sequences by context  {table}",
    ]
    others = [item for item in plan.considered if item is not plan.chosen][-3:]
    for item in others:
        link = f" over {item.link}" if item.parallel.tp_size > 1 else ""
        fit = f"fits {item.max_concurrency:,}" if item.fits else f"{item.binds} too large"
        lines.append(
            f"  {'next best' if item.fits else 'too small'}: {item.parallel.world_size} x {plan.gpu} "
            f"tp {item.parallel.tp_size} pp {item.parallel.pp_size}{link}: {fit}"
        )
    return lines


def _speed(plan: Plan) -> list[str]:
    p50, p90, p99 = plan.ttft_p50_p90_p99_ms
    lines = [
        "",
        f"speed, {plan.engine} {plan.engine_generation} ({plan.provenance}); [90 % band]",
        f"  TTFT   engine idle {_ms(plan.ttft_idle_ms)}   served, {plan.concurrency} in flight: mean {_ms(plan.ttft_ms)}",
        f"         simulated p50 {p50:.0f}  p90 {p90:.0f}  p99 {p99:.0f} ms; last of {plan.concurrency} at once "
        f"{plan.ttft_burst_ms:.0f} ms",
        f"  TPOT   {_ms(plan.tpot_ms)}   throughput {_rate(plan.tok_s)} tok/s   {plan.requests_s:.2f} requests/s",
        f"  TPOT: formula x {plan.tpot_ms.factor:.2f}, {plan.tpot_ms.source};  "
        f"TTFT: x {plan.ttft_ms.factor:.2f}, {plan.ttft_ms.source}",
    ]
    for phase in plan.phases:
        terms = "  ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in phase.terms.items())
        lines.append(
            f"  {phase.name:<8} {1e3 * phase.seconds:8.2f} ms  {phase.intensity:6.0f} FLOP/B, ridge {phase.ridge:.0f}, by"
            f" {phase.binds}, {phase.share_of_peak:.0%} of the roofline"
        )
        if terms:
            lines.append(f"           {terms} ms")
    if plan.slo is not None:
        names = {"ttft": "median TTFT", "tpot": "TPOT"}
        told = (f"{names[name]} {value:.0f} ms" for name, value in plan.slo["limits_ms"].items())
        limits = ", ".join(told) or "no limits"
        lines.append(
            f"  SLO {plan.slo['tier']} ({limits}): up to {plan.slo['concurrency']:,} in flight, "
            f"{plan.slo['concurrency_sure']:,} at the band's bad end"
        )
    return lines


def _curve(plan: Plan) -> list[str]:
    points = [
        point for point in plan.curve if point.concurrency == point.running or point.concurrency == plan.concurrency
    ]
    if len(points) > 9:
        kept = {round(index * (len(points) - 1) / 8) for index in range(9)}
        asked = next(index for index, point in enumerate(points) if point.concurrency == plan.concurrency)
        points = [point for index, point in enumerate(points) if index in kept | {asked}]
    top = max(point.tok_s for point in points)
    lines = [
        "",
        f"  {'in flight':>9} {'TTFT p50':>9} {'TPOT ms':>8} {'tok/s/user':>10} {'tok/s':>9} {'per GPU':>9}  bound by",
    ]
    for point in points:
        lines.append(
            f"  {point.concurrency:>9,} {point.ttft_ms:>9.0f} {point.tpot_ms:>8.2f} {point.tok_s_user:>10.0f} "
            f"{point.tok_s:>9,.0f} {point.tok_s_gpu:>9,.0f}  {point.binds:<27}{'#' * max(round(20 * point.tok_s / top), 1)}"
        )
    return lines


def _alternatives(plan: Plan) -> list[str]:
    if not plan.alternatives:
        return []
    lines = [
        "",
        f"  {'quant':<10} {'KV':<5} {'weights':>9} {'GPUs':>5} {'max users':>10} "
        f"{'decode':>7} {'prefill':>8} {'tok/s/GPU':>10}",
    ]
    for item in plan.alternatives:
        lines.append(
            f"  {item.quant:<10} {item.kv_cache:<5} {item.weight_bytes / 1e9:>6.1f} GB {item.num_gpus or '-':>5} "
            f"{item.max_concurrency:>10,} {_factor(item.decode_speedup):>7} {_factor(item.prefill_speedup):>8} "
            f"{f'{item.tok_s_gpu:,.0f}' if item.tok_s_gpu else '-':>10}"
            f"{'' if item.is_built else '  (planned only)'}"
        )
    return lines


def _speculation(plan: Plan) -> list[str]:
    if not plan.speculation:
        return []
    parts = [f"a={item.acceptance} x{item.gain:.2f}, pays {_break_even(item)}" for item in plan.speculation]
    return [f"  drafting {plan.speculation[0].tokens} tokens, {plan.concurrency} in flight: {'; '.join(parts)}"]


def _break_even(item: Speculation) -> str:
    if item.break_even_batch is None:
        return "always"
    return f"to batch {item.break_even_batch:,}" if item.break_even_batch else "never"


def _money(plan: Plan) -> list[str]:
    lines = []
    if plan.gpus_for_load is not None:
        lines.append(
            f"  GPUs for {plan.rate:g} requests/s: {plan.gpus_for_load:,}, {plan.gpus_for_load_sure:,} at the band's bad end; "
            f"engines of {plan.chosen.parallel.world_size} with {plan.concurrency} in flight each"
        )
    if plan.cost is not None:
        low, high = plan.cost.usd_per_million
        lines.append(
            f"  ${low:.2f}-{high:.2f} per million output tokens at {plan.cost.utilisation:.0%} use "
            f"(prices of {plan.cost.prices_date}); ${plan.cost.usd_per_hour:.2f}/h; "
            f"${plan.cost.tco_usd:,.0f} in {plan.cost.years:g} years; "
            f"{plan.cost.joules_per_token[0]:.2f}-{plan.cost.joules_per_token[1]:.2f} J per token"
        )
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    )


def _k(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def _ms(estimate: Estimate) -> str:
    digits = 1 if estimate.value < 100 else 0
    return f"{estimate.value:.{digits}f} ms [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _rate(estimate: Estimate) -> str:
    return f"{estimate.value:,.0f} [{estimate.low:,.0f}, {estimate.high:,.0f}]"


def _factor(value: float | None) -> str:
    return f"x{value:.2f}" if value is not None else "-"
