"""How covariances are held inside the loop: by a factor ``L`` with ``Sigma = L L^T`` and its inverse ``W``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Up to this many features a Cholesky factorization written out over (B, K) tensors is faster than the library's.
UNROLLED_UP_TO = 4


class Factors(NamedTuple):
    """A factor of each covariance and its inverse, in the shape that the structure prescribes.

    loadings: (B, K, D, R + 1), ``U`` and the square root of ``Psi`` of covariances ``U U^T + Psi``; else ``None``.
    """

    scale: Tensor
    inverse: Tensor
    loadings: Tensor | None = None

    def times(self, ratio: Tensor) -> Factors:
        """Return the factors of covariances that are larger by the square of a ratio."""
        loadings = None if self.loadings is None else self.loadings * ratio
        return Factors(self.scale * ratio, self.inverse / ratio, loadings)


class State(NamedTuple):
    """The parameters inside the loop, means relative to the centre of the cloud; natural ones where at hand."""

    log_weights: Tensor
    means: Tensor
    factors: Factors
    theta: Tensor | None = None


def choose(condition: Tensor, one: Factors, other: Factors) -> Factors:
    """Return one where a condition (B,) or (B, K) holds, and the other elsewhere."""

    def pick(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            return None
        return torch.where(condition.reshape(*condition.shape, *[1] * (a.ndim - condition.ndim)), a, b)

    scale, inverse, loadings = (pick(a, b) for a, b in zip(one, other, strict=True))
    assert scale is not None and inverse is not None
    return Factors(scale, inverse, loadings)


def cholesky_with_inverse(matrix: Tensor, least_pivots: Tensor) -> Factors:
    """Return the lower Cholesky factor of (..., D, D) matrices and its inverse, finite for every finite input.

    Args:
        matrix: symmetric, positive definite up to rounding.
        least_pivots: (..., D), what a pivot that rounding made smaller is raised to.
    """
    size = matrix.shape[-1]
    if size > UNROLLED_UP_TO:
        return _library_cholesky(matrix, least_pivots)
    rows = [[matrix[..., i, j] for j in range(i + 1)] for i in range(size)]
    return cholesky_of_rows(rows, list(least_pivots.unbind(-1)))


def cholesky_of_rows(rows: list[list[Tensor]], least_pivots: list[Tensor]) -> Factors:
    """Return the factor and its inverse of matrices given by the rows of their lower triangles."""
    size = len(rows)
    lower: list[list[Tensor]] = [[] for _ in range(size)]
    inverse: list[list[Tensor]] = [[] for _ in range(size)]
    zero = torch.zeros_like(rows[0][0])
    for i in range(size):
        # The squares of a row add up to the diagonal, unless rounding made the matrix indefinite: then the inverse of
        # rows that are longer would grow beyond every number.
        longest = 1.001 * torch.maximum(rows[i][i].detach(), least_pivots[i]).sqrt()
        for j in range(i):
            entry = rows[i][j]
            for p in range(j):
                entry = torch.addcmul(entry, lower[i][p], lower[j][p], value=-1)
            lower[i].append((entry * inverse[j][j]).clamp(-longest, longest))
        pivot = rows[i][i]
        for p in range(i):
            pivot = torch.addcmul(pivot, lower[i][p], lower[i][p], value=-1)
        root = torch.maximum(pivot, least_pivots[i]).sqrt()
        lower[i].append(root)
        reciprocal = root.reciprocal()
        for j in range(i):
            entry = lower[i][j] * inverse[j][j]
            for p in range(j + 1, i):
                entry = torch.addcmul(entry, lower[i][p], inverse[p][j])
            inverse[i].append(-entry * reciprocal)
        inverse[i].append(reciprocal)

    def assemble(rows: list[list[Tensor]]) -> Tensor:
        filled = [row + [zero] * (size - len(row)) for row in rows]
        return torch.stack([entry for row in filled for entry in row], -1).unflatten(-1, (size, size))

    return Factors(assemble(lower), assemble(inverse))


def _library_cholesky(matrix: Tensor, least_pivots: Tensor) -> Factors:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if torch.compiler.is_compiling() or bool((info != 0).any()):
        # Rounding made a matrix indefinite: its diagonal is the nearest thing that can be factored.
        diagonal = torch.maximum(matrix.diagonal(dim1=-2, dim2=-1), least_pivots).diag_embed()
        factor = torch.linalg.cholesky_ex(torch.where((info != 0)[..., None, None], diagonal, matrix))[0]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return Factors(factor, torch.linalg.solve_triangular(factor, eye.expand_as(matrix), upper=False))


def least_pivots_of(largest: Tensor) -> Tensor:
    """Return what rounding leaves of a difference of numbers as large as these, and never zero."""
    info = torch.finfo(largest.dtype)
    return (4.0 * info.eps * largest.detach()).clamp(min=info.eps**4)
