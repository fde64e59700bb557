"""Run directories -> frozen records and frames. Knows the files of `specs/record.py`; compares nothing, draws nothing.

The files come from another machine and another year, so nothing is believed: a file that is torn, of another schema or
in contradiction to its neighbours is named, with the reason, and left out. What a person wrote into a name stays as
text; control characters and what looks like a secret do not get this far.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tkit.errors import InputError
from tkit.files import from_mapping, read_json, reason_of
from tkit.specs.engine import CARD_SCHEMA, EngineCard
from tkit.specs.progress import Progress
from tkit.specs.record import (
    CHUNK_COLUMNS,
    FIND_MAX_FILE,
    FIND_MAX_SCHEMA,
    GPU_COLUMNS,
    POINT_SCHEMA,
    REQUEST_COLUMNS,
    SERVER_COLUMNS,
    SWEEP_SCHEMA,
    TOKEN_SOURCES,
    VALIDATION_SCHEMA,
    FindMaxRecord,
    FoundMax,
    Load,
    Manifest,
    PointSummary,
)
from tkit.units import NS_PER_MS, NS_PER_S

T = TypeVar("T")

MANIFEST_FILE = "manifest.json"
POINT_FILE = "point.json"
REQUESTS_FILE = "requests.parquet"
CHUNKS_FILE = "chunks.parquet"
SERVER_FILE = "server.parquet"
GPU_FILE = "gpu.parquet"
JOURNAL_FILE = "state.jsonl"
POINTS_DIR = "points"
VALIDATION_NUMBERS = ("ppl", "ppl_source", "ppl_ratio", "kl", "top1")

# rows and summary come from the same timestamps; further apart than this and they are not of one measurement
AGREEMENT = 0.001

# what a person may have typed into a URL, a command or a server's configuration
SECRET_KEYS = re.compile(
    r"^((hf|access|auth|api)[_-]?)?(token|secret|password|api[_-]?key|authorization)$", re.IGNORECASE
)
SECRET_TEXTS = (
    (re.compile(r"(://)[^/\s@]+@"), r"\1"),  # https://user:password@host
    (re.compile(r"\b(hf|sk|nvapi|ghp)[_-][A-Za-z0-9_-]{16,}"), r"\1_(removed)"),
    (re.compile(r"(?i)\b(bearer\s+)\S+"), r"\1(removed)"),
    (re.compile(r"(?i)(--(?:api-key|token|password)[= ])\S+"), r"\1(removed)"),
)
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """One shape at one load, one repeat.

    `requests` in the order sent: id, phase (warmup, measured, drain), status, error, isl, osl, scheduled_s, sent_s,
    first_s, end_s (seconds since the first was sent), ttft, ttfb, tpot, e2e (milliseconds); NaN = did not happen.
    """

    directory: Path
    summary: PointSummary
    requests: pd.DataFrame
    origin_ns: int  # when the first request was sent
    sha256: Mapping[str, str]  # file -> digest

    @property
    def measured(self) -> pd.DataFrame:
        """The requests that count: within the steady window, answered without error."""
        return self.requests[(self.requests["phase"] == "measured") & (self.requests["status"] == "ok")]

    def chunk_gaps(self) -> pd.DataFrame:
        """Columns request, gap (milliseconds), read anew each time: a point can have millions, and few are looked at."""
        if CHUNKS_FILE not in self.sha256:
            return pd.DataFrame({"request": [], "gap": []}, dtype="float64")
        chunks, _ = _read_parquet(self.directory / CHUNKS_FILE, CHUNK_COLUMNS)
        return pd.DataFrame({"request": _numbers(chunks["request"]), "gap": _numbers(chunks["gap_ns"]) / NS_PER_MS})

    def server_samples(self) -> pd.DataFrame:
        """Columns when_s (seconds since the first request), metric, labels, value; empty where there are none."""
        return self._samples(SERVER_FILE, SERVER_COLUMNS)

    def gpu_samples(self) -> pd.DataFrame:
        """Columns when_s and those of GPU_COLUMNS; empty where there are none."""
        return self._samples(GPU_FILE, GPU_COLUMNS)

    def _samples(self, file: str, columns: Mapping[str, str]) -> pd.DataFrame:
        names = ["when_s", *(name for name in columns if name != "when_ns")]
        if file not in self.sha256:
            return pd.DataFrame({name: [] for name in names})
        table, _ = _read_parquet(self.directory / file, columns)
        when_s = _numbers(pc.subtract(table["when_ns"], pa.scalar(self.origin_ns, pa.int64()))) / NS_PER_S
        return table.to_pandas().assign(when_s=when_s)[names]


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    directory: Path
    name: str  # unique within a report
    manifest: Manifest
    manifest_sha256: str
    engine: EngineCard | None
    points: tuple[Point, ...]
    left_out: tuple[LeftOut, ...]  # points
    ended_early: str | None  # why the sweep measured less than it set out to
    settled: frozenset[str] = frozenset()  # names of points that the sweep left out, as the repeats before them agreed
    found: tuple[FoundMax, ...] = ()  # the largest loads that hold a tier


def read_runs(
    directories: Iterable[Path], progress: Progress | None = None
) -> tuple[tuple[Run, ...], tuple[LeftOut, ...]]:
    """The readable runs, each with a name of its own, and what had to be left out. Holds every request in memory, no chunk."""
    directories = list(directories)
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    for done, directory in enumerate(directories):
        if progress is not None:
            progress.step("reading runs", done, len(directories))
        try:
            run = read_run(directory)
        except InputError as error:
            left_out.append(LeftOut(path=str(directory), reason=_one_line(error)))
            continue
        twin = next((other for other in runs if other.manifest_sha256 == run.manifest_sha256), None)
        if twin is not None:
            left_out.append(LeftOut(path=str(directory), reason=f"the same run as {twin.directory}"))
            continue
        runs.append(run)
        left_out.extend(run.left_out)
    if progress is not None:
        progress.step("reading runs", len(directories), len(directories))
    return _with_unique_names(runs), tuple(left_out)


def newest_runs(reports_dir: Path) -> list[list[Path]]:
    """The run directories in `reports_dir`: one list per engine (or model behind a URL), newest first.

    Directories whose manifest cannot be read stand alone, so that whoever reads them says why.
    """
    if not reports_dir.is_dir():
        return []
    engines: dict[str, list[tuple[str, Path]]] = {}
    for directory in sorted(reports_dir.iterdir()):
        if directory.name.startswith(".") or not (directory / MANIFEST_FILE).is_file():
            continue
        try:
            manifest, _ = read_manifest(directory)
        except InputError:
            engines[str(directory)] = [("", directory)]
            continue
        key = str((manifest.engine or {}).get("key", f"label {manifest.label}"))
        engines.setdefault(key, []).append((manifest.started, directory))
    return [[path for _, path in sorted(runs, reverse=True)] for runs in engines.values()]


def read_run(directory: Path) -> Run:
    """One run and its readable points; a run without any is an InputError that says what is wrong with them."""
    if not directory.is_dir():
        raise InputError("not a directory" if directory.exists() else "no such directory")
    manifest, digest = read_manifest(directory)
    engine = _engine(manifest)
    points: list[Point] = []
    left_out: list[LeftOut] = []
    for path in _point_directories(directory):
        try:
            point = read_point(path, manifest)
        except InputError as error:
            left_out.append(LeftOut(path=str(path), reason=_one_line(error)))
            continue
        twin = next((other for other in points if _place(other.summary) == _place(point.summary)), None)
        if twin is not None:
            left_out.append(LeftOut(path=str(path), reason=f"same shape, load and repeat as {twin.directory.name}"))
            continue
        points.append(point)
    if not points:
        reason = left_out[0].reason if left_out else _ended_early(directory) or "the sweep stored none"
        raise InputError(f"no readable point of {len(left_out)}: {reason}" if left_out else f"no point: {reason}")
    points.sort(key=lambda point: _position(point.summary, manifest))
    return Run(
        directory=directory,
        name=manifest.label,
        manifest=manifest,
        manifest_sha256=digest,
        engine=engine,
        points=tuple(points),
        left_out=tuple(left_out),
        ended_early=_ended_early(directory),
        settled=frozenset(str(event.get("point")) for event in _journal(directory) if event["event"] == "settled"),
        found=_found(directory),
    )


def _journal(directory: Path) -> list[Mapping[str, Any]]:
    """Its whole lines; one may have been cut off in the middle of an append."""
    events = []
    try:
        lines = (directory / JOURNAL_FILE).read_bytes().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, Mapping) and "event" in event:
            events.append(event)
    return events


def _ended_early(directory: Path) -> str | None:
    """The reason the journal's last whole line gives; None when the sweep finished or keeps no journal."""
    events = _journal(directory)
    if not events or events[-1]["event"] == "finished":
        return None
    return str(_clean(events[-1].get("reason", ""))) or "it was killed, or is still running"


def _found(directory: Path) -> tuple[FoundMax, ...]:
    if not (directory / FIND_MAX_FILE).is_file():
        return ()
    return _read_record(FindMaxRecord, directory / FIND_MAX_FILE, FIND_MAX_SCHEMA)[0].found


def read_manifest(directory: Path) -> tuple[Manifest, str]:
    """The manifest and its sha256."""
    return _read_record(Manifest, directory / MANIFEST_FILE, SWEEP_SCHEMA)


def _engine(manifest: Manifest) -> EngineCard | None:
    """The card in the manifest; also checks the validation record, whose numbers are compared."""
    validation = manifest.validation
    if validation is not None:
        _check_schema(validation, VALIDATION_SCHEMA, f"{MANIFEST_FILE}: validation")
        wrong = [name for name in VALIDATION_NUMBERS if not _is_number(validation.get(name))]
        if wrong:
            raise InputError(f"{MANIFEST_FILE}: validation: not a number: {', '.join(wrong)}")
    if manifest.engine is None:
        return None
    _check_schema(manifest.engine, CARD_SCHEMA, f"{MANIFEST_FILE}: engine")
    card = from_mapping(EngineCard, manifest.engine, f"{MANIFEST_FILE}: engine")
    if card.tp_size < 1 or card.pp_size < 1:
        raise InputError(f"{MANIFEST_FILE}: engine: tp_size {card.tp_size}, pp_size {card.pp_size}")
    return card


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_point(directory: Path, manifest: Manifest) -> Point:
    """One point directory, checked against itself and against the run's manifest."""
    summary, digest = _read_record(PointSummary, directory / POINT_FILE, POINT_SCHEMA)
    table, requests_digest = _read_parquet(directory / REQUESTS_FILE, REQUEST_COLUMNS)
    digests = {POINT_FILE: digest, REQUESTS_FILE: requests_digest}
    for file, columns in ((CHUNKS_FILE, CHUNK_COLUMNS), (SERVER_FILE, SERVER_COLUMNS), (GPU_FILE, GPU_COLUMNS)):
        if (directory / file).exists():
            _, digests[file] = _read_parquet(directory / file, columns)
    origin = pc.min(table["sent_ns"]).as_py() or 0
    point = Point(
        directory=directory,
        summary=summary,
        requests=_request_frame(table, origin),
        origin_ns=origin,
        sha256=digests,
    )
    problems = _contradictions(point, manifest)
    if problems:
        raise InputError("contradicts itself", problems=problems)
    return point


def _point_directories(directory: Path) -> list[Path]:
    points = directory / POINTS_DIR
    if not points.is_dir():
        return []
    return sorted(path for path in points.iterdir() if path.is_dir() and not path.name.startswith("."))


def _place(summary: PointSummary) -> tuple[str, Load, int]:
    return summary.shape, summary.load, summary.repeat


def _position(summary: PointSummary, manifest: Manifest) -> tuple[int, bool, float, int]:
    """Closed loops first."""
    return manifest.shapes.index(summary.shape), summary.rate is not None, summary.load.order, summary.repeat


def _contradictions(point: Point, manifest: Manifest) -> list[str]:
    summary, problems = point.summary, []
    if re.fullmatch(r"\d+/\d+", summary.shape) and summary.shape != f"{summary.isl}/{summary.osl}":
        problems.append(f'shape "{summary.shape}" with isl {summary.isl} and osl {summary.osl}')
    if summary.shape not in manifest.shapes:
        problems.append(f'shape "{summary.shape}" is not in {MANIFEST_FILE} ({", ".join(manifest.shapes)})')
    if summary.token_source not in TOKEN_SOURCES:
        problems.append(f'token source "{summary.token_source}", expected one of {", ".join(TOKEN_SOURCES)}')
    if summary.definitions != manifest.definitions:
        problems.append(f"{POINT_FILE} uses {summary.definitions}, {MANIFEST_FILE} {manifest.definitions}")
    named = re.search(r"-(c\d+|rate[\d.e+-]+)-r(\d+)$", point.directory.name)
    if named and (named[1], int(named[2])) != (summary.load.slug, summary.repeat):
        problems.append(f"{POINT_FILE} says {summary.load}, repeat {summary.repeat}")
    if (summary.concurrency is None) == (summary.rate is None):
        problems.append(
            f"{POINT_FILE}: concurrency {summary.concurrency} and rate {summary.rate}, expected one of them"
        )
    problems.extend(
        f"{POINT_FILE}: {name} is {value}" for name, value in _floats(asdict(summary)) if not math.isfinite(value)
    )
    problems.extend(
        f"{POINT_FILE}: goodput of {tier} without requests_s or attainment"
        for tier, facts in summary.goodput.items()
        if not {"requests_s", "attainment"} <= facts.keys()
    )
    rows = point.requests[point.requests["phase"] == "measured"]
    if len(rows) != summary.requests:
        problems.append(f"{REQUESTS_FILE} holds {len(rows)} measured requests, {POINT_FILE} {summary.requests}")
    errors = int((rows["status"] != "ok").sum())
    if errors != sum(summary.errors.values()):
        problems.append(f"{REQUESTS_FILE} holds {errors} errors, {POINT_FILE} {sum(summary.errors.values())}")
    measured = point.measured
    if bool(((measured["ttft"] < 0) | (measured["e2e"] < measured["ttft"])).any()):
        problems.append(f"{REQUESTS_FILE}: a token arrived before its request was sent")
    for metric in ("ttft", "tpot", "e2e"):
        told, found = getattr(summary, metric).p50, float(measured[metric].median())
        if told is not None and not abs(found - told) <= AGREEMENT * told + 0.001:
            problems.append(f"{metric} p50 is {told:.3f} ms in {POINT_FILE}, {found:.3f} ms over {REQUESTS_FILE}")
    return problems


def _floats(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _floats(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            yield f"{prefix}{key}", value


def _read_record(cls: type[T], path: Path, schema: str) -> tuple[T, str]:
    if not path.is_file():
        raise InputError(f"{path.name} is missing")
    try:
        values = _clean(read_json(path))
    except RecursionError as error:
        raise InputError(f"{path.name}: nested too deeply") from error
    except InputError as error:
        raise InputError(error.message.replace(str(path), path.name)) from error
    _check_schema(values, schema, path.name)
    return from_mapping(cls, values, path.name), hashlib.sha256(path.read_bytes()).hexdigest()


def _check_schema(values: Any, schema: str, where: str) -> None:
    found = values.get("schema") if isinstance(values, Mapping) else None
    if found != schema:
        raise InputError(f"{where}: schema is {json.dumps(found)}, this tkit reads {json.dumps(schema)}")


def _clean(value: Any, key: str = "") -> Any:
    """The same JSON value without secrets and control characters."""
    if isinstance(value, str):
        if SECRET_KEYS.search(key):
            return "(removed)"
        for pattern, replacement in SECRET_TEXTS:
            value = pattern.sub(replacement, value)
        return CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, Mapping):
        return {_clean(name): _clean(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_clean(item, key) for item in value]
    return value


def _read_parquet(path: Path, columns: Mapping[str, str]) -> tuple[pa.Table, str]:
    try:
        data = path.read_bytes()
        table = pq.read_table(io.BytesIO(data))
        missing = [name for name in columns if name not in table.column_names]
        if missing:
            raise InputError(f"{path.name}: no column {', '.join(missing)}")
        types = pa.schema([(name, pa.type_for_alias(alias)) for name, alias in columns.items()])
        return table.select(list(columns)).cast(types), hashlib.sha256(data).hexdigest()
    except FileNotFoundError as error:
        raise InputError(f"{path.name} is missing") from error
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path.name}: not readable as Parquet: {reason_of(error)}") from error


def _numbers(column: pa.ChunkedArray) -> Any:
    """Float64 with NaN for null. Exact below 2**53: nanoseconds are subtracted before they come here."""
    return pc.cast(column, pa.float64(), safe=False).to_numpy()


def _request_frame(table: pa.Table, origin_ns: int) -> pd.DataFrame:
    def seconds(name: str) -> Any:
        return _numbers(pc.subtract(table[name], pa.scalar(origin_ns, pa.int64()))) / NS_PER_S

    def milliseconds(later: str, earlier: str) -> Any:
        return _numbers(pc.subtract(table[later], table[earlier])) / NS_PER_MS

    num_later = _numbers(table["osl"]) - _numbers(pc.fill_null(table["n_first"], 1))
    frame = pd.DataFrame(
        {
            "id": _numbers(table["id"]),
            "phase": table["phase"].to_pylist(),
            "status": table["status"].to_pylist(),
            "error": table["error"].to_pylist(),
            "isl": _numbers(table["isl"]),
            "osl": _numbers(table["osl"]),
            "scheduled_s": seconds("scheduled_ns"),
            "sent_s": seconds("sent_ns"),
            "first_s": seconds("first_token_ns"),
            "end_s": seconds("end_ns"),
            "ttft": milliseconds("first_token_ns", "sent_ns"),
            "ttfb": milliseconds("first_byte_ns", "sent_ns"),
            "e2e": milliseconds("last_token_ns", "sent_ns"),
            "ttft_sched": milliseconds("first_token_ns", "scheduled_ns"),
            "e2e_sched": milliseconds("last_token_ns", "scheduled_ns"),
        }
    )
    decoding = milliseconds("last_token_ns", "first_token_ns")
    frame["tpot"] = pd.Series(decoding).div(num_later).where(num_later > 0)
    return frame.sort_values("sent_s", kind="stable", ignore_index=True)


def _with_unique_names(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Labels, told apart by run and then by directory where two runs share one."""
    labels = Counter(run.manifest.label for run in runs)
    pairs = Counter((run.manifest.label, run.manifest.run) for run in runs)
    named = []
    for run in runs:
        label, name = run.manifest.label, run.manifest.run
        if labels[label] > 1:
            label += f" ({name})" if pairs[label, name] == 1 else f" ({run.directory})"
        named.append(replace(run, name=label))
    return tuple(named)


def _one_line(error: InputError) -> str:
    text = "; ".join((error.message, *error.problems)) if error.problems else error.message
    return text if len(text) <= 400 else text[:399] + "…"
