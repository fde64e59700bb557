"""Becomes the server process: `python -I -S child.py SETTINGS COMMAND...` sets limits, then execs the command.

A second command may run beside the server, as its child: so it is of the same session and process group.

What must hold before the first instruction of the server cannot be set from outside afterwards, and Python code between
fork and exec is not safe in a process with threads. Imports the standard library only; knows no Triton.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """SETTINGS is JSON: {"parent_pid": int | null, "death_signal": int, "stack_bytes": int, "beside": [command]}.

    `{pid}` in either command is this process's id.
    """
    settings = json.loads(sys.argv[1])
    if settings["parent_pid"] is not None:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, settings["death_signal"])
        if os.getppid() != settings["parent_pid"]:
            sys.exit(1)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and an ignored signal stays so after exec
    if settings["beside"]:
        beside = _filled(settings["beside"])
        os.posix_spawn(beside[0], beside, os.environ)
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    stack_bytes = settings["stack_bytes"]
    resource.setrlimit(resource.RLIMIT_STACK, (stack_bytes if hard < 0 else min(stack_bytes, hard), hard))
    command = _filled(sys.argv[2:])
    os.execv(command[0], command)


def _filled(command: list[str]) -> list[str]:
    return [argument.replace("{pid}", str(os.getpid())) for argument in command]


if __name__ == "__main__":
    main()
