"""Cholesky factors and their inverses for many small matrices, finite for every finite input."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from em_lightning.mixture.backends import native


class Factor(NamedTuple):
    """``scale`` L with ``Sigma = L L^T`` and ``inverse`` W = L^-1: triangles (..., D, D) or the diagonals (..., D)."""

    scale: Tensor
    inverse: Tensor


def identity(size: int, like: Tensor) -> Tensor:
    """Return the identity matrix with the dtype and device of another tensor."""
    return torch.eye(size, dtype=like.dtype, device=like.device)


def smallest_pivots(second_moments: Tensor) -> Tensor:
    """Return the smallest variances distinguishable from round-off, given second moments."""
    info = torch.finfo(second_moments.dtype)
    # A variance E[x^2] - E[x]^2 has rounding errors of a few eps E[x^2]; 4 is chosen. The bound eps^4 makes inverses
    # finite where E[x^2] is 0. It has no effect in a fit, where E[x^2] is at least eps^2 (Points.floor).
    return (4.0 * info.eps * second_moments.detach()).clamp(min=info.eps**4)


def is_factorized_natively(matrix: Tensor) -> bool:
    """Return whether the native backend computes Cholesky factors of matrices (..., D, D)."""
    # It is faster than LAPACK for at most 4 features, as its loops are unrolled, or for many components.
    is_faster = matrix.shape[-1] <= 4 or matrix[..., 0, 0].numel() >= native.FEWEST_COMPONENTS
    return native.serves_components("cholesky.cpp", matrix, is_faster)


def cholesky_with_inverse(matrix: Tensor, pivots: Tensor) -> Factor:
    """Return the lower Cholesky factor of symmetric matrices (..., D, D) and its inverse.

    If round-off made a matrix indefinite, it is replaced by a definite one; ``pivots`` (..., D) are the smallest
    pivots that are distinguishable from round-off.
    """
    if is_factorized_natively(matrix):
        return Factor(*native.cholesky(matrix, pivots))
    return _cholesky_in_torch(matrix, pivots)


def _cholesky_in_torch(matrix: Tensor, pivots: Tensor) -> Factor:
    size = matrix.shape[-1]
    # Replace indefinite matrices before the factorization, because gradients of a failed one are NaN. First add D times
    # the pivots, which is enough against round-off; on a GPU, it would take too many launches. Then use the diagonal.
    diagonal = torch.maximum(matrix.diagonal(dim1=-2, dim2=-1), pivots).diag_embed()
    on_cpu = matrix.device.type == "cpu"
    replacements = [matrix + size * pivots.diag_embed(), diagonal] if on_cpu else [diagonal]
    for replacement in replacements:
        failed = torch.linalg.cholesky_ex(matrix.detach()).info != 0
        matrix = torch.where(failed[..., None, None], replacement, matrix)
    factor = torch.linalg.cholesky_ex(matrix).L
    eye = identity(size, matrix).expand_as(matrix)
    return Factor(factor, torch.linalg.solve_triangular(factor, eye, upper=False))


native.register_gradient(native.cholesky, native.cholesky_gradient, _cholesky_in_torch)
