"""What a large report costs: points with many requests each, simulated, read and rendered by `tkit report` as typed.

    python -m benchmarks.report [--points 100] [--requests 1000]

CPU seconds and peak memory of the command, and what it wrote. The bars: 10 s, 500 MB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "report"))

MAX_SECONDS, MAX_BYTES = 10.0, 500e6
RUNS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    from factory import card, make_run

    with tempfile.TemporaryDirectory() as directory:
        reports = Path(directory)
        quants = ("none", "fp8", "int8", "int4_awq")[:RUNS]
        loads = tuple(range(1, options.points // RUNS + 1))
        runs = [
            make_run(
                reports,
                quant,
                engine=card(quant),
                concurrency=loads,
                requests=options.requests,
                seed=seed,
                shapes=("128/16",),
            )
            for seed, quant in enumerate(quants)
        ]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run(
            [sys.executable, "-m", "tkit", "report", *map(str, runs), "--out", str(reports / "out"), "--quiet"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        html_bytes = (reports / "out" / "report.html").stat().st_size
    record = {
        "points": len(loads) * RUNS,
        "requests": len(loads) * RUNS * options.requests,
        "cpu_seconds": round(used.ru_utime - before + used.ru_stime, 2),
        "peak_memory_bytes": used.ru_maxrss * 1024,
        "html_bytes": html_bytes,
    }
    if options.json:
        print(json.dumps(record))
        return
    print(f"{record['points']} points, {record['requests']} requests")
    print(f"CPU {record['cpu_seconds']:.1f} s (bar {MAX_SECONDS:.0f})")
    print(f"memory {record['peak_memory_bytes'] / 1e6:.0f} MB (bar {MAX_BYTES / 1e6:.0f})")
    print(f"report.html {html_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
