"""Import: result files of another load generator -> one run directory that `tkit report` reads."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tkit import __version__
from tkit.errors import InputError
from tkit.files import name_problem, sha256_file
from tkit.loadgen.importers import AIPERF_FILE, Imported, read_result, summarise_import
from tkit.loadgen.run_directory import RunDirectory
from tkit.specs.record import Manifest, PointSummary


@dataclass(frozen=True, kw_only=True)
class ImportRecord:
    directory: str
    manifest: Manifest
    points: tuple[PointSummary, ...]


def import_results(
    files: Sequence[Path], *, out: Path, label: str | None = None, name: str | None = None
) -> ImportRecord:
    """One run of all the files, which must come from one tool. Raises InputError for the first that cannot be read."""
    if name is not None and (problem := name_problem(name)):
        raise InputError(f"--name {problem}")
    results = [read_result(path) for path in files]
    first = results[0]
    others = sorted({result.definitions for result in results} - {first.definitions})
    if others:
        raise InputError(
            f"one run cannot hold {first.definitions} and {', '.join(others)}", hint="import them one by one"
        )
    sources = [path / AIPERF_FILE if path.is_dir() else path for path in files]
    started = (
        datetime.fromtimestamp(sources[0].stat().st_mtime, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    )
    measured = []
    repeats: Counter[tuple[object, ...]] = Counter()
    for result in results:
        for point in result.points:
            place, summary = summarise_import(result, point, 1, started)
            key = (place.shape, place.concurrency, place.rate)
            repeats[key] += 1
            if repeats[key] > 1:
                place, summary = summarise_import(result, point, repeats[key], started)
            measured.append((place, summary, point.records))
    points = tuple(summary for _, summary, _ in measured)
    run = RunDirectory.create(out, name or f"{first.tool}-{sources[0].stem}", is_fixed=name is not None)
    manifest = _manifest(run, first, points, sources, label, started)
    run.write_manifest(manifest)
    run.journal("started", tkit=__version__)
    for place, summary, records in measured:
        run.write_point(place, summary, records)
        run.journal("point", point=place.slug, is_valid=summary.is_valid)
    run.write_summary(manifest, points)
    run.journal("finished")
    run.close()
    return ImportRecord(directory=str(run.path), manifest=manifest, points=points)


def _manifest(
    run: RunDirectory,
    first: Imported,
    points: Sequence[PointSummary],
    sources: Sequence[Path],
    label: str | None,
    started: str,
) -> Manifest:
    digests = {path.name: sha256_file(path) for path in sources}
    return Manifest(
        definitions=first.definitions,
        run=run.path.name,
        label=label or first.model or run.path.name,
        profile=f"imported from {first.definitions}",
        profile_digest=next(iter(digests.values())),
        seed=0,
        protocol=first.endpoint or "unknown",
        url="",
        model=first.model,
        shapes=tuple(dict.fromkeys(point.shape for point in points)),
        concurrency=tuple(dict.fromkeys(point.concurrency for point in points if point.concurrency is not None)),
        rates=tuple(dict.fromkeys(point.rate for point in points if point.rate is not None)),
        arrivals=next((point.arrivals for point in points if point.arrivals), None),
        repeats=max(point.repeat for point in points),
        identity={
            "tkit": __version__,
            "token_source": points[0].token_source,
            "imported": {"tool": first.tool, "version": first.version, "files": digests, **first.settings},
        },
        command=shlex.join(["tkit", "import", *map(str, sources)]),
        started=started,
    )
