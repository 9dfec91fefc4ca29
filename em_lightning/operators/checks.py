"""Input validation of operators."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless a value is one of the choices."""
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, known))}")


def check_sets(x: Tensor, mask: Tensor | None, weights: Tensor | None, num_features: int) -> Tensor:
    """Return points (B, N, D) in at least float32.

    Args:
        x: the points.
        mask: (B, N).
        weights: (B, N).
        num_features: D.

    Raises:
        ValueError: a shape does not fit, points that count are NaN or infinite, or weights are negative or not finite.
        TypeError: points are no floating-point tensor, or the mask is not boolean.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is of type {given}; give a floating-point tensor, for instance x.float()")
    if x.ndim != 3 or x.shape[-1] != num_features or x.shape[1] == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be (B, N, {num_features}) with at least one point, masked where a "
            f"set has none"
        )
    for name, value in (("mask", mask), ("weights", weights)):
        if value is not None and value.shape != x.shape[:2]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {tuple(x.shape[:2])}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask is of type {mask.dtype}; give a boolean tensor, for instance mask.bool()")
    if not torch.compiler.is_compiling():
        _check_values(x, mask, weights)
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_values(x: Tensor, mask: Tensor | None, weights: Tensor | None) -> None:
    finite = x.detach().isfinite().all(-1)
    if mask is not None:
        finite = finite | ~mask
    if not finite.all():
        place, row = (int(i) for i in (~finite).nonzero()[0])
        raise ValueError(f"x must be finite: set {place}, row {row} is {x[place, row].tolist()}; drop it or mask it")
    if weights is not None and not ((weights >= 0) & weights.isfinite()).all():
        place, row = (int(i) for i in (~((weights >= 0) & weights.isfinite())).nonzero()[0])
        raise ValueError(
            f"weights must be finite and not negative: set {place}, row {row} is {weights[place, row].item()}"
        )
