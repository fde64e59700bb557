"""The life of a server: started, refused, crashed, stopped, killed; nothing of it is left in any case."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import tritonclient.grpc as triton
from click.testing import CliRunner, Result
from fake_backend import ROWS, write_engine
from waiting import wait_until

from tkit.backends.table import BACKENDS
from tkit.cli.main import cli
from tkit.errors import InputError, ServerError
from tkit.files import write_json
from tkit.specs.progress import Progress
from tkit.specs.server import ServeOptions, ServerRecord
from tkit.stages.serve import running_server, serve_detached, stop_server
from tkit.stages.servers import ServerLock, replacing, running_servers, server_files
from tkit.triton import launcher, probe
from tkit.triton.install import free_ports

FREE = ServeOptions(http_port=0, grpc_port=0, metrics_port=0, openai_port=0, timeout_s=120)
FREE_PORTS = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--openai-port", "0")
# `tkit` in a process of its own, which knows the fake backends
TKIT = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1] / 'shared')!r});"
    "from fake_backend import ROWS; from tkit.backends.table import BACKENDS; BACKENDS.update(ROWS);"
    "from tkit.cli.main import main; main()"
)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """engines/tiny in the current directory; whatever still serves it is ended after the test."""
    monkeypatch.chdir(tmp_path)
    for name, row in ROWS.items():
        monkeypatch.setitem(BACKENDS, name, row)
    write_engine(tmp_path / "engines" / "tiny")
    yield tmp_path / "engines" / "tiny"
    files = server_files("tiny")
    if files.is_running():
        launcher.stop_group(files.pid() or 0, 0)
    files.remove_leftovers()


@pytest.fixture
def quick_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle server takes 2.5 s to end; where that is not the subject, it is killed."""
    monkeypatch.setattr(launcher.ServerProcess, "stop", launcher.ServerProcess.kill)


def tkit(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


class Foreground:
    """`tkit serve` as a process, ready to be signalled."""

    def __init__(self, *arguments: str, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "-c", TKIT, "serve", "--json", *FREE_PORTS, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        assert self.process.stdout is not None
        lines = []
        while not lines or lines[-1] != "}\n":
            line = self.process.stdout.readline()
            assert line, f"ended before it was ready: {self.process.communicate()}"
            lines.append(line)
        self.record: dict[str, Any] = json.loads("".join(lines))
        self.processes = processes_of(self.record["pid"])

    def end(self, timeout_s: float = 60) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, errors


def processes_of(pid: int) -> list[psutil.Process]:
    server = psutil.Process(pid)
    return [server, *server.children(recursive=True)]


def child_names(pid: int | None) -> list[str]:
    return [process.name() for process in psutil.Process(pid).children()] if pid else []


def is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def assert_nothing_left(engine: Path, pid: int, processes: list[psutil.Process] = []) -> None:  # noqa: B006
    assert not [process for process in processes if is_running(process)]
    assert not list(Path("/dev/shm").glob(f"tkit{pid}_*"))
    left = [path.name for path in (engine.parent / ".servers").iterdir()]
    assert left == [f"{engine.name}.log"]


def test_a_server_lives_as_long_as_its_block(engine: Path) -> None:
    with running_server(engine, FREE) as record:
        processes = processes_of(record.pid)
        assert len(processes) == 3  # the server, the model's stub and the OpenAI front
        assert {os.getpgid(process.pid) for process in processes} == {record.pid}
        assert os.getsid(record.pid) == os.getpgid(record.pid) == record.pid
        assert probe.generate("127.0.0.1", record.grpc_port, "a b", 3, 30) == "a b a "
        assert running_servers() == [record]
        connections = [connection for process in processes for connection in process.net_connections("tcp")]
        listening = {connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN}
        ports = (record.http_port, record.grpc_port, record.metrics_port, record.openai_port)
        assert {address.port for address in listening} == set(ports)
        assert all(address.ip in ("127.0.0.1", "::ffff:127.0.0.1") for address in listening)
        config = (engine.parent / ".servers" / "tiny" / "repository" / "ensemble" / "config.pbtxt").read_text()
        assert 'name: "ensemble"' in config

        with pytest.raises(ServerError) as twice, running_server(engine, FREE):
            pass
        assert str(twice.value) == (
            f"{engine} is already served: http {record.http_port}, grpc {record.grpc_port}, pid {record.pid}\n"
            "hint: use that server, or end it first: tkit stop tiny"
        )
        write_engine(engine.parent / "other")
        taken = replace(FREE, http_port=record.http_port, grpc_port=record.grpc_port)
        with pytest.raises(ServerError) as busy, running_server(engine.parent / "other", taken):
            pass
        assert busy.value.problems == (
            f"--http-port {record.http_port} is in use by tritonserver (pid {record.pid})",
            f"--grpc-port {record.grpc_port} is in use by tritonserver (pid {record.pid})",
        )
    assert_nothing_left(engine, record.pid, processes)
    assert running_servers() == []


def test_a_detached_server_is_stopped_by_name_and_finishes_what_is_under_way(engine: Path) -> None:
    started = tkit("serve", "--detach", "--json", *FREE_PORTS)
    assert started.exit_code == 0, started.output
    record = json.loads(started.stdout)
    assert record == json.loads((engine.parent / ".servers" / "tiny.json").read_text())
    processes = processes_of(record["pid"])
    assert probe.generate("127.0.0.1", record["grpc_port"], "a b", 1, 30) == "a "

    connection = http.client.HTTPConnection("127.0.0.1", record["openai_port"], timeout=60)
    body = {"model": "ensemble", "prompt": "a", "max_tokens": 100, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()  # its first token is there
    stopped = tkit("stop", "tiny")
    events = response.read().decode().split("\n\n")
    connection.close()
    assert (stopped.exit_code, stopped.stdout) == (0, f"tiny: stopped (pid {record['pid']})\n")
    assert (len(events), events[-2]) == (102, "data: [DONE]")
    assert_nothing_left(engine, record["pid"], processes)

    again = tkit("stop")
    assert (again.exit_code, again.stderr) == (1, "error: no server is running\nhint: start one: tkit serve\n")


def status() -> tuple[int, dict[str, Any]]:
    result = tkit("status", "--json")
    [told] = json.loads(result.stdout)
    return result.exit_code, told


def test_status_tells_how_a_server_is_and_how_it_died(engine: Path) -> None:
    assert tkit("status").stdout == "no server is running\n"
    record = serve_detached(engine, FREE)
    code, told = status()
    assert (code, told["state"], told["problem"], told["record"]["pid"]) == (0, "serving", None, record.pid)
    proven = {"length": 1, "running": 0, "waiting": 0}  # the one that proved that it generates; gauges follow in 0.1 s
    assert wait_until(lambda: status()[1]["requests"] == proven)
    text = tkit("status", "tiny").stdout.splitlines()
    assert text[0] == f"tiny: serving; since {record.started[:19].replace('T', ' ')} UTC, pid {record.pid}"
    assert text[1].startswith(
        f"  127.0.0.1: HTTP {record.http_port}, gRPC {record.grpc_port}, OpenAI {record.openai_port}"
    )
    unknown = tkit("status", "tinny")
    assert (unknown.exit_code, unknown.stderr.splitlines()[0]) == (
        1, 'error: no server is running for "tinny" (did you mean "tiny"?)',
    )  # fmt: skip

    os.kill(record.openai_pid, signal.SIGKILL)
    assert wait_until(lambda: status()[1]["state"] == "failing")
    assert status()[1]["problem"] == "the OpenAI front has died"
    [model] = record.model_pids
    os.kill(model, signal.SIGKILL)
    assert wait_until(lambda: status()[1]["problem"] == "the model's process has died")
    assert status()[0] == 1
    os.kill(record.pid, signal.SIGKILL)
    assert wait_until(lambda: status()[1]["state"] == "dead")
    assert "tiny: dead, it ended without tkit stop: killed, or crashed\n" in tkit("status").stdout


def test_stop_cleans_up_after_a_crash(engine: Path) -> None:
    record = serve_detached(engine, FREE)
    processes = processes_of(record.pid)
    os.kill(record.pid, signal.SIGKILL)
    assert wait_until(lambda: not any(map(is_running, processes)), 60)
    assert status()[1]["state"] == "dead"
    assert list(Path("/dev/shm").glob(f"tkit{record.pid}_*"))
    assert running_servers() == []
    assert tkit("stop").stdout == "tiny: had ended already; removed what it left behind\n"
    assert_nothing_left(engine, record.pid, processes)


def test_a_model_that_holds_pythons_lock_outlives_no_server(engine: Path) -> None:
    """As one does whose question a killed server never answered."""
    write_engine(engine, backend="locked")
    record = serve_detached(engine, FREE)
    processes = processes_of(record.pid)
    time.sleep(1)  # the three seconds that this backend sets count from the next look at the server
    client = http.client.HTTPConnection("127.0.0.1", record.http_port)
    client.request("POST", "/v2/models/ensemble/generate", json.dumps({"text_input": "a", "max_tokens": 2}))
    time.sleep(1)
    os.kill(record.pid, signal.SIGKILL)
    assert wait_until(lambda: not any(map(is_running, processes)))
    client.close()


def test_stop_kills_a_server_that_does_not_end(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tkit.stages.serve.GRACE_S", 0)
    monkeypatch.setattr(ServeOptions, "exit_timeout_s", 1)
    record = serve_detached(engine, FREE)
    processes = processes_of(record.pid)
    client = triton.InferenceServerClient(f"127.0.0.1:{record.grpc_port}")
    client.start_stream(lambda result, error: None)  # an idle stream: the server would wait for it without end
    os.kill(record.pid, signal.SIGSTOP)
    assert tkit("stop").stdout == f"tiny: killed, it did not end in time (pid {record.pid})\n"
    client.close()
    assert_nothing_left(engine, record.pid, processes)


def test_a_model_that_fails_to_load_is_told_with_its_reason(engine: Path) -> None:
    write_engine(engine, backend="failing")
    result = tkit("serve", *FREE_PORTS, "--timeout", "60")
    assert result.exit_code == 1
    assert "error: the server ended with exit code 1; its last lines:\n" in result.stderr
    assert "ValueError: checkpoint says 7 layers, found 6" in result.stderr
    assert f"hint: the whole log: {engine.parent}/.servers/tiny.log\n" in result.stderr
    assert [path.name for path in (engine.parent / ".servers").iterdir()] == ["tiny.log"]


def test_a_model_that_cannot_generate_never_opens_a_port(engine: Path) -> None:
    write_engine(engine, backend="mute")
    result = tkit("serve", *FREE_PORTS)
    assert result.exit_code == 1
    assert "RuntimeError: the engine gave no first token: no kernel" in result.stderr
    log = (engine.parent / ".servers" / "tiny.log").read_text()
    assert "Started HTTPService" not in log


def test_a_model_that_hangs_ends_within_the_timeout(engine: Path) -> None:
    write_engine(engine, backend="hanging")
    started = time.monotonic()
    result = tkit("serve", *FREE_PORTS, "--timeout", "2")
    assert time.monotonic() - started < 60
    assert result.exit_code == 1
    assert "error: the server was not ready within 2 s; its last lines:\n" in result.stderr
    here = [process.info["cwd"] or "" for process in psutil.process_iter(["cwd"])]
    assert not [cwd for cwd in here if cwd.startswith(str(engine.parent / ".servers"))]  # where Triton runs
    assert [path.name for path in (engine.parent / ".servers").iterdir()] == ["tiny.log"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_foreground_and_everything_it_started(engine: Path, signum: int, code: int) -> None:
    serving = Foreground()
    serving.process.send_signal(signum)
    assert serving.end()[0] == code
    assert_nothing_left(engine, serving.record["pid"], serving.processes)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=["ctrl-c", "terminal closed"]
)
def test_an_interrupt_during_the_start_leaves_nothing(engine: Path, signum: int, code: int) -> None:
    write_engine(engine, backend="hanging")
    before = signal.signal(signum, signal.default_int_handler)  # what nohup has ignored, a child would ignore as well
    starting = subprocess.Popen([sys.executable, "-c", TKIT, "serve", "--quiet", *FREE_PORTS], stderr=subprocess.PIPE)
    signal.signal(signum, before)
    files = server_files("tiny")
    assert wait_until(lambda: any("stub" in name for name in child_names(files.pid())), 300), child_names(files.pid())
    pid = files.pid() or 0
    processes = processes_of(pid)
    starting.send_signal(signum)
    starting.communicate(timeout=300)
    assert starting.returncode == code
    assert_nothing_left(engine, pid, processes)


def test_two_starts_at_once_give_one_server(engine: Path) -> None:
    command = [sys.executable, "-c", TKIT, "serve", "--detach", "--json", *FREE_PORTS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    starts = [subprocess.Popen(command, **pipes) for _ in range(2)]
    ended = sorted((*start.communicate(timeout=120), start.returncode) for start in starts)
    (_, refusal, refused_code), (record, _, served_code) = ended
    assert (refused_code, served_code) == (1, 0)
    assert "is already served" in refusal or "is being started by another tkit serve" in refusal
    assert [running.pid for running in running_servers()] == [json.loads(record)["pid"]]


@pytest.mark.parametrize(
    ("who", "message"),
    [
        ("server", "error: the server died: signal SIGKILL; its last lines:"),
        ("model", "error: the model's process died (killed, or out of memory)"),
        ("front", "error: the OpenAI front died (killed, or out of memory)"),
    ],
)
def test_the_foreground_notices_what_is_killed(engine: Path, who: str, message: str) -> None:
    serving = Foreground()
    server, front = serving.record["pid"], serving.record["openai_pid"]
    [model] = {process.pid for process in serving.processes} - {server, front}
    os.kill({"server": server, "model": model, "front": front}[who], signal.SIGKILL)
    code, errors = serving.end()
    assert (code, message in errors) == (1, True), errors
    assert_nothing_left(engine, server, serving.processes)


def test_the_foreground_ends_when_its_server_is_stopped_elsewhere(engine: Path) -> None:
    serving = Foreground()
    [stopped] = stop_server()
    assert (stopped.engine, stopped.was_running, stopped.was_killed) == ("tiny", True, False)
    code, errors = serving.end()
    assert (code, errors.endswith("the server was stopped\n")) == (0, True)
    assert_nothing_left(engine, serving.record["pid"], serving.processes)


@pytest.mark.usefixtures("quick_stop")
def test_a_server_dies_with_a_killed_foreground_and_the_next_one_starts(engine: Path) -> None:
    serving = Foreground()
    serving.process.kill()
    serving.end()
    assert wait_until(lambda: not any(map(is_running, serving.processes)))
    with running_server(engine, FREE) as record:
        assert not list(Path("/dev/shm").glob(f"tkit{serving.record['pid']}_*"))
    assert_nothing_left(engine, record.pid)


class Traffic:
    """Short requests to each port, each over a connection of its own, until the block ends.

    As every client does, it tries again when a connection is closed before its request has come in.
    """

    def __init__(self, record: ServerRecord):
        self.failures: dict[str, list[str]] = {"openai": [], "http": [], "grpc": []}
        self._answers = dict.fromkeys(self.failures, 0)
        self._record = record
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(name,)) for name in self.failures]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        self._wait_for_more()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait_for_more()
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _wait_for_more(self) -> None:
        before = dict(self._answers)
        assert wait_until(lambda: all(self._answers[name] >= count + 4 for name, count in before.items()), 60)

    def _run(self, name: str) -> None:
        while not self._is_over.is_set():
            for _ in range(2):
                try:
                    status, answer = self._ask(name)
                    break
                except ConnectionError as error:
                    status, answer = 0, repr(error)
            if status != 200 or "a b " not in answer:
                self.failures[name].append(f"{status} {answer}")
            self._answers[name] += 1

    def _ask(self, name: str) -> tuple[int, str]:
        if name == "openai":
            body = {"prompt": "a b", "max_tokens": 2, "model": "ensemble"}
            return ask(self._record.openai_port, "/v1/completions", body)
        if name == "http":
            return ask(self._record.http_port, "/v2/models/ensemble/generate", {"text_input": "a b", "max_tokens": 2})
        try:
            return 200, probe.generate("127.0.0.1", self._record.grpc_port, "a b", 2, 30)
        except ServerError as error:
            return 500, str(error)


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
    response = connection.getresponse()
    told = response.status, response.read().decode()
    connection.close()
    return told


def test_a_server_is_replaced_on_its_ports_without_a_gap(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    are_borrowed = []  # the old server's sockets, where this system allows it
    monkeypatch.setattr(
        "tkit.stages.serve.stop_listening", lambda *given: are_borrowed.append(launcher.stop_listening(*given))
    )
    write_engine(engine.parent / "next")
    old = serve_detached(engine, FREE)
    processes = processes_of(old.pid)
    with Traffic(old) as traffic:
        result = tkit("serve", "next", "--replace", "--detach", "--json")
        assert result.exit_code == 0, result.output
    try:
        assert traffic.failures["openai"] == []
        assert are_borrowed == [False] or traffic.failures == {"openai": [], "http": [], "grpc": []}
        new = json.loads(result.stdout)
        assert "tiny: replaced\n" in result.stderr
        shared = ("host", "http_port", "grpc_port", "openai_port")
        assert [new[name] for name in shared] == [getattr(old, name) for name in shared]
        assert [record.pid for record in running_servers()] == [new["pid"]]
        assert json.loads(ask(old.openai_port, "/v1/models")[1])["data"][0]["root"] == "next"
        assert probe.generate("127.0.0.1", old.grpc_port, "x y", 2, 30) == "x y "
    finally:
        assert tkit("stop", "next").exit_code == 0
    (engine.parent / ".servers" / "next.log").unlink()
    assert_nothing_left(engine, old.pid, processes)


def test_an_engine_that_does_not_generate_replaces_nothing(engine: Path) -> None:
    none = tkit("serve", "--replace")
    assert (none.exit_code, none.stderr.splitlines()[0]) == (1, "error: no server is running that could be replaced")
    write_engine(engine.parent / "next", backend="mute")
    with running_server(engine, FREE) as old:
        with Traffic(old) as traffic:
            result = tkit("serve", "next", "--replace", "--detach")
        assert (result.exit_code, "the engine gave no first token: no kernel" in result.stderr) == (1, True)
        assert not any(traffic.failures.values())
        assert running_servers() == [old]


def test_a_place_that_cannot_be_written_is_told(engine: Path) -> None:
    servers = engine.parent / ".servers"
    servers.write_text("")
    result = tkit("serve", "--detach", *FREE_PORTS)
    assert (result.exit_code, result.stderr) == (1, f"error: {servers}/tiny.lock cannot be locked: File exists\n")
    servers.unlink()


def test_a_changed_file_is_refused_before_anything_starts(engine: Path) -> None:
    (engine / "checkpoint" / "rank0.safetensors").write_bytes(b"weightz")
    result = tkit("serve", "--detach", *FREE_PORTS)
    assert result.exit_code == 2
    assert f"error: {engine}: 1 of 1 files are not as built\n  - checkpoint/rank0.safetensors: sha256" in result.stderr
    assert list((engine.parent / ".servers").iterdir()) == []


def test_no_engine_and_unknown_engines(engine: Path) -> None:
    unknown = tkit("serve", "tinny")
    assert (unknown.exit_code, unknown.stderr) == (
        2, 'error: no engine "tinny" (did you mean "tiny"?)\nhint: engines in engines: tiny\n',
    )  # fmt: skip
    (engine / "engine.json").unlink()
    none = tkit("serve")
    assert (none.exit_code, none.stderr) == (2, "error: no engine in engines\nhint: build one: tkit build\n")


def test_everything_that_keeps_a_server_from_starting_is_listed(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tkit.stages.serve.install_problems", lambda install: ["no Triton"])
    monkeypatch.setattr("tkit.stages.serve.shared_memory_problems", lambda: ["no memory"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = tkit("serve", *FREE_PORTS, "--http-port", port)
    assert (result.exit_code, result.stderr) == (
        1,
        "error: the server cannot start here\n  - no Triton\n"
        f"  - --http-port {port} is in use by {psutil.Process().name()} (pid {os.getpid()})\n  - no memory\n"
        "hint: tkit status names the servers of this checkout, tkit stop ends one; port 0 is any free one\n",
    )


@pytest.mark.usefixtures("quick_stop")
def test_a_port_that_is_lost_between_choosing_and_binding_is_chosen_again(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        answers = [[taken.getsockname()[1], *free_ports("127.0.0.1", 3)]]
        monkeypatch.setattr(
            "tkit.stages.serve.free_ports", lambda host, count: answers.pop() if answers else free_ports(host, count)
        )
        with running_server(engine, FREE) as record:
            assert record.http_port != taken.getsockname()[1]
    assert answers == []
    assert_nothing_left(engine, record.pid)


def test_two_commands_do_not_replace_one_server(engine: Path) -> None:
    with books_of_a_server(engine, 0), replacing():
        second = tkit("serve", "--replace")
    assert (second.exit_code, second.stderr) == (
        1, "error: another tkit serve --replace is under way\nhint: try again when it has ended\n",
    )  # fmt: skip


def test_several_servers_want_a_name(engine: Path) -> None:
    with contextlib.ExitStack() as serving:
        for started, name in enumerate(("tiny", "other")):
            serving.enter_context(books_of_a_server(engine.parent / name, started))
        result = tkit("stop")
        unknown = tkit("stop", "third")
        replaced = tkit("serve", "--replace")
    assert (result.exit_code, result.stderr) == (
        2, "error: several servers are running\n  - other\n  - tiny\nhint: name one: tkit stop ENGINE\n",
    )  # fmt: skip
    assert (unknown.exit_code, unknown.stderr) == (
        1, 'error: no server is running for "third"\nhint: running: other, tiny\n',
    )  # fmt: skip
    assert (replaced.exit_code, replaced.stderr) == (
        2, "error: several servers are running\n  - tiny\n  - other\nhint: stop all but the one to replace: tkit stop ENGINE\n",
    )  # fmt: skip


@pytest.mark.parametrize("garbage", [b"", b'{"engine": "/x", "pid"', b'{"pid": "7"}', b"\xff\x00"])
def test_a_record_that_cannot_be_read_hides_no_other_server(engine: Path, garbage: bytes) -> None:
    torn = server_files("torn")
    with books_of_a_server(engine, 0), books_of_a_server(engine.parent / "torn", 1):
        torn.record.write_bytes(garbage)
        result = tkit("status", "--json")
        found = {server["engine"]: server for server in json.loads(result.stdout)}
        assert (result.exit_code, found["torn"]["state"], found["tiny"]["record"]["pid"]) == (1, "failing", os.getpid())
        assert found["torn"]["problem"].startswith(f"{torn.record}: ")
        assert [record.engine for record in running_servers()] == [str(engine)]
        write_engine(engine.parent / "torn")
        again = tkit("serve", "torn")
        assert (again.exit_code, f"error: {torn.record}: " in again.stderr) == (2, True)
        assert again.stderr.endswith("hint: end that server and remove its files: tkit stop torn\n")
    torn.record.write_bytes(garbage)
    assert "torn: dead, " in tkit("status", "torn").stdout
    assert tkit("stop", "torn").stdout == "torn: had ended already; removed what it left behind\n"
    assert not torn.record.exists()


def test_a_server_whose_record_cannot_be_read_is_named_and_stopped(engine: Path) -> None:
    record = serve_detached(engine, FREE)
    server_files("tiny").record.write_text("{")
    with pytest.raises(InputError, match="tiny.json: not readable as JSON"):
        running_servers()
    assert tkit("stop").stdout == f"tiny: stopped (pid {record.pid})\n"
    assert_nothing_left(engine, record.pid)


@contextlib.contextmanager
def books_of_a_server(engine: Path, started: int) -> Iterator[None]:
    """What is written down while a server runs, its process being this one."""
    files = server_files(engine.name)
    lock = ServerLock(files)
    lock.write_pid(os.getpid())
    ports = {"http_port": 1, "grpc_port": 2, "metrics_port": 3, "openai_port": 4}
    record = ServerRecord(
        engine=str(engine), pid=os.getpid(), host="127.0.0.1", **ports, model_pids=(), openai_pid=0,
        api_key_file=None, started=f"2026-01-0{started + 1}", log=str(files.log),
    )  # fmt: skip
    write_json(files.record, record)
    yield
    files.remove_leftovers()
    lock.release()


def test_an_open_address_is_warned_about(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Notes(Progress):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    progress = Notes()
    (engine / "checkpoint" / "rank0.safetensors").unlink()  # it ends before it starts
    options = replace(FREE, host="0.0.0.0")
    with pytest.raises(InputError), running_server(engine, options, progress=progress):
        pass
    assert any("opens the server to the network" in note for note in progress.notes)
    assert any("CVE-2025-23310" in note for note in progress.notes)


def test_a_server_that_ends_in_silence_is_told(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TKIT_TRITONSERVER", "/bin/true")
    result = tkit("serve", *FREE_PORTS)
    assert (result.exit_code, "; it said nothing\nhint: the whole log: " in result.stderr) == (1, True), result.stderr


def test_a_host_elsewhere_is_told_before_anything_starts(engine: Path) -> None:
    result = tkit("serve", *FREE_PORTS, "--host", "192.0.2.1")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: the server cannot start here\n"
        "  - --host 192.0.2.1: Cannot assign requested address; expected an address of this machine\n"
        "hint: tkit doctor --backend fake says what this machine lacks\n",
    )


def test_impossible_options_are_listed() -> None:
    with pytest.raises(InputError) as error:
        ServeOptions(host="here", http_port=70000, grpc_port=9, metrics_port=9, device="tpu", timeout_s=0)
    assert error.value.problems == (
        "--http-port is 70000, expected 0 (any free port) to 65535",
        "two ports are equal: --http-port 70000, --grpc-port 9, --metrics-port 9, --openai-port 9000",
        '--host is "here", expected an IPv4 address, such as 127.0.0.1',
        '--device is "tpu", expected one of auto, cpu, cuda',
        "--timeout is 0, expected more than 0 seconds",
    )
    assert ServeOptions(host="localhost").is_loopback and not ServeOptions(host="10.0.0.1").is_loopback
