"""Models of every family, made once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from families import make_model


@pytest.fixture(scope="session")
def family_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family_model("gemma2") -> the directory of that tiny model."""
    made: dict[str, Path] = {}

    def model(name: str) -> Path:
        if name not in made:
            made[name] = make_model(name, tmp_path_factory.mktemp(name))
        return made[name]

    return model
