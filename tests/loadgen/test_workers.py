"""Several worker processes against the mock server, whose record is the truth: one load, whoever sends it."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from servers import fake_http_server, take_record, wait_for_answers

from tkit.cli.main import cli
from tkit.errors import TkitError
from tkit.files import read_json
from tkit.loadgen.live import Live
from tkit.loadgen.point import Place
from tkit.loadgen.profiles import Shape, find_profile
from tkit.loadgen.prompts import PromptMaker
from tkit.loadgen.session import Measurement, Session

MS = 1_000_000
SHAPE = Shape(isl=16, osl=16)
CLOSED = Place(shape=SHAPE, concurrency=6, repeat=1)
OPEN = Place(shape=SHAPE, rate=40, repeat=1)


def session(protocol: str, url: str, model: str, tokenizer_dir: Path, workers: int, **changes: Any) -> Session:
    profile = dataclasses.replace(
        find_profile("quick"), shapes=(SHAPE,), **{"requests": 18, "max_duration_s": None, **changes}
    )
    return Session(
        protocol, url, model, prompts=PromptMaker(tokenizer_dir, 0), profile=profile, num_workers=workers,
        idle_timeout_s=30,
    )  # fmt: skip


def measure(
    protocol: str,
    url: str,
    tokenizer_dir: Path,
    *,
    model: str = "exact",
    place: Place = CLOSED,
    workers: int = 3,
    on_progress: Callable[[Live], None] = lambda live: None,
    **changes: Any,
) -> Measurement:
    with session(protocol, url, model, tokenizer_dir, workers, **changes) as opened:
        opened.probe(SHAPE)
        return opened.measure(place, on_progress)


@pytest.mark.parametrize("protocol", ["openai", "triton-grpc"])
def test_streams_of_all_workers_are_one_load(mock: str, tokenizer_dir: Path, protocol: str) -> None:
    take_record(mock)
    lives: list[Live] = []
    point = measure(protocol, mock, tokenizer_dir, on_progress=lives.append)
    assert point.failures == []
    did = take_record(mock)
    assert len(did) == 2 + len(point.records), "two probes; nothing was sent twice"
    delays = []
    for record in point.records:
        line = did[f"16x16-16-6-1-{record.id}"]
        seen, sent = np.array(record.token_ns), np.array(line["sent_ns"])
        assert len(seen) == 16
        assert (seen > sent).all(), "one clock, whichever process looks at it"
        assert record.sent_ns < line["arrived_ns"]
        delays += list((seen - sent) / MS)
    assert statistics.median(delays) < 10
    assert {record.worker for record in point.records} == {0, 1, 2}
    assert all(record.worker == record.id % 3 for record in point.records)
    assert point.summary.requests >= 18
    assert point.summary.client["workers"] == 3
    assert 0 < point.summary.client["cpu_share"] <= point.summary.client["cpu_cores"]
    assert point.summary.client["delivered_concurrency"] == pytest.approx(6, rel=0.05)
    assert max(live.in_flight for live in lives) == 6
    assert lives[-1].errors == 0


def test_a_schedule_is_shared_out(mock: str, tokenizer_dir: Path) -> None:
    with session("openai", mock, "exact", tokenizer_dir, 3, requests=20) as opened:
        opened.probe(SHAPE)
        opened.measure(dataclasses.replace(CLOSED, concurrency=3), lambda live: None)  # by the same workers
        point = opened.measure(OPEN, lambda live: None)
    alone = measure("openai", mock, tokenizer_dir, place=OPEN, requests=20, workers=1)
    assert point.failures == []
    assert point.summary.requests == alone.summary.requests == 20
    due, due_alone = (
        np.array([(record.scheduled_ns or 0) for record in one.records][:30], dtype=np.int64) for one in (point, alone)
    )
    assert (np.diff(due) == np.diff(due_alone)).all(), "the times do not depend on who sends"
    assert all(record.sent_ns >= (record.scheduled_ns or 0) for record in point.records)
    assert {record.worker for record in point.records} == {0, 1, 2}


def test_the_number_of_workers_changes_no_request(tmp_path: Path, tokenizer_dir: Path, http_log: Any) -> None:
    def asked(workers: int) -> dict[str, Any]:
        http_log.log.write_text("")
        measure("openai", http_log.url, tokenizer_dir, model="plain", workers=workers)
        return {id: line["body"] for id, line in http_log.sent("plain").items()}

    alone, together = asked(1), asked(3)
    both = alone.keys() & together.keys()
    assert len(both) >= 20
    assert {id: alone[id] for id in both} == {id: together[id] for id in both}


@pytest.fixture
def http_log(tmp_path: Path, tokenizer_dir: Path) -> Iterator[Any]:
    with fake_http_server(tmp_path / "log.jsonl", tokenizer_dir) as server:
        yield server


def workers_of(pid: int) -> list[psutil.Process]:
    """A process that has ended has no command line; other tests may have left some that nobody has waited for."""

    def is_worker(child: psutil.Process) -> bool:
        return child.status() != psutil.STATUS_ZOMBIE and "tkit.loadgen.worker" in child.cmdline()

    return [child for child in psutil.Process(pid).children() if is_worker(child)]


def strike(blow: Callable[[psutil.Process], None]) -> Callable[[Live], None]:
    """Hits one worker, once, when the load is under way."""
    done = threading.Event()

    def look(live: Live) -> None:
        if live.in_flight == 6 and not done.is_set():
            done.set()
            blow(workers_of(os.getpid())[1])

    return look


def test_a_worker_that_dies_ends_the_point_by_its_name(mock: str, tokenizer_dir: Path) -> None:
    with pytest.raises(
        TkitError, match=r"^worker 1 of the load generator \(pid \d+\) ended with exit code -9: the point"
    ):
        measure("openai", mock, tokenizer_dir, on_progress=strike(psutil.Process.kill), requests=1000)
    assert workers_of(os.getpid()) == []


def test_one_worker_that_stood_still_makes_the_point_invalid(mock: str, tokenizer_dir: Path) -> None:
    def pause(worker: psutil.Process) -> None:
        worker.suspend()
        threading.Timer(1.0, worker.resume).start()

    point = measure("openai", mock, tokenizer_dir, on_progress=strike(pause), requests=40)
    assert point.failures == []
    assert any("stood still" in reason for reason in point.summary.invalid_reasons)


def command(url: str, tokenizer_dir: Path, tmp_path: Path, *options: str) -> list[str]:
    return ["sweep", "--protocol", "openai", "--url", url, "--model", "exact", "--tokenizer", str(tokenizer_dir), "--shape",
            "16/8", "--concurrency", "4", "--out", str(tmp_path), "--name", "run", *options]  # fmt: skip


def test_workers_end_with_the_sweep(mock: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Also when it is killed in the middle of a point."""
    options = command(mock, tokenizer_dir, tmp_path, "--workers", "2", "--requests", "10000")
    with subprocess.Popen([sys.executable, "-m", "tkit", *options], stderr=subprocess.DEVNULL) as process:
        wait_for_answers(mock, 40)  # more than probes and warm-up
        workers = workers_of(process.pid)
        process.kill()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert len(gone) == 2
    assert alive == []


def test_the_command_takes_a_number(mock: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, command(mock, tokenizer_dir, tmp_path, "--workers", "2"))
    assert result.exit_code == 0, result.output
    point = read_json(tmp_path / "run/points/16x8-c4-r1/point.json")
    assert point["client"]["workers"] == 2
    assert "--workers 2" in read_json(tmp_path / "run/manifest.json")["command"]
    for wrong in ("0", "many"):
        assert CliRunner().invoke(cli, command(mock, tokenizer_dir, tmp_path, "--workers", wrong)).exit_code == 2
