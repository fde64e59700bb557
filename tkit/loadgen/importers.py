"""Result files of other load generators -> requests as tkit records them. Knows their formats; measures nothing.

Written by AIPerf 0.13, guidellm 0.8.1, GenAI-Perf 0.0.16, vLLM's `bench serve --save-result --save-detailed` and SGLang's
`bench_serving --output-details`, the last two as their sources stood in 2026; only AIPerf's files come from a run of the tool.
Their definitions differ from tkit's, so what they measured is
labelled with the tool as its definitions, and a report keeps it in groups of its own.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from tkit.errors import InputError
from tkit.files import reason_of
from tkit.loadgen.exchange import RequestRecord
from tkit.loadgen.load_trace import LoadTrace
from tkit.loadgen.metrics import distribution
from tkit.loadgen.point import Place, summarise
from tkit.loadgen.profiles import HealthLimits, Shape
from tkit.specs.record import PointSummary
from tkit.units import NS_PER_MS, NS_PER_S

AIPERF_FILE = "profile_export.jsonl"
FAILED_SHARE = HealthLimits().error_share


@dataclass(frozen=True, kw_only=True)
class ImportedPoint:
    """One load. `window_s` is given where the requests have no times of their own, only durations."""

    concurrency: int | None = None
    rate: float | None = None
    arrivals: str | None = None
    token_source: str
    records: list[RequestRecord]
    window_s: float | None = None
    has_chunks: bool  # whether the time of every chunk is known


@dataclass(frozen=True, kw_only=True)
class Imported:
    tool: str
    version: str  # "" where the file does not say
    model: str
    endpoint: str  # the tool's own name for the protocol
    points: list[ImportedPoint]
    settings: dict[str, Any] = field(default_factory=dict)  # what the tool says of how it measured

    @property
    def definitions(self) -> str:
        return f"{self.tool}/{self.version}" if self.version else self.tool


def read_result(path: Path) -> Imported:
    """What another tool measured. Raises InputError that says what is missing, and which option writes it."""
    path = path / AIPERF_FILE if path.is_dir() else path
    values = _json_values(path)
    for recognise, read in READERS:
        if recognise(values[0]):
            try:
                imported = read(path, values)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                told = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise InputError(
                    f"{path}: looks like a result of {read.__name__.removeprefix('_read_')}, but: {told}"
                ) from error
            if not any(point.records for point in imported.points):
                raise InputError(f"{path}: holds no request")
            return imported
    hint = "known: AIPerf (profile_export.jsonl), vLLM, SGLang, guidellm (benchmarks.json), GenAI-Perf (profile_export.json)"
    if "input_config" in values[0]:
        hint = f"AIPerf's summary; give {AIPERF_FILE} beside it"
    elif {"output_throughput", "median_ttft_ms"} & set(values[0]):
        hint = "a summary without requests; measure with --save-detailed (vLLM) or --output-details (SGLang)"
    raise InputError(f"{path}: not a result that tkit can read", hint=hint)


def summarise_import(imported: Imported, point: ImportedPoint, repeat: int, started: str) -> tuple[Place, PointSummary]:
    """As a sweep's points, over the whole of the time. Nothing is known of the client's health, so only failures make
    such a point invalid."""
    ok = [record for record in point.records if record.is_ok]
    place = Place(
        shape=Shape(isl=_middle(record.isl or 0 for record in ok or point.records), osl=_middle(record.osl for record in ok)),
        concurrency=point.concurrency, rate=point.rate, repeat=repeat,
    )  # fmt: skip
    is_scheduled = point.rate is not None and all(record.scheduled_ns is not None for record in point.records)
    start = min(min(record.sent_ns, record.scheduled_ns or record.sent_ns) for record in point.records)
    end = max(record.end_ns for record in point.records)
    if point.window_s is not None:
        end = start + round(point.window_s * NS_PER_S)
    trace = LoadTrace(
        sent=(), start_ns=start, steady_start_ns=start, steady_end_ns=end, end_ns=end, cpu_shares=(0.0,), lags_ms=(),
        rss_bytes=0, gave_up=False, is_open=is_scheduled,
    )  # fmt: skip
    summary = summarise(
        place, point.records, trace, limits=HealthLimits(), token_source=point.token_source, num_gpus=None,
        arrivals=point.arrivals, started=started,
    )  # fmt: skip
    failed = len(point.records) - len(ok)
    reasons = (
        (f"{failed} of {len(point.records)} requests failed",) if failed > FAILED_SHARE * len(point.records) else ()
    )
    if not point.has_chunks:
        for record in point.records:
            record.token_ns, record.token_counts = array("q"), array("q")
    return place, replace(
        summary,
        definitions=imported.definitions,
        arrivals=point.arrivals,
        chunk_gap=summary.chunk_gap if point.has_chunks else distribution(()),
        ttfb=distribution(()),
        half_width={},
        client={},
        is_valid=not reasons,
        invalid_reasons=reasons,
    )


def _middle(values: Iterable[int]) -> int:
    return round(median([*values] or [1])) or 1


def _json_values(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON or of JSON lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {reason_of(error)}") from error
    try:
        values = [json.loads(text)]
    except ValueError:
        try:
            values = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise InputError(f"{path}: neither JSON nor JSON lines: {error}") from error
    if not values or not all(isinstance(value, dict) for value in values):
        raise InputError(f"{path}: expected JSON objects")
    return values


def _record(
    id: int, *, sent_ns: int, chunk_ns: Sequence[int], end_ns: int, isl: int, osl: int, error: str | None,
    scheduled_ns: int | None = None, counts: Sequence[int] | None = None,
) -> RequestRecord:  # fmt: skip
    """`chunk_ns`: arrivals, the first with one token, as all these tools count, unless `counts` says otherwise."""
    times = array("q", chunk_ns)
    if counts is None:
        later = len(times) - 1
        shares = [(osl - 1) * (i + 1) // later - (osl - 1) * i // later for i in range(later)]
        counts = [min(osl, 1), *shares] if times else []
    return RequestRecord(
        id=id, scheduled_ns=scheduled_ns, sent_ns=sent_ns, first_byte_ns=None, first_token_ns=times[0] if times else None,
        last_token_ns=times[-1] if times else None, end_ns=max(end_ns, times[-1] if times else end_ns), isl_asked=isl, isl=isl,
        osl_asked=osl, osl=osl, n_first=counts[0] if times else None, chunks=len(times),
        status="ok" if error is None else "error", error=None if error is None else "server", detail=error or "",
        token_ns=times, token_counts=array("q", counts),
    )  # fmt: skip


def _read_aiperf(path: Path, values: list[dict[str, Any]]) -> Imported:
    """A line per request; `profile_export_aiperf.json` beside it says how they were sent."""
    summary_path = path.with_name(path.stem + "_aiperf.json")
    summary = json.loads(summary_path.read_text(encoding="utf-8")) if summary_path.is_file() else {}
    config = summary.get("input_config", {})
    phases = [phase for phase in config.get("phases", []) if not phase.get("exclude_from_results")]
    phase = phases[0] if phases else config.get("loadgen", {})
    records: list[RequestRecord] = []
    for line in values:
        told, metrics = line["metadata"], line["metrics"]
        if told.get("benchmark_phase", "profiling") != "profiling":
            continue
        failure = (line.get("error") or {}).get("message") or ("cancelled" if told.get("was_cancelled") else None)
        sent, isl = told["request_start_ns"], _value(metrics, "input_sequence_length", "error_isl")
        chunk_ns: list[int] = []
        if failure is None:
            first = sent + round(_value(metrics, "time_to_first_token") * NS_PER_MS)
            gaps = metrics.get("inter_chunk_latency", {}).get("value", [])
            chunk_ns = [first + round(so_far * NS_PER_MS) for so_far in accumulate(gaps, initial=0.0)]
        osl = 0 if failure else round(_value(metrics, "output_sequence_length", "output_token_count"))
        records.append(_record(
            len(records), sent_ns=sent, chunk_ns=chunk_ns, end_ns=told["request_end_ns"], isl=round(isl), osl=osl,
            error=failure, scheduled_ns=told.get("credit_issued_ns"),
        ))  # fmt: skip
    rate = phase.get("rate") or phase.get("request_rate")
    point = ImportedPoint(
        concurrency=None if rate else phase.get("concurrency") or _most_in_flight(records),
        rate=float(rate) if rate else None,
        arrivals=str(phase.get("type", "poisson")) if rate else None,
        token_source="server_usage" if config.get("endpoint", {}).get("use_server_token_count") else "tokenizer",
        records=records,
        has_chunks=all("inter_chunk_latency" in line["metrics"] for line in values if not line.get("error")),
    )
    models = config.get("models", {}).get("items", [{}])
    return Imported(
        tool="aiperf",
        version=str(summary.get("aiperf_version", "")),
        model=str(models[0].get("name", "")),
        endpoint=str(config.get("endpoint", {}).get("type", "")),
        points=[point],
        settings={"command": summary.get("run_info", {}).get("cli_command")},
    )


def _value(metrics: dict[str, Any], *names: str) -> float:
    for name in names:
        if name in metrics:
            return float(metrics[name]["value"])
    raise KeyError(" or ".join(names))


def _most_in_flight(records: Sequence[RequestRecord]) -> int:
    edges = sorted([(record.sent_ns, 1) for record in records] + [(record.end_ns, -1) for record in records])
    return max(accumulate(step for _, step in edges), default=1)


def _read_vllm(path: Path, values: list[dict[str, Any]]) -> Imported:
    """Also SGLang's, a fork of the same script: an object per load; durations in seconds and no times. Where a server sent
    no usage, vLLM encodes the text again and SGLang takes the length it asked for; their files do not say so."""
    points = []
    for result in values:
        records: list[RequestRecord] = []
        errors = result.get("errors") or [""] * len(result["ttfts"])
        rows = zip(result["input_lens"], result["output_lens"], result["ttfts"], result["itls"], errors, strict=True)
        for isl, osl, ttft, gaps, error in rows:
            chunk_ns = [] if error else [round(so_far * NS_PER_S) for so_far in accumulate(gaps, initial=ttft)]
            records.append(_record(
                len(records), sent_ns=0, chunk_ns=chunk_ns, end_ns=chunk_ns[-1] if chunk_ns else 0, isl=isl,
                osl=0 if error else osl, error=error or None,
            ))  # fmt: skip
        rate = float(result.get("request_rate") or "inf")
        is_open = rate != float("inf")
        points.append(ImportedPoint(
            concurrency=None if is_open else result.get("max_concurrency") or len(records),
            rate=rate if is_open else None, arrivals="poisson" if is_open else None, token_source="server_usage",
            records=records, window_s=float(result["duration"]), has_chunks=True,
        ))  # fmt: skip
    first = values[0]
    return Imported(
        tool="sglang" if "total_output_tokens_retokenized" in first else "vllm",
        version="",
        model=str(first.get("model_id") or (first.get("server_info") or {}).get("model_path") or ""),
        endpoint=str(first.get("endpoint_type") or first.get("backend") or ""),
        points=points,
        settings={
            name: first[name] for name in ("date", "num_prompts", "burstiness", "dataset_name", "tag") if name in first
        },
    )


GUIDELLM_ARRIVALS = {"constant": "constant", "poisson": "poisson"}


def _read_guidellm(path: Path, values: list[dict[str, Any]]) -> Imported:
    points = []
    for benchmark in values[0]["benchmarks"]:
        strategy = benchmark["config"]["strategy"]
        groups = benchmark["requests"]
        has_usage = all(request["output_metrics"].get("text_tokens") for request in groups["successful"])
        records: list[RequestRecord] = []
        for status in ("successful", "errored"):  # those that were cut off at the end are no result
            for request in groups[status]:
                timings = request["info"]["timings"]
                start = timings["request_start"] if timings["request_start"] is not None else timings["resolve_start"]
                end = timings["request_end"] if timings["request_end"] is not None else timings["resolve_end"]
                failure = None if status == "successful" else request["info"].get("error") or "errored"
                ends = (timings["first_token_iteration"], timings["last_token_iteration"])
                chunk_ns = [] if failure or None in ends else [round(when * NS_PER_S) for when in ends]
                osl = (
                    request["output_metrics"]["text_tokens"]
                    if has_usage and not failure
                    else timings.get("token_iterations")
                )
                records.append(_record(
                    len(records), sent_ns=round(start * NS_PER_S), chunk_ns=chunk_ns, end_ns=round(end * NS_PER_S),
                    isl=request["prompt_tokens"] or 0, osl=0 if failure else osl or 0, error=failure,
                    scheduled_ns=round(timings["targeted_start"] * NS_PER_S) if timings.get("targeted_start") else None,
                ))  # fmt: skip
        arrivals = GUIDELLM_ARRIVALS.get(strategy["type_"])
        concurrency = 1 if strategy["type_"] == "synchronous" else strategy.get("streams") or _most_in_flight(records)
        points.append(ImportedPoint(
            concurrency=None if arrivals else concurrency, rate=float(strategy["rate"]) if arrivals else None,
            arrivals=arrivals, token_source="server_usage" if has_usage else "chunks", records=records, has_chunks=False,
        ))  # fmt: skip
    metadata, backend = values[0].get("metadata", {}), values[0].get("config", {}).get("backend", {})
    backend = backend if isinstance(backend, dict) else {}
    return Imported(
        tool="guidellm",
        version=str(metadata.get("guidellm_version", "")),
        model=str(backend.get("model") or ""),
        endpoint=str(backend.get("request_format") or ""),
        points=points,
    )


GENAI_PERF_MODES = {"concurrency": "concurrency", "request_rate": "rate"}
TEXT_KEYS = ("text", "content", "text_output", "reasoning_content")


def _read_genai_perf(path: Path, values: list[dict[str, Any]]) -> Imported:
    """Times and raw responses of every request. A response with text counts as one token, since the file has no counts;
    the number of input tokens stands, as a mean, in `profile_export_genai_perf.json` beside it."""
    summary_path = path.with_name(path.stem + "_genai_perf.json")
    summary = json.loads(summary_path.read_text(encoding="utf-8")) if summary_path.is_file() else {}
    isl = round(summary.get("input_sequence_length", {}).get("avg", 0)) or 1
    points = []
    for experiment in values[0]["experiments"]:
        records: list[RequestRecord] = []
        for request in experiment["requests"]:
            answers = zip(request["response_timestamps"], request["response_outputs"], strict=True)
            chunk_ns = [
                when for when, output in answers if _has_text(output.get("response") or output.get("text_output") or "")
            ]
            error = None if request.get("success", bool(chunk_ns)) else "no response with text"
            end = request["response_timestamps"][-1] if request["response_timestamps"] else request["timestamp"]
            records.append(_record(
                len(records), sent_ns=request["timestamp"], chunk_ns=chunk_ns, end_ns=end, isl=isl, osl=len(chunk_ns),
                error=error, counts=[1] * len(chunk_ns),
            ))  # fmt: skip
        told = experiment["experiment"]
        level = {GENAI_PERF_MODES[told["mode"]]: told["value"]}
        arrivals = "poisson" if told["mode"] == "request_rate" else None
        points.append(
            ImportedPoint(**level, arrivals=arrivals, token_source="chunks", records=records, has_chunks=True)
        )
    config = summary.get("input_config", {})
    model = config.get("model_names") or config.get("formatted_model_name") or ""
    return Imported(
        tool="genai-perf",
        version=str(values[0].get("version", "")),
        model=", ".join(model) if isinstance(model, list) else str(model),
        endpoint=str(values[0].get("service_kind", "")),
        points=points,
    )


def _has_text(response: str) -> bool:
    """Whether a raw response, perhaps of several events, carries text."""
    for line in response.splitlines():
        try:
            value = json.loads(line.removeprefix("data:"))
        except ValueError:
            continue
        if not isinstance(value, dict):
            continue
        for part in (value, *value.get("choices", ())):
            if any(part.get(key) or (part.get("delta") or {}).get(key) for key in TEXT_KEYS):
                return True
    return bool(response) and not response.lstrip().startswith(("data:", "{", ":"))


# how a tool's first object is told -> what reads the file
READERS: tuple[tuple[Callable[[dict[str, Any]], bool], Callable[[Path, list[dict[str, Any]]], Imported]], ...] = (
    (lambda value: {"metadata", "metrics"} <= set(value), _read_aiperf),
    (lambda value: {"ttfts", "itls", "input_lens"} <= set(value), _read_vllm),
    (lambda value: "benchmarks" in value, _read_guidellm),
    (lambda value: "experiments" in value, _read_genai_perf),
)
