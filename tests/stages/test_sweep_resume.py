"""Sweeps that are cut off, and servers that go away: what stays, and how it goes on."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from servers import wait_for_answers
from waiting import wait_until

from tkit.files import read_json

Tkit = Callable[..., Result]
WAIT_S = 60


class Mock:
    """The mock server on a port that it comes back to."""

    def __init__(self) -> None:
        self.port = 0
        self.process: subprocess.Popen[str] | None = None

    def start(self, seed: int = 0) -> None:
        command = [sys.executable, "-m", "tkit.loadgen.mock_server", "--ttft-ms=5", "--itl-ms=1", f"--port={self.port}",
                   f"--seed={seed}"]  # fmt: skip
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        assert self.process is not None
        with self.process as process:
            process.kill()


@pytest.fixture
def mock() -> Iterator[Mock]:
    server = Mock()
    server.start()
    yield server
    server.kill()


def arguments(mock: Mock, tokenizer_dir: Path, *options: str) -> list[str]:
    return ["sweep", "--protocol", "openai", "--url", f"127.0.0.1:{mock.port}", "--model", "exact", "--tokenizer",
            str(tokenizer_dir), "--shape", "16/8", *options]  # fmt: skip


def started(arguments: list[str], tmp_path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tkit", *arguments]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def journal(run: Path) -> list[dict[str, Any]]:
    lines = (run / "state.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def names(events: list[dict[str, Any]]) -> list[str]:
    return [event.get("point", "").partition("-")[2] or event["event"] for event in events]


def test_a_killed_sweep_goes_on_where_it_was(mock: Mock, tokenizer_dir: Path, tmp_path: Path, tkit: Tkit) -> None:
    """Killed in a point: those before it are kept as they are, that one is measured from its beginning."""
    typed = arguments(mock, tokenizer_dir, "--concurrency", "1,2,4", "--requests", "40", "--repeats", "2")
    run = tmp_path / "reports/r"
    with started([*typed, "--name", "r"], tmp_path) as process:
        assert wait_until(lambda: (run / "points/16x8-c2-r1").is_dir())
        process.kill()
    kept = {path.name: read_json(path / "point.json")["started"] for path in (run / "points").glob("16x8-*")}
    assert 2 <= len(kept) < 6
    (run / "points/.16x8-c4-r1.99.tmp").mkdir()
    with open(run / "state.jsonl", "a") as file:
        file.write('{"time": "2026-01-01T00:00:00Z", "eve')  # as a power cut leaves it
    result = tkit(*typed, "--resume")
    assert result.exit_code == 0, result.stderr
    assert f"resuming reports/r: points kept: {len(kept)}" in result.stderr
    assert Path(result.stdout.splitlines()[-1]) == Path("reports/r")
    assert sorted(path.name for path in (run / "points").iterdir()) == [
        f"16x8-c{concurrency}-r{repeat}" for concurrency in (1, 2, 4) for repeat in (1, 2)
    ]
    for name, when in kept.items():
        assert read_json(run / "points" / name / "point.json")["started"] == when
    assert len(read_json(run / "summary.json")) == 6
    events = names(journal(run))
    assert events[-1] == "finished"
    assert (
        events[events.index("resumed") + 1 :]
        == ["c1-r1", "c2-r1", "c4-r1", "c1-r2", "c2-r2", "c4-r2", "finished"][len(kept) :]
    )
    again = tkit(*typed, "--resume")
    assert (again.exit_code, "reports: no run in it was cut off" in again.stderr) == (2, True)


def test_only_the_same_is_resumed(mock: Mock, tokenizer_dir: Path, tmp_path: Path, tkit: Tkit) -> None:
    typed = arguments(mock, tokenizer_dir, "--requests", "4")
    assert tkit(*typed, "--concurrency", "1", "--name", "r").exit_code == 0
    other = tkit(*typed, "--concurrency", "2", "--seed", "3", "--name", "r", "--resume")
    assert other.exit_code == 2
    lines = other.stderr.splitlines()
    assert lines[-4:-1] == [
        "error: reports/r measured something else",
        "  - --concurrency: (1,) then, (2,) now",
        "  - --seed: 0 then, 3 now",
    ]
    assert lines[-1].startswith("hint: to go on with it: tkit sweep quick --url ")
    assert lines[-1].endswith(" --resume --name r")
    missing = tkit(*typed, "--name", "nowhere", "--resume")
    assert missing.exit_code == 2 and "reports/nowhere: no run to resume" in missing.stderr


def test_two_do_not_measure_into_one_directory(mock: Mock, tokenizer_dir: Path, tmp_path: Path, tkit: Tkit) -> None:
    typed = arguments(mock, tokenizer_dir, "--concurrency", "1", "--requests", "4", "--repeats", "500")
    with started([*typed, "--name", "r"], tmp_path) as process:
        assert wait_until(lambda: (tmp_path / "reports/r/points/16x8-c1-r1").is_dir())
        second = tkit(*typed, "--name", "r", "--resume")
        process.terminate()
    assert second.exit_code == 2
    assert "reports/r is being measured by another process" in second.stderr


def test_a_server_that_comes_back_leaves_a_hole_that_resume_fills(
    mock: Mock, tokenizer_dir: Path, tmp_path: Path, tkit: Tkit
) -> None:
    typed = arguments(mock, tokenizer_dir, "--concurrency", "1,2", "--requests", "200")
    run = tmp_path / "reports/r"
    with started([*typed, "--name", "r"], tmp_path) as process:
        wait_for_answers(f"127.0.0.1:{mock.port}", 10)
        mock.kill()
        assert wait_until(lambda: "hole" in (run / "state.jsonl").read_text())
        mock.start()
        _, told = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, told
    assert "the server stopped answering; waiting up to 60 s for it" in told
    assert "the server is back" in told
    assert "1 points have no result; to measure them: tkit sweep " in told
    hole = next(event for event in journal(run) if event["event"] == "hole")["point"]
    (other,) = {"16x8-c1-r1", "16x8-c2-r1"} - {hole}
    marked = read_json(run / "points" / hole / "point.json")
    assert not marked["is_valid"] and marked["invalid_reasons"][0] == "the server stopped answering"
    assert read_json(run / "points" / other / "point.json")["errors"] == {}
    before = read_json(run / "points" / other / "point.json")
    assert tkit(*typed, "--resume").exit_code == 0
    filled = read_json(run / "points" / hole / "point.json")
    assert filled["errors"] == {} and filled["requests"] == 200
    assert read_json(run / "points" / other / "point.json") == before
    assert names(journal(run))[-3:] == ["resumed", hole.partition("-")[2], "finished"]


def test_a_server_that_stays_away_ends_the_sweep(mock: Mock, tokenizer_dir: Path, tmp_path: Path) -> None:
    typed = arguments(mock, tokenizer_dir, "--concurrency", "1,2", "--requests", "6000", "--reconnect", "1")
    with started([*typed, "--name", "r"], tmp_path) as process:
        wait_for_answers(f"127.0.0.1:{mock.port}", 10)
        mock.kill()
        _, told = process.communicate(timeout=WAIT_S)
    mock.start()
    assert process.returncode == 1
    assert f"error: 127.0.0.1:{mock.port}: the server stopped answering during 16/8 C = 1" in told
    assert "  - not back after 1 s: " in told
    assert "the same command with --resume" in told
    assert names(journal(tmp_path / "reports/r"))[-2:] == ["c1-r1", "failed"]


class Switch:
    """A port whose new connections go to the server that `port` names now, as when one server replaces another."""

    def __init__(self, port: int):
        self.port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.own_port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with self._listener, contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.port))
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with source, contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def test_a_server_in_the_place_of_the_first_is_not_measured(
    mock: Mock, tokenizer_dir: Path, tmp_path: Path, tkit: Tkit
) -> None:
    """No request fails: those under way end with the first server, new connections come to the other."""
    switch, other = Switch(mock.port), Mock()
    other.start(seed=1)
    typed = arguments(mock, tokenizer_dir, "--concurrency", "1,2", "--requests", "30")
    typed[typed.index("--url") + 1] = f"127.0.0.1:{switch.own_port}"
    run = tmp_path / "reports/r"
    with started([*typed, "--name", "r"], tmp_path) as process:
        assert wait_until(lambda: (run / "state.jsonl").is_file())
        switch.port = other.port
        _, told = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert f"error: 127.0.0.1:{switch.own_port}: another server answers: root seed-0 then, seed-1 now" in told
    point = read_json(run / "points/16x8-c1-r1/point.json")
    assert (point["errors"], point["is_valid"]) == ({}, False)
    assert names(journal(run))[-2:] == ["c1-r1", "failed"]
    refused = tkit(*typed, "--resume")
    assert refused.exit_code == 2
    assert "  - another server answers: root seed-0 then, seed-1 now" in refused.stderr
    switch.port = mock.port
    assert tkit(*typed, "--resume").exit_code == 0
    assert [point["requests"] for point in read_json(run / "summary.json")] == [30, 30]
    switch.close()
    other.kill()


def test_another_server_after_the_first_has_died_is_not_measured(
    mock: Mock, tokenizer_dir: Path, tmp_path: Path
) -> None:
    typed = arguments(mock, tokenizer_dir, "--concurrency", "1,2", "--requests", "200")
    run = tmp_path / "reports/r"
    with started([*typed, "--name", "r"], tmp_path) as process:
        assert wait_until(lambda: (run / "state.jsonl").is_file())
        mock.kill()
        assert wait_until(lambda: "hole" in (run / "state.jsonl").read_text())
        mock.start(seed=1)
        _, told = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert f"error: 127.0.0.1:{mock.port}: another server answers: root seed-0 then, seed-1 now" in told


def test_the_largest_load_is_found_and_told(mock: Mock, tokenizer_dir: Path, tmp_path: Path, tkit: Tkit) -> None:
    """Four slots and half a second for the first token: with 36 tokens of 1 ms after 5, more than that many streams per
    slot wait too long. Whether it is met is worked out again from the requests."""
    import pandas as pd

    typed = arguments(mock, tokenizer_dir, "--requests", "30", "--find-max", "interactive", "--concurrency", "64")
    typed[typed.index("exact")] = "slots"
    typed[typed.index("16/8")] = "16/36"
    result = tkit(*typed, "--name", "r", "--attainment", "0.9")
    assert result.exit_code == 0, result.stderr
    run = tmp_path / "reports/r"
    (found,) = read_json(run / "find_max.json")["found"]
    for step in found["steps"]:
        concurrency = step["load"]["concurrency"]
        paths = sorted((run / "points").glob(f"16x36-c{concurrency}-r*"))
        valid = [path for path in paths if read_json(path / "point.json")["is_valid"]]
        rows = pd.concat(pd.read_parquet(path / "requests.parquet") for path in valid or paths)
        rows = rows[rows.phase == "measured"]
        ttft = (rows.first_token_ns - rows.sent_ns) / 1e6
        tpot = (rows.last_token_ns - rows.first_token_ns) / 1e6 / (rows.osl - rows.n_first)
        share = float(((ttft <= 500) & (tpot <= 30)).mean())
        assert step["attainment"] == pytest.approx(share)
        assert step["holds"] == (share >= 0.9 and bool(valid))
        assert step["low"] <= share <= step["high"]
    assert f"16/36, largest load with 90% interactive: C = {found['best']['load']['concurrency']} (" in result.stderr
    assert tkit("report", "reports/r", "--out", "compared").exit_code == 0
    record = read_json(tmp_path / "compared/report.json")
    assert record["runs"][0]["found"] == [found]
    assert "Largest loads within a tier" in (tmp_path / "compared/report.md").read_text()
