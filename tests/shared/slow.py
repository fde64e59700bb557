"""The obvious versions of what the quantizers do, in float64. They share no code with tkit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

Grid = Callable[[torch.Tensor, int], torch.Tensor]  # (values of one column, which column) -> the nearest it can store


def settled(weight: torch.Tensor, x: torch.Tensor, grid: Grid, reach: int) -> torch.Tensor:
    """What each weight had become when its turn came. Within `reach` columns, errors are made up for by the columns behind.

    Hassibi and Stork's surgeon: the inverse Hessian loses a row and a column with every weight that is fixed.
    """
    weight, x = weight.double().clone(), x.double()
    for start in range(0, weight.shape[1], reach):
        part, seen = weight[:, start : start + reach], x[:, start : start + reach]
        hessian = seen.T @ seen / len(seen)
        inverse = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))).inverse()
        for j in range(part.shape[1]):
            error = (part[:, j] - grid(part[:, j], start + j)) / inverse[j, j]
            part[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
            inverse = inverse - inverse[:, j, None] * inverse[j] / inverse[j, j]
    return weight


def int4(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale).round().clamp(-8, 7)


def best_scale(
    values: torch.Tensor,
    moments: torch.Tensor,
    scales: Iterable[torch.Tensor],
    rounded: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, float]:
    """Of `scales` the one under which a group loses least, weighed by how loud its channels are, and what it loses."""
    errors = [(float(((rounded(values, scale) - values).square() * moments).sum()), scale) for scale in scales]
    error, scale = min(errors, key=lambda pair: pair[0])
    return scale, error


def int4_scales(
    weight: torch.Tensor, moments: torch.Tensor, group: int, dtype: torch.dtype
) -> tuple[torch.Tensor, float]:
    """(out, in/group), and the error that is left: the largest weight of a group is kept, or cut off to 0.88 or 0.76."""
    weight, moments, total = weight.double(), moments.double(), 0.0
    scales = torch.zeros(len(weight), weight.shape[1] // group, dtype=torch.double)
    for row in range(len(weight)):
        for index in range(scales.shape[1]):
            columns = slice(index * group, (index + 1) * group)
            values = weight[row, columns]
            candidates = [(clip * values.abs().max() / 7).to(dtype).double() for clip in (1.0, 0.88, 0.76)]
            scales[row, index], error = best_scale(
                values, moments[columns], candidates, lambda values, scale: int4(values, scale) * scale
            )
            total += error
    return scales, total


def awq_factor(
    weights: Iterable[torch.Tensor], x: torch.Tensor, group: int, dtype: torch.dtype
) -> tuple[torch.Tensor, Mapping[float, float]]:
    """1 / mean(|x|)^a, normalised, of the a with the smallest error over all weights; and the error of each a."""
    x, stacked = x.double(), torch.cat(list(weights))
    factors, errors = {}, {}
    for exponent in (step / 10 for step in range(11)):
        s = x.abs().mean(dim=0) ** exponent
        factor = (1 / (s / (s.max() * s.min()).sqrt())).to(dtype).double()
        moments = x.square().mean(dim=0) * factor.square()
        factors[exponent], errors[exponent] = factor, int4_scales(stacked / factor, moments, group, dtype)[1]
    return factors[min(errors, key=lambda exponent: errors[exponent])], errors
