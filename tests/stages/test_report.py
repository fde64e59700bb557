from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, tzinfo
from pathlib import Path

import pytest
from click.testing import Result

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))

from factory import card, edit, make_run, validation

Tkit = Callable[..., Result]
FILES = {"report.html", "report.md", "report.csv", "report.json"}


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """Two engines, one of them measured twice."""
    reports = tmp_path / "reports"
    small = {"concurrency": (1, 4), "requests": 30}
    make_run(reports, "none-old", engine=card("none"), started="2025-01-01T00:00:00Z", **small)
    make_run(reports, "none-new", engine=card("none"), started="2025-01-03T00:00:00Z", quality=validation(), **small)
    make_run(reports, "fp8", engine=card("fp8"), started="2025-01-02T00:00:00Z", speed=0.8, seed=1, **small)
    return reports


def test_without_a_run_the_newest_of_each_engine_is_reported(tkit: Tkit, reports: Path) -> None:
    result = tkit("report")
    assert result.exit_code == 0, result.stderr
    path = Path(result.stdout.splitlines()[-1])
    assert re.fullmatch(r"reports/report-\d{8}T\d{6}Z/report\.html", str(path))
    assert {file.name for file in path.parent.iterdir()} == FILES
    assert "reports/fp8: demo-fp8-tp1-3f9c2a, 2025-01-02" in result.stderr
    assert "reports/none-new: demo-none-tp1-3f9c2a, 2025-01-03" in result.stderr
    assert "none-old" not in result.stderr
    assert "demo-fp8-tp1-3f9c2a against demo-none-tp1-3f9c2a, 128/64 at C = 4: output tok/s +2" in result.stderr
    record = json.loads((path.parent / "report.json").read_text())
    assert [run["run"] for run in record["runs"]] == ["none-new", "fp8"]  # the unquantized engine is the baseline
    assert [run["run"] for run in json.loads(tkit("report", "--json").stdout)["runs"]] == ["none-new", "fp8"]


def test_two_reports_of_one_second_do_not_share_a_directory(
    tkit: Tkit, reports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noon(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Noon:
            return cls(2025, 6, 1, 12, tzinfo=tz)

    monkeypatch.setattr("tkit.stages.report.datetime", Noon)
    written = [tkit("report", "fp8", "--quiet").stdout for _ in range(2)]
    assert written == [
        "reports/report-20250601T120000Z/report.html\n",
        "reports/report-20250601T120000Z-2/report.html\n",
    ]


def test_an_unreadable_newest_run_gives_way_to_the_one_before(tkit: Tkit, reports: Path) -> None:
    shutil.rmtree(reports / "none-new" / "points")
    (reports / "torn").mkdir()
    (reports / "torn" / "manifest.json").write_text('{"schema": "tkit.sw')
    result = tkit("report", "--out", "out")
    assert result.exit_code == 0, result.stderr
    record = json.loads(Path("out/report.json").read_text())
    assert [run["run"] for run in record["runs"]] == ["none-old", "fp8"]
    assert "left out: reports/none-new: no point: the sweep stored none" in result.stderr
    assert "left out: reports/torn: manifest.json: not readable as JSON" in result.stderr
    assert [left["path"] for left in record["left_out"]] == ["reports/none-new", "reports/torn"]


def test_runs_are_reported_in_the_order_given(tkit: Tkit, reports: Path) -> None:
    result = tkit("report", reports / "fp8", "none-old", "--out", "out", "--quiet")
    assert (result.exit_code, result.stdout) == (0, "out/report.html\n")
    assert result.stderr == ""
    rows = list(csv.DictReader(Path("out/report.csv").read_text().splitlines()))
    assert [(row["id"], row["run"], row["baseline"]) for row in rows][:2] == [("A", "fp8", "A"), ("B", "none-old", "A")]
    assert float(rows[1]["output_tok_s_change"]) < 0


@pytest.mark.parametrize("baseline", ["none-old", "none", "reports/none-old"])
def test_the_baseline_is_the_one_named(tkit: Tkit, reports: Path, baseline: str) -> None:
    result = tkit("report", "reports/fp8", "reports/none-old", "--baseline", baseline, "--json", "--out", "out")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record == json.loads(Path("out/report.json").read_text())
    assert record["schema"] == "tkit.report/1"
    assert (record["baseline"], record["verdict"][0]["run"], record["verdict"][0]["tone"]) == ("B", "A", "better")


def test_a_baseline_directory_need_not_be_named_twice(tkit: Tkit, reports: Path) -> None:
    result = tkit("report", "reports/fp8", "--baseline", "reports/none-old", "--json")
    record = json.loads(result.stdout)
    assert [run["run"] for run in record["runs"]] == ["none-old", "fp8"]
    assert record["baseline"] == "A"


def test_one_run_is_reported_alone(tkit: Tkit, reports: Path) -> None:
    result = tkit("report", "reports/fp8", "--out", "out")
    assert result.exit_code == 0
    assert "demo-fp8-tp1-3f9c2a, 128/64: highest output rate " in result.stderr
    assert "Report of one run" in Path("out/report.html").read_text()


def test_pareto_png(tkit: Tkit, reports: Path) -> None:
    assert tkit("report", "reports/fp8", "--out", "out", "--png").exit_code == 0
    assert Path("out/pareto.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def test_nothing_to_report(tkit: Tkit) -> None:
    result = tkit("report")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: reports: no sweep to report\nhint: measure a server first: tkit sweep\n"


def test_no_run_can_be_read(tkit: Tkit, reports: Path) -> None:
    edit(reports / "fp8" / "manifest.json", schema="other/1")
    Path("empty").mkdir()
    result = tkit("report", "reports/fp8", "empty", "absent", "--out", "out")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-5:] == [
        "error: none of the runs can be reported",
        '  - reports/fp8: manifest.json: schema is "other/1", this tkit reads "tkit.sweep/1"',
        "  - empty: manifest.json is missing",
        "  - absent: no such directory",
        "hint: measure again: tkit sweep",
    ]
    assert not Path("out").exists()


def test_what_cannot_be_read_is_named_and_the_rest_reported(tkit: Tkit, reports: Path) -> None:
    (reports / "fp8" / "points" / "128x64-c4-r1" / "requests.parquet").write_bytes(b"PAR1")
    result = tkit("report", "reports/fp8", "reports/none-old", "absent", "--out", "out")
    assert result.exit_code == 0
    assert "left out: absent: no such directory" in result.stderr
    assert "left out: reports/fp8/points/128x64-c4-r1: requests.parquet: not readable as Parquet" in result.stderr
    html = Path("out/report.html").read_text()
    assert "no such directory" in html and "requests.parquet: not readable as Parquet" in html


def test_a_baseline_that_is_not_among_the_runs(tkit: Tkit, reports: Path) -> None:
    result = tkit("report", "reports/fp8", "reports/none-old", "--baseline", "non", "--out", "out")
    assert result.exit_code == 2
    assert 'error: --baseline: none of the runs is "non" (did you mean "none"?)\nhint: known: ' in result.stderr
    result = tkit("report", "reports/none-new", "reports/none-old", "--baseline", "none", "--out", "out")
    assert result.exit_code == 2
    assert 'error: --baseline "none" is 2 of the runs\n  - none-new: ' in result.stderr
    assert not Path("out").exists()


def test_a_report_can_be_written_again(tkit: Tkit, reports: Path) -> None:
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    assert tkit("report", "reports/none-old", "--out", "out").exit_code == 0
    first = Path("out/report.html").read_text()
    assert tkit("report", "reports/fp8", "--out", "out").exit_code == 0
    assert Path("out/report.html").read_text() != first
    assert {path.name for path in Path("out").iterdir()} == FILES | {"notes.txt"}
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]


def test_out_that_cannot_be_written(tkit: Tkit, reports: Path) -> None:
    Path("file").write_text("in the way")
    for out in ("file", "file/below"):
        result = tkit("report", "reports/fp8", "--out", out)
        assert result.exit_code == 2
        assert f"error: {out}: cannot write the report: " in result.stderr
        assert "hint: choose another --out" in result.stderr
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]


def test_a_report_appears_whole_or_not_at_all(tkit: Tkit, reports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    result = tkit("report", "reports/fp8", "--out", "out")
    assert result.exit_code == 2
    assert "error: out: cannot write the report: No space left on device" in result.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["reports"]


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, tkit.cli.report; print(sorted({'torch', 'pandas', 'pyarrow', 'numpy', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_report_needs_no_torch(reports: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from tkit.cli.main import cli\n"
        "cli(['report', 'reports/fp8', '--quiet', '--out', 'out'], standalone_mode=False)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=reports.parent, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "out/report.html\n"), result.stderr
