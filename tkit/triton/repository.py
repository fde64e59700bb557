"""A model repository on disk: `<model>/config.pbtxt` and `<model>/1/` with its code. Never knows what a model does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tkit.files import write_atomic
from tkit.triton.model_config import ModelConfig, render_model_config


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model ready to be laid out. In its version directory: `source` as model.py, which Triton's Python backend imports;
    `files`, name -> text; `links`, name -> path on the machine that will serve, which may be another."""

    config: ModelConfig
    source: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, Path] = field(default_factory=dict)


def repository_files(models: Sequence[ServedModel]) -> dict[str, str]:
    """Relative path -> text of every file of the repository."""
    files = {}
    for model in models:
        files[f"{model.config.name}/config.pbtxt"] = render_model_config(model.config)
        own = dict(model.files) | ({"model.py": model.source} if model.source is not None else {})
        files |= {f"{model.config.name}/1/{name}": text for name, text in own.items()}
    return files


def write_repository(repository: Path, models: Sequence[ServedModel]) -> None:
    for name, text in repository_files(models).items():
        write_atomic(repository / name, text)
    for model in models:
        version = repository / model.config.name / "1"
        version.mkdir(parents=True, exist_ok=True)  # Triton wants one, even empty
        for name, path in model.links.items():
            (version / name).symlink_to(path)
