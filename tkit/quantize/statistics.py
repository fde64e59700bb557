"""What calibration keeps of the activations that enter a linear layer. Memory: three vectors, and the Gram blocks."""

from __future__ import annotations

import math

import torch

GRAM_BLOCK = 128  # channels


class InputStatistics:
    """Per input channel of x (tokens, in): absolute maximum, mean of |x|, mean of x^2; all (in,) float32.

    `gram` asks for the mean of x x^T as well, over the whole "input" or within each "block" of neighbouring channels.
    Sums per channel are kept in float64, so that the result does not depend on how the tokens are batched.
    """

    def __init__(self, gram: str | None = None) -> None:
        self._gram_kind = gram
        self.num_tokens = 0
        self.abs_max = torch.zeros(0)
        self._abs_sum = torch.zeros(0)
        self._square_sum = torch.zeros(0)
        self._gram_sum = torch.zeros(0)

    def update(self, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()  # (tokens, in)
        magnitude = x.abs()
        abs_max = magnitude.amax(dim=0)
        abs_sum = magnitude.sum(dim=0, dtype=torch.float64)
        square_sum = x.square().sum(dim=0, dtype=torch.float64)
        if self.num_tokens == 0:
            self.abs_max, self._abs_sum, self._square_sum = abs_max, abs_sum, square_sum
        else:
            self.abs_max = torch.maximum(self.abs_max, abs_max)
            self._abs_sum += abs_sum
            self._square_sum += square_sum
        self.num_tokens += len(x)
        if self._gram_kind is not None:
            size = x.shape[1] if self._gram_kind == "input" else math.gcd(x.shape[1], GRAM_BLOCK)
            blocks = x.reshape(len(x), -1, size).transpose(0, 1)  # (blocks, tokens, size)
            if not len(self._gram_sum):
                self._gram_sum = x.new_zeros(len(blocks), size, size)
            self._gram_sum.baddbmm_(blocks.mT, blocks)

    @property
    def abs_mean(self) -> torch.Tensor:
        return (self._abs_sum / self.num_tokens).float()

    @property
    def square_mean(self) -> torch.Tensor:
        return (self._square_sum / self.num_tokens).float()

    @property
    def gram(self) -> torch.Tensor:
        """(blocks, size, size) float32"""
        return self._gram_sum / self.num_tokens
