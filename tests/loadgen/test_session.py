"""Points driven against real servers: Triton's times against the model's own record, and servers that misbehave."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import check_times, fake_server

from tkit.errors import ServerError
from tkit.loadgen.point import Place
from tkit.loadgen.profiles import Profile, Shape, find_profile
from tkit.loadgen.prompts import PromptMaker
from tkit.loadgen.session import Measurement, Session

MS = 1_000_000
SHAPE = Shape(isl=24, osl=16)
QUICK = dataclasses.replace(find_profile("quick"), shapes=(SHAPE,), max_duration_s=None)


def profile(requests: int, **changes: Any) -> Profile:
    return dataclasses.replace(QUICK, requests=requests, **changes)


def measure(
    url: str, model: str, tokenizer_dir: Path, used: Profile, concurrency: int, *, timeout_s: float = 10.0
) -> Measurement:
    with Session(
        "triton-grpc", url, model, prompts=PromptMaker(tokenizer_dir, 0), profile=used, idle_timeout_s=timeout_s
    ) as session:
        session.probe(used.shapes[0])
        return session.measure(Place(shape=used.shapes[0], concurrency=concurrency, repeat=1), lambda live: None)


@pytest.fixture(scope="module")
def point(paced: Any) -> Measurement:
    return measure(paced.url, "ensemble", paced.tokenizer_dir, profile(24), 4)


def test_every_request_arrives_as_it_was_meant(paced: Any, point: Measurement) -> None:
    assert point.failures == []
    assert [record.id for record in point.records] == list(range(len(point.records)))
    sent = paced.sent()
    for record in point.records:
        line = sent[f"24x16-16-4-1-{record.id}"]
        assert (line["isl"], line["asked"]) == (24, 16), "the server's own tokenizer counts the prompt"
        assert (record.isl, record.osl, record.n_first, record.chunks) == (24, 16, 1, 16)
        assert line["inputs"] == {
            "max_tokens": "16", "min_tokens": "16", "end_id": "-1", "stream": "True", "top_k": "1", "temperature": "1.0",
            "seed": "0", "exclude_input_in_output": "True", "return_num_input_tokens": "True",
            "return_num_output_tokens": "True",
        }  # fmt: skip


def test_times_agree_with_the_servers_own(paced: Any, point: Measurement) -> None:
    check_times(point, paced.sent())
    assert all(record.first_byte_ns == record.first_token_ns for record in point.records)
    assert point.summary.ttft.p50 is not None
    assert 0 < point.summary.ttft.p50 - paced.ttft_ms < 40


def test_the_load_is_closed_and_steady(point: Measurement) -> None:
    """Rates follow from concurrency and the requests' own durations (Little's law), however fast this machine is."""
    summary = point.summary
    assert summary.requests == 24
    phases = [record.phase for record in point.records]
    assert phases.count("warmup") >= 4
    assert 0 < phases.count("drain") < 4
    assert summary.token_source == "server_usage"
    assert summary.client["delivered_concurrency"] == pytest.approx(4, rel=0.05)
    starts = sorted(record.sent_ns for record in point.records)[:4]
    assert (starts[-1] - starts[0]) / MS > 100, "the first wave is spread over one request's duration of 200 ms"
    assert summary.e2e.mean is not None
    e2e_s = summary.e2e.mean / 1000
    assert summary.output_tok_s == pytest.approx(4 * 16 / e2e_s, rel=0.1)
    assert summary.window_s == pytest.approx(24 / 4 * e2e_s, rel=0.25)


def test_a_model_without_counts_and_options_is_counted_by_the_tokenizer(paced: Any) -> None:
    """Its stream ends apart from the last token, with an empty final response that is no token."""
    point = measure(paced.url, "bare", paced.tokenizer_dir, profile(4), 2)
    assert point.failures == []
    assert point.summary.token_source == "tokenizer"
    assert {(record.osl, record.chunks, record.n_first) for record in point.records} == {(16, 16, 1)}
    line = paced.sent()[f"24x16-16-2-1-{point.records[0].id}"]
    assert line["inputs"] == {"max_tokens": "16"}


def test_a_duration_ends_a_point(fake_url: str, tokenizer_dir: Path) -> None:
    """Requests last for it also after a heavier load, where each takes longer."""
    timed = dataclasses.replace(QUICK, min_duration_s=0.6, max_duration_s=0.6, requests_per_stream=1, min_requests=1)
    with Session("triton-grpc", fake_url, "ensemble", prompts=PromptMaker(tokenizer_dir, 0), profile=timed) as session:
        session.probe(SHAPE)
        for concurrency, repeat in ((1, 1), (64, 1), (1, 2)):
            place = Place(shape=SHAPE, concurrency=concurrency, repeat=repeat)
            summary = session.measure(place, lambda live: None).summary
            assert 0.6 <= summary.window_s < 3
            assert summary.requests > 0


def test_a_count_of_requests_may_be_cut_off_by_a_duration(fake_url: str, tokenizer_dir: Path) -> None:
    point = measure(fake_url, "ensemble", tokenizer_dir, profile(300, max_duration_s=0.3), 1)
    assert point.failures == []
    assert 0 < point.summary.requests < 100
    assert 0.3 <= point.summary.window_s < 3


@pytest.mark.parametrize("model", ["coalescing", "so_far", "deltas", "promising"])
def test_other_ways_to_count(fake_url: str, tokenizer_dir: Path, model: str) -> None:
    """The promising one has an output for counts and sends none."""
    point = measure(fake_url, model, tokenizer_dir, profile(3), 1)
    assert point.failures == []
    (shape,) = {(record.osl, record.chunks, record.n_first) for record in point.records}
    assert shape == ((16, 4, 4) if model == "coalescing" else (16, 16, 1))


@pytest.mark.parametrize(
    ("model", "error", "detail"),
    [
        ("truncated", "truncated", "ended after 8 responses, none of them final"),
        ("failing", "server", "out of memory"),
        ("overloaded", "server", "Exceeds maximum queue size"),
        ("garbled", "unreadable", "not a ModelStreamInferResponse: "),
        ("short", "short", "8 tokens, asked for 16"),
        ("stalled", "timeout", "no"),  # message for 0.5 s, or, on a busy machine, complete answer after 0.633 s
    ],
)
def test_failures_have_names(fake_url: str, tokenizer_dir: Path, model: str, error: str, detail: str) -> None:
    point = measure(fake_url, model, tokenizer_dir, profile(4), 2, timeout_s=0.5 if model == "stalled" else 20)
    assert {record.error for record in point.records} == {error}
    assert all(record.detail.startswith(detail) for record in point.records)
    assert all(record.status == "error" for record in point.records)
    assert not point.summary.is_valid
    assert f" {error}), the first: {detail}" in point.summary.invalid_reasons[0]


def test_a_stream_that_only_drips_ends_by_the_total_limit(fake_url: str, tokenizer_dir: Path) -> None:
    """A token every 0.1 s is never silent for 0.5 s, but 16 of them take longer than the 0.63 s that they are given."""
    point = measure(fake_url, "dripping", tokenizer_dir, profile(2), 2, timeout_s=0.5)
    assert {record.error for record in point.records} == {"timeout"}
    assert {record.detail for record in point.records} == {"not complete after 0.633 s"}


def test_a_silent_server_fails_the_first_request(fake_url: str, tokenizer_dir: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ServerError) as caught:
        measure(fake_url, "silent", tokenizer_dir, profile(4), 2, timeout_s=0.5)
    assert "the first request (24/16) failed: no message, or no end, within the limit: no message for 0.5 s" in str(
        caught.value
    )
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("unknown", 'model "unknown" is not ready'),
        ("not_ready", 'model "not_ready" is not ready'),
        ("unary", "not decoupled, so it cannot stream"),
        ("untypical", 'no input "text_input"'),
    ],
)
def test_models_that_cannot_be_measured(fake_url: str, tokenizer_dir: Path, model: str, message: str) -> None:
    with pytest.raises(ServerError) as caught:
        measure(fake_url, model, tokenizer_dir, profile(4), 2)
    assert message in str(caught.value)
    assert "--model NAME" in (caught.value.hint or "")


def test_nobody_answers(tokenizer_dir: Path) -> None:
    with pytest.raises(ServerError, match="127.0.0.1:9: no Triton server answers over gRPC: ") as caught:
        measure("127.0.0.1:9", "ensemble", tokenizer_dir, profile(4), 2)
    assert "tkit serve" in (caught.value.hint or "")


@pytest.fixture
def dying_url() -> Iterator[str]:
    with fake_server() as url:
        yield url


def test_a_server_that_dies_ends_the_point(dying_url: str, tokenizer_dir: Path) -> None:
    """Its seventh request kills it, so that the rest of the point finds nobody."""
    used = profile(200)
    with Session(
        "triton-grpc", dying_url, "dying", prompts=PromptMaker(tokenizer_dir, 0), profile=used, idle_timeout_s=5.0
    ) as session:
        session.probe(SHAPE)
        point = session.measure(Place(shape=SHAPE, concurrency=2, repeat=1), lambda live: None)
        assert session.identity_now() is None
    errors = [record.error for record in point.records if record.error]
    assert set(errors) <= {"disconnected", "refused"}
    assert errors[0] == "disconnected"
    assert 3 <= len(errors) < 20, "given up, not run through"
    assert sum(record.is_ok for record in point.records) >= 3
