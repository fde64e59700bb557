"""Runs every benchmark with its defaults: `python -m benchmarks`, or some of them: `python -m benchmarks cli convert`.

Those beside another tool, which needs an environment of its own, run when they are named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BESIDE_ANOTHER_TOOL = {"plan", "quality", "quantize"}


def main() -> None:
    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n\nknown: {', '.join(known)}")
        return
    chosen = sys.argv[1:] or [name for name in known if name not in BESIDE_ANOTHER_TOOL]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        sys.exit(f"no benchmark {', '.join(unknown)}; known: {', '.join(known)}")
    for name in chosen:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


main()
