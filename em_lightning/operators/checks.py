"""What an operator says of points it cannot fit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from em_lightning.mixture.state import Mixture, structure_of

# Coordinates are at most this power of the largest number: 2.6e15 in float32.
_SQUARED = 0.4


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless a value is one of the choices."""
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, known))}")


def check_sets(
    x: Tensor, mask: Tensor | None, weights: Tensor | None, num_features: int, squared: bool = False
) -> Tensor:
    """Return points (B, N, D) in at least float32.

    Args:
        x: the points.
        mask: (B, N).
        weights: (B, N).
        num_features: D.
        squared: whether squares of coordinates have to be numbers, with some room.

    Raises:
        ValueError: a shape does not fit, or points are NaN or infinite or too large, or weights negative.
        TypeError: points are no floating-point tensor, or the mask is not boolean.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is of type {given}; give a floating-point tensor, for instance x.float()")
    if x.ndim != 3 or x.shape[-1] != num_features or x.shape[1] == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; give (B, N, {num_features}) with at least one point, "
            f"padded and masked where a set has fewer"
        )
    for name, value in (("mask", mask), ("weights", weights)):
        if value is not None and value.shape != x.shape[:2]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; give {tuple(x.shape[:2])}, one value a point")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask is of type {mask.dtype}; give a boolean tensor, for instance mask.bool()")
    if not torch.compiler.is_compiling():
        check_values(x, mask, weights, squared)
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_init(init: Mixture, covariance: str, shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless mixtures have a covariance structure and means of a shape (B, K, D)."""
    own = structure_of(init).name
    if own not in (covariance, "full" if shape[1] == 1 or covariance == "lowrank" else ""):
        raise ValueError(f"init has {own} covariances and the operator {covariance}; convert one")
    if init.means.shape != shape:
        raise ValueError(f"init.means has shape {tuple(init.means.shape)}; give {shape}")


def check_values(x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None, squared: bool = False) -> None:
    """Raise ValueError unless points (B, N, D) and weights (B, N) are numbers; arguments are those of check_sets."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    limit = torch.finfo(dtype).max ** (_SQUARED if squared else 1.0)
    plain = mask is None and weights is None
    if plain and (not x.numel() or torch.linalg.vector_norm(x.detach(), torch.inf) <= limit):
        return  # one pass and no temporary of the size of x
    good = (x.abs() <= limit).all(-1)
    if mask is not None:
        good = good | ~mask
    if not good.all():
        cloud, row = (int(i) for i in (~good).nonzero()[0])
        bad = x[cloud, row].tolist()
        where = f"cloud {cloud}, row {row} is {bad}"
        if x[cloud, row].isfinite().all():
            raise ValueError(
                f"x has a point whose squares are beyond {dtype}: {where}; scale the points to {limit:.0e} or less"
            )
        raise ValueError(f"x has a point that is not finite: {where}; drop it or mask it")
    if weights is not None and not ((weights >= 0) & weights.isfinite()).all():
        cloud, row = (int(i) for i in (~((weights >= 0) & weights.isfinite())).nonzero()[0])
        raise ValueError(
            f"weights must be finite and not negative: cloud {cloud}, row {row} is {weights[cloud, row].item()}"
        )
