"""The tritonserver process: its command line, its start, its log and its end. Knows no engine and sends no request."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tkit.errors import ServerError
from tkit.triton import child
from tkit.triton.install import SHARED_MEMORY, TritonInstall, library_directory, others_path

# The HTTP server takes 16 bytes of stack for every piece in which a body arrives: with the default 8 MB, half a million
# pieces (600 thousand chunks of one byte; a few megabytes over a slow network) kill it. 64 MB took 3 million.
# Not unlimited: glibc would then give threads 2 MB.
STACK_BYTES = 64 * 1024 * 1024
# What a client has no business with. The key is made up and thrown away, so nobody has access.
RESTRICTED_APIS = "model-repository,shared-memory,trace,logging"
# After the exit timeout. Then the server has failed to end by itself: a client that keeps an idle gRPC stream open blocks
# it for ever; a gRPC request refused for an unknown input, or cancelled after its end, until the exit timeout.
GRACE_S = 5
# A rank behind the first waits in its model for work from that one. Should it ever get past, it must not take its ports.
NO_PORTS = ("--allow-http=false", "--allow-grpc=false", "--allow-metrics=false")
ASKED_TO_END = "Signal (15) received"  # in the log
LOG_LINES = 15
PIDFD_GETFD = 438  # a system call since Linux 5.6, without a name in Python
LINE_CHARACTERS = 400
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    repository: Path
    host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    exit_timeout_s: int
    backends: Path | None = None  # None = the server's own
    has_gpu_metrics: bool = False
    is_own_python: bool = True  # the models' Python is tkit's, not the first on PATH
    shares_ports: bool = False  # with the server that is to replace this one; the metrics port cannot be shared
    num_ranks: int = 1  # processes of one engine, one per GPU, under mpirun
    rank_model: str | None = None  # the only model that ranks after the first load

    def from_repository(self) -> LaunchSpec:
        """The same, for a server that starts in its repository, without a path that a shell could misread: the Python
        backend hands them to one unquoted, and a space in one kept the server from ever getting ready."""
        backends = Path(os.path.relpath(self.backends, self.repository)) if self.backends is not None else None
        return dataclasses.replace(self, repository=Path(), backends=backends)


def server_command(binary: Path, spec: LaunchSpec, key: str, mpirun: str = "mpirun") -> list[str]:
    """`{pid}` is the process id of the server, or of its mpirun, filled in by `child.py`.

    With several ranks the first is the leader, which serves; the others wait for it inside the engine's model.
    """
    if spec.num_ranks == 1:
        return _rank_command(binary, spec, key, 0)
    command = [mpirun, "--allow-run-as-root"]
    for rank in range(spec.num_ranks):
        command += [*([":"] if rank else []), "-n", "1", *_rank_command(binary, spec, key, rank)]
    return command


def _rank_command(binary: Path, spec: LaunchSpec, key: str, rank: int) -> list[str]:
    return [
        str(binary),
        f"--model-repository={spec.repository}",
        *(
            ["--model-control-mode=explicit", f"--load-model={spec.rank_model}"]
            if rank
            else ["--model-control-mode=none"]
        ),
        "--disable-auto-complete-config",
        *([f"--backend-directory={spec.backends}"] if spec.backends else []),
        f"--backend-config=python,shm-region-prefix-name=tkit{{pid}}_{f'{rank}_' if rank else ''}",
        *(NO_PORTS if rank else _port_options(spec, key)),
        "--pinned-memory-pool-byte-size=0",
        f"--exit-timeout-secs={spec.exit_timeout_s}",
    ]


def _port_options(spec: LaunchSpec, key: str) -> list[str]:
    return [
        f"--http-address={spec.host}",
        f"--http-port={spec.http_port}",
        f"--http-restricted-api={RESTRICTED_APIS}:tkit-key={key}",
        f"--grpc-address={spec.host}",
        f"--grpc-port={spec.grpc_port}",
        f"--grpc-restricted-protocol={RESTRICTED_APIS}:tkit-key={key}",
        f"--metrics-address={spec.host}",
        f"--metrics-port={spec.metrics_port}",
        f"--allow-gpu-metrics={str(spec.has_gpu_metrics).lower()}",
        *(["--reuse-http-port=true", "--reuse-grpc-port=true"] if spec.shares_ports else []),
    ]


def server_environment(
    install: TritonInstall, environment: Mapping[str, str] = os.environ, *, is_own_python: bool = True
) -> dict[str, str]:
    """Nothing fetched, no tokens. The first Python on PATH, where the Python backend looks for packages, is this
    interpreter; or, for models of the container, the container's, also when tkit lives in a virtual environment."""
    values = {name: value for name, value in environment.items() if name not in SECRETS}
    values |= OFFLINE
    if is_own_python:
        values["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), values.get("PATH", os.defpath)])
    else:
        values["PATH"] = others_path(environment)
    library = library_directory()
    if install.is_wheel and library is not None:
        libraries = [str(library), *filter(None, [values.get("LD_LIBRARY_PATH")])]
        values["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
    return values


class ServerProcess:
    """A running tritonserver that leads its own session and process group. `stop` ends it, whatever state it is in."""

    def __init__(self, popen: subprocess.Popen[bytes], log: Path, exit_timeout_s: int):
        self._popen = popen
        self.log = log
        self._exit_timeout_s = exit_timeout_s

    @classmethod
    def start(
        cls,
        install: TritonInstall,
        spec: LaunchSpec,
        log: Path,
        *,
        dies_with_parent: bool,
        keep_open: Sequence[int] = (),
        beside: Sequence[str] = (),
    ) -> ServerProcess:
        """`dies_with_parent`: also when this process is killed; then call it from a thread that lives as long.

        `keep_open` are file descriptors that the server inherits, so that a lock lives as long as it does. `beside` is
        a command that runs as a child of the server, `{pid}` in it being the server's.
        """
        settings = {
            "parent_pid": os.getpid() if dies_with_parent else None,
            # With SIGTERM a server would wait for its clients, with nobody left to end the wait. mpirun waits a second for
            # its ranks and kills them; killed itself, it might leave them running.
            "death_signal": int(signal.SIGKILL if spec.num_ranks == 1 else signal.SIGTERM),
            "stack_bytes": STACK_BYTES,
            "beside": [*beside],
        }
        mpirun = shutil.which("mpirun") or "mpirun"
        command = server_command(install.binary, spec.from_repository(), secrets.token_hex(16), mpirun)
        with open(log, "wb") as output:
            popen = subprocess.Popen(
                [sys.executable, "-I", "-S", child.__file__, json.dumps(settings), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=server_environment(install, is_own_python=spec.is_own_python),
                start_new_session=True,
                pass_fds=keep_open,
                cwd=spec.repository,  # the Python backend imports from there before anything installed
            )
        return cls(popen, log, spec.exit_timeout_s)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative is the signal that killed it."""
        return self._popen.poll()

    def wait(self, timeout_s: float) -> int | None:
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    @property
    def is_asked_to_end(self) -> bool:
        return self.log_contains(ASKED_TO_END)

    def child_pids(self) -> set[int]:
        """The models' processes, and what was started beside the server, that run now."""
        try:
            children = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return set()
        return {process.pid for process in children if is_running(process.pid)}

    def find_child(self, argument: str) -> int | None:
        """The running child with `argument` on its command line."""
        for pid in self.child_pids():
            with contextlib.suppress(psutil.NoSuchProcess):
                if argument in psutil.Process(pid).cmdline():
                    return pid
        return None

    def log_contains(self, text: str) -> bool:
        return text in self.log.read_text("utf-8", "replace")

    def check_alive(self) -> None:
        code = self.exit_code()
        if code is not None:
            raise self.failure(f"the server ended with {describe_exit(code)}")

    def failure(self, message: str) -> ServerError:
        lines = "".join(f"\n  | {line}" for line in last_lines(self.log))
        said = f"its last lines:{lines}" if lines else "it said nothing"
        return ServerError(f"{message}; {said}", hint=f"the whole log: {self.log}")

    def stop(self) -> bool:
        """Ends the server and its models' processes; true when it had to be killed."""
        return self._end(self._exit_timeout_s + GRACE_S)

    def kill(self) -> None:
        """Ends a server that serves nobody."""
        self._end(patience_s=0)

    def _end(self, patience_s: float) -> bool:
        try:
            return stop_group(self.pid, patience_s)
        finally:
            self.wait(GRACE_S)  # reaps it
            remove_shared_memory(self.pid)

    def leave(self) -> None:
        """The server outlives this object, which is what Popen would otherwise warn about."""
        self._popen.returncode = 0


def stop_listening(pid: int, ports: Collection[int]) -> bool:
    """Has a server accept nothing more on `ports`, so that new connections go to the one that shares them; open ones stay.

    Asked to end, Triton stops accepting at once and keeps its sockets until its models are unloaded: half of the new
    connections would wait there, to be reset. False where the system does not let its sockets be borrowed (a container
    without CAP_SYS_PTRACE).
    """
    try:
        with open(os.pidfd_open(pid), "rb", buffering=0) as pidfd:
            for connection in psutil.Process(pid).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port in ports:
                    with socket.socket(fileno=_borrowed(pidfd.fileno(), connection.fd)) as listener:
                        listener.shutdown(socket.SHUT_RDWR)
    except (OSError, psutil.Error):
        return False
    return True


def _borrowed(pidfd: int, descriptor: int) -> int:
    """Another process's file, opened here too."""
    own: int = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, pidfd, descriptor, 0)
    if own < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return own


def end_member(group: int, pid: int, patience_s: float) -> None:
    """SIGTERM to one process of a server's group, before the server itself, and a bounded wait for its end."""
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(pid) == group:
            os.kill(pid, signal.SIGTERM)
            _wait_for_none(lambda: [pid] if is_running(pid) else [], patience_s)


def stop_group(pid: int, patience_s: float) -> bool:
    """SIGTERM to the group, a bounded wait, SIGKILL to what is left of it; true when that was needed.

    The processes of Triton's Python backend ignore SIGTERM: they end with their server, after the last request.
    An exception (a second Ctrl-C) ends the wait, not the killing.
    """
    try:
        _signal(os.killpg, pid, signal.SIGTERM)
        _wait_for_none(lambda: [pid] if is_running(pid) else [], patience_s)
        if not is_running(pid):
            _wait_for_none(lambda: _members(pid), 1)  # a model's process leaves by itself when its server has
    finally:
        is_forced = kill_group(pid)
    return is_forced


def kill_group(pid: int) -> bool:
    """Kills what lives of the process group that `pid` led; true when there was something."""
    has_members = bool(_members(pid))
    if has_members:
        _signal(os.killpg, pid, signal.SIGKILL)
        _wait_for_none(lambda: _members(pid), GRACE_S)
    return has_members


def _wait_for_none(running: Callable[[], Sequence[int]], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while running() and time.monotonic() < deadline:
        time.sleep(0.05)


def _signal(send: Callable[[int, int], None], pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        send(pid, signum)


def _members(group: int) -> list[int]:
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == group and is_running(pid):
                members.append(pid)
    return members


def is_running(pid: int) -> bool:
    """A zombie has ended, nothing but its parent's curiosity keeps it; unless other threads of it are still ending."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1
    except psutil.NoSuchProcess:
        return False


def remove_shared_memory(pid: int) -> list[str]:
    """Removes what a server of this process id left in /dev/shm, where regions outlive a crash; returns their names."""
    leftovers = sorted(SHARED_MEMORY.glob(f"tkit{pid}_*"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return [path.name for path in leftovers]


def describe_exit(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def last_lines(log: Path, count: int = LOG_LINES) -> list[str]:
    """The end of a log without Triton's tables, which bury the reason and repeat what the lines say."""
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 65_536))
        lines = file.read().decode("utf-8", "replace").splitlines()
    lines = [line.rstrip()[:LINE_CHARACTERS] for line in lines if not line.startswith(("+", "|"))]
    return [line for line in lines if line and not line.endswith("]")][-count:]
