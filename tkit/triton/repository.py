"""A model repository on disk: `<model>/config.pbtxt` and `<model>/1/model.py`. Never knows what the model does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tkit.files import write_atomic
from tkit.triton.model_config import ModelConfig, render_model_config


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model ready to be laid out. `source` is the text of model.py, which Triton's Python backend imports."""

    config: ModelConfig
    source: str


def repository_files(model: ServedModel) -> Mapping[str, str]:
    """Relative path -> text of every file of the repository."""
    return {
        f"{model.config.name}/config.pbtxt": render_model_config(model.config),
        f"{model.config.name}/1/model.py": model.source,
    }


def write_repository(repository: Path, model: ServedModel) -> None:
    for name, text in repository_files(model).items():
        write_atomic(repository / name, text)
