"""The files of one run, laid out as `specs.record` says. A point appears whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence, Sized
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tkit import __version__
from tkit.errors import InputError
from tkit.files import check_writable, from_mapping, read_json, sync_directory, write_atomic, write_json
from tkit.loadgen.exchange import RequestRecord
from tkit.loadgen.metrics import chunk_gaps
from tkit.loadgen.parquet import ParquetWriter
from tkit.loadgen.point import Place
from tkit.loadgen.telemetry import Samples
from tkit.specs.progress import Progress
from tkit.specs.record import (
    CHUNK_COLUMNS,
    FIND_MAX_FILE,
    GPU_COLUMNS,
    REQUEST_COLUMNS,
    SERVER_COLUMNS,
    FindMaxRecord,
    FoundMax,
    Manifest,
    PointSummary,
)

PERCENTILES = ("p50", "p90", "p95", "p99")
RATES = (
    "window_s", "output_tok_s", "output_tok_s_whole", "input_tok_s", "requests_s", "offered_requests_s", "tok_s_user",
    "tok_s_gpu",
)  # fmt: skip
MANIFEST_FILE, POINT_FILE, JOURNAL_FILE = "manifest.json", "point.json", "state.jsonl"
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class RunDirectory:
    """Every write is atomic or an appended line, so a run that was cut off is readable up to there."""

    def __init__(self, path: Path):
        self.path = path
        self._parquet = ParquetWriter()

    @classmethod
    def create(cls, out: Path, name: str, *, is_fixed: bool) -> RunDirectory:
        """A new, empty one. A name that is taken is refused when it is fixed, else numbered."""
        check_writable(out, "choose another --out")
        for number in itertools.count(2):
            path = out / name
            try:
                path.mkdir(parents=True)
                (path / "points").mkdir()
                run = cls(path)
                run._lock()
                return run
            except FileExistsError as error:
                if is_fixed or not path.is_dir():
                    raise InputError(f"{path} exists", hint="give another --name, or remove it") from error
            except OSError as error:
                raise InputError(f"{path}: cannot be made: {error.strerror}") from error
            name = f"{name.removesuffix(f'-{number - 1}')}-{number}"
        raise AssertionError("unreachable")

    @classmethod
    def unfinished(cls, out: Path, name: str | None) -> RunDirectory:
        """The run of that name, or the newest in `out`, that was cut off or has a hole. What a killed process left half
        written in it is removed."""
        if name is not None:
            run = cls(out / name)
            if not (run.path / MANIFEST_FILE).is_file():
                raise InputError(f"{run.path}: no run to resume")
        else:
            found = [cls(path.parent) for path in out.glob(f"*/{MANIFEST_FILE}")]
            cut_off = [run for run in found if run.is_unfinished()]
            if not cut_off:
                raise InputError(f"{out}: no run in it was cut off", hint="name the one that is meant: --name RUN")
            run = max(cut_off, key=lambda run: (run.path / MANIFEST_FILE).stat().st_mtime_ns)
        run._lock()
        for left in (run.path / "points").glob(".*.tmp"):
            shutil.rmtree(left)
        return run

    def _lock(self) -> None:
        """Held until it is closed or this process ends: two that measure into one directory would mix their points."""
        self._journal_file = os.open(self.path / JOURNAL_FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._journal_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{self.path} is being measured by another process") from error

    def close(self) -> None:
        """Lets another process resume it."""
        os.close(self._journal_file)
        self._parquet.close()

    def remove(self) -> None:
        """Of a run that could not begin."""
        self.close()
        shutil.rmtree(self.path)

    def _events(self) -> list[dict[str, Any]]:
        """The journal's whole lines; the last may have been cut off."""
        events = []
        try:
            lines = (self.path / JOURNAL_FILE).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        for line in lines:
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
        return events

    def is_unfinished(self) -> bool:
        """Cut off, or with points that have no result."""
        events = self._events()
        return not events or events[-1]["event"] != "finished" or bool(self._holes())

    def _holes(self) -> set[str]:
        last = {event["point"]: event["event"] for event in self._events() if "point" in event}
        return {slug for slug, event in last.items() if event == "hole"}

    def read_manifest(self) -> Manifest:
        path = self.path / MANIFEST_FILE
        return from_mapping(Manifest, read_json(path), str(path))

    def kept_points(self) -> dict[str, PointSummary]:
        """By directory name. Holes are measured again, invalid points are not: to measure until a point turns out valid
        would be to choose among the results."""
        found = {}
        for path in sorted((self.path / "points").glob(f"*/{POINT_FILE}")):
            if not path.parent.name.startswith(".") and path.parent.name not in self._holes():
                found[path.parent.name] = from_mapping(PointSummary, read_json(path), str(path))
        return found

    def write_found(self, found: tuple[FoundMax, ...]) -> None:
        write_json(self.path / FIND_MAX_FILE, FindMaxRecord(found=found))

    def write_manifest(self, manifest: Manifest) -> None:
        write_json(self.path / MANIFEST_FILE, manifest)

    def journal(self, event: str, **facts: Any) -> None:
        """Appends one line to state.jsonl."""
        line = json.dumps({"time": utc_now(), "event": event, **facts}, ensure_ascii=False)
        size = os.fstat(self._journal_file).st_size
        if size and os.pread(self._journal_file, 1, size - 1) != b"\n":
            line = f"\n{line}"  # the last one was cut off
        os.write(self._journal_file, f"{line}\n".encode())
        os.fsync(self._journal_file)

    @contextlib.contextmanager
    def sweeping(self, points: Sized, progress: Progress, *, is_resumed: bool) -> Iterator[None]:
        """Journals how a sweep begins and ends. One that ends early says how many `points` are there to go on from."""
        self.journal("resumed" if is_resumed else "started", tkit=__version__)
        try:
            yield
            self.journal("finished")
        except BaseException as error:
            is_told_to_end = isinstance(error, KeyboardInterrupt | SystemExit)
            reason = "interrupted" if is_told_to_end else f"{type(error).__name__}: {error}".rstrip(": ")
            self.journal("failed", reason=reason)
            progress.note(f"{self.path}: points kept: {len(points)}; --resume goes on, and so does tkit run")
            raise

    def write_point(
        self, place: Place, summary: PointSummary, records: Sequence[RequestRecord], samples: Samples | None = None
    ) -> None:
        points = self.path / "points"
        temporary = points / f".{place.slug}.{os.getpid()}.tmp"
        temporary.mkdir()
        try:
            self._parquet.write(temporary / "requests.parquet", _request_columns(records), REQUEST_COLUMNS)
            measured = [record for record in records if record.phase == "measured" and record.is_ok]
            self._parquet.write(temporary / "chunks.parquet", chunk_gaps(measured), CHUNK_COLUMNS)
            if samples is not None and samples.server["when_ns"]:
                self._parquet.write(temporary / "server.parquet", samples.server, SERVER_COLUMNS)
            if samples is not None and samples.gpu["when_ns"]:
                self._parquet.write(temporary / "gpu.parquet", samples.gpu, GPU_COLUMNS)
            write_json(temporary / POINT_FILE, summary)
            if self.has_point(place):  # a hole
                shutil.rmtree(points / place.slug)
            temporary.rename(points / place.slug)
            sync_directory(points)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def has_point(self, place: Place) -> bool:
        return (self.path / "points" / place.slug).is_dir()

    def write_summary(self, manifest: Manifest, points: Sequence[PointSummary]) -> None:
        rows = [summary_row(manifest, point) for point in points]
        write_json(self.path / "summary.json", rows)
        write_atomic(self.path / "summary.csv", _csv(rows))


def summary_row(manifest: Manifest, point: PointSummary) -> dict[str, Any]:
    """One flat row: what was measured, at which load, and the numbers."""
    card = manifest.engine or {}
    row: dict[str, Any] = {
        "run": manifest.run,
        "label": manifest.label,
        "profile": manifest.profile,
        "protocol": manifest.protocol,
        "model": manifest.model,
        "hw": manifest.identity.get("hardware"),
        "backend": card.get("backend"),
        "precision": card.get("quant"),
        "tp": card.get("tp_size"),
        "pp": card.get("pp_size"),
        "gpus": manifest.identity.get("num_gpus"),
        "isl": point.isl,
        "osl": point.osl,
        "conc": point.concurrency,
        "arrivals": point.arrivals,
        "rate": point.rate,
        "repeat": point.repeat,
        "requests": point.requests,
        "errors": sum(point.errors.values()),
        "is_valid": point.is_valid,
        "token_source": point.token_source,
    }
    for name in RATES:
        row[name] = getattr(point, name)
    for metric in ("ttft", "ttfb", "tpot", "chunk_gap", "e2e", "ttft_sched", "e2e_sched"):
        for percentile in ("mean", *PERCENTILES):
            row[f"{metric}_{percentile}_ms"] = getattr(getattr(point, metric), percentile, None)
    for tier, numbers in point.goodput.items():
        row[f"goodput_{tier}_requests_s"] = numbers["requests_s"]
        row[f"goodput_{tier}_attainment"] = numbers["attainment"]
    row["invalid_reasons"] = "; ".join(point.invalid_reasons)
    return row


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    if rows:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return file.getvalue()


def _cell(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula is kept a text."""
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    return value


def _request_columns(records: Sequence[RequestRecord]) -> dict[str, list[Any]]:
    return {name: [getattr(record, name) for record in records] for name in REQUEST_COLUMNS}
