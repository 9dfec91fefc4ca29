"""Cholesky factors and their inverses for many small matrices, finite for every finite input."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from em_lightning.mixture.backends import native

# Up to this size, a loop unrolled into operations on (...,) tensors is faster on a CPU than LAPACK's loop over
# matrices. On a GPU it would need about 40 kernel launches.
_UNROLLED_SIZE = 4


class Factor(NamedTuple):
    """A factor ``L`` with ``Sigma = L L^T`` and its inverse ``W``: matrices (..., D, D) or standard deviations."""

    scale: Tensor
    inverse: Tensor


def identity(size: int, like: Tensor) -> Tensor:
    """Return the identity matrix with the dtype and device of another tensor."""
    return torch.eye(size, dtype=like.dtype, device=like.device)


def smallest_pivots(second_moments: Tensor) -> Tensor:
    """Return the smallest variances distinguishable from round-off, given second moments."""
    info = torch.finfo(second_moments.dtype)
    return (4.0 * info.eps * second_moments.detach()).clamp(min=info.eps**4)


def cholesky_with_inverse(matrix: Tensor, pivots: Tensor) -> Factor:
    """Return the lower Cholesky factor of symmetric matrices (..., D, D) and its inverse.

    If round-off made a matrix indefinite, it is replaced by one with pivots of at least ``pivots`` (..., D).
    """
    if native.serves_components("cholesky.cpp", matrix, matrix[..., 0, 0].numel()):
        return Factor(*native.cholesky(matrix, pivots))
    return _cholesky_in_torch(matrix, pivots)


def _cholesky_in_torch(matrix: Tensor, pivots: Tensor) -> Factor:
    if matrix.shape[-1] <= _UNROLLED_SIZE and matrix.device.type == "cpu":
        return _unrolled_cholesky(0.5 * (matrix + matrix.mT), pivots)
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
        # The squares of a row of the factor add up to the diagonal entry, unless round-off made the matrix indefinite.
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


native.register_gradient(native.cholesky, native.cholesky_gradient, _cholesky_in_torch)
