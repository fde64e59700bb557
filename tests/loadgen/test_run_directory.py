"""The files of a run."""

from __future__ import annotations

import csv
import json
import types
from array import array
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tkit.errors import InputError
from tkit.files import from_mapping, read_json
from tkit.loadgen.exchange import RequestRecord
from tkit.loadgen.load_trace import LoadTrace
from tkit.loadgen.point import Place, summarise
from tkit.loadgen.profiles import HealthLimits, Shape
from tkit.loadgen.run_directory import RunDirectory
from tkit.specs.record import CHUNK_COLUMNS, REQUEST_COLUMNS, Manifest, PointSummary

PLACE = Place(shape=Shape(isl=8, osl=3), concurrency=1, repeat=2)
MANIFEST = Manifest(
    run="r", label="=cmd()", profile="quick/1", profile_digest="0", seed=0, protocol="triton-grpc", url="h:1",
    model="ensemble", shapes=("8/3",), concurrency=(1,), repeats=2, command="tkit sweep", started="2026-01-01T00:00:00Z",
)  # fmt: skip


def measured() -> tuple[PointSummary, list[RequestRecord]]:
    times = array("q", [60, 70, 90])
    whole = dict(id=4, scheduled_ns=10, sent_ns=20, first_byte_ns=55, first_token_ns=60, last_token_ns=90, end_ns=95,
                 isl_asked=8, isl=8, osl_asked=3, osl=3, n_first=1, chunks=3, status="ok", error=None, detail="",
                 token_ns=times, token_counts=array("q", [1, 1, 1]))  # fmt: skip
    lost = dict(id=5, scheduled_ns=95, sent_ns=96, first_byte_ns=None, first_token_ns=None, last_token_ns=None, end_ns=99,
                isl_asked=8, isl=8, osl_asked=3, osl=0, n_first=None, chunks=0, status="error", error="refused",
                detail="nobody", token_ns=array("q"), token_counts=array("q"))  # fmt: skip
    cut = dict(whole, id=6, osl=2, chunks=2, status="error", error="timeout", detail="no message", token_ns=times[:2],
               token_counts=array("q", [1, 1]))  # fmt: skip
    records = [RequestRecord(**fields) for fields in (whole, lost, cut)]  # type: ignore[arg-type]
    trace = LoadTrace(sent=(), start_ns=0, steady_start_ns=15, steady_end_ns=100, end_ns=110, cpu_shares=(0.1,), lags_ms=[0.1],
                      rss_bytes=1, gave_up=False)  # fmt: skip
    summary = summarise(PLACE, records, trace, limits=HealthLimits(), token_source="server_usage", num_gpus=None,
                        started="2026-01-01T00:00:00Z")  # fmt: skip
    return summary, records


def test_a_point_on_disk_is_the_point(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "reports", "r", is_fixed=True)
    summary, records = measured()
    run.write_point(PLACE, summary, records)
    directory = tmp_path / "reports/r/points/8x3-c1-r2"
    assert sorted(path.name for path in directory.iterdir()) == ["chunks.parquet", "point.json", "requests.parquet"]
    assert [path.name for path in directory.parent.iterdir()] == ["8x3-c1-r2"]
    assert from_mapping(PointSummary, read_json(directory / "point.json"), "point.json") == summary
    table = pq.read_table(directory / "requests.parquet")
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == REQUEST_COLUMNS
    whole, lost, _ = table.to_pylist()
    assert whole == {name: getattr(records[0], name) for name in REQUEST_COLUMNS}
    assert (lost["first_token_ns"], lost["n_first"], lost["status"], lost["error"]) == (None, None, "error", "refused")
    chunks = pq.read_table(directory / "chunks.parquet")
    assert {name: str(chunks.schema.field(name).type) for name in chunks.column_names} == CHUNK_COLUMNS
    assert chunks.to_pydict() == {"request": [4, 4], "gap_ns": [10, 20]}, "of whole answers only"


def test_a_point_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "r", is_fixed=True)
    summary, _ = measured()
    with pytest.raises(AttributeError):
        run.write_point(PLACE, summary, [types.SimpleNamespace()])  # type: ignore[list-item]
    assert list((tmp_path / "r/points").iterdir()) == []


def test_summaries_are_flat_and_harmless(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "r", is_fixed=True)
    summary, _ = measured()
    run.write_summary(MANIFEST, [summary])
    (row,) = read_json(tmp_path / "r/summary.json")
    assert [row[name] for name in ("label", "isl", "osl", "conc", "repeat", "errors")] == ["=cmd()", 8, 3, 1, 2, 2]
    assert row["ttft_p50_ms"] == summary.ttft.p50
    with open(tmp_path / "r/summary.csv", newline="") as file:
        (cells,) = csv.DictReader(file)
    assert list(cells) == list(row)
    assert cells["label"] == "'=cmd()", "a spreadsheet would run the formula"
    assert cells["ttft_p50_ms"] == str(row["ttft_p50_ms"])


def test_no_points_no_rows(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "r", is_fixed=True)
    run.write_summary(MANIFEST, [])
    assert read_json(tmp_path / "r/summary.json") == []


def test_the_journal_grows_by_lines(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "r", is_fixed=True)
    run.journal("started")
    run.journal("point", point="8x3-c1-r2", is_valid=True)
    lines = [json.loads(line) for line in (tmp_path / "r/state.jsonl").read_text().splitlines()]
    assert [(line["event"], line.get("point")) for line in lines] == [("started", None), ("point", "8x3-c1-r2")]


def test_names_that_are_taken(tmp_path: Path) -> None:
    assert RunDirectory.create(tmp_path, "r", is_fixed=False).path.name == "r"
    assert RunDirectory.create(tmp_path, "r", is_fixed=False).path.name == "r-2"
    assert RunDirectory.create(tmp_path, "r", is_fixed=False).path.name == "r-3"
    with pytest.raises(InputError, match="r exists"):
        RunDirectory.create(tmp_path, "r", is_fixed=True)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file exists"):
        RunDirectory.create(tmp_path, "file", is_fixed=False)
    with pytest.raises(InputError, match="file: a file, expected a directory"):
        RunDirectory.create(tmp_path / "file", "r", is_fixed=False)
