"""Servers to measure, started once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
servers: Any = importlib.import_module("servers")


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return servers.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real Triton whose tokens come after 50 ms and then every 10 ms, and which keeps a record of when."""
    with servers.paced_server(tmp_path_factory.mktemp("paced"), ttft_ms=50, itl_ms=10) as server:
        yield server


@pytest.fixture(scope="session")
def fake_url() -> Iterator[str]:
    with servers.fake_server() as url:
        yield url
