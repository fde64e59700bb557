"""What the load generator adds to the numbers on one machine, measured against a server whose tokens come at known times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

CLIENT_SCHEMA = "tkit.client/1"
CLIENT_FILE = "client.json"  # in the reports directory


@dataclass(frozen=True, kw_only=True)
class ClientCalibration:
    """One protocol. Errors are percentiles, "p50" and "p99", of what the client says minus what the server did."""

    protocol: str
    ttft_error_ms: Mapping[str, float]
    gap_error_ms: Mapping[str, float]  # of the gap between two chunks, whichever its sign
    cpu_us_per_token: float  # at the heaviest load that was held
    max_streams: int | None  # None: none was held, the machine was too busy
    max_tok_s: float | None
    limit: str  # what ended the search: why heavier loads were not held, or that none were tried


@dataclass(frozen=True, kw_only=True)
class ClientRecord:
    """`client.json`. It holds for this machine and this tkit only."""

    schema: str = CLIENT_SCHEMA
    tkit: str
    machine: Mapping[str, str] = field(default_factory=dict)
    created: str
    protocols: tuple[ClientCalibration, ...]

    def of(self, protocol: str) -> ClientCalibration | None:
        return next((found for found in self.protocols if found.protocol == protocol), None)
