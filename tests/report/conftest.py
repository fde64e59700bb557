"""Makes `factory` importable, and the runs that most tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from factory import card, make_run, validation


@pytest.fixture(scope="session")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """none, fp8 10 % faster with three repeats, int4_awq with a hole at C = 4 and an invalid point at C = 16."""
    reports = tmp_path_factory.mktemp("reports")
    runs = [
        make_run(
            reports, "a", engine=card("none"), quality=validation(kl=0.00002, ppl=21.12), shapes=("128/64", "512/32")
        ),
        make_run(reports, "b", engine=card("fp8"), quality=validation(), speed=0.9, seed=1, repeats=3, error_rate=0.01),
        make_run(reports, "c", engine=card("int4_awq"), speed=0.7, seed=2, invalid={16: "client CPU 83 %, limit 70 %"}),
    ]
    hole = runs[2] / "points" / "128x64-c4-r1"
    for path in hole.iterdir():
        path.unlink()
    hole.rmdir()
    return runs
