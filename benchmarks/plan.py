"""Predictions of TPOT and TTFT beside NVIDIA's aiconfigurator's, on the same published measurements.

    python -m benchmarks.plan [--aiconfigurator PYTHON] [--rows 30]

PYTHON is the interpreter of an environment with `pip install aiconfigurator==0.12.0` (850 MB); without it one is made in
a temporary directory. Runs are taken evenly from the published closed loops of dense and MoE models on one engine
with tensor parallelism alone, which both can predict. tkit's figure is given twice: as a plan has it, each row without itself,
and without the rows' deployments (engine version, GPU, model), neither in the fit of the constants nor as neighbours.
aiconfigurator's tables are measurements of kernels; its published sample is where these rows come from.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tkit.planner.holdout import folds_by_deployment, left_out
from tkit.planner.kernels import Fold, predicted
from tkit.planner.neighbours import published
from tkit.planner.published import Row, read_table
from tkit.planner.selfcheck import predict

# both know these; aiconfigurator ships their configs, so nothing is downloaded
MODELS = {
    ("Llama-3.1-8B", "fp8"): ("meta-llama/Meta-Llama-3.1-8B", {"gemm_quant_mode": "fp8", "kvcache_quant_mode": "fp8"}),
    ("Llama-3.1-70B", "fp8"): ("nvidia/Llama-3.1-70B-Instruct-FP8", {}),
    ("Qwen3-32B", "fp8"): ("Qwen/Qwen3-32B-FP8", {}),
    ("Qwen3-32B", "bf16"): ("Qwen/Qwen3-32B", {}),
    ("Qwen3-235B-A22B", "fp8"): ("Qwen/Qwen3-235B-A22B-FP8", {}),
}
LOADS = ("closed", "burst")
SYSTEMS = {"H100-SXM": "h100_sxm", "H200-SXM": "h200_sxm", "B200": "b200_sxm"}
BACKENDS = {"tensorrt-llm": "trtllm", "vllm": "vllm", "sglang": "sglang"}
ESTIMATE = """
import json, sys, time
started = time.perf_counter()
from aiconfigurator.cli.api import cli_estimate
seconds, answers = [time.perf_counter() - started], []
for query in json.load(sys.stdin):
    started = time.perf_counter()
    try:
        estimate = cli_estimate(**query)
        answers.append({"tpot": estimate.tpot, "ttft": estimate.ttft})
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}"[:200])
    seconds.append(time.perf_counter() - started)
print(json.dumps({"answers": answers, "seconds": seconds}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aiconfigurator", metavar="PYTHON", type=Path)
    parser.add_argument("--rows", type=int, default=30)
    arguments = parser.parse_args()
    everything, _ = read_table()
    usable = [row for row in everything if is_common(row)]
    runs = [usable[index] for index in np.linspace(0, len(usable) - 1, arguments.rows).round().astype(int)]
    with tempfile.TemporaryDirectory() as directory:
        python = arguments.aiconfigurator or environment(Path(directory))
        answers, seconds, num_bytes = aiconfigurator(python, runs)
    unseen = predict_unseen(everything)
    ttft = {run_of(row): row for row in everything if row.metric == "ttft" and row.load in LOADS}
    for metric in ("tpot", "ttft"):
        rows = [run if metric == "tpot" else ttft.get(run_of(run)) for run in runs]
        pairs = [
            (row, answer[metric] / 1e3) for row, answer in zip(rows, answers, strict=True) if row is not None and answer
        ]
        print_errors(metric, [row for row, _ in pairs], np.array([value for _, value in pairs]), unseen)
    started = time.perf_counter()
    predict(runs)
    our_seconds = (time.perf_counter() - started) / len(runs)
    print(f"\nseconds per prediction    aiconfigurator {np.median(seconds):.3f}, tkit {our_seconds:.5f}")
    own_bytes = sum(path.stat().st_size for path in Path(sys.modules["tkit"].__path__[0], "planner").rglob("*.*"))
    print(f"installed                 aiconfigurator {num_bytes / 1e6:.0f} MB, tkit's planner {own_bytes / 1e6:.1f} MB")


def run_of(row: Row) -> tuple[object, ...]:
    """What TPOT and TTFT of one published run have in common."""
    return (row.engine, row.version, row.gpu, row.shape.name, row.dtype, row.parallel, row.isl, row.osl, row.amount)


def print_errors(metric: str, rows: list[Row], theirs: np.ndarray, predicted_unseen: dict[int, float]) -> None:
    ours, unseen = predict(rows)[0], np.array([predicted_unseen[row.number] for row in rows])
    truth = np.array([row.value for row in rows])
    print(f"\n{metric.upper()}, ms: {len(rows)} runs that both answer")
    print(f"{'':60} measured  aiconf.    tkit  unseen")
    for row, value, *others in zip(rows, truth, theirs, ours, unseen, strict=True):
        name = (
            f"{row.engine} {row.version} {row.gpu} {row.shape.name} {row.dtype} tp{row.parallel.tp_size} "
            f"{row.isl}/{row.osl} C{row.amount:g}"
        )
        print(f"{name[:60]:60} {value * 1e3:8.1f} " + "".join(f"{other * 1e3:8.1f}" for other in others))
    for name, values in (("aiconfigurator", theirs), ("tkit", ours), ("tkit, deployment unseen", unseen)):
        error = np.abs(values / truth - 1)
        print(f"{name:25} MAPE {error.mean():6.1%}  median {np.median(error):6.1%}  worst {error.max():6.1%}")


def is_common(row: Row) -> bool:
    return (
        row.metric == "tpot"
        and row.load in LOADS
        and row.gpu in SYSTEMS
        and (row.shape.name, row.dtype) in MODELS
        and row.parallel.pp_size == 1
        and row.machine.tp == row.parallel.tp_size
    )


def aiconfigurator(python: Path, rows: list[Row]) -> tuple[list[dict[str, float] | None], list[float], int]:
    """(milliseconds, None where it has no answer; seconds of each query; bytes of its environment)."""
    queries = []
    for row in rows:
        model, modes = MODELS[row.shape.name, row.dtype]
        queries.append(
            {"model_path": model, "system_name": SYSTEMS[row.gpu], "backend_name": BACKENDS[row.engine], "isl": row.isl,
             "osl": row.osl, "batch_size": int(row.amount), "tp_size": row.parallel.tp_size, "database_mode": "HYBRID",
             **({"moe_tp_size": row.parallel.tp_size, "moe_ep_size": 1} if row.is_moe else {}), **modes}
        )  # fmt: skip
    done = subprocess.run([python, "-c", ESTIMATE], input=json.dumps(queries), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{python}: {done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    for query, answer in zip(queries, result["answers"], strict=True):
        if isinstance(answer, str):
            print(f"no answer for {query['model_path']} {query['backend_name']} {query['system_name']}: {answer}")
    prefix = subprocess.run([python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True).stdout
    num_bytes = sum(path.stat().st_size for path in Path(prefix.strip()).rglob("*") if path.is_file())
    answers = [answer if isinstance(answer, dict) else None for answer in result["answers"]]
    return answers, result["seconds"][1:], num_bytes


def predict_unseen(everything: list[Row]) -> dict[int, float]:
    """{number of a row: its prediction by constants and neighbours outside its fold of deployments}."""
    folds, _ = left_out(everything, folds_by_deployment(everything))
    runs, kernels = [row.run for row in everything], published().kernels
    left = np.zeros(len(runs))
    for name, kernel in kernels.items():
        index = np.array([i for i, run in enumerate(runs) if run.kernel == name])
        own = [Fold(fold.out[index], fold.residuals[index]) for fold in folds]
        left[index] = predicted(kernel, [runs[i] for i in index], own)[0]
    return {row.number: row.value / float(np.exp(error)) for row, error in zip(everything, left, strict=True)}


def environment(directory: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", directory / "venv"], check=True)
    python = directory / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "aiconfigurator==0.12.0"], check=True)
    return python


if __name__ == "__main__":
    main()
