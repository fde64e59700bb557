"""What calibration keeps of the activations that enter a linear layer. Memory: up to three vectors; the Gram blocks and
about a thousand tokens where a format asks for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

GRAM_BLOCK = 128  # channels
ROWS = 128  # summed at once on a CPU: as float32 they stay in the cache, 6 ns a value with Gram blocks and 30 without
NUM_FOLDS = 16
SAMPLED_SEQUENCES, SAMPLED_TOKENS = 16, 64  # the first sequences, and evenly spread tokens of each


class InputStatistics:
    """Per input channel of x (tokens, in): absolute maximum, mean of |x|, mean of x^2; all (in,) float32.

    Without `has_means` the maximum alone, at a tenth of the time. `gram` asks for the mean of x x^T as well, over the
    whole "input" or within each "block" of neighbouring channels; `has_folds` for tokens that a scale can be tried on,
    each with the maxima of the sequences it is not part of.
    Sums per channel are kept in float64, so that the result does not depend on how the tokens are batched.
    """

    def __init__(self, gram: str | None = None, has_folds: bool = False, has_means: bool = True) -> None:
        self._gram_kind = gram
        self._has_means = has_means
        self._has_folds = has_folds
        self._num_sequences = 0
        self._fold_max: list[torch.Tensor] = []
        self._samples: list[list[torch.Tensor]] = []
        self.num_tokens = 0
        self.abs_max = torch.zeros(0)
        self._abs_sum = torch.zeros(0)
        self._square_sum = torch.zeros(0)
        self._gram_sum = torch.zeros(0)

    def update(self, x: torch.Tensor) -> None:
        """x (tokens, in) is one sequence, (sequences, tokens, in) are several."""
        if self._has_folds:
            for sequence in x.reshape(-1, *x.shape[-2:]).float():
                self._update_fold(sequence)
        x = x.reshape(-1, x.shape[-1])  # (tokens, in)
        if self.num_tokens == 0:
            self.abs_max = x.new_zeros(x.shape[1], dtype=torch.float32)
            self._abs_sum = self._square_sum = torch.zeros_like(self.abs_max, dtype=torch.float64)
        self.num_tokens += len(x)
        if not self._has_means:
            self.abs_max = torch.maximum(self.abs_max, x.abs().amax(dim=0).float())
            return
        if self._gram_kind == "input":
            self._update_gram(x.float(), x.shape[1])
        for rows in x.split(ROWS if x.device.type == "cpu" else len(x)):
            rows = rows.float()
            if self._gram_kind == "block":
                self._update_gram(rows, math.gcd(x.shape[1], GRAM_BLOCK))
            ones, magnitudes = rows.new_ones(len(rows)), rows.abs()
            self.abs_max = torch.maximum(self.abs_max, magnitudes.amax(dim=0))
            self._abs_sum = self._abs_sum + ones @ magnitudes  # a product is faster than a sum over rows
            self._square_sum = self._square_sum + ones @ magnitudes.square_()

    def _update_gram(self, x: torch.Tensor, size: int) -> None:
        blocks = x.reshape(len(x), -1, size).transpose(0, 1)  # (blocks, tokens, size)
        if not len(self._gram_sum):
            self._gram_sum = x.new_zeros(len(blocks), size, size)
        self._gram_sum.baddbmm_(blocks.mT, blocks)

    def _update_fold(self, sequence: torch.Tensor) -> None:
        fold, abs_max = self._num_sequences % NUM_FOLDS, sequence.abs().amax(dim=0)
        if fold == len(self._fold_max):
            self._fold_max.append(abs_max)
            self._samples.append([])
        self._fold_max[fold] = torch.maximum(self._fold_max[fold], abs_max)
        if self._num_sequences < SAMPLED_SEQUENCES:
            self._samples[fold].append(sequence[:: max(len(sequence) // SAMPLED_TOKENS, 1)][:SAMPLED_TOKENS].clone())
        self._num_sequences += 1

    def folds(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each fold the absolute maxima (in,) of all others, and tokens (tokens, in) of its own.

        A fold that is alone gets its own maxima.
        """
        if len(self._fold_max) == 1:
            return [(self._fold_max[0], torch.cat(self._samples[0]))]
        maxima = torch.stack(self._fold_max)  # (folds, in)
        others = [torch.cat((maxima[:fold], maxima[fold + 1 :])).amax(dim=0) for fold in range(len(maxima))]
        return list(zip(others, map(torch.cat, self._samples), strict=True))

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


def positive(values: torch.Tensor) -> torch.Tensor:
    """Zeros count as the smallest of the others; where there are no others, all count as 1."""
    smallest = torch.where(values > 0, values, torch.inf).amin()
    return values.clamp(min=torch.where(smallest.isfinite(), smallest, 1.0))


def least(candidates: Sequence[torch.Tensor], errors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The candidate with the smallest error. All errors are read at once: a GPU is waited for only here."""
    values = torch.stack(list(errors)).tolist()
    return candidates[values.index(min(values))]
