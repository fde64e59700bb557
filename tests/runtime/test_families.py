"""Every family that the converter writes, in the engine beside transformers: rows of unequal length, chunked prompts."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest
import torch
from families import MODELS, make_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from tkit.errors import InputError
from tkit.runtime.engine import Engine
from tkit.specs.generation import GenerationChunk, GenerationRequest

NUM_NEW = 12
REFUSED = {"falcon-rw": "falcon: ALiBi positions"}
SHORTER = {"phi3-longrope": 16}  # positions it has in the engine; 64 in transformers


class Words:
    """A tokenizer whose text is its token ids."""

    bos_token = eos_token_id = None

    def get_vocab(self) -> dict[str, int]:
        return {"00000 ": 0}  # as long as any: it is how much text may come

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] if text == "a" else [int(word) for word in text.split()]

    def decode(self, token_ids: list[int], **_: object) -> str:
        return "".join(f" {token_id}" for token_id in token_ids)


@torch.inference_mode()
def generated(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_transformers_own(tmp_path: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(name, tmp_path), dtype=torch.float32).eval()
    if name in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name]):
            Engine(model, Words())
        return
    generator = torch.Generator().manual_seed(0)
    longest = SHORTER.get(name, 40) - NUM_NEW
    prompts = [
        torch.randint(3, 90, (length,), generator=generator).tolist() for length in (3, longest, 2, longest // 2)
    ]
    answers: list[list[int]] = [[] for _ in prompts]
    ended: queue.Queue[str | None] = queue.Queue()

    def submit(engine: Engine, prompt: list[int], answer: list[int]) -> None:
        def on_chunk(chunk: GenerationChunk) -> None:
            answer.extend(chunk.token_ids)
            if chunk.finish_reason:
                ended.put(chunk.error)

        text = " ".join(map(str, prompt))
        engine.submit(GenerationRequest(prompt=text, max_tokens=NUM_NEW, temperature=0, end_id=-1), on_chunk)

    with Engine(model, Words(), prefill_chunk=7) as engine:
        for prompt, answer in zip(prompts, answers, strict=True):
            submit(engine, prompt, answer)
        assert [ended.get(timeout=120) for _ in prompts] == [None] * len(prompts)
        if name in SHORTER:
            with pytest.raises(InputError, match=f"the model has {SHORTER[name]} positions"):
                submit(engine, [3] * 5, [])
    assert answers == [generated(model, prompt, NUM_NEW) for prompt in prompts]
