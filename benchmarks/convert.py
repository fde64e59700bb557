"""The whole `tkit build` command on a 1.1 B Llama: wall time, CPU time and peak memory, with `cp -r` of the same source as
the yardstick. Both end with the data synced to disk.

    python -m benchmarks.convert [--layers 22] [--quant none] [--tp 2] [--rounds 3] [--work DIR]

Weights are random; conversion does not look at them. `anonymous` is memory the process allocated, `RSS` counts mapped
libraries too. The rounds of the yardstick and of the build alternate; the best of each counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from tkit import demo
from tkit.checkpoints.writer import FileWriter

NUM_SHARDS = 3
NUM_RANDOM = 8_388_593  # prime: rows of a tensor longer than that differ


class Shape(NamedTuple):
    """Of a Llama."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    layers: int


SHAPES = {
    "tiny": Shape(256, 512, 8, 4, 32, 4096, 2),
    "1b": Shape(2048, 5632, 32, 4, 64, 32000, 22),
    "8b": Shape(4096, 14336, 32, 8, 128, 128256, 32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--quant", default="none")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calib-samples", type=int, default=1, help="of 256 tokens, for formats that calibrate")
    parser.add_argument("--work", type=Path, help="where to write; about four times the model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        source = Path(work) / "model"
        num_bytes = write_model(source, SHAPES["1b"]._replace(layers=arguments.layers))
        print(f"{arguments.layers} layers, {num_bytes / 1e9:.2f} GB bf16 in {NUM_SHARDS} shards")
        copies, builds = [], []
        for _ in range(arguments.rounds):
            copies.append(copy(source, Path(work) / "copy"))
            builds.append(build(source, Path(work), arguments.quant, arguments.tp, arguments.calib_samples))
        best_copy = min(copies)
        best = min(builds, key=lambda row: row["wall_s"])
        print(f"cp -r and sync       {best_copy:6.2f} s")
        print(
            f"tkit build {arguments.quant:9s} {best['wall_s']:6.2f} s wall, {best['cpu_s']:.2f} s CPU, "
            f"{best['wall_s'] / best_copy:.2f} x cp; of it the conversion {best['convert_s']:.2f} s, "
            f"{best['convert_s'] / best_copy:.2f} x cp"
        )
        print(f"peak memory          {best['anonymous'] / 1e6:.0f} MB anonymous, {best['rss'] / 1e6:.0f} MB RSS")
        print(json.dumps({"cp_s": best_copy, **best}))


def write_model(directory: Path, shape: Shape) -> int:
    """A Llama of random bf16 weights in the field's file layout; returns its bytes. Memory: the largest tensor."""
    directory.mkdir()
    hidden, intermediate, heads, kv_heads, head_size, vocab, num_layers = shape
    tensors = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (heads * head_size, hidden),
            prefix + "self_attn.k_proj.weight": (kv_heads * head_size, hidden),
            prefix + "self_attn.v_proj.weight": (kv_heads * head_size, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, heads * head_size),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (intermediate, hidden),
            prefix + "mlp.up_proj.weight": (intermediate, hidden),
            prefix + "mlp.down_proj.weight": (hidden, intermediate),
        }
    tensors |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    names = list(tensors)
    per_shard = -(-len(names) // NUM_SHARDS)
    generator = np.random.default_rng(0)
    normal = generator.standard_normal(2 * NUM_RANDOM, dtype=np.float32) * np.float32(0.02)
    random = (normal.view(np.uint32) >> 16).astype(np.uint16)  # bits of bfloat16; drawing 8 B of them takes minutes
    weight_map, total = {}, 0
    for shard in range(NUM_SHARDS):
        shard_names = names[shard * per_shard : (shard + 1) * per_shard]
        file_name = f"model-{shard + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        file = FileWriter(directory / file_name, {name: ("BF16", tensors[name]) for name in shard_names})
        file.start()
        for name in shard_names:
            start = generator.integers(NUM_RANDOM)
            file.write(name, [np.resize(random[start : start + NUM_RANDOM], tensors[name])])
        file.finish()
        total += file.num_bytes
        weight_map |= dict.fromkeys(shard_names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": num_layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_size, "vocab_size": vocab, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 10000.0,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    for path in demo.MODEL_DIR.glob("tokenizer*"):
        shutil.copyfile(path, directory / path.name)
    return total


def copy(source: Path, target: Path) -> float:
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", "-f", target], check=True)
    return time.perf_counter() - started


def build(source: Path, work: Path, quant: str, tp: int, calib_samples: int) -> dict[str, float]:
    out = work / "engines"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    command = [sys.executable, "-m", "tkit", "build", str(source), "--quant", quant, "--tp", str(tp), "--out", str(out)]
    command += ["--calib-samples", str(calib_samples), "--json"]
    started = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    peak = {"rss": 0, "anonymous": 0}
    done = threading.Event()
    watcher = threading.Thread(target=watch, args=(process.pid, peak, done))
    watcher.start()
    output, _ = process.communicate()
    wall = time.perf_counter() - started
    done.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"{command} failed")
    usage = json.loads(output)["build"]
    return {"wall_s": wall, "cpu_s": usage["cpu_seconds"], "convert_s": usage["stages"]["convert"], **peak}


def watch(pid: int, peak: dict[str, int], done: threading.Event) -> None:
    """Samples the process 50 times a second."""
    while not done.wait(0.02):
        try:
            fields = Path(f"/proc/{pid}/status").read_text().split()
        except OSError:
            return
        for key, field in (("rss", "VmHWM:"), ("anonymous", "RssAnon:")):
            if field in fields:
                peak[key] = max(peak[key], int(fields[fields.index(field) + 1]) * 1024)


if __name__ == "__main__":
    main()
