"""Error compensation: columns are rounded one after the other, and those still to come make up for the error.

With H = E[x x^T], the expected squared error of the output is (q - w) H (q - w)^T for every row w. Once the first columns
are rounded, the best that the others can do is a linear step. With H + d I = R R^T, R upper triangular, and U = R^-1:

    e_j = w_j - q_j        w_k <- w_k - e_j U_jk / U_jj for k > j

The scales are fixed beforehand. H comes in blocks along its diagonal: one for the whole input, or one per 128 channels,
which compensate at the same time and cost next to nothing.

Method: Frantar et al., GPTQ, https://arxiv.org/abs/2210.17323, with one factorization where theirs takes three.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

DAMPING = 0.01  # d as a share of H's mean diagonal; the demo model's KL divergence: 0.1 gives 1 % more, 0.001 4 % more
COLUMNS = 16  # corrected one by one; wider ranges are halved, and the second half is corrected by a matrix product
VALUES = 16384  # of one column in all blocks: what is worked on stays in the processor's cache; a GPU takes all rows
MAX_ROWS = 2048

Rounding = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def compensated(weight: torch.Tensor, scale: torch.Tensor, gram: torch.Tensor, rounded: Rounding) -> torch.Tensor:
    """What every value of `weight` (out, in) had become when its turn came: rounding that gives the compensated codes.

    `rounded(values, scale)` gives the nearest values of the grid; `scale` is (out, in / group). `gram` (blocks, size,
    size) holds H's blocks along the diagonal.
    """
    num_blocks, size, _ = gram.shape
    group = weight.shape[1] // scale.shape[1]
    steps = _steps(gram)
    first_columns = torch.arange(num_blocks, device=weight.device) * size  # of each block
    targets = torch.empty_like(weight)
    num_rows = min(max(VALUES // num_blocks, 1), MAX_ROWS) if weight.device.type == "cpu" else len(weight)
    for rows in (slice(start, start + num_rows) for start in range(0, len(weight), num_rows)):
        columns = weight[rows].T.contiguous().view(num_blocks, size, -1)  # (blocks, size, rows)
        scales = scale[rows].T.contiguous()  # (in / group, rows)
        errors = torch.empty_like(columns)
        for start, middle, stop in _order(0, size):
            if middle is None:
                for j in range(start, stop):
                    if j % min(group, size) == 0:  # one of group and size divides the other
                        scale_of_column = scales[(first_columns + j) // group]  # (blocks, rows)
                    torch.sub(columns[:, j], rounded(columns[:, j], scale_of_column), out=errors[:, j])
                    columns[:, j + 1 : stop].addcmul_(steps[:, j, j + 1 : stop, None], errors[:, j, None], value=-1)
            else:
                columns[:, middle:stop].baddbmm_(
                    steps[:, start:middle, middle:stop].mT, errors[:, start:middle], alpha=-1
                )
        targets[rows] = columns.view(weight.shape[1], -1).T
    return targets


def _order(start: int, stop: int) -> list[tuple[int, int | None, int]]:
    """Ranges in the order in which they are worked on: (start, None, stop) settles its columns one by one,
    (start, middle, stop) brings the errors of the first half into the second."""
    if stop - start <= COLUMNS:
        return [(start, None, stop)]
    middle = (start + stop) // 2
    return [*_order(start, middle), (start, middle, stop), *_order(middle, stop)]


def _steps(gram: torch.Tensor) -> torch.Tensor:
    """U_jk / U_jj, (blocks, size, size). A channel that was never active neither gives nor takes."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    level = diagonal.mean(dim=-1, keepdim=True)
    damping = DAMPING * torch.where(level > 0, level, torch.ones_like(level))  # (blocks, 1)
    while True:
        damped = gram + torch.diag_embed(damping.expand_as(diagonal))
        # the flipped matrix's lower factor, flipped back, is upper triangular
        factor, failed = torch.linalg.cholesky_ex(damped.flip(-1, -2))
        if not failed.any():
            break
        damping = torch.where(failed[:, None] > 0, damping * 10, damping)  # indefinite by float32's rounding
    identity = torch.eye(gram.shape[-1], device=gram.device).expand_as(gram)
    inverse = torch.linalg.solve_triangular(factor.flip(-1, -2), identity, upper=True)
    return inverse / inverse.diagonal(dim1=-2, dim2=-1)[..., None]
