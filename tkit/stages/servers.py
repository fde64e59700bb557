"""The books on running servers: which engines are served, by which process, and what a dead one left behind.

    engines/.servers/<engine>.lock    locked as long as any process of the server lives; holds its pid
    engines/.servers/<engine>.json    ServerRecord, while it answers
    engines/.servers/<engine>/        its private runtime directory: model repository, backends
    engines/.servers/<engine>.log     what it said, kept until the next start

The lock is an flock that the server inherits, so the kernel releases it however the server ends, and a process id is
believed only while the lock is held. Knows files and process ids; starts nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tkit.errors import InputError, ServerError
from tkit.files import from_mapping, read_json
from tkit.specs.server import SERVER_RECORDS, ServerRecord
from tkit.stages.engines import ENGINES_DIR
from tkit.triton.launcher import is_running, kill_group, remove_shared_memory

# A reader holds the lock for microseconds to see whether it is free, a foreground server while it cleans up.
LOCK_PATIENCE_S = 2.0


@dataclass(frozen=True)
class ServerFiles:
    """Where everything about one engine's server lies."""

    directory: Path
    name: str

    @property
    def lock(self) -> Path:
        return self.directory / f"{self.name}.lock"

    @property
    def record(self) -> Path:
        return self.directory / f"{self.name}.json"

    @property
    def runtime(self) -> Path:
        return self.directory / self.name

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    def pid(self) -> int | None:
        """The server's process id; None before there is one."""
        try:
            return int(self.lock.read_text())
        except (OSError, ValueError):
            return None

    def read_record(self) -> ServerRecord | None:
        """None while there is none; raises InputError when it cannot be read."""
        if not self.record.is_file():
            return None
        try:
            return from_mapping(ServerRecord, read_json(self.record), str(self.record))
        except InputError as error:
            error.hint = f"end that server and remove its files: tkit stop {self.name}"
            raise

    def readable_record(self) -> ServerRecord | None:
        """None also when it cannot be read: what must go on without it."""
        try:
            return self.read_record()
        except InputError:
            return None

    def is_locked(self) -> bool:
        descriptor = _try_lock(self.lock, fcntl.LOCK_SH)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None and self.lock.is_file()

    def is_running(self) -> bool:
        """The server itself; not what a killed one may have left, which holds its lock."""
        pid = self.pid()
        return self.is_locked() and (pid is None or is_running(pid))

    def remove_leftovers(self) -> None:
        """Everything of a server that has ended, but its log. The lock stays with whoever holds it."""
        pid = self.pid()
        if pid is not None:
            remove_shared_memory(pid)
        self.record.unlink(missing_ok=True)
        shutil.rmtree(self.runtime, ignore_errors=True)


class ServerLock:
    """Held from before a server starts until after everything of it is gone."""

    def __init__(self, files: ServerFiles):
        """Takes the lock and removes what a dead server left; raises ServerError when the engine is being served."""
        self._path = files.lock
        try:
            files.directory.mkdir(parents=True, exist_ok=True)
            self.descriptor = _patient_lock(files)
        except OSError as error:
            raise ServerError(f"{files.lock} cannot be locked: {error.strerror}") from error
        files.remove_leftovers()
        os.ftruncate(self.descriptor, 0)  # the dead server's process id may become anybody's

    def write_pid(self, pid: int) -> None:
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, str(pid).encode(), 0)

    def leave_to_server(self) -> None:
        """The server's inherited descriptor goes on holding the lock."""
        os.close(self.descriptor)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self.descriptor)


def _patient_lock(files: ServerFiles) -> int:
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        descriptor = _try_lock(files.lock, fcntl.LOCK_EX, os.O_CREAT)
        if descriptor is not None:
            return descriptor
        pid = files.pid()
        if pid is not None and not is_running(pid):
            kill_group(pid)  # what a killed server left running holds its lock
        if time.monotonic() > deadline:
            raise _already_served(files)
        time.sleep(0.05)


def _try_lock(path: Path, kind: int, flags: int = 0) -> int | None:
    """An open, locked descriptor of the file that has this name now; None when it is locked or absent."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _already_served(files: ServerFiles) -> ServerError:
    record = files.read_record()  # one that cannot be read is an error that names it
    if record is None:
        return ServerError(
            f"{files.name} is being started by another tkit serve",
            hint="wait for it, or end that command",
        )
    return ServerError(
        f"{record.engine} is already served: http {record.http_port}, grpc {record.grpc_port}, pid {record.pid}",
        hint=f"use that server, or end it first: tkit stop {files.name}",
    )


def server_files(name: str, engines_dir: Path = ENGINES_DIR) -> ServerFiles:
    return ServerFiles((engines_dir / SERVER_RECORDS).absolute(), name)


@contextlib.contextmanager
def replacing(engines_dir: Path = ENGINES_DIR) -> Iterator[None]:
    """Held by the one command that puts a server in the place of another; ServerError for a second."""
    (engines_dir / SERVER_RECORDS).mkdir(parents=True, exist_ok=True)
    directory = os.open(engines_dir / SERVER_RECORDS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ServerError(
                "another tkit serve --replace is under way", hint="try again when it has ended"
            ) from error
        yield
    finally:
        os.close(directory)


def known_servers(engines_dir: Path = ENGINES_DIR) -> list[ServerFiles]:
    """Every engine that has a lock or a record: running, starting or dead."""
    directory = engines_dir / SERVER_RECORDS
    names = {path.stem for pattern in ("*.lock", "*.json") for path in directory.glob(pattern)}
    return [server_files(name, engines_dir) for name in sorted(names)]


def running_servers(engines_dir: Path = ENGINES_DIR) -> list[ServerRecord]:
    """The servers that answer now, the latest last; records of dead servers do not count. Raises InputError where the only
    records are ones that cannot be read."""
    running = [files for files in known_servers(engines_dir) if files.is_running()]
    records = [record for files in running if (record := files.readable_record()) is not None]
    if not records:
        for files in running:
            files.read_record()
    return sorted(records, key=lambda record: record.started)
