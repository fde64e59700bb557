from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import factory
import numpy as np
import pyarrow.parquet as pq
import pytest
from factory import card, edit, make_run, validation

from tkit.report.read import newest_runs, read_run, read_runs
from tkit.specs.record import REQUEST_COLUMNS

POINT = Path("points") / "128x64-c4-r1"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path, "run", concurrency=(1, 4), requests=20, engine=card(), quality=validation())


def test_rows_become_milliseconds(run: Path) -> None:
    point = read_run(run).points[1]
    rows = pq.read_table(run / POINT / "requests.parquet").to_pylist()
    assert len(point.requests) == len(rows) == 24
    assert len(point.measured) == 20
    first = rows[int(point.requests["id"][5])]
    told = point.requests.iloc[5]
    assert told["ttft"] == pytest.approx((first["first_token_ns"] - first["sent_ns"]) / 1e6)
    assert told["e2e"] == pytest.approx((first["last_token_ns"] - first["sent_ns"]) / 1e6)
    assert told["tpot"] == pytest.approx((first["last_token_ns"] - first["first_token_ns"]) / 1e6 / 63)
    assert told["sent_s"] == pytest.approx((first["sent_ns"] - min(row["sent_ns"] for row in rows)) / 1e9)
    assert point.requests["sent_s"].is_monotonic_increasing
    assert len(point.chunk_gaps()) == 20 * 63
    assert point.chunk_gaps()["gap"].median() == pytest.approx(point.summary.chunk_gap.p50)


def test_a_request_that_failed_does_not_count(tmp_path: Path) -> None:
    point = read_run(make_run(tmp_path, "run", concurrency=(4,), error_rate=0.3)).points[0]
    failed = point.requests[point.requests["status"] == "error"]
    assert len(failed) == sum(point.summary.errors.values()) > 0
    assert failed["ttft"].notna().all()  # cut off after the first token
    assert not set(failed["id"]) & set(point.measured["id"])
    assert len(point.measured) == point.summary.ttft.n == 40 - len(failed)


def test_a_request_that_was_never_answered_has_no_times(run: Path) -> None:
    path = run / POINT / "requests.parquet"
    rows = pq.read_table(path).to_pydict()
    last = rows["phase"].index("measured")
    for name in ("first_byte_ns", "first_token_ns", "last_token_ns", "n_first"):
        rows[name][last] = None
    rows["status"][last], rows["error"][last], rows["osl"][last] = "error", "timeout", 0
    factory.write_parquet(path, rows, REQUEST_COLUMNS)
    ok = [row for row in pq.read_table(path).to_pylist() if row["phase"] == "measured" and row["status"] == "ok"]
    ttft = [(row["first_token_ns"] - row["sent_ns"]) / 1e6 for row in ok]
    e2e = [(row["last_token_ns"] - row["sent_ns"]) / 1e6 for row in ok]
    tpot = [(row["last_token_ns"] - row["first_token_ns"]) / 1e6 / 63 for row in ok]
    told = {"ttft": ttft, "e2e": e2e, "tpot": tpot}
    edit(run / POINT / "point.json", errors={"timeout": 1}, **{k: factory.distribution(v) for k, v in told.items()})
    point = read_run(run).points[1]
    failed = point.requests[point.requests["status"] == "error"]
    assert failed[["ttft", "ttfb", "tpot", "e2e"]].isna().all(axis=None)
    assert failed["sent_s"].notna().all()


def test_a_request_answered_in_one_chunk_has_no_tpot(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", shapes=("16/2",), concurrency=(1,), requests=12)
    point = run / "points" / "16x2-c1-r1"
    rows = pq.read_table(point / "requests.parquet").to_pydict()
    factory.write_parquet(point / "requests.parquet", rows | {"n_first": [2] * len(rows["id"])}, REQUEST_COLUMNS)
    edit(point / "point.json", tpot=factory.distribution([]))
    assert read_run(run).points[0].measured["tpot"].isna().all()


# ---- what is torn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["manifest.json", str(POINT / "point.json"), str(POINT / "requests.parquet")])
def test_a_file_cut_anywhere_is_named_and_never_believed(run: Path, name: str) -> None:
    path = run / name
    whole = path.read_bytes()
    for length in [*range(0, len(whole) - 1, len(whole) // 30), len(whole) - 2]:
        path.write_bytes(whole[:length])
        runs, left_out = read_runs([run])
        assert len(left_out) == 1, length
        assert path.name in left_out[0].reason
        if path.name == "manifest.json":
            assert not runs
        else:
            assert [point.directory.name for point in runs[0].points] == ["128x64-c1-r1"]
            assert left_out[0].path == str(path.parent)


def test_a_file_without_its_last_newline_is_whole(run: Path) -> None:
    path = run / "manifest.json"
    path.write_text(path.read_text().rstrip("\n"))
    assert not read_runs([run])[1]


@pytest.mark.parametrize(
    ("breaking", "reason"),
    [
        (lambda run: (run / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda run: (run / "manifest.json").write_text("[1]"), "manifest.json: schema is null"),
        (lambda run: (run / "manifest.json").write_bytes(b"\xff\xfe"), "not readable as JSON"),
        (lambda run: (run / "manifest.json").write_text("[" * 100_000), "nested too deeply"),
        (lambda run: edit(run / "manifest.json", schema="tkit.sweep/2"), 'schema is "tkit.sweep/2", this tkit reads'),
        (lambda run: edit(run / "manifest.json", profil="x"), 'unknown key "profil" (did you mean "profile"?)'),
        (lambda run: edit(run / "manifest.json", repeats="3"), "repeats: expected int, found '3'"),
        (lambda run: edit(run / "manifest.json", engine={"schema": "other/1"}), 'engine: schema is "other/1"'),
        (lambda run: edit(run / "manifest.json", engine=card(tp_size=1) | {"pp_size": 0}), "tp_size 1, pp_size 0"),
        (lambda run: edit(run / "manifest.json", engine=card() | {"files": {"a": {}}}), "engine: files: a: expected its bytes"),
        (lambda run: edit(run / "manifest.json", validation=validation() | {"kl": "small"}), "not a number: kl"),
        (lambda run: shutil.rmtree(run / "points"), "no point: the sweep stored none"),
        (lambda run: shutil.rmtree(run), "no such directory"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_read_is_left_out(run: Path, breaking: Callable[[Path], object], reason: str) -> None:
    breaking(run)
    runs, left_out = read_runs([run])
    assert not runs
    assert left_out[0].path == str(run)
    assert reason in left_out[0].reason


@pytest.mark.parametrize(
    ("breaking", "reason"),
    [
        (lambda point: (point / "point.json").unlink(), "point.json is missing"),
        (lambda point: (point / "requests.parquet").unlink(), "requests.parquet is missing"),
        (lambda point: (point / "chunks.parquet").write_bytes(b"PAR1"), "chunks.parquet: not readable as Parquet"),
        (lambda point: edit(point / "point.json", schema="tkit.point/9"), 'schema is "tkit.point/9"'),
        (lambda point: edit(point / "point.json", concurrency=16), "says C = 16, repeat 1"),
        (lambda point: edit(point / "point.json", shape="1/2", isl=1, osl=2), 'shape "1/2" is not in manifest.json'),
        (lambda point: edit(point / "point.json", isl=64), 'shape "128/64" with isl 64 and osl 64'),
        (lambda point: edit(point / "point.json", requests=19), "holds 20 measured requests, point.json 19"),
        (lambda point: edit(point / "point.json", errors={"timeout": 2}), "holds 0 errors, point.json 2"),
        (lambda point: edit(point / "point.json", definitions="x/2"), "point.json uses x/2, manifest.json"),
        (lambda point: edit(point / "point.json", token_source="guess"), 'token source "guess"'),
        (lambda point: edit(point / "point.json", output_tok_s=float("nan")), "output_tok_s is nan"),
        (lambda point: edit(point / "point.json", goodput={"batch": {"low": 1.0}}), "goodput of batch without requests_s"),
        (lambda point: edit(point / "point.json", ttft=factory.distribution([1, 2])), "ttft p50 is 1.500 ms in point"),
        (lambda point: _columns(point, sent_ns=None), "no column sent_ns"),
        (lambda point: _columns(point, phase=[1] * 24), "holds 0 measured requests"),
        (lambda point: _columns(point, osl=["many"] * 24), "not readable as Parquet"),
        (lambda point: _columns(point, first_token_ns=[0] * 24), "before its request was sent"),
    ],
)  # fmt: skip
def test_a_point_that_cannot_be_believed_is_left_out(
    run: Path, breaking: Callable[[Path], object], reason: str
) -> None:
    breaking(run / POINT)
    runs, left_out = read_runs([run])
    assert [point.directory.name for point in runs[0].points] == ["128x64-c1-r1"]
    assert left_out[0].path == str(run / POINT)
    assert reason in left_out[0].reason


def _columns(point: Path, **changes: list[object] | None) -> None:
    import pyarrow as pa

    path = point / "requests.parquet"
    columns = pq.read_table(path).to_pydict() | changes
    pq.write_table(pa.table({name: values for name, values in columns.items() if values is not None}), path)


def test_every_reason_is_named_at_once(run: Path) -> None:
    edit(run / POINT / "point.json", requests=1, concurrency=9, errors={"timeout": 2})
    reason = read_runs([run])[1][0].reason
    assert all(part in reason for part in ("C = 9", "point.json 1", "point.json 2"))


def test_a_point_in_the_making_is_not_looked_at(run: Path) -> None:
    (run / "points" / ".128x64-c8-r1.123.tmp").mkdir()
    assert read_runs([run])[1] == ()


def test_a_second_copy_of_a_point_is_left_out(run: Path) -> None:
    shutil.copytree(run / POINT, run / "points" / "copy")
    runs, left_out = read_runs([run])
    assert len(runs[0].points) == 2
    assert left_out[0].reason == "same shape, load and repeat as 128x64-c4-r1"


# ---- names --------------------------------------------------------------------------------------------------------


def test_a_run_given_twice_counts_once(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    runs, left_out = read_runs([run, copy])
    assert len(runs) == 1
    assert left_out[0].reason == f"the same run as {run}"


def test_runs_of_one_label_get_names_of_their_own(tmp_path: Path) -> None:
    first = make_run(tmp_path, "one", label="engine", concurrency=(1,), requests=12)
    second = make_run(tmp_path, "two", label="engine", concurrency=(1,), requests=12)
    third = make_run(tmp_path / "elsewhere", "two", label="engine", concurrency=(1,), requests=12, seed=5)
    edit(third / "manifest.json", seed=1)
    runs, _ = read_runs([first, second, third])
    assert [run.name for run in runs] == ["engine (one)", f"engine ({second})", f"engine ({third})"]


def test_secrets_and_control_characters_do_not_get_in(run: Path) -> None:
    canary = "hf_" + "A1b2" * 8
    edit(
        run / "manifest.json",
        label="name\x1b[2J\x00",
        command=f"tkit sweep --api-key {canary} --header 'Authorization: Bearer {canary}' --model {canary}",
        url=f"http://user:{canary}@host:80/v1",
        identity={"hf_token": canary, "nested": [{"password": canary}], "eos_token": "</s>", "tokens": 5},
    )
    manifest = read_run(run).manifest
    assert canary not in json.dumps(manifest.__dict__)
    assert manifest.label == "name�[2J�"
    assert manifest.url == "http://host:80/v1"
    assert manifest.identity["eos_token"] == "</s>"


# ---- the journal, the newest --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"event": "started"}', '{"event": "finished"}'], None),
        (['{"event": "started"}', '{"event": "failed", "reason": "ServerError: gone"}'], "ServerError: gone"),
        (
            ['{"event": "started"}', '{"event": "point", "point": "x"}', '{"event": "fin'],
            "it was killed, or is still running",
        ),
        (["", "garbage", "[]"], None),
    ],
)
def test_why_a_sweep_ended_early(run: Path, lines: list[str], expected: str | None) -> None:
    (run / "state.jsonl").write_text("\n".join(lines))
    assert read_run(run).ended_early == expected


def test_the_newest_run_of_each_engine_comes_first(tmp_path: Path) -> None:
    for name, engine, started in (
        ("a-old", card("none"), "2025-01-01T00:00:00Z"),
        ("z-new", card("none"), "2025-01-02T00:00:00Z"),
        ("fp8", card("fp8"), "2025-01-01T00:00:00Z"),
        ("url", None, "2025-01-01T00:00:00Z"),
    ):
        make_run(tmp_path, name, engine=engine, started=started, concurrency=(1,), requests=12)
    factory.write(tmp_path / "report-x" / "report.json", {})
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "manifest.json").write_text("{")
    names = [[path.name for path in group] for group in newest_runs(tmp_path)]
    assert names == [["z-new", "a-old"], ["fp8"], ["torn"], ["url"]]
    assert newest_runs(tmp_path / "absent") == []


def test_nanoseconds_far_from_zero_keep_their_microseconds(tmp_path: Path) -> None:
    """A monotonic clock that has run for 300 days is beyond what a float64 counts exactly."""
    run = make_run(tmp_path, "run", concurrency=(1,), requests=12)
    path = run / "points" / "128x64-c1-r1" / "requests.parquet"
    before = read_run(run).points[0].measured["ttft"].to_numpy()
    table = pq.read_table(path).to_pydict()
    shift = 300 * 86_400 * 10**9
    moved = {k: [v + shift for v in values] if k.endswith("_ns") else values for k, values in table.items()}
    factory.write_parquet(path, moved, REQUEST_COLUMNS)
    assert np.array_equal(read_run(run).points[0].measured["ttft"].to_numpy(), before)
