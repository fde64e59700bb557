"""How a model is spread over GPUs. Rank order is TensorRT-LLM's: rank = pp_rank * tp_size + tp_rank."""

from __future__ import annotations

from dataclasses import dataclass

from tkit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Parallel:
    tp_size: int = 1
    pp_size: int = 1

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, expected at least 1"
            for name, value in (("tp_size", self.tp_size), ("pp_size", self.pp_size))
            if value < 1
        ]
        if problems:
            raise InputError("impossible parallel layout", problems=problems)

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

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
