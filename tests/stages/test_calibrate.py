"""`tkit sweep --calibrate`, and what a later sweep takes from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tkit.errors import InputError
from tkit.files import read_json, write_json
from tkit.loadgen import calibrate as client
from tkit.specs.client import ClientCalibration
from tkit.stages import calibrate as stage

Tkit = Callable[..., Result]


def calibration(protocol: str, error_ms: float = 0.2) -> ClientCalibration:
    errors = {"p50": error_ms, "p99": 2 * error_ms}
    return ClientCalibration(
        protocol=protocol, ttft_error_ms=errors, gap_error_ms=errors, cpu_us_per_token=9.5, max_streams=512,
        max_tok_s=47_000.0, limit="1024 streams: too many",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each measurement takes seconds and has tests of its own; what they gave is here what was asked."""
    names: list[str] = []

    def measure(protocol: str, on_progress: Callable[[str], None]) -> ClientCalibration:
        names.append(protocol)
        return calibration(protocol, 0.1 * len(names))

    monkeypatch.setattr(client, "calibrate", measure)
    return names


def test_all_protocols_are_measured_and_one_again(tkit: Tkit, tmp_path: Path, measured: list[str]) -> None:
    result = tkit("sweep", "--calibrate")
    assert result.exit_code == 0, result.stderr
    assert measured == ["triton-grpc", "triton-http", "openai"]
    assert result.stdout.splitlines()[-1] == "reports/client.json"
    assert "openai: 1024 streams: too many" in result.stderr
    assert tkit("sweep", "--calibrate", "--protocol", "openai-chat").exit_code == 0
    found = stage.find_calibration(tmp_path / "reports", "openai-chat")
    assert found is not None
    assert (found.protocol, found.ttft_error_ms["p50"]) == ("openai", pytest.approx(0.4))
    assert stage.find_calibration(tmp_path / "reports", "triton-grpc") == calibration("triton-grpc", 0.1)


def test_another_machine_or_tkit_has_not_been_measured(tmp_path: Path) -> None:
    assert stage.find_calibration(tmp_path, "openai") is None
    stage.run_calibration(tmp_path, "openai")
    record = read_json(tmp_path / "client.json")
    write_json(tmp_path / "client.json", {**record, "tkit": "0.0.1"})
    assert stage.find_calibration(tmp_path, "openai") is None
    write_json(tmp_path / "client.json", {**record, "machine": {**record["machine"], "cores": "1"}})
    assert stage.find_calibration(tmp_path, "openai") is None
    write_json(tmp_path / "client.json", record)
    assert stage.find_calibration(tmp_path, "openai") is not None
    assert stage.find_calibration(tmp_path, "triton-grpc") is None


def test_a_record_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "client.json").write_text("{")
    with pytest.raises(InputError, match="client.json: not readable as JSON"):
        stage.find_calibration(tmp_path, "openai")


def test_nothing_else_is_asked_for(tkit: Tkit) -> None:
    result = tkit("sweep", "--calibrate", "--url", "h:1", "--requests", "2")
    assert result.exit_code == 2
    assert "leave out --url, --requests" in result.stderr
