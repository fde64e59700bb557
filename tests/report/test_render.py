from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import vl_convert
from factory import as_open_loop, card, make_run, validation

from tkit.files import to_json
from tkit.report import text
from tkit.report.compare import compare, run_ids
from tkit.report.plots.plot import series
from tkit.report.plots.png import render_png
from tkit.report.plots.samples import ECDF_POINTS, ecdf_points
from tkit.report.read import read_runs
from tkit.report.record import MEASURES, Comparison
from tkit.report.render_csv import neutral, render_csv
from tkit.report.render_html import MARK_PATHS, render_html, script_json
from tkit.report.render_markdown import escape, render_markdown
from tkit.report.sections import Section, sections
from tkit.report.verdict import verdicts
from tkit.specs.record import METRICS

EVIL = (
    '</script><script>document.title="owned"</script>',
    '"><img src=x onerror="alert(1)">',
    '=cmd()|"/c calc"!A0',
    "x" * 300,
    "\U0001f680 rocket \u202eevil \u05d0\u05d1",
    "| pipe `tick` **bold** [l](http://example.com) @user #1 :tada: <!-- -->",
    "{{ 7 * 7 }} {% raw %} ${x} %s",
)


class Page(HTMLParser):
    """What a browser would see: elements with their attributes and text, scripts as they stand."""

    VOID = {"meta", "br", "img", "link", "input", "path"}

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[int] = []
        self.feed(html)
        self.close()
        assert not self._open, [self.elements[index] for index in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(len(self.elements) - 1)
        if tag == "table":
            self.tables[str(dict(attrs)["id"])] = []
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        index = self._open.pop()
        assert self.elements[index][0] == tag, f"</{tag}> closes {self.elements[index]}"

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.texts[index] = self.texts.get(index, "") + data
        if any(self.elements[index][0] in ("td", "th") for index in self._open):
            self._table[-1][-1] = (self._table[-1][-1] + data).lstrip()

    @property
    def _table(self) -> list[list[str]]:
        return list(self.tables.values())[-1]

    @property
    def cells(self) -> list[str]:
        return [cell.strip() for rows in self.tables.values() for row in rows for cell in row]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text_of(self, tag: str) -> list[str]:
        return [self.texts.get(index, "") for index, (name, _) in enumerate(self.elements) if name == tag]


def rendered(paths: Sequence[Path]) -> tuple[Comparison, tuple[Section, ...]]:
    runs, left_out = read_runs(paths)
    comparison = compare(
        runs,
        baseline=runs[0] if len(runs) > 1 else None,
        left_out=left_out,
        created="2025-06-02T10:00:00+00:00",
        tkit="0.1.0",
    )
    comparison = replace(comparison, verdict=verdicts(comparison))
    return comparison, sections(comparison, runs)


@pytest.fixture(scope="module")
def three(three_runs: list[Path]) -> tuple[Comparison, tuple[Section, ...]]:
    return rendered(three_runs)


@pytest.fixture(scope="module")
def html(three: tuple[Comparison, tuple[Section, ...]]) -> str:
    return render_html(*three)


def test_a_comment_is_never_too_long(tmp_path: Path) -> None:
    """GitHub takes 65 536 characters. What stands open goes last, and what is gone is named."""
    loads = tuple(range(1, 31))
    paths = [
        make_run(tmp_path, f"run{i}", label=f"run{i}", concurrency=loads, requests=8, shapes=("16/4",), seed=i)
        for i in range(4)
    ]
    comparison, parts = rendered(paths)
    markdown = render_markdown(comparison, parts)
    assert 30_000 < len(markdown) <= 65_536
    assert "## Numbers per load" in markdown and "<summary>Provenance" not in markdown
    assert re.search(r"\nToo long to stand here, see report.html: .*Provenance\.\n", markdown)
    assert markdown.count("<details>") == markdown.count("</details>")
    assert markdown.startswith("# Comparison report\n\n- ")


def test_open_loops_are_drawn_from_the_schedule_and_on_no_frontier(tmp_path: Path) -> None:
    run = as_open_loop(make_run(tmp_path, "run", concurrency=(4,), requests=70), 2.5)
    comparison, parts = rendered([run])
    by_id = {part.id: part for part in parts}
    assert by_id["pareto"].plots == ()
    plot = by_id["latency"].plots[0]
    sched = comparison.groups[0].levels[0].cells[0].estimates["ttft_sched_p50"]
    assert plot.title == "TTFT from schedule against throughput, 128/64, poisson arrivals"
    assert sched is not None and plot.spec["data"]["values"][0]["y"] == sched.value


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, tuple[Section, ...]]:
    reports = tmp_path_factory.mktemp("evil")
    runs = []
    for index, name in enumerate(EVIL):
        engine = card("fp8", key=str(index)) | {"name": name, "command": name, "source": {"model": name}}
        run = make_run(
            reports,
            f"run{index}",
            label=name,
            engine=engine,
            quality=validation() | {"text": {"name": name}},
            concurrency=(1, 4),
            requests=12,
            seed=index,
            invalid={4: name},
            identity={"server": {name: name}},
            model=name,
            url=name,
            command=name,
            profile=name,
            protocol=name,
        )
        runs.append(run)
    return rendered(runs)


# ---- the page -----------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing(html: str) -> None:
    page = Page(html)
    assert not page.all("link") and not page.all("img") and not page.all("iframe")
    for tag, attributes in page.elements:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith("#")
    style = "".join(page.text_of("style"))
    assert "url(" not in style and "@import" not in style


def test_only_the_scripts_of_the_page_may_run(html: str) -> None:
    page = Page(html)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith(
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-"
    )
    scripts = [
        source for attributes, source in zip(page.all("script"), page.text_of("script"), strict=True) if not attributes
    ]
    digests = [base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in scripts]
    assert policy.split("script-src ")[1].split() == [f"'sha256-{digest}'" for digest in digests]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_the_page_can_be_walked(html: str) -> None:
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "href"):
            target = (attributes.get(name) or "").removeprefix("#")
            assert not target or target in ids
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"
    links = [link["href"] for link in page.all("a")]
    assert [f"#{section['id']}" for section in page.all("section")] == links[1:]
    tables = [index for index, (tag, _) in enumerate(page.elements) if tag == "table"]
    assert len(page.text_of("caption")) == len(tables) and all(page.text_of("caption"))
    regions = [div for div in page.all("div") if div.get("class") == "scroll"]
    assert len(regions) == len(tables)
    assert all(region["tabindex"] == "0" and region["aria-label"] and region["role"] == "region" for region in regions)


def test_sections_stand_in_the_order_they_are_read(html: str) -> None:
    order = [section["id"] for section in Page(html).all("section")]
    assert order == [
        "verdict",
        "runs",
        "numbers",
        "pareto",
        "latency",
        "distributions",
        "wall",
        "size",
        "quality",
        "cost",
        "validity",
        "provenance",
    ]


def test_three_runs_stay_below_two_megabytes(html: str) -> None:
    assert len(html.encode()) < 2_000_000


def test_long_runs_are_drawn_by_a_sample(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", concurrency=(64,), requests=6000, shapes=("8/8",))
    plots = [plot for section in rendered([run])[1] for plot in section.plots]
    assert {plot.id: len(json.dumps(plot.spec)) for plot in plots if len(json.dumps(plot.spec)) > 100_000} == {}


def test_every_plot_compiles(three: tuple[Comparison, tuple[Section, ...]]) -> None:
    plots = [plot for section in three[1] for plot in section.plots]
    assert [plot.id for plot in plots] == [
        "pareto-128x64-0", "pareto-512x32-1", "ttft-128x64-0", "tpot-128x64-0", "ttft-512x32-1", "tpot-512x32-1",
        "ecdf-ttft", "ecdf-tpot", "ecdf-gap", "in-flight", "ttft-time",
    ]  # fmt: skip
    for plot in plots:
        assert vl_convert.vegalite_to_vega(json.dumps(plot.spec))["marks"]


def test_a_line_has_a_gap_where_a_load_is_missing_or_invalid(three: tuple[Comparison, tuple[Section, ...]]) -> None:
    plot = next(plot for section in three[1] for plot in section.plots if plot.id == "pareto-128x64-0")
    segments: dict[str, list[tuple[int, str]]] = {}
    for row in plot.spec["data"]["values"]:
        segments.setdefault(row["run"][0], []).append((row["C"], row["segment"]))
    assert segments["A"] == [(1, "A0"), (4, "A0"), (16, "A0")]
    assert len({segment for _, segment in segments["C"]}) == len(segments["C"]) == 2
    states = {(row["run"][0], row["C"]): row["state"] for row in plot.spec["data"]["values"]}
    assert states["C", 16] == "invalid" and states["A", 1] == "behind" and states["C", 1] == "frontier"


def test_a_distribution_keeps_its_tail() -> None:
    values = np.random.default_rng(0).lognormal(size=50_000)
    points = ecdf_points(values)
    assert len(points) <= ECDF_POINTS
    assert [value for value, _ in points[-3:]] == sorted(values)[-3:]
    assert points[-1][1] == 1.0
    for value, share in points:
        assert np.mean(values <= value) == pytest.approx(share, abs=1e-9)


def test_the_picture_is_a_picture_with_the_names(three: tuple[Comparison, tuple[Section, ...]]) -> None:
    plot = next(plot for section in three[1] for plot in section.plots)
    assert render_png(plot, three[0])[:8] == b"\x89PNG\r\n\x1a\n"
    assert "container" in json.dumps(plot.spec)  # the page's own is untouched


def test_runs_are_told_apart_by_colour_and_mark(three: tuple[Comparison, tuple[Section, ...]]) -> None:
    runs = tuple(replace(three[0].runs[0], id=run_id) for run_id in run_ids(40))
    drawn = [series(replace(three[0], runs=runs), run.id) for run in runs]
    assert len(set(drawn)) == 40
    assert {color for color, _ in drawn} == {mark for _, mark in drawn} == set(range(len(MARK_PATHS)))


# ---- numbers ------------------------------------------------------------------------------------------------------


THROUGHPUT = [name for name, measure in MEASURES.items() if not measure.percentile]
LATENCY = [name for name, measure in MEASURES.items() if measure.percentile and "_sched_" not in name]


def test_numbers_agree_in_all_four_files(three: tuple[Comparison, tuple[Section, ...]], html: str) -> None:
    comparison, parts = three
    record = json.loads(to_json(comparison))
    assert record["schema"] == "tkit.report/1"
    page, markdown = Page(html), render_markdown(comparison, parts)
    compared = 0
    for row in csv.DictReader(io.StringIO(render_csv(comparison))):
        number, group = next((i, group) for i, group in enumerate(record["groups"]) if group["shape"] == row["shape"])
        level = next(level for level in group["levels"] if level["load"]["concurrency"] == int(row["concurrency"]))
        cell = next(cell for cell in level["cells"] if cell["run"] == row["id"])
        for table, names in (("throughput", THROUGHPUT), ("latency", LATENCY)):
            shown = page.tables[f"table-{table}-{row['shape'].replace('/', 'x')}-{number}"]
            drawn = _row(shown, row["concurrency"], row["id"])
            written = _row(_markdown_table(markdown, f"{table.title()}, {row['shape']}"), row["concurrency"], row["id"])
            for column, name in enumerate(names, start=2):
                found, change = cell["estimates"][name], cell["changes"].get(name)
                assert row[name] == ("" if found is None else str(found["value"]))
                assert row[f"{name}_change"] == ("" if change is None else str(change["relative"]))
                expected = text.number(found["value"]) if found else text.ABSENT
                for told in (drawn[column], written[column]):
                    assert re.match(rf"{re.escape(expected)}(\s|p9|$)", told), (name, expected, told)
                    assert not change or text.percent(change["relative"]) in told
                compared += 1
    assert compared == 11 * len(THROUGHPUT + LATENCY)


def _row(rows: list[list[str]], concurrency: str, run: str) -> list[str]:
    return next(cells for cells in rows if cells[0] == concurrency and cells[1].split()[0] == run)


def _markdown_table(markdown: str, caption: str) -> list[list[str]]:
    lines = markdown.split(f"**{caption}**\n\n")[1].split("\n\n")[0].split("\n")
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_csv_has_a_row_per_run_and_load(three: tuple[Comparison, tuple[Section, ...]]) -> None:
    rows = list(csv.DictReader(io.StringIO(render_csv(three[0]))))
    assert [(row["id"], row["shape"], row["concurrency"]) for row in rows] == [
        ("A", "128/64", "1"), ("B", "128/64", "1"), ("C", "128/64", "1"),
        ("A", "128/64", "4"), ("B", "128/64", "4"),
        ("A", "128/64", "16"), ("B", "128/64", "16"), ("C", "128/64", "16"),
        ("A", "512/32", "1"), ("A", "512/32", "4"), ("A", "512/32", "16"),
    ]  # fmt: skip
    assert (rows[1]["quant"], rows[1]["tp"], rows[1]["num_devices"]) == ("fp8", "1", "1")
    assert rows[7]["invalid_reasons"] == "client CPU 83 %, limit 70 %"
    assert float(rows[0]["kl"]) == 0.00002


def test_markdown_tables_are_tables(three: tuple[Comparison, tuple[Section, ...]]) -> None:
    lines = render_markdown(*three).split("\n")
    for index, line in enumerate(lines):
        if line.startswith("| ---"):
            width = line.count("|")
            assert lines[index - 1].replace("\\|", "").count("|") == width
            for row in lines[index + 1 :]:
                if not row.startswith("|"):
                    break
                assert row.replace("\\|", "").count("|") == width, row
    assert "".join(lines).count("<details>") == "".join(lines).count("</details>") > 0


def test_every_definition_is_printed(html: str) -> None:
    rows = [[cell.strip() for cell in row] for row in Page(html).tables["table-definitions"]]
    assert rows[1:] == [[name, unit, meaning] for name, (unit, meaning) in METRICS.items()]


def test_what_is_not_known_is_said_not_made_up(tmp_path: Path) -> None:
    comparison, parts = rendered([make_run(tmp_path, "run", concurrency=(1,), requests=12, invalid={1: "drift"})])
    said = {section.id: " ".join(section.lead) for section in parts}
    assert said["size"] == "No engine card in these runs."
    assert said["quality"] == "Not known of A: only engines with a card are validated."
    assert said["distributions"] == "No valid point to look into."
    assert said["runs"] == "One run: nothing to compare."
    Page(render_html(comparison, parts))


def test_a_run_in_which_everything_failed_is_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", concurrency=(4,), error_rate=1.0, invalid={4: "40 of 40 requests failed"})
    comparison, parts = rendered([run])
    cells = Page(render_html(comparison, parts)).cells
    assert "40 of 40 requests failed" in cells
    assert any("truncated 40" in cell for cell in cells)
    render_markdown(comparison, parts)
    assert render_csv(comparison).count("\n") == 2


# ---- names that try to be more than text --------------------------------------------------------------------------


def test_names_are_text_in_html(evil: tuple[Comparison, tuple[Section, ...]], html: str) -> None:
    page, plain = Page(render_html(*evil)), Page(html)
    assert len(evil[0].runs) == len(EVIL)
    for name in EVIL:
        assert name in page.cells or any(cell.endswith(f" {name}") for cell in page.cells), name
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    assert len([script for script in page.all("script") if not script]) == 2
    assert page.text_of("title") == ["Comparison of 7 runs – tkit"]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_names_are_text_in_the_plots_of_html(evil: tuple[Comparison, tuple[Section, ...]]) -> None:
    page = Page(render_html(*evil))
    data = [
        source
        for attributes, source in zip(page.all("script"), page.text_of("script"), strict=True)
        if attributes.get("type") == "application/json"
    ]
    assert data
    for source in data:
        assert "<" not in source
        json.loads(source)
    assert script_json("</script><!--\u2028&") == '"\\u003c/script\\u003e\\u003c!--\\u2028\\u0026"'


def test_names_are_text_in_csv(evil: tuple[Comparison, tuple[Section, ...]]) -> None:
    rows = list(csv.DictReader(io.StringIO(render_csv(evil[0]))))
    assert {row["name"] for row in rows} == {neutral(name) for name in EVIL}
    for row in rows:
        for value in row.values():
            assert not value.startswith(("=", "+", "@", "\t")), value
            assert not value.startswith("-") or re.fullmatch(r"-\d.*", value)


@pytest.mark.parametrize("value", ["=1+1", "+1", "-1+cmd()", "@SUM(A1)", "\t=1", " =1", "＝1"])
def test_formulas_are_quoted(value: str) -> None:
    assert neutral(value) == f"'{value}"
    assert neutral(-1.5) == -1.5
    assert neutral("a=b") == "a=b"


def test_names_are_text_in_markdown(evil: tuple[Comparison, tuple[Section, ...]]) -> None:
    markdown = render_markdown(*evil)
    allowed = {"<br>", "<details>", "</details>", "<summary>", "</summary>", "<!-- -->"}
    assert set(re.findall(r"<[^>]*>", markdown)) <= allowed
    assert not re.search(r"(?<!\\)\]\(|@user|://|(?<!\\)`", markdown)
    assert escape("a|b") == "a\\|b"
    assert escape("int4_awq _x_ *y*") == "int4_awq \\_x\\_ \\*y\\*"
    assert escape("line\nbreak") == "line break"


def test_names_are_text_in_json(evil: tuple[Comparison, tuple[Section, ...]]) -> None:
    assert [run["name"] for run in json.loads(to_json(evil[0]))["runs"]] == list(EVIL)


def test_the_picture_survives_names(evil: tuple[Comparison, tuple[Section, ...]]) -> None:
    plot = next(plot for section in evil[1] for plot in section.plots)
    assert render_png(plot, evil[0], scale=1)[:4] == b"\x89PNG"


def test_the_noisiest_layer_and_the_samples_of_a_validation_are_shown(tmp_path: Path) -> None:
    """Text of models is text everywhere; records that hold neither, or nonsense, show nothing."""
    sample = {"prompt": EVIL[0], "source": "| a\nb", "engine": EVIL[1], "same_tokens": 3, "tokens": 32}
    told = {"layer_snr_db": [31.25, None, 18.449, 40.0], "samples": [sample, 7]}
    runs, _ = read_runs(
        [
            make_run(tmp_path, "a", engine=card("fp8"), quality=validation() | told, concurrency=(1,), requests=12),
            make_run(tmp_path, "b", engine=card("none"), quality=validation() | {"layer_snr_db": 3}, concurrency=(1,)),
        ]
    )
    comparison = compare(runs, baseline=runs[0], left_out=(), created="2025-06-02T10:00:00+00:00", tkit="0")
    parts = sections(comparison, runs)
    page = Page(render_html(comparison, parts))
    (rows,) = (rows for name, rows in page.tables.items() if name == "table-samples")
    assert [cell.strip() for cell in rows[1]][1:] == [EVIL[0], "| a\nb", EVIL[1], "3 of 32"] and len(rows) == 2
    quality = page.tables["table-quality"]
    assert [" ".join(row[-2].split()) for row in quality[1:]] == ["18.4 layer 2", "\N{EN DASH}"]
    markdown = render_markdown(comparison, parts)
    folded = markdown.split("<details><summary>What source and engine go on with</summary>")[1].split("</details>")[0]
    assert "&lt;/script&gt;" in folded and "3 of 32" in folded and "<script" not in folded
