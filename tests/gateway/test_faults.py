"""The small form of `benchmarks/serve_faults.py`: clients that leave, nonsense, and too much of everything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_server_gets_over_what_its_clients_do() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.serve_faults", "--requests", "40"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    counts = re.fullmatch(
        r"(\d+) answered, (\d+) left, (\d+) malformed, (\d+) oversized", result.stdout.splitlines()[0]
    )
    assert counts is not None
    assert all(int(count) > 0 for count in counts.groups())
