"""Report: run directories -> report.html, report.md, report.csv, report.json in one directory; gates for a pipeline."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from tkit import __version__
from tkit.errors import GateFailed, InputError
from tkit.files import name_problem, sync_directory, to_json, write_atomic
from tkit.planner.cost import read_prices
from tkit.report.compare import compare, find_baseline
from tkit.report.gates import asked, evaluate, failures, summary
from tkit.report.plots.png import render_png
from tkit.report.read import LeftOut, Run, newest_runs, read_runs
from tkit.report.record import Comparison
from tkit.report.render_csv import render_csv
from tkit.report.render_html import render_html
from tkit.report.render_junit import render_junit
from tkit.report.render_markdown import render_markdown
from tkit.report.sections import Section, sections
from tkit.report.verdict import verdicts
from tkit.specs.gate import Gate
from tkit.specs.progress import Progress
from tkit.stages.wall import with_walls

REPORTS_DIR = Path("reports")
BASELINES = "baselines"  # reports/baselines/<name>/: runs that were kept to be compared with
HTML_FILE = "report.html"
MAX_SUMMARY_BYTES = 1 << 20  # GitHub shows nothing of a longer one


def report(
    runs: Sequence[Path],
    progress: Progress,
    *,
    out: Path | None = None,
    baseline: str | None = None,
    with_png: bool = False,
    gates: Sequence[Gate] = (),
    spared: Sequence[Path] = (),
    junit: Path | None = None,
    step_summary: Path | None = None,
    prices: Path | None = None,
    reports_dir: Path = REPORTS_DIR,
) -> tuple[Path, Comparison]:
    """(path of report.html, what report.json holds). Without `runs`: the newest readable one of every engine.

    `gates` are evaluated and reported, not acted on: that is `check_gates`. They are not held against the runs in `spared`.
    `junit` is written and `step_summary`
    appended to after the report is in place.
    """
    found, left_out, chosen = _read(runs, baseline, reports_dir, progress)
    now = datetime.now(UTC)
    comparison = compare(
        found,
        baseline=chosen,
        left_out=left_out,
        created=now.isoformat(timespec="seconds"),
        tkit=__version__,
        asked=asked(gates),
    )
    comparison = with_walls(comparison, read_prices(prices) if prices is not None else None)
    outcomes = evaluate(gates, comparison, [run.id for run in comparison.runs if Path(run.directory) in spared])
    comparison = replace(comparison, verdict=verdicts(comparison), gates=outcomes)
    progress.step("rendering", 0, 1)
    parts = sections(comparison, found)
    files: dict[str, str | bytes] = {
        "report.json": to_json(comparison),
        "report.csv": render_csv(comparison),
        "report.md": render_markdown(comparison, parts),
        HTML_FILE: render_html(comparison, parts),
    }
    if with_png:
        for plot in next(part for part in parts if part.id == "pareto").plots[:1]:
            files["pareto.png"] = render_png(plot, comparison)
    directory = out or _free_name(reports_dir / f"report-{now:%Y%m%dT%H%M%SZ}")
    _publish(directory, files)
    if junit is not None:
        _write_junit(junit, comparison)
    if step_summary is not None:
        _append_summary(step_summary, comparison, parts)
    progress.step("rendering", 1, 1)
    return directory / HTML_FILE, comparison


def check_gates(comparison: Comparison, path: Path) -> None:
    """Raises GateFailed unless every gate passed. `path`: where the report is."""
    problems = failures(comparison)
    if problems:
        raise GateFailed(summary(comparison), problems=problems, hint=f"every number: {path}")


def _write_junit(path: Path, comparison: Comparison) -> None:
    try:
        write_atomic(path, render_junit(comparison))
    except OSError as error:
        raise InputError(
            f"{path}: cannot write the JUnit file: {error.strerror}", hint="choose another --junit"
        ) from error


def _append_summary(path: Path, comparison: Comparison, parts: Sequence[Section]) -> None:
    """What stands open in report.md, as far as the file takes it."""
    brief = [part for part in parts if part.is_brief]
    try:
        left = MAX_SUMMARY_BYTES - (path.stat().st_size if path.exists() else 0)
        written = render_markdown(comparison, brief, lambda text: len(text.encode()) <= left).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(written)
    except OSError as error:
        raise InputError(
            f"{path}: cannot append the summary: {error.strerror}", hint="choose another --step-summary"
        ) from error


def _read(
    paths: Sequence[Path], baseline: str | None, reports_dir: Path, progress: Progress
) -> tuple[tuple[Run, ...], tuple[LeftOut, ...], Run | None]:
    """The runs in the order they are shown, what was left out, and the baseline when there is something to compare."""
    if paths:
        named = [_directory(path, reports_dir) for path in paths]
        kept = find_baseline_directory(baseline, reports_dir) if baseline is not None else None
        if kept is not None:
            baseline = str(kept)
            if kept.resolve() not in _resolved(named):
                named.insert(0, kept)
        found, left_out = read_runs(named, progress)
    else:
        found, left_out = _read_newest(reports_dir, progress)
    if not found:
        raise InputError(
            "none of the runs can be reported",
            problems=[f"{left.path}: {left.reason}" for left in left_out],
            hint="measure again: tkit sweep",
        )
    if baseline is not None:
        chosen = find_baseline(found, baseline)
    elif paths:
        chosen = found[0]
    else:
        chosen = next((run for run in found if run.engine is not None and run.engine.quant == "none"), found[0])
        found = (chosen, *(run for run in found if run is not chosen))
    return found, left_out, chosen if len(found) > 1 else None


def _read_newest(reports_dir: Path, progress: Progress) -> tuple[tuple[Run, ...], tuple[LeftOut, ...]]:
    """Per engine the newest run that can be read; oldest first."""
    engines = newest_runs(reports_dir)
    if not engines:
        raise InputError(f"{reports_dir}: no sweep to report", hint="measure a server first: tkit sweep")
    paths: list[Path] = []
    unreadable: list[LeftOut] = []
    for candidates in engines:
        for path in candidates:
            readable, left_out = read_runs([path])
            if readable:
                paths.append(path)
                break
            unreadable.extend(left_out)
    found, left_out = read_runs(paths, progress)
    found = tuple(sorted(found, key=lambda run: (run.manifest.started, run.name)))
    for run in found:
        progress.note(f"{run.directory}: {run.name}, {run.manifest.started}")
    return found, (*left_out, *unreadable)


def _directory(run: Path, reports_dir: Path) -> Path:
    """A directory, or the name of one under `reports_dir`."""
    return reports_dir / run if not run.exists() and (reports_dir / run).is_dir() else run


def find_baseline_directory(name: str, reports_dir: Path = REPORTS_DIR) -> Path | None:
    """A directory, or a baseline that was kept under that name; None where `name` means something else, such as a run."""
    return next((path for path in (Path(name), reports_dir / BASELINES / name) if path.is_dir()), None)


def baseline_directory(name: str) -> Path:
    """Where a baseline of that name is kept."""
    if problem := name_problem(name):
        raise InputError(f"--save-baseline {problem}")
    return REPORTS_DIR / BASELINES / name


def copy_directory(source: Path, target: Path) -> None:
    """A copy in place of what was there; never a part of one."""
    work = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(source, work)
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
        sync_directory(target.parent)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}", hint="choose another name") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _resolved(paths: Sequence[Path]) -> set[Path]:
    return {path.resolve() for path in paths}


def _free_name(directory: Path) -> Path:
    """The directory, or with a number behind it when another report of the same second has it."""
    number = 2
    candidate = directory
    while candidate.exists():
        candidate = directory.with_name(f"{directory.name}-{number}")
        number += 1
    return candidate


def _publish(directory: Path, files: dict[str, str | bytes]) -> None:
    """All files at once: a new directory appears complete; in an existing one each file is replaced whole."""
    work = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir()
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            with open(work / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        sync_directory(work)
        if directory.exists():
            for name in files:
                (work / name).replace(directory / name)
            sync_directory(directory)
        else:
            work.rename(directory)
        sync_directory(directory.parent)
    except OSError as error:
        raise InputError(
            f"{directory}: cannot write the report: {error.strerror}", hint="choose another --out"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
