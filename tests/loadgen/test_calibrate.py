"""The client's own error bars and ceiling."""

from __future__ import annotations

import numpy as np
import pytest

from tkit.loadgen import calibrate as module
from tkit.loadgen.calibrate import Load, calibrate


@pytest.mark.parametrize("protocol", ["openai", "triton-grpc"])
def test_a_client_is_measured(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    monkeypatch.setattr(module, "FIRST_STREAMS", 2)
    monkeypatch.setattr(module, "STREAMS", (4,))
    monkeypatch.setattr(module, "MAX_DELAY_MS", {"p50": 1000.0, "p99": 1000.0})
    monkeypatch.setattr(module, "MAX_SERVER_DELAY_MS", 1000.0)
    said: list[str] = []
    found = calibrate(protocol, said.append)
    assert said == [f"{protocol}, 2 streams", f"{protocol}, 4 streams"]
    assert 0 < found.ttft_error_ms["p50"] <= found.ttft_error_ms["p99"] < 1000
    assert 0 <= found.gap_error_ms["p50"] <= found.gap_error_ms["p99"] < 1000
    assert found.cpu_us_per_token > 0
    assert (found.max_streams, found.limit) == (4, "4 streams were held, more were not tried")
    assert found.max_tok_s is not None
    assert 4 * 64 / 0.68 * 0.3 < found.max_tok_s <= 4 * 64 / 0.68 * 1.05


def load(**changes: object) -> Load:
    quiet = np.full(1000, 0.1)
    values = dict(
        streams=64, tok_s=6000.0, cpu_share=0.1, ttft_errors=quiet, gap_errors=quiet, delays=quiet, send_delays=quiet,
        server_delays=quiet,
    )  # fmt: skip
    return Load(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({}, None),
        ({"delays": np.full(1000, 3.0)}, "messages were seen 3.0 ms late at p50 (limit 2 ms)"),
        ({"delays": np.repeat([0.1, 30.0], [970, 30])}, "messages were seen 30.0 ms late at p99 (limit 20 ms)"),
        ({"send_delays": np.full(1000, 3.0)}, "requests were sent 3.0 ms late at p50 (limit 2 ms)"),
        ({"cpu_share": 0.95}, "the client used 95% of a core (limit 90%)"),
        ({"delays": np.full(1000, 9.0), "server_delays": np.full(1000, 6.0)}, "the mock server was 6.0 ms late"),
    ],
)
def test_what_ends_the_search(changes: dict[str, object], limit: str | None) -> None:
    assert load(**changes).limit == limit


def test_a_busy_machine_has_no_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_STREAMS", 2)
    monkeypatch.setattr(module, "MAX_CPU_SHARE", 0.0)
    found = calibrate("openai", lambda text: None)
    assert (found.max_streams, found.max_tok_s) == (None, None)
    assert found.limit.startswith("2 streams: ")
