from __future__ import annotations

import importlib
import json
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from factory import card, edit, make_run, validation

from tkit.cli.main import COMMANDS
from tkit.errors import InputError
from tkit.files import to_json
from tkit.report.compare import compare
from tkit.report.gates import FACTS, MEASURED, asked, evaluate, failures, parse_gates, summary, unit
from tkit.report.read import read_runs
from tkit.report.record import Comparison, GateCheck, GateOutcome
from tkit.report.render_html import render_html
from tkit.report.render_junit import render_junit
from tkit.report.render_markdown import render_markdown
from tkit.report.sections import gated as gates_section
from tkit.report.sections import sections
from tkit.report.statistics import Change
from tkit.report.text import THIN
from tkit.report.verdict import verdicts
from tkit.specs.gate import Gate
from tkit.specs.record import Load

SMALL: dict[str, Any] = {"concurrency": (1, 4), "repeats": 3, "requests": 80}


def gated(expression: str, *paths: Path, with_baseline: bool = True) -> Comparison:
    gates = parse_gates(expression, "--fail-on")
    runs, left_out = read_runs(paths)
    comparison = compare(
        runs,
        baseline=runs[0] if with_baseline and len(runs) > 1 else None,
        left_out=left_out,
        created="2025-06-02T00:00:00Z",
        tkit="0",
        asked=asked(gates),
    )
    return replace(comparison, gates=evaluate(gates, comparison))


def plain(words: str) -> str:
    return words.replace(THIN, " ")


def outcome_of(expression: str, *paths: Path) -> GateOutcome:
    return gated(expression, *paths).gates[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    return make_run(directory, "base", engine=card("none"), quality=validation(kl=0.00002, ppl=21.12), **SMALL)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 % slower, half the size."""
    directory = tmp_path_factory.mktemp("slow")
    return make_run(directory, "slow", engine=card("fp8"), quality=validation(), speed=1.2, seed=1, **SMALL)


@pytest.fixture(scope="module")
def compared(base: Path, slow: Path) -> Comparison:
    return gated("kl>1", base, slow)


@pytest.fixture
def slow_copy(slow: Path, tmp_path: Path) -> Path:
    return shutil.copytree(slow, tmp_path / "slow")


def test_gates_work_on_what_was_measured_once_and_say_so(tmp_path: Path) -> None:
    """A baseline without repeats: a loss of 40 % is seen, the same again is none, and both outcomes name the doubt."""
    settings = SMALL | {"repeats": 1}
    once = make_run(tmp_path, "once", engine=card("none"), quality=validation(kl=0.00002, ppl=21.12), **settings)
    slower = make_run(tmp_path, "slower", engine=card("fp8"), quality=validation(), speed=1.7, seed=1, **SMALL)
    twin = make_run(tmp_path, "twin", engine=card("fp8"), quality=validation(), seed=2, **settings)
    lost = gated("output_tok_s<-5%", once, slower)
    (outcome,) = lost.gates
    assert [(check.state, check.text.endswith("tok/s, the baseline measured once")) for check in outcome.checks] == [
        ("failed", True)
    ] * 2
    (outcome,) = gated("output_tok_s<-5%", once, twin).gates
    assert outcome.state == "passed"
    assert all(check.text.endswith("the run and the baseline measured once") for check in outcome.checks)
    assert any("measured once, its interval is that of its requests" in line for line in gates_section(lost).lead)


# ---- what is written ----------------------------------------------------------------------------------------------


def test_an_expression_is_read_as_written() -> None:
    gates = parse_gates(" output_tok_s<-5% ,ttft_p99 > +10%,kl>0.01,weight_bytes>1.5e9", "--fail-on")
    assert gates == (
        Gate(text="output_tok_s<-5%", metric="output_tok_s", side="<", limit=-0.05, is_relative=True),
        Gate(text="ttft_p99 > +10%", metric="ttft_p99", side=">", limit=0.1, is_relative=True),
        Gate(text="kl>0.01", metric="kl", side=">", limit=0.01, is_relative=False),
        Gate(text="weight_bytes>1.5e9", metric="weight_bytes", side=">", limit=1.5e9, is_relative=False),
    )


def test_everything_wrong_with_an_expression_is_listed() -> None:
    with pytest.raises(InputError) as error:
        parse_gates(
            "output_tok_s<-5,ttft>3,tftt_p50>3%,,kl>=2,a b,chunk_gap_p99>1,ttft_p98>1,kl<-100%,kl>1e999", "here"
        )
    assert str(error.value).splitlines() == [
        'here "output_tok_s<-5,ttft>3,tftt_p50>3%,,kl>=2,a b,chunk_gap_p99>1,ttft_p98>1,kl<-100%,kl>1e999": 10 problems',
        '  - "output_tok_s<-5": output_tok_s is never negative (did you mean output_tok_s<-5%?)',
        "  - ttft: which one? ttft_p50, ttft_p90, ttft_p95, ttft_p99, ttft_tail",
        '  - unknown metric "tftt_p50" (did you mean "ttft_p50"?)',
        "  - a gate is empty",
        '  - "kl>=2": unknown comparison >=, expected < or >',
        '  - "a b" is not a gate',
        "  - chunk_gap_p99: gaps are pooled over requests and have no interval; gate on tpot_p50 or tpot_p99",
        '  - unknown metric "ttft_p98" (did you mean "ttft_p99"?)',
        '  - "kl<-100%": no change is below −100 %',
        '  - "kl>1e999": 1e999 is too large',
        "hint: a gate is METRIC<NUMBER or METRIC>NUMBER, with % for a change against the baseline: ttft_p99>+10%",
    ]


@pytest.mark.parametrize("expression", ["", " ", "kl", "kl>", ">1", "kl>1,", "kl>nan", "kl>1 %%", "kl>0x1", "kl>1\n,"])
def test_what_is_not_an_expression(expression: str) -> None:
    with pytest.raises(InputError):
        parse_gates(expression, "--fail-on")


def test_every_metric_can_be_evaluated(base: Path, slow: Path) -> None:
    """p99 needs more requests than there are, GPUs were not told, and the loops are closed; all else has a number."""
    metrics = (*MEASURED, *FACTS)
    for outcome in gated(",".join(f"{metric}>90000%" for metric in metrics), base, slow).gates:
        metric = outcome.gate.metric
        assert outcome.checks and isinstance(unit(metric), str)
        expected = "not evaluated" if metric == "tok_s_gpu" or "_p99" in metric or "_sched_" in metric else "passed"
        assert {check.state for check in outcome.checks} == {expected}, outcome


# ---- the rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "change", "state", "words"),
    [
        ("output_tok_s<-5%", (-0.10, -0.15, -0.04, True), "failed", "−10.0 % (95 % CI −15.0 to −4.0)"),
        ("output_tok_s<-5%", (-0.10, -0.21, 0.02, False), "passed", "not significant: the interval includes no change"),
        ("output_tok_s<-5%", (-0.04, -0.045, -0.035, True), "passed", "−4.0 %"),  # certain, and within the limit
        ("output_tok_s<-5%", (0.10, 0.05, 0.15, True), "passed", "+10.0 %"),
        ("output_tok_s<-1%", (-0.02, -0.025, -0.015, False), "passed", "within the practical threshold of 3 %"),
        ("ttft_p50>+10%", (0.12, 0.01, 0.24, True), "failed", "+12.0 % (95 % CI +1.0 to +24.0)"),
        ("ttft_p50>+10%", (-0.5, -0.6, -0.4, True), "passed", "−50.0 %"),
        ("ttft_p50>10%", (0.5, None, None, False), "not evaluated", "+50.0 %, too few requests for an interval"),
        # an improvement of at least 10 % is demanded
        ("output_tok_s<+10%", (0.05, 0.02, 0.08, True), "failed", "+5.0 %"),
        ("output_tok_s<+10%", (0.08, 0.02, 0.14, True), "passed", "not decided: the interval reaches the limit"),
        ("output_tok_s<+10%", (0.12, 0.08, 0.16, True), "passed", "+12.0 %"),
        ("ttft_p50>-10%", (0.0, -0.01, 0.01, False), "failed", "0.0 %"),
    ],
)
def test_a_change_fails_only_when_the_interval_supports_it(
    compared: Comparison,
    expression: str,
    change: tuple[float, float | None, float | None, bool],
    state: str,
    words: str,
) -> None:
    gates = parse_gates(expression, "--fail-on")
    relative, low, high, is_called = change
    told = Change(relative=relative, low=low, high=high, is_called=is_called)
    group = compared.groups[0]
    levels = [
        replace(
            level,
            cells=tuple(
                replace(cell, changes=dict.fromkeys(cell.changes, told)) if cell.changes else cell
                for cell in level.cells
            ),
        )
        for level in group.levels
    ]
    outcome = evaluate(gates, replace(compared, groups=(replace(group, levels=tuple(levels)),)))[0]
    assert [check.state for check in outcome.checks] == [state, state]
    assert outcome.state == state
    assert words in plain(outcome.checks[0].text)


def test_a_number_is_held_against_a_limit_in_its_own_unit(base: Path, slow: Path) -> None:
    (first, second) = outcome_of("ttft_p50>40", base, slow).checks
    assert (first.run, first.shape, first.load, first.state) == ("B", "128/64", Load(concurrency=1), "passed")
    assert (second.load, second.state) == (Load(concurrency=4), "failed")
    assert second.value is not None and second.low is not None and second.high is not None
    assert second.low < second.value < second.high and second.value > 40
    assert second.text.endswith(f" ms (95 % CI {second.low:.1f} to {second.high:.1f})")


def test_a_limit_on_a_number_needs_no_baseline(slow: Path) -> None:
    comparison = gated("kl>0.001,ttft_p50>1000,output_tok_s<-5%,weight_bytes>5%", slow)
    assert [outcome.state for outcome in comparison.gates] == ["failed", "passed", "not evaluated", "not evaluated"]
    assert {check.text for outcome in comparison.gates[2:] for check in outcome.checks} == {
        "one run alone has no baseline"
    }


def test_facts_of_an_engine_are_exact(base: Path, slow: Path) -> None:
    comparison = gated("kl>0.003,kl>0.005,ppl_ratio>1.02,top1<0.98,weight_bytes>-40%,weight_bytes>-60%", base, slow)
    found = [(outcome.state, plain(outcome.checks[0].text)) for outcome in comparison.gates]
    assert found == [
        ("failed", "0.0040 nats/token"),
        ("passed", "0.0040 nats/token"),
        ("passed", "1.0095"),
        ("failed", "0.9730"),
        ("passed", "−50.0 %, 1 200 000 bytes against 2 400 000 bytes"),
        ("failed", "−50.0 %, 1 200 000 bytes against 2 400 000 bytes"),
    ]
    assert all(check.run == "B" for outcome in comparison.gates for check in outcome.checks)  # never the baseline


def test_numbers_beyond_the_tables_are_those_of_the_rows(base: Path, slow: Path) -> None:
    comparison = gated("ttft_p90>900%,requests_s<-90%,input_tok_s<-90%,goodput_interactive<-90%", base, slow)
    cell = comparison.groups[0].levels[1].cells[1]
    ttft, told = [], []
    for repeat in (1, 2, 3):
        point = slow / "points" / f"128x64-c4-r{repeat}"
        for row in pq.read_table(point / "requests.parquet").to_pylist():
            if row["phase"] == "measured":
                ttft.append((row["first_token_ns"] - row["sent_ns"]) / 1e6)
        told.append(json.loads((point / "point.json").read_text()))
    values = {name: found.value for name, found in cell.estimates.items() if found is not None}
    assert values["ttft_p90"] == pytest.approx(np.percentile(ttft, 90))
    for name in ("requests_s", "input_tok_s"):
        assert values[name] == pytest.approx(np.median([summary[name] for summary in told]))
    rate = np.median([summary["goodput"]["interactive"]["requests_s"] for summary in told])
    assert values["goodput_interactive"] == pytest.approx(rate)
    assert {"ttft_p90", "requests_s", "input_tok_s", "goodput_interactive"} <= set(cell.changes)
    assert "ttft_p90" not in gated("kl>1", base, slow).groups[0].levels[0].cells[0].estimates  # only when asked


# ---- what cannot be evaluated -------------------------------------------------------------------------------------


def drop_point(run: Path) -> None:
    for point in (run / "points").glob("128x64-c4-r*"):
        shutil.rmtree(point)


def invalidate(run: Path) -> None:
    for point in (run / "points").glob("128x64-c4-r*"):
        edit(point / "point.json", is_valid=False, invalid_reasons=["client CPU 83 %"])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(drop_point, "point is missing"), (invalidate, "point is invalid: repeat 1: client CPU 83 %; repeat 2: ")],
)
def test_a_missing_or_invalid_point_is_never_a_pass(
    base: Path, slow_copy: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(slow_copy)
    *outcomes, failing = gated("output_tok_s<-90%,output_tok_s<1,output_tok_s<-5%", base, slow_copy).gates
    for outcome in outcomes:
        assert [check.state for check in outcome.checks] == ["passed", "not evaluated"]
        assert outcome.state == "not evaluated"
        assert outcome.checks[1].text.startswith(reason)
    assert failing.state == "failed"  # the point that counts still does
    change, number = gated("output_tok_s<90%,output_tok_s<1", slow_copy, base).gates  # on the baseline's side
    assert change.checks[1].text.startswith(f"the baseline's {reason}")
    assert number.state == "passed"  # the baseline plays no part


def test_a_point_that_one_repeat_of_three_supports_is_evaluated(base: Path, slow_copy: Path) -> None:
    for repeat in (1, 2):
        path = slow_copy / "points" / f"128x64-c4-r{repeat}" / "point.json"
        edit(path, is_valid=False, invalid_reasons=["client CPU 83 %"])
    assert [check.state for check in outcome_of("output_tok_s<-90%", base, slow_copy).checks] == ["passed", "passed"]


def test_a_load_that_was_asked_for_and_not_measured(base: Path, slow_copy: Path) -> None:
    edit(slow_copy / "manifest.json", concurrency=[1, 4, 16])
    (slow_copy / "state.jsonl").write_text('{"event": "ended", "reason": "interrupted"}\n')
    checks = outcome_of("output_tok_s<1", base, slow_copy).checks
    assert [(str(check.load), check.state) for check in checks[2:]] == [("C = 16", "not evaluated")]
    assert checks[2].text == "point is missing: the sweep ended early: interrupted"


def test_a_load_or_shape_that_only_the_baseline_has(base: Path, tmp_path: Path) -> None:
    wide = make_run(tmp_path, "wide", shapes=("128/64", "512/32"), concurrency=(1, 4, 16), requests=40)
    checks = outcome_of("output_tok_s<-90%", wide, base).checks
    where = [(check.shape, check.load and check.load.concurrency, check.state) for check in checks]
    assert checks[2].text == "point is missing"
    assert where == [
        ("128/64", 1, "passed"),
        ("128/64", 4, "passed"),
        ("128/64", 16, "not evaluated"),
        ("512/32", 1, "not evaluated"),
        ("512/32", 4, "not evaluated"),
        ("512/32", 16, "not evaluated"),
    ]
    third = make_run(tmp_path, "third", seed=3, **SMALL)
    told = [check.run for check in outcome_of("output_tok_s<-90%", base, third, wide).checks]
    assert told.count("B") == 2  # what only another candidate measured is not missing


def test_tokens_counted_otherwise_are_not_comparable(base: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path, "other", token_source="chunks", **SMALL)
    checks = outcome_of("output_tok_s<-90%", base, other).checks
    reason = "the baseline was not measured with tokens from chunks under tkit.definitions/1"
    assert [(check.load and check.load.concurrency, check.state, check.text) for check in checks] == [
        (1, "not evaluated", reason),
        (4, "not evaluated", reason),
    ]


def test_no_goodput_is_a_number_but_has_no_ratio(base: Path, tmp_path: Path) -> None:
    stuck = make_run(tmp_path, "stuck", ttft_speed=100.0, **SMALL)
    comparison = gated("goodput_interactive<0.5,goodput_interactive<-5%,ttft_tail<1", base, stuck)
    assert [outcome.state for outcome in comparison.gates] == ["failed", "not evaluated", "passed"]
    assert [outcome.checks[0].text for outcome in comparison.gates[:2]] == [
        "0 req/s",
        "goodput_interactive is zero or was not measured",
    ]
    assert comparison.gates[2].checks[0].text.startswith("p95 ")


def test_a_percentile_needs_its_requests(base: Path, slow: Path) -> None:
    comparison = gated("ttft_p99>+10%", base, slow)
    assert failures(comparison) == [  # loads of which the same is to be said stand together
        "ttft_p99>+10%: demo-fp8-tp1-3f9c2a, 128/64 at C = 1, 4: not evaluated: "
        "p99 needs 662 requests, the point has 240"
    ]
    assert summary(comparison) == "1 of 1 gate could not be evaluated"


def test_a_run_without_validation_or_that_could_not_be_read(base: Path, tmp_path: Path) -> None:
    plain = make_run(tmp_path, "plain", engine=card("int8"), **SMALL)
    bare = make_run(tmp_path, "bare", seed=1, **SMALL)
    comparison = gated("kl>1,weight_bytes>900%", base, plain, bare, tmp_path / "absent")
    assert [check.text for check in comparison.gates[0].checks] == [
        "not validated (tkit validate, then sweep again)",
        "the run has no engine card",
        f"{tmp_path / 'absent'} was left out: no such directory",
    ]
    assert [check.state for check in comparison.gates[1].checks] == ["passed", "not evaluated", "not evaluated"]
    assert failures(comparison)[2] == f"kl>1: not evaluated: {tmp_path / 'absent'} was left out: no such directory"


# ---- how it is told -----------------------------------------------------------------------------------------------


def rendered(comparison: Comparison, paths: Sequence[Path]) -> tuple[str, str]:
    parts = sections(comparison, read_runs(paths)[0])
    return render_markdown(comparison, parts), render_html(comparison, parts)


def test_gates_stand_right_after_the_verdict(base: Path, slow: Path) -> None:
    comparison = gated("output_tok_s<-5%,kl>1,ttft_p99>1%", base, slow)
    markdown, html = rendered(replace(comparison, verdict=verdicts(comparison)), (base, slow))
    first = "Gates: 1 of 3 gates failed, 1 of 3 gates could not be evaluated"
    assert markdown.startswith(f"# Comparison report\n\n- **{first}.**\n- ▼ slower: **demo-fp8")
    assert html.index("<b>1 of 3 gates failed") < html.index('<span class="badge worse">slower</span>')
    assert markdown.index("## Gates") < markdown.index("## What was compared")
    assert "1 of 3 gates failed, 1 of 3 gates could not be evaluated." in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("| output_tok_s&lt;-5% | failed | B ")]
    assert len(lines) == 2 and " | 128/64 at C = 4 | −1" in lines[1]
    assert "| kl&gt;1 | passed | B demo-fp8-tp1-3f9c2a | – | 0.0040 nats/token |" in markdown
    assert html.index('id="verdict"') < html.index('<section id="gates"') < html.index('<section id="runs"')
    assert "output_tok_s&lt;-5%" in html and "p99 needs 662 requests" in html


def test_without_gates_no_word_about_them(base: Path, slow: Path) -> None:
    runs, left_out = read_runs((base, slow))
    comparison = compare(runs, baseline=runs[0], left_out=left_out, created="2025-06-02T00:00:00Z", tkit="0")
    markdown, html = rendered(comparison, (base, slow))
    assert "Gates" not in markdown and 'id="gates"' not in html
    assert json.loads(to_json(comparison))["gates"] == []


def test_the_record_holds_every_check(base: Path, slow: Path) -> None:
    record = json.loads(to_json(gated("output_tok_s<-5%,kl>1", base, slow)))
    assert [(outcome["gate"]["text"], outcome["state"]) for outcome in record["gates"]] == [
        ("output_tok_s<-5%", "failed"),
        ("kl>1", "passed"),
    ]
    check = record["gates"][0]["checks"][1]
    change = record["groups"][0]["levels"][1]["cells"][1]["changes"]["output_tok_s"]
    assert {key: check[key] for key in ("run", "shape", "load", "state")} == {
        "run": "B", "shape": "128/64", "load": {"concurrency": 4, "rate": None, "arrivals": None}, "state": "failed",
    }  # fmt: skip
    assert (check["value"], check["low"], check["high"]) == (change["relative"], change["low"], change["high"])


def test_junit_has_a_case_per_point_and_per_gate(base: Path, slow_copy: Path) -> None:
    invalidate(slow_copy)
    shutil.rmtree(slow_copy / "points" / "128x64-c1-r2")
    root = ElementTree.fromstring(render_junit(gated("output_tok_s<-5%,kl>1,ttft_p99>+1%", base, slow_copy)))
    points, gates = root.findall("testsuite")
    told = {
        (case.get("classname"), case.get("name")): [(child.tag, child.get("message")) for child in case]
        for case in points.findall("testcase")
    }
    reasons = "; ".join(f"repeat {repeat}: client CPU 83 %" for repeat in (1, 2, 3))
    assert told == {
        ("demo-none-tp1-3f9c2a", "128/64 C = 1"): [],
        ("demo-none-tp1-3f9c2a", "128/64 C = 4"): [],
        ("demo-fp8-tp1-3f9c2a", "128/64 C = 1"): [],
        ("demo-fp8-tp1-3f9c2a", "128/64 C = 4"): [("skipped", f"invalid: {reasons}")],
        ("demo-fp8-tp1-3f9c2a", "128/64 C = 1 repeat 2"): [("skipped", "missing: no readable result")],
    }
    cases = {case.get("name"): case for case in gates.findall("testcase")}
    assert [[child.tag for child in case] for case in cases.values()] == [["failure"], ["system-out"], ["error"]]
    failure = cases["output_tok_s<-5%"].find("failure")
    assert failure is not None and failure.text is not None
    assert str(failure.get("message")).startswith("demo-fp8-tp1-3f9c2a, 128/64 at C = 1: −1")
    assert "C = 4: not evaluated: point is invalid: " in failure.text.splitlines()[1]
    counts = {name: root.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "8", "failures": "1", "errors": "1", "skipped": "2"}
    assert [suite.get("tests") for suite in (points, gates)] == ["5", "3"]


def test_junit_holds_any_name(base: Path, tmp_path: Path) -> None:
    label = 'a<b>&"c"\x00\x1b[31m\ud800]]>\n'
    comparison = gated("kl>1", base)
    comparison = replace(
        comparison,
        runs=tuple(
            replace(run, name=label, missing=("128/64 C = 9 repeat 1",), ended_early="<&\x07")
            for run in comparison.runs
        ),
        gates=tuple(
            replace(outcome, state="failed", checks=(GateCheck(run="A", state="failed", text="\x00<![CDATA["),))
            for outcome in comparison.gates
        ),
    )
    root = ElementTree.fromstring(render_junit(comparison).encode())
    cases = list(root.iter("testcase"))
    assert cases[0].get("classname") == 'a<b>&"c"\ufffd\ufffd[31m\ufffd]]>\n'
    assert [case.get("name") for case in cases][-2:] == ["128/64 C = 9 repeat 1", "kl>1"]
    assert str(next(root.iter("failure")).get("message")).endswith("\ufffd<![CDATA[")


# ---- docs/ci.md ---------------------------------------------------------------------------------------------------

GUIDE = Path(__file__).parents[2] / "docs" / "ci.md"


def test_the_pipelines_of_the_guide_can_be_read() -> None:
    blocks = re.findall(r"^## (GitHub Actions|GitLab)\n\n((?:    .*\n|\n)+)", GUIDE.read_text(), re.MULTILINE)
    github, gitlab = (yaml.safe_load(textwrap.dedent(block)) for _, block in blocks)
    assert list(github["jobs"]) == list(gitlab) == ["quality", "speed"]
    uploaded = [
        step["with"]["path"]
        for job in github["jobs"].values()
        for step in job["steps"]
        if "path" in step.get("with", {})
    ]
    assert uploaded == ["reports/demo\njunit.xml", "reports/ci\njunit.xml"]
    assert gitlab["speed"]["artifacts"]["reports"] == {"junit": "junit.xml"}


def test_commands_and_gates_of_the_guide_exist() -> None:
    guide = GUIDE.read_text()
    commands = re.findall(r"\btkit (\w+)((?: +(?!&&)[^\n`#)]+)?)", guide)
    assert {name for name, _ in commands} >= {"build", "validate", "serve", "sweep", "stop", "report"}
    for name, rest in commands:
        command = importlib.import_module(COMMANDS[name][0]).command
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, (name, rest)
    for expression in re.findall(r"(?:--fail-on '|fail_on: \")([^'\"]+)", guide):
        parse_gates(expression, "docs/ci.md")
    rows = re.findall(r"^\| (`.+) \| .+ \|$", guide, re.MULTILINE)[:8]
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    suffixes = {name for name in told if name.startswith("_")}
    whole = {name for name in told if name in (*MEASURED, *FACTS)}
    assert whole | {f"{name}{suffix}" for name in told - whole - suffixes for suffix in suffixes} == {*MEASURED, *FACTS}
