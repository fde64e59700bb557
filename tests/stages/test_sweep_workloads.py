"""Sweeps of requests that are not just so many tokens: without a tokenizer, from files, with a common beginning."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from click.testing import Result

from tkit.files import read_json
from tkit.loadgen.mock_server import running_mock

Tkit = Callable[..., Result]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_mock(ttft_ms=5, itl_ms=1) as url:
        yield url


def swept(tkit: Tkit, url: str, tmp_path: Path, *options: object) -> Path:
    result = tkit("sweep", "--protocol", "openai", "--url", url, "--model", "exact", *options)
    assert result.exit_code == 0, result.stderr
    return tmp_path / result.stdout.splitlines()[-1]


def rows(run: Path, point: str) -> pd.DataFrame:
    return pd.read_parquet(run / "points" / point / "requests.parquet")


def test_characters_and_common_beginnings(tkit: Tkit, url: str, tmp_path: Path) -> None:
    run = swept(tkit, url, tmp_path, "--shape", "200/8", "--isl-chars", "--prefix-share", "0,0.5", "--concurrency", "2",
                "--requests", "8")  # fmt: skip
    manifest = read_json(run / "manifest.json")
    assert manifest["shapes"] == ["200c/8", "200c/8-shared50"]
    assert manifest["identity"]["tokenizer_sha256"] is None
    assert " --isl-chars --prefix-share 0,0.5" in manifest["command"]
    for shape in ("200cx8", "200cx8-shared50"):
        point = read_json(run / "points" / f"{shape}-c2-r1/point.json")
        assert (point["isl"], point["isl_unit"], point["errors"]) == (200, "characters", {})
        assert rows(run, f"{shape}-c2-r1").isl_asked.isna().all()
    assert tkit("report", run, "--out", "compared").exit_code == 0
    record = read_json(tmp_path / "compared/report.json")
    assert [group["shape"] for group in record["groups"]] == ["200c/8", "200c/8-shared50"]
    assert record["runs"][0]["missing"] == []


def test_a_trace_is_replayed_as_it_was_recorded_and_faster(
    tkit: Tkit, url: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    times = [0, 40, 50, 400, 410, 420, 800, 1000]
    trace = [
        {"timestamp": 7000 + when, "input_length": 20 + i, "output_length": 4 + i, "hash_ids": [i % 3]}
        for i, when in enumerate(times)
    ]
    (tmp_path / "azure.jsonl").write_text("\n".join(map(json.dumps, trace)))
    options = ("--tokenizer", tokenizer_dir, "--dataset", "azure.jsonl", "--arrivals", "trace")
    run = swept(tkit, url, tmp_path, *options)
    (point,) = (run / "points").iterdir()
    assert point.name == "azure-rate7-r1", "seven gaps in a second"
    seen = rows(run, point.name)
    assert seen.phase.tolist() == ["measured"] * 8
    assert ((seen.scheduled_ns - seen.scheduled_ns[0]) / 1e6).tolist() == pytest.approx(times, abs=0.01)
    assert seen.isl_asked.tolist() == [20 + i for i in range(8)]
    assert seen.osl.tolist() == seen.osl_asked.tolist() == [4 + i for i in range(8)]
    assert read_json(run / "manifest.json")["identity"]["dataset"]["requests"] == 8
    faster = swept(tkit, url, tmp_path, *options, "--rate", "14", "--name", "faster")
    seen = rows(faster, "azure-rate14-r1")
    assert ((seen.scheduled_ns - seen.scheduled_ns[0]) / 1e6).tolist() == pytest.approx(
        [t / 2 for t in times], abs=0.01
    )
    assert tkit("report", run, faster, "--out", "compared").exit_code == 0
    (group,) = read_json(tmp_path / "compared/report.json")["groups"]
    assert (group["shape"], group["arrivals"]) == ("azure", "trace")
    assert [level["load"]["rate"] for level in group["levels"]] == [7.0, 14.0]


def test_conversations_in_closed_loop(tkit: Tkit, url: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f" word{' ba' * i}", "completion": " word" * (3 + i % 4)} for i in range(30)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = swept(tkit, url, tmp_path, "--tokenizer", tokenizer_dir, "--dataset", "chats.jsonl", "--concurrency", "2",
                "--requests", "12")  # fmt: skip
    seen = rows(run, "chats-c2-r1")
    assert set(seen.osl_asked) == {3, 4, 5, 6}
    assert (seen.osl == seen.osl_asked).all() and (seen.status == "ok").all()
    point = read_json(run / "points/chats-c2-r1/point.json")
    assert not any("tokens per request" in reason for reason in point["invalid_reasons"])
    told = tkit("sweep", "--url", url, "--tokenizer", tokenizer_dir, "--dataset", "chats.jsonl", "--arrivals", "trace")
    assert told.exit_code == 2 and "--arrivals is trace, but the data set has no timestamps" in told.stderr
    absent = tkit("sweep", "--url", url, "--tokenizer", tokenizer_dir, "--dataset", "nowhere.jsonl")
    assert absent.exit_code == 2 and "--dataset: nowhere.jsonl: No such file or directory" in absent.stderr
