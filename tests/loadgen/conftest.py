"""Servers to measure, started once."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import paced_server


@pytest.fixture(scope="session")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real Triton whose tokens come after 50 ms and then every 10 ms, and which keeps a record of when."""
    with paced_server(tmp_path_factory.mktemp("paced"), ttft_ms=50, itl_ms=10) as server:
        yield server


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
