from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime, tzinfo
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import Result
from factory import card, edit, make_run, validation

from tkit.specs.recipe import EngineRecipe

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


# ---- gates -------------------------------------------------------------------------------------------------------


def test_a_gate_that_passes_exits_0(tkit: Tkit, reports: Path) -> None:
    result = tkit(
        "report", "none-new", "fp8", "--fail-on", "output_tok_s<-5%,weight_bytes>0%", "--out", "out", "--quiet"
    )
    assert (result.exit_code, result.stdout, result.stderr) == (0, "out/report.html\n", "")
    gates = json.loads(Path("out/report.json").read_text())["gates"]
    assert [(outcome["state"], len(outcome["checks"])) for outcome in gates] == [("passed", 2), ("passed", 1)]


def test_a_gate_that_fails_exits_3_and_says_where_and_by_how_much(tkit: Tkit, reports: Path) -> None:
    """fp8 is 20 % faster than none; the report is written all the same, and its path is the last line of stdout."""
    expression = "output_tok_s<-5%, ttft_p50>+10%,kl>0.001"
    result = tkit("report", "fp8", "none-new", "--fail-on", expression, "--out", "out", "--quiet")
    assert (result.exit_code, result.stdout) == (3, "out/report.html\n")
    lines = result.stderr.replace("\u202f", " ").splitlines()
    assert lines[0] == "error: 3 of 3 gates failed"
    once = ", the run and the baseline measured once"
    change = r"\(95 % CI [+−][\d.]+ to [+−][\d.]+\), \d[\d.]* against \d[\d.]* "
    assert re.fullmatch(
        r"  - output_tok_s<-5%: demo-none-tp1-3f9c2a, 128/64 at C = 1: −\d\d\.\d % " + change + "tok/s" + once, lines[1]
    )
    assert re.fullmatch(
        r"  - ttft_p50>\+10%: demo-none-tp1-3f9c2a, 128/64 at C = 4: \+\d\d\.\d % " + change + "ms" + once, lines[4]
    )
    assert lines[5:] == ["  - kl>0.001: demo-none-tp1-3f9c2a: 0.0040 nats/token", "hint: every number: out/report.html"]
    assert {file.name for file in Path("out").iterdir()} == FILES
    assert "3 of 3 gates failed" in Path("out/report.html").read_text()


def test_a_gate_that_cannot_be_evaluated_exits_3_with_a_message_of_its_own(tkit: Tkit, reports: Path) -> None:
    invalid = {"is_valid": False, "invalid_reasons": ["client CPU 83 %"]}
    edit(reports / "fp8" / "points" / "128x64-c4-r1" / "point.json", **invalid)
    shutil.rmtree(reports / "fp8" / "points" / "128x64-c1-r1")
    result = tkit("report", "none-new", "fp8", "--fail-on", "output_tok_s<-5%,kl>1", "--json", "--out", "out")
    assert result.exit_code == 3
    assert [outcome["state"] for outcome in json.loads(result.stdout)["gates"]] == ["not evaluated"] * 2
    assert result.stderr.splitlines()[-5:] == [
        "error: 2 of 2 gates could not be evaluated",
        "  - output_tok_s<-5%: demo-fp8-tp1-3f9c2a, 128/64 at C = 1: not evaluated: point is missing",
        "  - output_tok_s<-5%: demo-fp8-tp1-3f9c2a, 128/64 at C = 4: not evaluated: point is invalid: client CPU 83 %",
        "  - kl>1: demo-fp8-tp1-3f9c2a: not evaluated: not validated (tkit validate, then sweep again)",
        "hint: every number: out/report.html",
    ]


def test_a_run_left_out_is_no_pass(tkit: Tkit, reports: Path) -> None:
    result = tkit("report", "none-new", "fp8", "absent", "--fail-on", "output_tok_s<-5%", "--out", "out", "--quiet")
    assert result.exit_code == 3
    assert "  - output_tok_s<-5%: not evaluated: absent was left out: no such directory\n" in result.stderr


def test_a_gate_that_is_mistyped_exits_2_before_anything_is_read(tkit: Tkit) -> None:
    result = tkit("report", "absent", "--fail-on", "output_toks<-5%,kl=1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        'error: --fail-on "output_toks<-5%,kl=1": 2 problems',
        '  - unknown metric "output_toks" (did you mean "output_tok_s"?)',
        '  - "kl=1": unknown comparison =, expected < or >',
        "hint: a gate is METRIC<NUMBER or METRIC>NUMBER, with % for a change against the baseline: ttft_p99>+10%",
    ]


def test_junit_is_written_whether_or_not_a_gate_fails(tkit: Tkit, reports: Path) -> None:
    for expression, code in (("kl>1", 3), ("output_tok_s<-5%", 0)):
        arguments = ("--fail-on", expression, "--junit", "results/tkit.xml", "--out", "out")
        assert tkit("report", "none-new", "fp8", *arguments).exit_code == code
        root = ElementTree.parse("results/tkit.xml").getroot()
        assert [suite.get("name") for suite in root] == ["points", "gates"]
        assert (root.get("tests"), root.get("errors")) == ("5", str(int(code == 3)))
    assert tkit("report", "none-new", "fp8", "--junit", "results/tkit.xml", "--out", "out").exit_code == 0
    assert [suite.get("name") for suite in ElementTree.parse("results/tkit.xml").getroot()] == ["points"]
    result = tkit("report", "fp8", "--junit", "out/report.html/tkit.xml", "--out", "out")
    assert result.exit_code == 2
    assert "error: out/report.html/tkit.xml: cannot write the JUnit file: " in result.stderr


def test_the_step_summary_is_appended_to(tkit: Tkit, reports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("summary.md").write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    assert tkit("report", "none-new", "fp8", "--fail-on", "kl>1", "--out", "out").exit_code == 3
    written = Path("summary.md").read_text()
    assert written.startswith("before\n# Comparison report\n")
    assert "\n## Gates\n" in written and "<details>" not in written
    assert tkit("report", "fp8", "--out", "out", "--step-summary", "other.md").exit_code == 0
    assert Path("summary.md").read_text() == written
    assert Path("other.md").read_text().startswith("# Report\n")
    monkeypatch.setattr("tkit.stages.report.MAX_SUMMARY_BYTES", len(written.encode()))
    assert tkit("report", "none-new", "fp8", "--fail-on", "kl>1", "--out", "out").exit_code == 3
    added = Path("summary.md").read_text().removeprefix(written)
    assert "**Gates: 1 of 1 gate could not be evaluated.**" in added and "\n## Numbers" not in added
    result = tkit("report", "fp8", "--out", "out", "--step-summary", "out/report.html/s.md")
    assert (result.exit_code, "error: out/report.html/s.md: cannot append the summary: " in result.stderr) == (2, True)


RECIPE = "model: demo\nengines: [{quant: none}, {quant: fp8}]\nreport: {out: out, fail_on: '%s'}\n"


@pytest.mark.parametrize(("gate", "code"), [("output_tok_s<-5%", 0), ("output_tok_s<90%", 3), ("output_toks<1", 2)])
def test_a_recipe_holds_gates(tkit: Tkit, reports: Path, monkeypatch: pytest.MonkeyPatch, gate: str, code: int) -> None:
    """Everything before the report is there already; a mistyped gate is told before anything is built."""
    Path("r.yaml").write_text(RECIPE % gate)
    done: list[str] = []

    def plan_engine(source: Any, engine: EngineRecipe, *_: Any, **__: Any) -> SimpleNamespace:
        done.append(engine.quant)
        return SimpleNamespace(backend="reference", reason="", quant=engine.quant, checkpoint=None)

    built = SimpleNamespace(name="engine", build={"seconds": 1.0})
    quality = SimpleNamespace(ppl=1.0, ppl_source=1.0, kl=0.0, top1=1.0)
    monkeypatch.setattr("tkit.stages.run.fetch_model", lambda *_: None)
    monkeypatch.setattr("tkit.stages.run.plan_engine", plan_engine)
    monkeypatch.setattr("tkit.stages.run.build_engine", lambda plan, *_, **__: (Path(plan.quant), built, True))
    monkeypatch.setattr("tkit.stages.run.validate", lambda *_, **__: quality)
    monkeypatch.setattr("tkit.stages.run.running_server", lambda *_, **__: nullcontext())
    sweeps = {"none": "reports/none-new", "fp8": "reports/fp8"}
    monkeypatch.setattr(
        "tkit.stages.run.run_sweep", lambda _, target, **__: SimpleNamespace(directory=sweeps[target.engine])
    )
    result = tkit("run", "r.yaml", "--fresh")
    assert result.exit_code == code, result.stderr
    assert done == ([] if code == 2 else ["none", "fp8"])
    assert Path("out/report.html").exists() == (code != 2)
    if code == 3:
        assert (
            "error: 1 of 1 gate failed\n  - output_tok_s<90%: demo-fp8-tp1-3f9c2a, 128/64 at C = 1: +" in result.stderr
        )
    if code == 2:
        assert 'error: r: report: fail_on "output_toks<1": 1 problem\n' in result.stderr


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
