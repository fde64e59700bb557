"""Quality of every format beside NVIDIA ModelOpt 0.47: KL divergence per token of the exported files against the bf16 model.

    python -m benchmarks.quality [--modelopt-python PATH] [--work DIR] [--formats int4_awq,fp8] [--seed 1 | --demo]

Both tools get the same model, the same 16 x 256 calibration tokens and write TensorRT-LLM checkpoints; both checkpoints are
read by `benchmarks/_trtllm_reader.py`, which shares no code with either, and run on the same held-out text. The model is
the demo's architecture, trained from another seed for fewer steps (about five minutes once, kept in --work); `--demo` takes
the demo model itself. Without `--modelopt-python`, ModelOpt is installed into an environment in --work. `fp8+kv` is `fp8` with
`--kv-cache fp8`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from benchmarks._trtllm_reader import load
from tkit import demo
from tkit.runtime.corpus import calibration_tokens
from tkit.runtime.evaluate import Comparison, compare_models

PEER_FORMATS = ("int8", "fp8", "fp8+kv", "fp8_rowwise", "int8_sq", "int4", "int4_awq", "w4a8_awq", "nvfp4")
FORMATS = (*PEER_FORMATS[:7], "int4_gptq", *PEER_FORMATS[7:])
REQUIREMENTS = ("torch==2.13.0", "nvidia-modelopt==0.47.*", "requests", "transformers<5.15")
TRAIN_STEPS = 400
WINDOW_TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tkit-quality")
    parser.add_argument("--modelopt-python", type=Path, help="Python of an environment with ModelOpt 0.47")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--seed", type=int, default=1, help="of the trained model (default: 1)")
    parser.add_argument("--demo", action="store_true", help="the demo model instead of a trained one")
    parser.add_argument("--windows", type=int, default=32, help="of 512 held-out tokens (default: 32)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    formats = options.formats.split(",")

    work = options.work / ("demo" if options.demo else f"seed-{options.seed}")
    work.mkdir(parents=True, exist_ok=True)
    model_dir, calibration, held_out = _demo() if options.demo else _trained(work, options.seed)
    _export_modelopt(options, work, model_dir, calibration, [name for name in formats if name in PEER_FORMATS])
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokens = held_out_windows(held_out, tokenizer, options.windows)
    source = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    rows = {}
    for name in formats:
        ours = _quality(source, model_dir, _build(work, model_dir, calibration, name), tokens)
        peer_dir = work / "modelopt" / name
        peer = _quality(source, model_dir, peer_dir, tokens) if name in PEER_FORMATS else None
        rows[name] = {"kl": ours.kl, "top1": ours.top1, "ppl_ratio": ours.ppl / ours.ppl_source}
        if peer is not None:
            rows[name] |= {"modelopt_kl": peer.kl, "modelopt_top1": peer.top1, "ratio": ours.kl / peer.kl}
    print(json.dumps(rows, indent=2) if options.json else table(rows))


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':12} {'KL':>9} {'top-1':>7} {'ppl':>8}   {'ModelOpt':>9} {'top-1':>7}   {'KL ratio':>8}"]
    for name, row in rows.items():
        line = f"{name:12} {row['kl']:9.2e} {row['top1']:7.1%} x{row['ppl_ratio']:7.4f}"
        if "ratio" in row:
            line += f"   {row['modelopt_kl']:9.2e} {row['modelopt_top1']:7.1%}   {row['ratio']:8.2f}"
        lines.append(line)
    return "\n".join(lines)


def held_out_windows(file: Path, tokenizer: Tokenizer, num_windows: int) -> torch.Tensor:
    """(num_windows, WINDOW_TOKENS), spread over the text."""
    ids = tokenizer.encode(file.read_text(encoding="utf-8"), add_special_tokens=False).ids
    stride = (len(ids) - WINDOW_TOKENS) // (num_windows - 1)
    return torch.tensor([ids[index * stride : index * stride + WINDOW_TOKENS] for index in range(num_windows)])


def _demo() -> tuple[Path, Path, Path]:
    return demo.MODEL_DIR, demo.CALIBRATION, demo.HELD_OUT


def _trained(work: Path, seed: int) -> tuple[Path, Path, Path]:
    """The demo's shape from another seed, trained for fewer steps; kept once made."""
    out = work / "trained"
    if not (out / "calibration.txt").exists():  # written last
        command = [
            sys.executable,
            "-m",
            "tkit.demo.train",
            "--out",
            str(out),
            "--threads",
            str(torch.get_num_threads()),
        ]
        subprocess.run([*command, "--seed", str(seed), "--steps", str(TRAIN_STEPS)], check=True, stdout=sys.stderr)
    return out / "model", out / "calibration.txt", out / "held_out.txt"


def _export_modelopt(
    options: argparse.Namespace, work: Path, model_dir: Path, calibration: Path, formats: list[str]
) -> None:
    missing = [name for name in formats if not (work / "modelopt" / name / "config.json").exists()]
    if not missing:
        return
    python = options.modelopt_python or _modelopt_environment(options.work / "modelopt-venv")
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokens = work / "calibration.json"
    tokens.write_text(json.dumps(calibration_tokens(calibration, tokenizer, 16, 256, 0, tokenizer.get_vocab_size())))
    script = Path(__file__).with_name("_modelopt_export.py")
    subprocess.run([python, script, model_dir, tokens, work / "modelopt", *missing], check=True, stdout=sys.stderr)


def _modelopt_environment(directory: Path) -> Path:
    python = directory / "bin" / "python"
    if not (directory / "ready").exists():
        venv.create(directory, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True, stdout=sys.stderr)
        (directory / "ready").touch()
    return python


def _build(work: Path, model_dir: Path, calibration: Path, name: str) -> Path:
    quant, plus, _ = name.partition("+")
    command = [sys.executable, "-m", "tkit", "build", str(model_dir), "--quant", quant, "--calib", str(calibration)]
    command += ["--kv-cache", "fp8"] if plus else []
    command += ["--out", str(work / "tkit"), "--name", name, "--force", "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return work / "tkit" / name / "checkpoint"


def _quality(source: torch.nn.Module, model_dir: Path, checkpoint: Path, tokens: torch.Tensor) -> Comparison:
    candidate = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    load(candidate, checkpoint)
    return compare_models(source, candidate, tokens, lambda done: None)


if __name__ == "__main__":
    main()
