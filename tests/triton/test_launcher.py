"""Command line, environment and end of a server process, with plain processes in Triton's place."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tkit.triton import child, launcher
from tkit.triton.install import TritonInstall
from tkit.triton.launcher import LaunchSpec, describe_exit, last_lines, server_command, server_environment, stop_group

SPEC = LaunchSpec(
    repository=Path("/run/repository"), host="127.0.0.1", http_port=8000, grpc_port=8001, metrics_port=8002,
    exit_timeout_s=10, backends=Path("/run/backends"), shares_ports=True,
)  # fmt: skip


def test_command_line() -> None:
    restricted = "model-repository,shared-memory,trace,logging:tkit-key=k"
    assert server_command(Path("/opt/tritonserver/bin/tritonserver"), SPEC, "k") == [
        "/opt/tritonserver/bin/tritonserver",
        "--model-repository=/run/repository",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        "--backend-directory=/run/backends",
        "--backend-config=python,shm-region-prefix-name=tkit{pid}_",
        "--http-address=127.0.0.1",
        "--http-port=8000",
        f"--http-restricted-api={restricted}",
        "--grpc-address=127.0.0.1",
        "--grpc-port=8001",
        f"--grpc-restricted-protocol={restricted}",
        "--metrics-address=127.0.0.1",
        "--metrics-port=8002",
        "--allow-gpu-metrics=false",
        "--reuse-http-port=true",
        "--reuse-grpc-port=true",
        "--pinned-memory-pool-byte-size=0",
        "--exit-timeout-secs=10",
    ]


def test_ranks_behind_the_first_load_the_engine_and_open_no_port() -> None:
    spec = replace(SPEC, num_ranks=2, rank_model="tensorrt_llm")
    command = server_command(Path("/x/tritonserver"), spec, "k", "/x/mpirun")
    assert command[:5] == ["/x/mpirun", "--allow-run-as-root", "-n", "1", "/x/tritonserver"]
    second = command[command.index(":") + 1 :]
    assert second == [
        "-n",
        "1",
        "/x/tritonserver",
        "--model-repository=/run/repository",
        "--model-control-mode=explicit",
        "--load-model=tensorrt_llm",
        "--disable-auto-complete-config",
        "--backend-directory=/run/backends",
        "--backend-config=python,shm-region-prefix-name=tkit{pid}_1_",
        "--allow-http=false",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--pinned-memory-pool-byte-size=0",
        "--exit-timeout-secs=10",
    ]


def test_environment_has_this_python_first_and_no_tokens() -> None:
    install = TritonInstall(binary=Path("/x/bin/tritonserver"), origin="", is_wheel=True)
    given = {"PATH": "/usr/bin", "HF_TOKEN": "canary", "LD_LIBRARY_PATH": "/mine"}
    values = server_environment(install, given)
    assert "canary" not in values.values()
    assert values["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
    assert values["HF_HUB_OFFLINE"] == "1"
    directory, mine = values["LD_LIBRARY_PATH"].split(":")
    assert (mine, any(Path(directory).glob("libpython3*.so*"))) == ("/mine", True)


def start_child(*command: str, **settings: object) -> subprocess.Popen[str]:
    settings = {"parent_pid": None, "death_signal": 9, "stack_bytes": 64 * 2**20, "beside": [], **settings}
    arguments = [sys.executable, "-I", "-S", child.__file__, json.dumps(settings), *command]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_the_server_process_gets_its_stack_its_pid_and_default_signals() -> None:
    script = "ulimit -s; echo {pid} $$; grep SigIgn /proc/self/status"
    process = start_child("/bin/sh", "-c", script)
    stack, pids, ignored = process.communicate(timeout=30)[0].splitlines()
    assert (int(stack), pids.split()) == (64 * 1024, [str(process.pid)] * 2)
    assert int(ignored.split()[1], 16) & (1 << (signal.SIGPIPE - 1)) == 0


def test_a_command_beside_the_server_is_its_child_and_of_its_group() -> None:
    beside = ["/bin/sh", "-c", "echo $PPID {pid} $(ps -o pgid= -p $$); ulimit -s"]
    process = start_child("/bin/sleep", "1", beside=beside)
    pids, stack = process.communicate(timeout=30)[0].splitlines()
    assert pids.split() == [str(process.pid)] * 3
    assert stack != str(64 * 1024)  # the server's alone


def test_the_server_process_dies_with_the_process_that_started_it() -> None:
    starter = (
        "import json, os, subprocess, sys, time\n"
        "settings = json.dumps({'parent_pid': os.getpid(), 'death_signal': 9, 'stack_bytes': 8 * 2**20, 'beside': []})\n"
        f"command = [sys.executable, '-I', '-S', {child.__file__!r}, settings, '/bin/sleep', '60']\n"
        "print(subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    server = int(parent.stdout.readline())
    deadline = time.monotonic() + 30
    while psutil.Process(server).name() != "sleep" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert launcher.is_running(server)
    parent.kill()
    parent.communicate()
    while launcher.is_running(server) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not launcher.is_running(server)


def test_a_parent_that_is_gone_already_starts_nothing() -> None:
    process = start_child("/bin/echo", "started", parent_pid=1)
    assert (process.communicate(timeout=30)[0], process.returncode) == ("", 1)


def start_group(script: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()  # it is up
    return process


def test_a_group_that_ends_when_asked_is_not_killed() -> None:
    process = start_group("trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done")
    assert stop_group(process.pid, 30) is False
    assert process.wait(30) == 0
    process.communicate()


@pytest.mark.parametrize("trap", ["trap '' TERM", "trap 'exit 0' TERM"], ids=["leader stays", "child stays"])
def test_what_stays_of_a_group_is_killed(trap: str) -> None:
    process = start_group(f"{trap}; (trap '' TERM; echo up; exec sleep 60) & while :; do sleep 0.05; done")
    started = time.monotonic()
    assert stop_group(process.pid, 0.5) is True
    assert time.monotonic() - started < 30
    process.communicate(timeout=30)
    assert living_members(process.pid) == []


def living_members(group: int) -> list[psutil.Process]:
    members = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def test_an_interrupt_while_waiting_still_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    process = start_group("trap '' TERM; echo up; while :; do sleep 0.05; done")
    wait = launcher._wait_for_none

    def interrupted(running: object, timeout_s: float) -> None:
        monkeypatch.setattr(launcher, "_wait_for_none", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher, "_wait_for_none", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stop_group(process.pid, 60)
    assert process.wait(30) == -signal.SIGKILL
    process.communicate()


def test_only_this_servers_shared_memory_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SHARED_MEMORY", tmp_path)
    for name in ("tkit12_a", "tkit12_b", "tkit123_a", "tkit1_a", "triton_python_backend_shm_region_x"):
        (tmp_path / name).touch()
    assert launcher.remove_shared_memory(12) == ["tkit12_a", "tkit12_b"]
    assert len(list(tmp_path.iterdir())) == 3


def test_the_log_without_tables_and_the_exit_code(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b'+---+\n| a |\n+---+\n\nI1120 server.cc:604] \nI1120 1] "one"\n' + b"x" * 500 + b"\nlast \xff\n")
    assert last_lines(log) == ['I1120 1] "one"', "x" * 400, "last �"]
    assert last_lines(log, 1) == ["last �"]
    assert (describe_exit(1), describe_exit(-signal.SIGSEGV)) == ("exit code 1", "signal SIGSEGV")
