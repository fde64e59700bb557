"""The client measured against the mock server: what it adds to a time, and how many tokens a second it can follow.

Every request is compared with the server's own record of it, so a server that was late does not count against the client.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tkit.loadgen.closed_loop import ClosedLoop, run_closed_loop
from tkit.loadgen.exchange import Exchange, RequestRecord, request_record
from tkit.loadgen.http import HttpConnections, http_address
from tkit.loadgen.load import loop_factory
from tkit.loadgen.load_trace import LoadTrace
from tkit.loadgen.metrics import assign_phases, tokens_between
from tkit.loadgen.mock_server import DEFAULT_ITL_MS, DEFAULT_TTFT_MS, running_mock
from tkit.loadgen.protocols import Client, make_client
from tkit.specs.client import ClientCalibration
from tkit.units import NS_PER_MS, NS_PER_S

MODEL = "exact"
OSL = 64
E2E_S = (DEFAULT_TTFT_MS + (OSL - 1) * DEFAULT_ITL_MS) / 1000
FIRST_STREAMS = 32  # here the errors are taken
STREAMS = (64, 128, 256, 512, 1024, 2048)
ROUNDS = 2  # measured requests per stream
TIMEOUT_S = 60.0

# A load is held when all of these hold.
MAX_DELAY_MS = {"p50": 2.0, "p99": 20.0}  # from the server's send to the client's time, and from due to sent
MAX_CPU_SHARE = 0.9  # of a core; beyond this nothing is left for a busier moment
MAX_SERVER_DELAY_MS = 5.0  # the median; a server that is later is itself the limit


@dataclass(frozen=True, kw_only=True)
class Load:
    """What came of so many streams. Errors and delays in milliseconds."""

    streams: int
    tok_s: float
    cpu_share: float
    ttft_errors: np.ndarray
    gap_errors: np.ndarray
    delays: np.ndarray
    send_delays: np.ndarray
    server_delays: np.ndarray

    @property
    def limit(self) -> str | None:
        """Why this load was not held."""
        if float(np.median(self.server_delays)) > MAX_SERVER_DELAY_MS:
            return f"the mock server was {np.median(self.server_delays):.1f} ms late"
        for words, delays in (("messages were seen", self.delays), ("requests were sent", self.send_delays)):
            for name, most in MAX_DELAY_MS.items():
                found = _percentiles(delays)[name]
                if found > most:
                    return f"{words} {found:.1f} ms late at {name} (limit {most:g} ms)"
        if self.cpu_share > MAX_CPU_SHARE:
            return f"the client used {self.cpu_share:.0%} of a core (limit {MAX_CPU_SHARE:.0%})"
        return None


def calibrate(protocol: str, on_progress: Callable[[str], None]) -> ClientCalibration:
    """Takes about two seconds per load, until one is not held."""
    loads: list[Load] = []
    limit = f"{STREAMS[-1]} streams were held, more were not tried"
    with running_mock() as url, asyncio.Runner(loop_factory=loop_factory()) as runner:
        for streams in (FIRST_STREAMS, *STREAMS):
            on_progress(f"{protocol}, {streams} streams")
            load = runner.run(_measure(protocol, url, streams))
            if load.limit is not None:
                limit = f"{streams} streams: {load.limit}"
                loads = loads or [load]
                break
            loads.append(load)
    first, last = loads[0], loads[-1]
    is_held = last.limit is None
    return ClientCalibration(
        protocol=protocol,
        ttft_error_ms=_percentiles(first.ttft_errors),
        gap_error_ms=_percentiles(first.gap_errors),
        cpu_us_per_token=last.cpu_share / last.tok_s * 1e6,
        max_streams=last.streams if is_held else None,
        max_tok_s=last.tok_s if is_held else None,
        limit=limit,
    )


async def _measure(protocol: str, url: str, streams: int) -> Load:
    client = make_client(protocol, url, MODEL, _word_ends)
    await client.open(TIMEOUT_S)
    try:
        exchanges = list(_exchanges(client, streams))
        load = ClosedLoop(
            concurrency=streams,
            num_warmup=streams,
            num_requests=ROUNDS * streams,
            min_duration_s=0,
            max_duration_s=None,
            spread_s=E2E_S,
            idle_timeout_s=TIMEOUT_S,
            total_timeout_s=TIMEOUT_S,
        )
        trace = await run_closed_loop(client, exchanges, load, lambda live: None)
        records = [request_record(exchange, client.answer(exchange)) for exchange in trace.sent]
        did = {line["id"]: line for line in await _record(url)}
    finally:
        await client.close()
    return _compare(streams, records, trace, did)


def _exchanges(client: Client, streams: int) -> Iterator[Exchange]:
    for index in range((2 + ROUNDS + 1) * streams):
        request = client.request(str(index), "word " * 16, OSL, 0)
        yield Exchange(index=index, request=request, isl=16, osl=OSL)


async def _record(url: str) -> list[dict[str, Any]]:
    connections = HttpConnections(http_address(url), {})
    try:
        reply = await connections.ask("/record", TIMEOUT_S)
    finally:
        connections.close()
    record: list[dict[str, Any]] = json.loads(reply.body)
    return record


def _compare(streams: int, records: Sequence[RequestRecord], trace: LoadTrace, did: dict[str, dict[str, Any]]) -> Load:
    assign_phases(records, trace)
    pairs = [(record, did[str(record.id)]) for record in records if record.phase == "measured" and record.is_ok]
    ttft_errors, gap_errors, delays, server_delays = [np.empty(0)], [np.empty(0)], [np.empty(0)], [np.empty(0)]
    for record, line in pairs:
        seen, sent = np.asarray(record.token_ns), np.asarray(line["sent_ns"])
        ttft_errors.append(np.array([(seen[0] - record.sent_ns) - (sent[0] - line["arrived_ns"])]))
        gap_errors.append(np.abs(np.diff(seen) - np.diff(sent)))
        delays.append(seen - sent)
        server_delays.append(sent - np.asarray(line["due_ns"]))
    window_s = (trace.steady_end_ns - trace.steady_start_ns) / NS_PER_S
    tokens = tokens_between(records, trace.steady_start_ns, trace.steady_end_ns)
    return Load(
        streams=streams,
        tok_s=tokens / window_s if window_s else 0.0,
        cpu_share=sum(trace.cpu_shares),
        ttft_errors=np.concatenate(ttft_errors) / NS_PER_MS,
        gap_errors=np.concatenate(gap_errors) / NS_PER_MS,
        delays=np.concatenate(delays) / NS_PER_MS,
        send_delays=np.array([record.sent_ns - (record.scheduled_ns or 0) for record, _ in pairs]) / NS_PER_MS,
        server_delays=np.concatenate(server_delays) / NS_PER_MS,
    )


def _percentiles(values: np.ndarray) -> dict[str, float]:
    return {name: float(np.percentile(values, int(name[1:]))) for name in ("p50", "p99")}


def _word_ends(text: str) -> list[int]:
    return [end for end in range(1, len(text) + 1) if end == len(text) or text[end] == " "]
