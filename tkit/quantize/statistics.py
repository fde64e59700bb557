"""What calibration keeps of the activations that enter a linear layer. Memory: three vectors and a fixed sample."""

from __future__ import annotations

import torch

# 512 tokens decide between AWQ candidates as well as thousands do, and bound the memory: 512 x 14336 floats are 29 MB
SAMPLE_TOKENS = 512


class InputStatistics:
    """Per-channel absolute maximum and mean of x (tokens, in), and `sample` (at most SAMPLE_TOKENS, in), all float32.

    The sample is every k-th token of the whole calibration set, `total_tokens` of which are announced up front; it does
    not depend on how the tokens are batched.
    """

    def __init__(self, total_tokens: int):
        self.stride = max(total_tokens // SAMPLE_TOKENS, 1)
        self.num_tokens = 0
        self.abs_max = torch.zeros(0)
        self._abs_sum = torch.zeros(0)
        self._sample: list[torch.Tensor] = []

    def update(self, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()  # (tokens, in)
        magnitude = x.abs()
        if self.num_tokens == 0:
            self.abs_max = magnitude.amax(dim=0)
            self._abs_sum = magnitude.sum(dim=0, dtype=torch.float64)
        else:
            self.abs_max = torch.maximum(self.abs_max, magnitude.amax(dim=0))
            self._abs_sum += magnitude.sum(dim=0, dtype=torch.float64)
        first = -self.num_tokens % self.stride
        self._sample.append(x[first :: self.stride].clone())
        self.num_tokens += len(x)

    @property
    def abs_mean(self) -> torch.Tensor:
        return (self._abs_sum / self.num_tokens).float()

    @property
    def sample(self) -> torch.Tensor:
        return torch.cat(self._sample)[:SAMPLE_TOKENS]
