"""Servers to measure, started once."""

from __future__ import annotations

import importlib
import shutil
import subprocess
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


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Key and certificate of localhost; the certificate is its own authority."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, authority = (tmp_path_factory.mktemp("tls") / name for name in ("key.pem", "authority.pem"))
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", authority], check=True, capture_output=True)
    return key, authority
