"""Finding, reading and checking engine directories. Knows their names and cards; never what is inside a checkpoint."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from tkit.errors import InputError, did_you_mean
from tkit.files import from_mapping, read_json, sha256_file
from tkit.specs.engine import CARD_FILE, CARD_SCHEMA, EngineCard
from tkit.specs.progress import Progress

ENGINES_DIR = Path("engines")


def find_engine(engine: str | Path | None = None, engines_dir: Path = ENGINES_DIR) -> Path:
    """The absolute path of an engine: a directory, a name under `engines_dir`, or (None) the newest complete one."""
    if engine is None:
        return _newest(engines_dir)
    for directory in (Path(engine), engines_dir / engine):
        if (directory / CARD_FILE).is_file():
            return directory.resolve()
    for directory in (Path(engine), engines_dir / engine):
        if directory.is_dir():
            raise InputError(
                f"{directory}: not a complete engine, it holds no {CARD_FILE}",
                hint="the build did not finish or the directory is something else; run tkit build",
            )
    names = [directory.name for directory in complete_engines(engines_dir)]
    raise InputError(
        f'no engine "{engine}"{did_you_mean(str(engine), names)}',
        hint=f"engines in {engines_dir}: {', '.join(names) if names else 'none; run tkit build'}",
    )


def find_checkpoint(engine: str | None) -> Path:
    """An engine as `find_engine` finds it, or the directory of a checkpoint without a card, whoever wrote it:
    TensorRT-LLM's or Hugging Face's."""
    directory = Path(engine) if engine else None
    if directory is not None and (directory / "config.json").is_file() and not is_engine(directory):
        return directory.resolve()
    return find_engine(engine)


def is_engine(directory: Path) -> bool:
    return (directory / CARD_FILE).is_file()


def complete_engines(engines_dir: Path = ENGINES_DIR) -> list[Path]:
    """Directories under `engines_dir` that hold a card, by name; hidden ones are builds in progress and servers."""
    if not engines_dir.is_dir():
        return []
    directories = [path for path in engines_dir.iterdir() if not path.name.startswith(".")]
    return sorted(path for path in directories if (path / CARD_FILE).is_file())


def _newest(engines_dir: Path) -> Path:
    directories = complete_engines(engines_dir)
    if not directories:
        raise InputError(f"no engine in {engines_dir}", hint="build one: tkit build")
    return max(directories, key=lambda directory: read_card(directory).created).resolve()


def read_card(engine_dir: Path) -> EngineCard:
    """The engine's card; a card of another schema is refused before its keys are."""
    path = engine_dir / CARD_FILE
    if not path.is_file():
        raise InputError(f"{engine_dir}: not a complete engine, it holds no {CARD_FILE}", hint="run tkit build")
    try:
        values = read_json(path)
        schema = values.get("schema") if isinstance(values, dict) else None
        if schema != CARD_SCHEMA:
            raise InputError(f'{path}: schema is {schema!r}, this tkit reads "{CARD_SCHEMA}"')
        return from_mapping(EngineCard, values, str(path))
    except InputError as error:  # also when it is not this engine that was asked for, but the newest
        error.hint = f"name another engine, or remove {engine_dir} and build it again"
        raise


def verify_files(engine_dir: Path, card: EngineCard, progress: Progress | None = None) -> None:
    """Every file the card lists is there with its size and sha256; raises with the whole list of those that are not."""
    problems = []
    for done, (name, facts) in enumerate(card.files.items()):
        if progress is not None:
            progress.step("verifying", done, len(card.files))
        problem = _file_problem(engine_dir, name, facts["bytes"], facts["sha256"])
        if problem:
            problems.append(f"{name}: {problem}")
    if problems:
        raise InputError(
            f"{engine_dir}: {len(problems)} of {len(card.files)} files are not as built",
            problems=problems,
            hint=f"rebuild the engine: {card.command} --force",
        )
    if progress is not None:
        progress.step("verifying", len(card.files), len(card.files))


def _file_problem(engine_dir: Path, name: str, num_bytes: int, sha256: str) -> str | None:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return "path leaves the engine directory"
    path = engine_dir / name
    if not path.is_file():
        return "missing"
    if path.stat().st_size != num_bytes:
        return f"{path.stat().st_size} bytes, the card says {num_bytes}"
    found = sha256_file(path)
    return None if found == sha256 else f"sha256 is {found[:12]}..., the card says {sha256[:12]}..."
