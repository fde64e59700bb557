"""How a model is spread over GPUs. Rank order is TensorRT-LLM's: rank = pp_rank * tp_size + tp_rank."""

from __future__ import annotations

from dataclasses import dataclass

from tkit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Parallel:
    tp_size: int = 1
    pp_size: int = 1
    moe_ep_size: int = 1  # of the tp ranks, how many hold different experts; the others split each expert
    shards_embedding: bool = False  # over tp; some of TensorRT-LLM's classes always do

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, expected at least 1"
            for name in ("tp_size", "pp_size", "moe_ep_size")
            if (value := getattr(self, name)) < 1
        ]
        if not problems and self.tp_size % self.moe_ep_size:
            problems.append(f"tp_size {self.tp_size} is not a multiple of moe_ep_size {self.moe_ep_size}")
        if problems:
            raise InputError("impossible parallel layout", problems=problems)

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def moe_tp_size(self) -> int:
        return self.tp_size // self.moe_ep_size

    def rank(self, pp_rank: int, tp_rank: int) -> int:
        return pp_rank * self.tp_size + tp_rank

    def stage_layers(self, num_layers: int) -> list[range]:
        """The global layer indices of each pipeline stage; the first stages take the extras (`tensor_split`)."""
        base, extras = divmod(num_layers, self.pp_size)
        stages, start = [], 0
        for pp_rank in range(self.pp_size):
            stop = start + base + (pp_rank < extras)
            stages.append(range(start, stop))
            start = stop
        return stages
