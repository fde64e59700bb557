"""What the client says against what the mock server did: tricks that fool other clients, and clients that are held back.

The server's own record is the truth, not its settings: a busy machine makes it late, and the client sees that. Where the
client itself was too late and says so, the measurement is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import take_record, wait_for_answers

from tkit.files import read_json
from tkit.loadgen.exchange import RequestRecord
from tkit.loadgen.metrics import tpot_ms, ttfb_ms, ttft_ms
from tkit.loadgen.mock_server import running_mock
from tkit.loadgen.point import Place
from tkit.loadgen.profiles import Shape, find_profile
from tkit.loadgen.prompts import PromptMaker
from tkit.loadgen.session import Measurement, Session

MS = 1_000_000
STREAMS, OSL = 4, 16
ATTEMPTS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """One request as the client saw it and as the server answered it."""

    seen: RequestRecord
    did: dict[str, Any]

    @property
    def own_ttft_ms(self) -> float:
        return (self.did["sent_ns"][0] - self.did["arrived_ns"]) / MS

    @property
    def own_tpot_ms(self) -> float:
        sent, tokens = self.did["sent_ns"], self.did["tokens"]
        return (sent[-1] - sent[0]) / MS / (sum(tokens) - tokens[0])


def measure(
    protocol: str, url: str, model: str, tokenizer_dir: Path, *, requests: int = 8, osl: int = OSL
) -> tuple[Measurement, list[Pair]]:
    shape = Shape(isl=16, osl=osl)
    profile = dataclasses.replace(find_profile("quick"), shapes=(shape,), requests=requests, max_duration_s=None)
    take_record(url)
    with Session(protocol, url, model, prompts=PromptMaker(tokenizer_dir, 0), profile=profile) as session:
        session.probe(shape)
        point = session.measure(Place(shape=shape, concurrency=STREAMS, repeat=1), lambda live: None)
    assert point.failures == []
    did = take_record(url)
    return point, [Pair(seen=record, did=did[f"16x{osl}-{osl}-{STREAMS}-1-{record.id}"]) for record in point.records]


def check_times(pairs: list[Pair]) -> None:
    """Nothing is seen before it was sent, and little long after; durations are the server's own."""
    delays = []
    for pair in pairs:
        seen, sent = np.array(pair.seen.token_ns), np.array(pair.did["sent_ns"])
        assert len(seen) == len(sent)
        assert (seen > sent).all()
        assert pair.seen.sent_ns < pair.did["arrived_ns"]
        delays.append((seen - sent) / MS)
    assert float(np.median(np.concatenate(delays))) < 5
    ttft_error = [(ttft_ms(pair.seen) or 0) - pair.own_ttft_ms for pair in pairs]
    assert -0.001 < statistics.median(ttft_error) < 5
    assert statistics.median((tpot_ms(pair.seen) or 0) / pair.own_tpot_ms for pair in pairs) == pytest.approx(
        1, abs=0.03
    )


def truthful(
    protocol: str, url: str, model: str, tokenizer_dir: Path, **settings: Any
) -> tuple[Measurement, list[Pair]]:
    """A point that the client vouches for, compared with the record."""
    for _ in range(ATTEMPTS):
        point, pairs = measure(protocol, url, model, tokenizer_dir, **settings)
        if point.summary.client["loop_lag_p90_ms"] < 3:
            break
    check_times(pairs)
    return point, pairs


@pytest.mark.parametrize("protocol", ["openai", "triton-http", "triton-grpc"])
def test_a_schedule_is_seen_as_it_was_kept(mock: str, tokenizer_dir: Path, protocol: str) -> None:
    _, pairs = truthful(protocol, mock, "exact", tokenizer_dir)
    assert {(pair.seen.osl, pair.seen.chunks, pair.seen.n_first) for pair in pairs} == {(OSL, OSL, 1)}
    assert min(pair.own_ttft_ms for pair in pairs) >= 50


def test_an_empty_chunk_that_names_a_role_is_no_token(mock: str, tokenizer_dir: Path) -> None:
    _, pairs = truthful("openai-chat", mock, "role_first", tokenizer_dir)
    for pair in pairs:
        assert (ttft_ms(pair.seen) or 0) >= 50
        assert pair.seen.chunks == OSL
    assert statistics.median(ttfb_ms(pair.seen) or 0 for pair in pairs) < 25


@pytest.mark.parametrize("protocol", ["openai", "triton-http", "triton-grpc"])
def test_tokens_that_come_four_at_a_time(mock: str, tokenizer_dir: Path, protocol: str) -> None:
    """Every 40 ms a chunk: 10 ms per token, and 40 between chunks."""
    point, pairs = truthful(protocol, mock, "four", tokenizer_dir)
    assert {(pair.seen.osl, pair.seen.chunks, pair.seen.n_first) for pair in pairs} == {(OSL, OSL // 4, 4)}
    own_gaps = np.concatenate([np.diff(pair.did["sent_ns"]) for pair in pairs]) / MS
    assert point.summary.chunk_gap.p50 == pytest.approx(float(np.median(own_gaps)), rel=0.05)
    assert point.summary.chunk_gap.p50 == pytest.approx(4 * point.summary.tpot.p50, rel=0.05)  # type: ignore[operator]


def test_jitter_is_seen(mock: str, tokenizer_dir: Path) -> None:
    point, pairs = truthful("openai", mock, "jittery", tokenizer_dir, requests=24)
    gaps = np.concatenate([np.diff(pair.seen.token_ns) for pair in pairs]) / MS
    own = np.concatenate([np.diff(pair.did["sent_ns"]) for pair in pairs]) / MS
    assert np.percentile(gaps, [10, 50, 90]) == pytest.approx(np.percentile(own, [10, 50, 90]), abs=1)
    assert np.percentile(own, 90) - np.percentile(own, 10) > 6, "gaps from 5 to 15 ms"


def test_a_stall_shows_in_the_gaps_and_in_time(mock: str, tokenizer_dir: Path) -> None:
    """One second in five is silent: the median gap tells nothing of it."""
    point, pairs = truthful("openai", mock, "stalling", tokenizer_dir, requests=8, osl=150)
    own = np.sort(np.concatenate([pair.did["sent_ns"] for pair in pairs]))
    seen = np.sort(np.concatenate([pair.seen.token_ns for pair in pairs]))
    at = int(np.argmax(np.diff(own)))
    silence = own[at], own[at + 1]
    assert (silence[1] - silence[0]) / MS >= 950
    inside = (seen > silence[0] + 50 * MS) & (seen < silence[1])
    assert not inside.any(), "nothing in the silence on the axis of time either"
    assert point.summary.chunk_gap.max == pytest.approx((silence[1] - silence[0]) / MS, rel=0.1)
    assert point.summary.chunk_gap.p50 == pytest.approx(10, abs=1)


BACKGROUND = "while True: pass"


def test_what_users_wait_when_more_come_than_there_is_room_for(mock: str, tokenizer_dir: Path) -> None:
    """Four answers at a time, each 0.67 s long, and 12 requests a second: the queue grows by six a second."""
    shape = Shape(isl=16, osl=63)
    profile = dataclasses.replace(
        find_profile("quick"), shapes=(shape,), requests=None, max_duration_s=2, min_duration_s=2
    )
    take_record(mock)
    with Session("openai", mock, "slots", prompts=PromptMaker(tokenizer_dir, 0), profile=profile) as session:
        session.probe(shape)
        point = session.measure(Place(shape=shape, rate=12, repeat=1), lambda live: None)
    assert point.failures == []
    did = {id: line for id, line in take_record(mock).items() if "probe" not in id}
    assert len(did) == len(point.records)
    waited = []
    for record in point.records:
        (line,) = (line for id, line in did.items() if id.endswith(f"-{record.id}"))
        assert record.first_token_ns is not None
        assert record.scheduled_ns is not None
        waited.append((line["sent_ns"][0] - record.scheduled_ns) / MS)
        assert (record.first_token_ns - record.scheduled_ns) / MS >= waited[-1]
    measured = [wait for wait, record in zip(waited, point.records, strict=True) if record.phase == "measured"]
    assert point.summary.ttft_sched is not None
    assert point.summary.ttft_sched.p50 == pytest.approx(statistics.median(measured), abs=20)
    assert statistics.median(measured) > 1000


def sweep(url: str, tokenizer_dir: Path, tmp_path: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "tkit", "sweep", "standard", "--repeats", "1", "--protocol", "openai", "--url", url,
        "--model", "exact", "--tokenizer", str(tokenizer_dir), "--out", str(tmp_path), "--name", "run", *options,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def point_of(tmp_path: Path) -> dict[str, Any]:
    (path,) = (tmp_path / "run/points").iterdir()
    point: dict[str, Any] = read_json(path / "point.json")
    return point


def test_a_client_that_was_stopped_is_no_witness(mock: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    options = ("--shape", "16/32", "--concurrency", "4", "--duration", "3")
    process = sweep(mock, tokenizer_dir, tmp_path, *options)
    try:
        wait_for_answers(mock, 24)  # two probes and sixteen to warm up, then it is measured for 3 s
        process.send_signal(signal.SIGSTOP)
        time.sleep(1)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    point = point_of(tmp_path)
    assert not point["is_valid"]
    assert point["client"]["standstill_s"] > 0.9
    assert any(reason.startswith("the client stood still for ") for reason in point["invalid_reasons"]), point


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to a core")
def test_a_client_on_a_core_that_others_use_says_so(mock: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        process = sweep(mock, tokenizer_dir, tmp_path, "--shape", "16/32", "--concurrency", "32", "--requests", "40")
        wait_for_answers(mock, 2)  # the probes
        others = [stack.enter_context(subprocess.Popen([sys.executable, "-c", BACKGROUND])) for _ in range(2)]
        for other in others:
            stack.callback(other.kill)
        for busy in (process, *others):
            os.sched_setaffinity(busy.pid, {core})
        assert process.wait(120) == 0
    point = point_of(tmp_path)
    assert not point["is_valid"]
    assert any("messages were seen" in reason or "stood still" in reason for reason in point["invalid_reasons"]), point


def test_more_streams_than_the_client_can_hold(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A token per 0.5 ms and stream: 512 000 a second, which no single core reads."""
    with running_mock(itl_ms=0.5) as url:
        process = sweep(url, tokenizer_dir, tmp_path, "--shape", "16/64", "--concurrency", "256", "--requests", "256")
        assert process.wait(120) == 0
    point = point_of(tmp_path)
    assert not point["is_valid"]
    words = ("messages were seen", "stood still", "of its core", "requests were sent")
    assert any(word in reason for reason in point["invalid_reasons"] for word in words), point["invalid_reasons"]
