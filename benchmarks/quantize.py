"""What a calibrated build of a 1.1 B Llama costs, beside NVIDIA ModelOpt 0.47 on the same files.

    python -m benchmarks.quantize --modelopt PYTHON [--quant fp8 int4_awq] [--layers 22] [--tokens 256 ...] [--threads 2]
    python -m benchmarks.quantize --shape 8b --device cuda --quant fp8 int8_sq int4_awq --tokens 4096 --threads 8

PYTHON is the interpreter of an environment with ModelOpt (see `quality`). Without it only tkit is measured. Weights are
random: both tools do the same work whatever their values. Both write TensorRT-LLM checkpoints for tensor parallelism 2.
Calibration tokens come in samples of 256. Beside them what transformers takes for the same tokens: loading the same model in
bfloat16, and its forward pass alone. With `--device cuda` tkit is measured alone; it calibrates on a GPU, whose peak memory is
printed. `--shape 8b` writes 16 GB and an engine of as much.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.convert import SHAPES, write_model
from tkit.backends.nvidia import visible_gpus

EXPORT = Path(__file__).with_name("_modelopt_export.py")
SAMPLE_TOKENS = 256
FORWARD = """
import json, sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
with torch.inference_mode():
    for sample in json.load(open(sys.argv[2])):
        model(torch.tensor([sample]), use_cache=False)
"""


class Cost(NamedTuple):
    wall_s: float
    cpu_s: float
    peak_bytes: int  # resident

    def __str__(self) -> str:
        return f"{self.wall_s:7.1f} s wall {self.cpu_s:7.1f} s CPU {self.peak_bytes / 1e9:6.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modelopt", metavar="PYTHON", type=Path)
    parser.add_argument("--quant", nargs="+", default=["fp8", "int4_awq"])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="in place of the shape's own")
    parser.add_argument("--tokens", nargs="+", type=int, default=[256])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where tkit calibrates")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where to write; about three times the model")
    arguments = parser.parse_args()
    place = "the CPU"
    if arguments.device == "cuda":
        gpus, problem = visible_gpus()
        if not gpus or arguments.modelopt is not None:
            parser.error(f"--device cuda: {problem or 'ModelOpt is measured on the CPU; leave out --modelopt'}")
        place = gpus[0].name
    shape = SHAPES[arguments.shape]
    shape = shape._replace(layers=arguments.layers or shape.layers)
    with tempfile.TemporaryDirectory(dir=arguments.work) as directory:
        work = Path(directory)
        num_bytes = write_model(work / "model", shape)
        print(f"{arguments.shape}, {shape.layers} layers, {num_bytes / 1e9:.2f} GB bf16, tp 2, on {place}", flush=True)
        for num_tokens in arguments.tokens:
            compare(work, num_tokens, arguments)


def compare(work: Path, num_tokens: int, arguments: argparse.Namespace) -> None:
    length = min(num_tokens, SAMPLE_TOKENS)
    samples = [[1 + index % 4000 for index in range(length)]] * (num_tokens // length)
    tokens, nothing = work / "tokens.json", work / "nothing.json"
    tokens.write_text(json.dumps(samples))
    nothing.write_text("[]")
    if arguments.device == "cpu":
        both, load = (
            measure([sys.executable, "-c", FORWARD, work / "model", file], arguments.threads)
            for file in (tokens, nothing)
        )
        forward = both.cpu_s - load.cpu_s
        print(f"{num_tokens:5} tokens  transformers   load {load.cpu_s:.1f} s CPU, forward {forward:.1f} s CPU")
    for quant in arguments.quant:
        ours = measure(
            [sys.executable, "-m", "tkit", "build", work / "model", "--quant", quant, "--tp", "2", "--quiet",
             "--calib-samples", str(len(samples)), "--calib-len", str(length), "--workers", str(arguments.threads),
             "--device", arguments.device, "--out", work / "engines"],
            arguments.threads,
        )  # fmt: skip
        (card,) = (work / "engines").glob("*/engine.json")
        build = json.loads(card.read_text())["build"]
        shutil.rmtree(work / "engines")
        gpu = build["peak_gpu_memory_bytes"]
        on_gpu = f", of the GPU {gpu / 1e9:.2f} GB; conversion alone {build['stages']['convert']:.1f} s" if gpu else ""
        print(f"{num_tokens:5} tokens  {quant:10} tkit     {ours}{on_gpu}", flush=True)
        if arguments.modelopt is None:
            continue
        theirs = measure(
            [arguments.modelopt, EXPORT, "--tp", "2", work / "model", tokens, work / "modelopt", quant],
            arguments.threads,
        )
        shutil.rmtree(work / "modelopt")
        print(f"{num_tokens:5} tokens  {quant:10} ModelOpt {theirs}")
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        print(
            f"{num_tokens:5} tokens  {quant:10} ratio    {ratios[0]:7.2f}        {ratios[1]:7.2f}       {ratios[2]:6.2f}"
        )


def measure(command: list[str | Path], num_threads: int) -> Cost:
    """Of the command and what it started and waited for."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - started
        if process.returncode:
            output.seek(0)
            sys.exit(f"{command} failed:\n{output.read().decode()[-3000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


if __name__ == "__main__":
    main()
