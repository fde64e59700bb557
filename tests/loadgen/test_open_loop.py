"""Open loop against a server whose tokens come at known times: what is sent when, and what a user waits."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tkit.loadgen.arrivals import Arrivals, arrival_times
from tkit.loadgen.metrics import wilson_interval
from tkit.loadgen.mock_server import running_mock
from tkit.loadgen.point import Place
from tkit.loadgen.profiles import Profile, Shape, find_profile
from tkit.loadgen.prompts import PromptMaker
from tkit.loadgen.run_directory import RunDirectory
from tkit.loadgen.session import Measurement, Session
from tkit.specs.record import SLO_TIERS

MS = 1_000_000
SHAPE = Shape(isl=16, osl=16)
SERVICE_S = 0.050 + 15 * 0.010  # the mock's 50 ms to the first token and 10 ms to each other one
QUICK = dataclasses.replace(find_profile("quick"), shapes=(SHAPE,), concurrency=())


def measure(url: str, model: str, tokenizer_dir: Path, rate: float, **changes: Any) -> Measurement:
    profile: Profile = dataclasses.replace(QUICK, **{"max_duration_s": None, **changes})
    with Session("openai", url, model, prompts=PromptMaker(tokenizer_dir, 0), profile=profile) as session:
        session.probe(SHAPE)
        return session.measure(Place(shape=SHAPE, rate=rate, repeat=1), lambda live: None)


@pytest.fixture(scope="module")
def steady(mock: str, tokenizer_dir: Path) -> Measurement:
    return measure(mock, "exact", tokenizer_dir, 20.0, requests=70)


def test_requests_go_out_when_they_are_due(steady: Measurement) -> None:
    """The schedule is the seed's, whatever the server does; nothing is sent before it is due."""
    due = itertools.islice(arrival_times(Arrivals(process="poisson"), 20.0, "0/arrivals/16x16-rate20-r1"), 10_000)
    scheduled = np.array([record.scheduled_ns for record in steady.records], dtype=np.int64)
    expected = np.array([next(due) for _ in scheduled])
    assert np.diff(scheduled) / 1e9 == pytest.approx(np.diff(expected), abs=1e-6)
    late = np.array([record.sent_ns for record in steady.records]) - scheduled
    assert (late >= 0).all()
    assert np.median(late) / MS < 5
    assert [record.id for record in steady.records] == list(range(len(scheduled)))


def test_the_window_is_a_piece_of_the_schedule(steady: Measurement) -> None:
    """Warm-up before it, exactly what was asked for in it, and the load goes on until the last of those has ended."""
    phases = [record.phase for record in steady.records]
    assert phases == sorted(phases, key=["warmup", "measured", "drain"].index)
    assert (phases.count("measured"), steady.summary.requests) == (70, 70)
    assert phases.count("warmup") >= 4, "as many as are in flight"
    measured = [record for record in steady.records if record.phase == "measured"]
    drain = [record for record in steady.records if record.phase == "drain"]
    assert drain and drain[0].sent_ns < max(record.end_ns for record in measured)
    assert steady.summary.concurrency is None
    assert (steady.summary.rate, steady.summary.arrivals) == (20.0, "poisson")


def test_the_numbers_are_those_of_the_rows(steady: Measurement, tmp_path: Path) -> None:
    """Worked out again with pandas from requests.parquet, from the send and from the schedule."""
    run = RunDirectory.create(tmp_path, "r", is_fixed=True)
    place = Place(shape=SHAPE, rate=20.0, repeat=1)
    run.write_point(place, steady.summary, steady.records)
    rows = pd.read_parquet(tmp_path / "r/points/16x16-rate20-r1/requests.parquet")
    rows = rows[rows.phase == "measured"]
    summary = steady.summary
    for metric, later, earlier in (
        ("ttft", "first_token_ns", "sent_ns"), ("e2e", "last_token_ns", "sent_ns"),
        ("ttft_sched", "first_token_ns", "scheduled_ns"), ("e2e_sched", "last_token_ns", "scheduled_ns"),
    ):  # fmt: skip
        values = (rows[later] - rows[earlier]) / MS
        told = getattr(summary, metric)
        assert (told.n, told.p99) == (70, None), "p99 needs 662"
        assert (told.mean, told.p50, told.p90) == pytest.approx(
            (values.mean(), values.quantile(), values.quantile(0.9))
        )
    window_s = summary.window_s
    assert window_s == pytest.approx((rows.scheduled_ns.max() - rows.scheduled_ns.min()) / 1e9, rel=0.2)
    assert summary.offered_requests_s == pytest.approx(70 / window_s)
    limits = SLO_TIERS["interactive"]
    tpot = (rows.last_token_ns - rows.first_token_ns) / MS / (rows.osl - rows.n_first)
    good = int((((rows.first_token_ns - rows.scheduled_ns) / MS <= limits["ttft"]) & (tpot <= limits["tpot"])).sum())
    told = summary.goodput["interactive"]
    assert told["attainment"] == good / 70
    assert (told["low"], told["high"]) == pytest.approx(wilson_interval(good, 70))


def fifo(scheduled: list[float], slots: int, service_s: float) -> list[float]:
    """When each request begins to be served, slowly and obviously: by the slot that is free first, not before it is due."""
    free = [0.0] * slots
    begins = []
    for due in scheduled:
        begin = max(due, heapq.heappop(free))
        heapq.heappush(free, begin + service_s)
        begins.append(begin)
    return begins


@pytest.mark.parametrize("max_outstanding", [512, 4])
def test_four_slots_make_users_wait(mock: str, tokenizer_dir: Path, max_outstanding: int) -> None:
    """36 req/s against 4 slots of 0.2 s, which serve 20. Whether the waiting is in the server or in a client that keeps no
    more than 4 requests in flight, latency from the schedule tells all of it; from the send, the latter hides it."""
    model = "slots" if max_outstanding > 4 else "exact"
    point = measure(
        mock, model, tokenizer_dir, 36.0, requests=100, arrivals=Arrivals(process="constant"),
        max_outstanding=max_outstanding,
    )  # fmt: skip
    assert point.failures == []
    origin = point.records[0].scheduled_ns or 0
    scheduled = [((record.scheduled_ns or 0) - origin) / 1e9 for record in point.records]
    begins = fifo(scheduled, 4, SERVICE_S)
    least_ms = np.array([(begin - due) * 1000 + 50 for begin, due in zip(begins, scheduled, strict=True)])
    waited = np.array([((r.first_token_ns or 0) - (r.scheduled_ns or 0)) / MS for r in point.records])
    due_ms = np.array(scheduled) * 1000
    ideal, seen = (
        np.sort(due_ms + least_ms),
        np.sort(due_ms + waited),
    )  # sorted: a busy server may take them in any order
    assert (seen > ideal - 2).all(), "no earlier than an ideal server could"
    assert np.median(waited[-40:] / least_ms[-40:]) < 1.5
    assert waited.max() > 1000
    summary = point.summary
    assert summary.ttft_sched is not None and summary.ttft_sched.p50 is not None and summary.ttft.p50 is not None
    assert summary.ttft_sched.p50 > 500
    assert summary.requests_s < 22 < 35 < (summary.offered_requests_s or 0)
    held_back = [reason for reason in summary.invalid_reasons if "as many in flight as --max-outstanding" in reason]
    if max_outstanding == 4:
        assert summary.ttft.p50 < 250, "what a client that counts from the send would say"
        assert len(held_back) == 1 and summary.client["num_unsent"] > 0
        assert summary.client["delivered_concurrency"] < 4.1
    else:
        assert summary.ttft.p50 == pytest.approx(summary.ttft_sched.p50, rel=0.05)
        assert held_back == []


def test_a_ramp_and_a_duration(mock: str, tokenizer_dir: Path) -> None:
    """All of a ramp is measured: it has no steady part to warm up for."""
    point = measure(mock, "exact", tokenizer_dir, 40.0, arrivals=Arrivals(process="ramp"), max_duration_s=2.0)
    assert {record.phase for record in point.records} <= {"measured", "drain"}
    assert point.summary.window_s == pytest.approx(2.0)
    assert point.summary.requests == pytest.approx(40, abs=20)


def test_a_server_that_dies_ends_the_point(tokenizer_dir: Path) -> None:
    """The schedule would go on for more than a minute; with nobody to answer, the point does not."""
    profile = dataclasses.replace(QUICK, requests=2000, max_duration_s=None)
    with contextlib.ExitStack() as server:
        url = server.enter_context(running_mock())
        with Session("openai", url, "exact", prompts=PromptMaker(tokenizer_dir, 0), profile=profile) as session:
            session.probe(SHAPE)
            place = Place(shape=SHAPE, rate=30.0, repeat=1)
            point = session.measure(place, lambda live: server.close() if live.done else None)
    assert len(point.records) < 1500
    assert not point.summary.is_valid
    assert set(point.summary.errors) <= {"refused", "disconnected"}
    assert sum(point.summary.errors.values()) >= 10
