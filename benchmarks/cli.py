"""How long `tkit --help` takes, beside an empty Python and an import of click: the best of twenty, alternating.

python -m benchmarks.cli
"""

from __future__ import annotations

import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import click'": [sys.executable, "-c", "import click"],
    "tkit --help": [sys.executable, "-m", "tkit", "--help"],
}
ROUNDS = 20


def main() -> None:
    best = dict.fromkeys(COMMANDS, float("inf"))
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            best[name] = min(best[name], time.perf_counter() - started)
    for name, seconds in best.items():
        print(f"{name:26s} {seconds * 1000:6.0f} ms")


if __name__ == "__main__":
    main()
