"""Tables with a row per engine: size, memory, quality, cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tkit.report import text
from tkit.report.record import Comparison, RunFacts
from tkit.report.tables.loads import common_load, estimate_entry
from tkit.report.tables.table import Column, Entry, Table, text_columns
from tkit.specs.record import METRICS
from tkit.units import format_bytes, format_seconds

# name -> (column, meaning); of the load at which it was highest
MEASURED_MEMORY = {
    "gpu": ("per GPU, measured", "NVML: the mean of a load, divided by the GPUs; at the load where it was highest"),
    "server": ("engine's process, measured", "resident memory, the highest"),
    "kv": ("KV cache in use, measured", "by the server, the highest share"),
}
JOULES = "joules_per_output_token"


def size_table(comparison: Comparison) -> Table:
    """Memory and size, from the engine cards."""
    columns = (
        Column(name="Run", kind="text"),
        Column(name="weights", meaning="all ranks, from the engine card"),
        Column(name="weights per rank"),
        Column(name="KV cache per token", meaning="all layers and ranks"),
        Column(name="on disk", meaning="every file of the engine"),
        Column(name="parameters"),
        Column(name="build time"),
        Column(name="build memory", meaning="highest resident memory of the build"),
    )
    rows = []
    for run in comparison.runs:
        if run.engine is None:
            continue
        engine, build = run.engine, run.engine.build
        ranks = rank_bytes(engine.files)
        per_rank = " / ".join(dict.fromkeys(format_bytes(size) for size in ranks)) or text.ABSENT
        rows.append(
            (
                Entry(text=run.name, run=run.id),
                Entry(text=format_bytes(engine.weight_bytes)),
                Entry(text=per_rank, note=text.plural(len(ranks), "rank")),
                _told(build.get("kv_bytes_per_token"), format_bytes),
                Entry(text=format_bytes(sum(facts["bytes"] for facts in engine.files.values()))),
                Entry(text=text.count(engine.num_params)),
                _told(build.get("seconds"), format_seconds),
                _told(build.get("peak_memory_bytes"), format_bytes),
            )
        )
    return Table(id="size", caption="Memory and size", columns=columns, rows=tuple(rows))


def rank_bytes(files: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """Size of each rank's weights, in rank order."""
    names = [name for name in files if name.startswith("checkpoint/rank") and name.endswith(".safetensors")]
    names.sort(key=lambda name: (len(name), name))
    return [files[name]["bytes"] for name in names]


def _told(value: Any, format_value: Callable[[float], str]) -> Entry:
    if isinstance(value, int | float):
        return Entry(text=format_value(value))
    return Entry(text=text.ABSENT, note="not in the card", tone="absent")


def memory_table(comparison: Comparison) -> Table:
    """What the plan says beside what the engine card and, where they were asked, the GPUs and the server say."""
    measured = {run.id: _measured_memory(comparison, run) for run in comparison.runs}
    shown = [name for name in MEASURED_MEMORY if any(name in told for told in measured.values())]
    has_gpu = any(run.memory is not None and run.memory.gpu_usable is not None for run in comparison.runs)
    on_gpu = (
        Column(name="weights per GPU", meaning="of the fullest GPU, as the plan expects them there"),
        Column(name="activations", meaning="an estimate, rounded up"),
        Column(name="overhead", meaning="CUDA context, libraries, captured graphs, NCCL; an estimate, rounded up"),
        Column(name="left for the KV cache"),
        Column(name="usable", meaning="what the driver leaves for programs"),
    )
    columns: tuple[Column, ...] = (
        Column(name="Run", kind="text"),
        Column(name="weights, planned", meaning="all ranks, on disk; from the model's shapes and the format's layout"),
        Column(name="built", meaning="the rank files in the engine card"),
        Column(name="KV per token, planned", meaning="all layers and ranks"),
        Column(name="built", meaning="from the engine card"),
        *(on_gpu if has_gpu else ()),
        *(Column(name=MEASURED_MEMORY[name][0], meaning=MEASURED_MEMORY[name][1]) for name in shown),
    )
    rows = []
    for run in comparison.runs:
        if run.engine is None or run.memory is None:
            continue
        memory = run.memory
        built = sum(rank_bytes(run.engine.files)) or None
        planned = (
            memory.gpu_weights,
            memory.gpu_activations,
            memory.gpu_overhead,
            memory.gpu_kv_pool,
            memory.gpu_usable,
        )
        rows.append(
            (
                Entry(text=run.name, run=run.id),
                _bytes(memory.stored),
                _bytes(built),
                _bytes(memory.kv_per_token),
                _told(run.engine.build.get("kv_bytes_per_token"), format_bytes),
                *(map(_bytes, planned) if has_gpu else ()),
                *(measured[run.id].get(name, Entry(text=text.ABSENT, tone="absent")) for name in shown),
            )
        )
    caption = "Memory, planned, built and measured" if shown else "Memory, planned and built"
    return Table(id="memory", caption=caption, columns=columns, rows=tuple(rows))


def _measured_memory(comparison: Comparison, run: RunFacts) -> dict[str, Entry]:
    told = [
        cell.telemetry
        for group in comparison.groups
        for level in group.levels
        for cell in level.cells
        if cell.run == run.id
    ]
    per_gpu = [
        numbers["gpu_memory_bytes"] / count
        for numbers in told
        if "gpu_memory_bytes" in numbers and (count := numbers.get("gpus"))
    ]
    server = [numbers["server_bytes_max"] for numbers in told if "server_bytes_max" in numbers]
    share = [numbers["kv_share_max"] for numbers in told if "kv_share_max" in numbers]
    return {
        **({"gpu": Entry(text=format_bytes(max(per_gpu)))} if per_gpu else {}),
        **({"server": Entry(text=format_bytes(max(server)))} if server else {}),
        **({"kv": Entry(text=text.share(max(share)))} if share else {}),
    }


def _bytes(size: int | None) -> Entry:
    return Entry(text=text.ABSENT, tone="absent") if size is None else Entry(text=format_bytes(size))


def quality_table(comparison: Comparison) -> Table:
    """Quality beside speed: the speed at the highest load that is valid in every run."""
    place = common_load(comparison)
    speed = f"output tok/s, {place[0].shape} {place[1].load}" if place else "output tok/s"
    columns = (
        Column(name="Run", kind="text"),
        Column(name=speed),
        Column(name="perplexity"),
        Column(name="source"),
        Column(name="ratio", meaning="perplexity / perplexity of the source model"),
        Column(name="KL, nats/token", meaning="mean KL divergence from the source model"),
        Column(name="top-1", meaning="share of positions with the source model's most likely token"),
        Column(
            name="noisiest layer, dB", meaning="the lowest signal-to-noise ratio that a decoder layer has by itself"
        ),
        Column(name="over", kind="text"),
    )
    rows = []
    for run in comparison.runs:
        facts = run.validation
        if facts is None:
            continue
        cell = next((cell for cell in place[1].cells if cell.run == run.id), None) if place else None
        rows.append(
            (
                Entry(text=run.name, run=run.id),
                estimate_entry(comparison, place[1], cell, "output_tok_s")
                if place and cell
                else Entry(text=text.ABSENT),
                Entry(text=text.fixed(facts["ppl"], 3)),
                Entry(text=text.fixed(facts["ppl_source"], 3)),
                Entry(text=text.fixed(facts["ppl_ratio"], 4)),
                Entry(text=text.number(facts["kl"])),
                Entry(text=text.share(facts["top1"])),
                _noisiest(facts.get("layer_snr_db")),
                Entry(text=f"{facts.get('tokens', text.ABSENT)} tokens of {_text_name(facts.get('text'))}"),
            )
        )
    return Table(id="quality", caption="Quality and speed", columns=columns, rows=tuple(rows))


def _noisiest(ratios: Any) -> Entry:
    """Of a list with a number, or null, per layer; records of earlier versions hold none."""
    told = list(enumerate(ratios)) if isinstance(ratios, list | tuple) else []
    known = [(ratio, layer) for layer, ratio in told if isinstance(ratio, int | float)]
    if not known:
        return Entry(text=text.ABSENT, tone="absent")
    ratio, layer = min(known)
    return Entry(text=f"{ratio:.1f}", note=f"layer {layer}")


def samples_table(comparison: Comparison) -> Table:
    """What source and engine go on with after the same prompts."""
    rows: list[tuple[Entry, ...]] = []
    for run in comparison.runs:
        samples = (run.validation or {}).get("samples")
        for sample in samples if isinstance(samples, list | tuple) else ():
            if not isinstance(sample, Mapping):
                continue
            told = [str(sample.get(name, text.ABSENT)) for name in ("prompt", "source", "engine")]
            same = f"{sample.get('same_tokens', text.ABSENT)} of {sample.get('tokens', text.ABSENT)}"
            rows.append((Entry(text=run.name, run=run.id), *(Entry(text=item) for item in told), Entry(text=same)))
    columns = (*text_columns("Run", "Prompt", "Source goes on", "Engine goes on"), Column(name="equal tokens"))
    return Table(
        id="samples", caption="What source and engine go on with", columns=columns, rows=tuple(rows), is_folded=True
    )


def _text_name(facts: Any) -> str:
    return str(facts.get("name", "a text")) if isinstance(facts, Mapping) else str(facts or "a text")


def cost_table(comparison: Comparison) -> Table:
    """At each run's cheapest valid load per group, by price or, where there is none, by measured energy."""
    columns = (
        Column(name="Run", kind="text"),
        Column(name="Shape", kind="text"),
        Column(name="Load", kind="text"),
        Column(name="output tok/s", meaning=METRICS["output_tok_s"][1]),
        Column(name="$ per million output tokens", meaning="at the utilisation that the price file states"),
        Column(
            name="J per output token",
            meaning="of the GPUs' measured power; without it, data-sheet power times 1.13 to 1.31 for servers and fans",
        ),
    )
    rows = []
    for run in comparison.runs:
        for group in comparison.groups:
            known = [
                (cell.cost.usd_per_million.value if cell.cost is not None else cell.telemetry[JOULES], cell)
                for level in group.levels
                for cell in level.cells
                if cell.run == run.id and cell.is_valid and (cell.cost is not None or JOULES in cell.telemetry)
            ]
            if not known:
                continue
            _, cell = min(known, key=lambda pair: pair[0])
            rate, dollars = cell.estimates["output_tok_s"], cell.cost.usd_per_million if cell.cost else None
            rows.append(
                (
                    Entry(text=run.name, run=run.id),
                    Entry(text=group.shape),
                    Entry(text=str(cell.load)),
                    Entry(text=text.number(rate.value if rate else None)),
                    Entry(text=text.number(dollars.value), aside=text.interval(dollars.low, dollars.high))
                    if dollars
                    else Entry(text=text.ABSENT, tone="absent"),
                    Entry(text=text.number(cell.telemetry[JOULES]), note="measured")
                    if JOULES in cell.telemetry
                    else Entry(text=text.interval(*cell.cost.joules_per_token) if cell.cost else text.ABSENT),
                )
            )
    return Table(id="cost", caption="Each run where its tokens are cheapest", columns=columns, rows=tuple(rows))
