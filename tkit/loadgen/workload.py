"""What each request of a point asks: a prompt and how many tokens. Knows seeds and texts; never a time or a server.

Equal seeds and equal places give equal bytes, in any process. A place is where a point stands in the grid: every point
draws requests of its own, so that none finds those of another in a prefix cache.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tkit.errors import InputError
from tkit.loadgen.datasets import BLOCK_TOKENS, DatasetFile, read_dataset
from tkit.loadgen.profiles import Shape
from tkit.loadgen.prompts import Ask, CharacterPrompts, PromptMaker
from tkit.loadgen.token_counts import TokenEnds


class RequestSource(Protocol):
    @property
    def token_ends(self) -> TokenEnds | None:
        """None: no tokenizer."""

    def ask(self, shape: Shape, place: Sequence[object], index: int, template_tokens: int) -> Ask:
        """Request number `index` of the point at `place`. `template_tokens`: that the server adds to every prompt."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    source: RequestSource
    shapes: tuple[Shape, ...]
    timestamps: tuple[float, ...] = ()  # seconds, of a trace
    identity: Mapping[str, Any]  # of tokenizer and data set


def make_workload(
    shapes: tuple[Shape, ...], dataset: Path | None, tokenizer_dir: Path | None, seed: int, max_tokens: int | None
) -> Workload:
    """`max_tokens`: input and output that the engine has room for; entries of a file that need more are left out."""
    prompts = PromptMaker(tokenizer_dir, seed) if tokenizer_dir is not None else None
    identity: dict[str, Any] = {"tokenizer_sha256": prompts.digest if prompts is not None else None}
    if dataset is None:
        return Workload(source=prompts or CharacterPrompts(seed), shapes=shapes, identity=identity)
    file = read_dataset(dataset)
    source: Conversations | Trace
    source = Trace(file, prompts, max_tokens) if file.trace else Conversations(file, prompts, seed, max_tokens)
    identity["dataset"] = {
        "name": file.name,
        "sha256": file.sha256,
        "requests": source.num_requests,
        "left_out": file.num_left_out + len(file.conversations) + len(file.trace) - source.num_requests,
    }
    timestamps = source.timestamps if isinstance(source, Trace) else ()
    return Workload(source=source, shapes=(source.shape,), timestamps=timestamps, identity=identity)


class Conversations:
    """Prompts of a file, each once in random order before any comes again; as many tokens as the file's answer has."""

    def __init__(self, file: DatasetFile, prompts: PromptMaker | None, seed: int, max_tokens: int | None):
        if prompts is None and any(one.output_tokens is None for one in file.conversations):
            raise InputError(
                f"--dataset {file.name}: how many tokens its answers have takes a tokenizer",
                hint="give its directory: --tokenizer DIR; or tell output_tokens in every entry",
            )
        self.token_ends = prompts.token_ends if prompts is not None else None
        asks = [
            Ask(
                prompt=one.prompt,
                isl=prompts.count_tokens(one.prompt) if prompts is not None else None,
                osl=one.output_tokens or (len(prompts.token_ends(one.answer or "")) if prompts is not None else 0),
            )
            for one in file.conversations
        ]
        self._asks = [ask for ask in asks if ask.osl and (max_tokens is None or (ask.isl or 0) + ask.osl <= max_tokens)]
        self.num_requests = _refuse_empty(file, len(self._asks), max_tokens)
        sizes = [len(ask.prompt) if ask.isl is None else ask.isl for ask in self._asks]
        unit = "tokens" if prompts is not None else "characters"
        self.shape = _mean_shape(file, sizes, [ask.osl for ask in self._asks], unit)
        self._seed = seed
        self._orders: dict[str, list[int]] = {}

    def ask(self, shape: Shape, place: Sequence[object], index: int, template_tokens: int) -> Ask:
        turn, position = divmod(index, len(self._asks))
        name = "/".join(map(str, (self._seed, "order", *place, turn)))
        if name not in self._orders:
            generator = random.Random(name)
            self._orders[name] = sorted(range(len(self._asks)), key=lambda _: generator.random())
        ask = self._asks[self._orders[name][position]]
        return Ask(prompt=ask.prompt, isl=None if ask.isl is None else ask.isl + template_tokens, osl=ask.osl)


class Trace:
    """Random prompts of a trace's lengths, in its order. Within a point equal blocks have equal tokens."""

    def __init__(self, file: DatasetFile, prompts: PromptMaker | None, max_tokens: int | None):
        if prompts is None:
            raise InputError(
                f"--dataset {file.name}: a trace tells lengths in tokens",
                hint="give the directory of the served model's tokenizer: --tokenizer DIR",
            )
        self.token_ends = prompts.token_ends
        self._prompts = prompts
        self._entries = [entry for entry in file.trace if max_tokens is None or entry.isl + entry.osl <= max_tokens]
        self.num_requests = _refuse_empty(file, len(self._entries), max_tokens)
        self.timestamps = tuple(entry.timestamp_s for entry in self._entries)
        sizes = [entry.isl for entry in self._entries], [entry.osl for entry in self._entries]
        self.shape = _mean_shape(file, *sizes, "tokens")

    def ask(self, shape: Shape, place: Sequence[object], index: int, template_tokens: int) -> Ask:
        entry = self._entries[index % len(self._entries)]
        blocks: tuple[object, ...] = entry.blocks or tuple(f"{index}.{i}" for i in range(-(-entry.isl // BLOCK_TOKENS)))
        prompt = self._prompts.prompt_of_blocks(entry.isl - template_tokens, blocks, BLOCK_TOKENS, *place)
        return Ask(prompt=prompt, isl=entry.isl, osl=entry.osl)


def _refuse_empty(file: DatasetFile, num_requests: int, max_tokens: int | None) -> int:
    if not num_requests:
        total = len(file.conversations) + len(file.trace)
        limit = f" fits into the {max_tokens} positions of the engine" if max_tokens else " can be asked"
        raise InputError(f"--dataset {file.name}: none of its {total} requests{limit}")
    return num_requests


def _mean_shape(file: DatasetFile, isl: Sequence[int], osl: Sequence[int], unit: str) -> Shape:
    return Shape(isl=round(statistics.mean(isl)), osl=round(statistics.mean(osl)), unit=unit, dataset=file.name)
