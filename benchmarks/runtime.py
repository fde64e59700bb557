"""The reference engine beside transformers' own ways to generate: tokens per second on one fixed load, in one process.

    python -m benchmarks.runtime [--model demo|100m|DIR] [--requests 16] [--prompt-tokens 128] [--new-tokens 64]

Every way gets the same prompts, generates greedily, and must give the same tokens. Rounds alternate between the ways, so
that a disturbance of the machine falls on all of them; the best round of each counts. `x static` compares CPU seconds:
with one thread that is the time alone on the machine. `of limit` is the CPU time that the arithmetic and the weight
traffic alone would take, at speeds measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
)

from tkit.runtime.engine import Engine
from tkit.specs.generation import GenerationChunk, GenerationRequest

MODELS: dict[str, dict[str, Any]] = {
    "demo": {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "100m": {
        "vocab_size": 32000, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 10, "num_key_value_heads": 10,
    },
}  # fmt: skip

Tokens = list[list[int]]


class Seconds(NamedTuple):
    wall: float
    cpu: float


class Words:
    """A tokenizer whose text is its token ids, so that prompts have exactly the length asked for."""

    bos_token = eos_token_id = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] if text == "a" else [int(word) for word in text.split()]

    def decode(self, token_ids: list[int], **_: object) -> str:
        return "".join(f" {token_id}" for token_id in token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, 100m (random weights), or a directory")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch's, for all ways")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    model = make_model(options.model)
    generator = torch.Generator().manual_seed(0)
    shape = (options.requests, options.prompt_tokens)
    prompts: Tokens = torch.randint(3, model.config.vocab_size, shape, generator=generator).tolist()
    ways: dict[str, Callable[[], Tokens]] = {
        "generate, static batch": lambda: static_batch(model, prompts, options.new_tokens),
        "generate_batch, continuous": lambda: transformers_continuous(model, prompts, options.new_tokens),
    }
    with Engine(model, Words(), max_batch_size=options.requests, num_threads=options.threads) as engine:
        ways["tkit engine"] = lambda: tkit_engine(engine, prompts, options.new_tokens)
        ways["tkit engine, sampled"] = lambda: tkit_engine(
            engine, prompts, options.new_tokens, temperature=0.8, top_k=50, top_p=0.95
        )
        seconds, answers = measure(ways, options.rounds)
    for name in ("generate_batch, continuous", "tkit engine"):
        if answers[name] != answers["generate, static batch"]:
            sys.exit(f"{name} gives other tokens than generate")
    limit_s = machine_limit_s(model, options.requests, options.prompt_tokens, options.new_tokens)
    report(seconds, options.requests * options.new_tokens, limit_s, as_json=options.json)


def make_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name in MODELS:
        # A wider spread than usual: with near ties, rounding would decide which token is the likeliest.
        config = LlamaConfig(**MODELS[name], max_position_embeddings=2048, initializer_range=0.08, eos_token_id=None)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return AutoModelForCausalLM.from_pretrained(Path(name), dtype=torch.float32).eval()


def measure(ways: dict[str, Callable[[], Tokens]], rounds: int) -> tuple[dict[str, list[Seconds]], dict[str, Tokens]]:
    seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
    answers: dict[str, Tokens] = {}
    for _ in range(rounds):
        for name, run in ways.items():
            started = time.perf_counter(), time.process_time()
            answers[name] = run()
            seconds[name].append(Seconds(time.perf_counter() - started[0], time.process_time() - started[1]))
    return seconds, answers


@torch.inference_mode()
def static_batch(model: Any, prompts: Tokens, new_tokens: int) -> Tokens:
    prompt_ids = torch.tensor(prompts)
    output = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[:, prompt_ids.shape[1] :].tolist()


def transformers_continuous(model: Any, prompts: Tokens, new_tokens: int) -> Tokens:
    page_size = 32  # tokens
    pages_per_request = -(-(len(prompts[0]) + new_tokens) // page_size)
    outputs = model.generate_batch(
        inputs=prompts,
        generation_config=GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=page_size,
            num_blocks=(pages_per_request + 1) * len(prompts),
            max_batch_tokens=512,
            max_requests_per_batch=len(prompts),
            allow_block_sharing=False,
        ),
        progress_bar=False,
    )
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [by_prompt[tuple(prompt)] for prompt in prompts]


def tkit_engine(engine: Engine, prompts: Tokens, new_tokens: int, **sampling: float) -> Tokens:
    answers: Tokens = [[] for _ in prompts]
    ended: queue.Queue[str | None] = queue.Queue()

    def collect(answer: list[int]) -> Callable[[GenerationChunk], None]:
        def on_chunk(chunk: GenerationChunk) -> None:
            answer.extend(chunk.token_ids)
            if chunk.finish_reason:
                ended.put(chunk.error)

        return on_chunk

    parameters = {"temperature": 0.0, **sampling}
    for prompt, answer in zip(prompts, answers, strict=True):
        text = " ".join(map(str, prompt))
        engine.submit(
            GenerationRequest(prompt=text, max_tokens=new_tokens, end_id=-1, **parameters),  # type: ignore[arg-type]
            collect(answer),
        )
    for _ in prompts:
        if error := ended.get():
            sys.exit(error)
    return answers


def machine_limit_s(model: PreTrainedModel, requests: int, prompt_tokens: int, new_tokens: int) -> float:
    """Prefill at the speed of a large matrix product; each decode step the slower of its products and its weights."""
    weights = [weight for name, weight in model.named_parameters() if "embed_tokens" not in name and weight.ndim == 2]
    num_weights = sum(weight.numel() for weight in weights)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    flops = 2 * 1024**3 / best_s(lambda: left @ right)
    memory = torch.zeros(64 * 1024**2)  # 256 MiB, beyond any cache
    bandwidth = memory.nbytes / best_s(memory.sum)
    prefill_s = 2 * num_weights * requests * prompt_tokens / flops
    step_s = max(2 * num_weights * requests / flops, 4 * num_weights / bandwidth)
    return prefill_s + (new_tokens - 1) * step_s


def best_s(run: Callable[[], object]) -> float:
    times = []
    for _ in range(7):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return min(times)


def report(seconds: dict[str, list[Seconds]], num_tokens: int, limit_s: float, *, as_json: bool) -> None:
    best = {name: Seconds(*map(min, zip(*times, strict=True))) for name, times in seconds.items()}
    reference = best["generate, static batch"]
    rows = [
        {
            "way": name,
            "tokens_per_s": num_tokens / wall,
            "wall_s": wall,
            "cpu_s": cpu,
            "ratio_to_static": reference.cpu / cpu,
            "share_of_limit": limit_s / cpu,
        }
        for name, (wall, cpu) in best.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'':28} {'tok/s':>7} {'wall':>8} {'CPU':>8} {'x static':>9} {'of limit':>9}")
    for row in rows:
        print(
            f"{row['way']:28} {row['tokens_per_s']:7.0f} {row['wall_s']:7.2f}s {row['cpu_s']:7.2f}s "
            f"{row['ratio_to_static']:9.2f} {row['share_of_limit']:9.0%}"
        )


if __name__ == "__main__":
    main()
