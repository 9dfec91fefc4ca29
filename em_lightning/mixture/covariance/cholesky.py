"""Cholesky factors and their inverses for many small matrices, finite for every finite input."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Up to this size a factorization written out over (...,) tensors is faster on a CPU than the library's loop over
# matrices. On a GPU it would be about 40 launches.
_UNROLLED_SIZE = 4


class Factor(NamedTuple):
    """A factor ``L`` with ``Sigma = L L^T`` and its inverse ``W``: matrices (..., D, D) or standard deviations."""

    scale: Tensor
    inverse: Tensor


def identity(size: int, like: Tensor) -> Tensor:
    """Return the identity matrix of the dtype and on the device of another tensor."""
    return torch.eye(size, dtype=like.dtype, device=like.device)


def smallest_pivots(second_moments: Tensor) -> Tensor:
    """Return the smallest variance that round-off leaves distinguishable from zero, for given second moments."""
    info = torch.finfo(second_moments.dtype)
    return (4.0 * info.eps * second_moments.detach()).clamp(min=info.eps**4)


def cholesky_with_inverse(matrix: Tensor, pivots: Tensor) -> Factor:
    """Return the lower Cholesky factor of symmetric matrices (..., D, D) and its inverse.

    A matrix that rounding made indefinite is factored with the smallest pivots (..., D).
    """
    if matrix.shape[-1] <= _UNROLLED_SIZE and matrix.device.type == "cpu":
        return _unrolled_cholesky(matrix, pivots)
    with torch.no_grad():  # gradients of a failed factorization are NaN, so failures are replaced beforehand
        failed = (torch.linalg.cholesky_ex(matrix).info != 0)[..., None, None]
    diagonal = torch.maximum(matrix.diagonal(dim1=-2, dim2=-1), pivots).diag_embed()
    factor = torch.linalg.cholesky_ex(torch.where(failed, diagonal, matrix)).L
    eye = identity(matrix.shape[-1], matrix).expand_as(matrix)
    return Factor(factor, torch.linalg.solve_triangular(factor, eye, upper=False))


def _unrolled_cholesky(matrix: Tensor, pivots: Tensor) -> Factor:
    size = matrix.shape[-1]
    rows = matrix.unbind(-2)
    lower: list[list[Tensor]] = [[] for _ in range(size)]
    inverse: list[list[Tensor]] = [[] for _ in range(size)]
    for i in range(size):
        entries, least = rows[i].unbind(-1), pivots[..., i]
        # The squares of a row add up to its diagonal entry, unless rounding made the matrix indefinite.
        longest = 1.001 * torch.maximum(entries[i].detach(), least).sqrt()
        for j in range(i):
            entry = entries[j]
            for p in range(j):
                entry = torch.addcmul(entry, lower[i][p], lower[j][p], value=-1)
            lower[i].append((entry * inverse[j][j]).clamp(-longest, longest))
        pivot = entries[i]
        for p in range(i):
            pivot = torch.addcmul(pivot, lower[i][p], lower[i][p], value=-1)
        root = torch.maximum(pivot, least).sqrt()
        lower[i].append(root)
        reciprocal = root.reciprocal()
        for j in range(i):
            entry = lower[i][j] * inverse[j][j]
            for p in range(j + 1, i):
                entry = torch.addcmul(entry, lower[i][p], inverse[p][j])
            inverse[i].append(-entry * reciprocal)
        inverse[i].append(reciprocal)
    return Factor(_assemble(lower), _assemble(inverse))


def _assemble(rows: list[list[Tensor]]) -> Tensor:
    size, zero = len(rows), torch.zeros_like(rows[0][0])
    entries = [entry for row in rows for entry in (*row, *[zero] * (size - len(row)))]
    return torch.stack(entries, -1).unflatten(-1, (size, size))
