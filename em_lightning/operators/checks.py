"""Input validation of operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from em_lightning.mixture.backends.reference import have_memory
from em_lightning.registry import from_options


def build(argument: str, cls: type[Any], value: Any) -> Any:
    """Return an instance of a class for an instance, a mapping of its arguments, or ``None``."""
    if isinstance(value, Mapping):
        return from_options(argument, cls, value)
    if value is not None and not isinstance(value, cls):
        raise TypeError(f"{argument}={value!r} must be a {cls.__name__}, a dict or None")
    return value


def check_sets(x: Tensor, mask: Tensor | None, weights: Tensor | None, num_features: int) -> Tensor:
    """Return points (B, N, D) in at least float32 after a check of them, their mask and weights (B, N).

    Raises:
        ValueError: a shape does not fit, points that count are NaN or infinite, or weights are negative or not finite.
        TypeError: points are no floating-point tensor, or the mask is not boolean.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {given}")
    if x.ndim != 3 or x.shape[-1] != num_features or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, N, {num_features}) with N >= 1")
    for name, value in (("mask", mask), ("weights", weights)):
        if value is not None and value.shape != x.shape[:2]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {tuple(x.shape[:2])}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be a boolean tensor, got {mask.dtype}")
    # Neither a compiler, nor torch.func, nor the capture of a CUDA graph allows reading values.
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if not torch.compiler.is_compiling() and not capturing and have_memory(x):
        finite = x.detach().isfinite().all(-1)
        _check_all(finite if mask is None else finite | ~mask, "x must be finite", x)
        if weights is not None:
            _check_all((weights >= 0) & weights.isfinite(), "weights must be finite and not negative", weights)
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_all(valid: Tensor, rule: str, values: Tensor) -> None:
    if not valid.all():
        place, row = (int(i) for i in (~valid).nonzero()[0])
        raise ValueError(f"{rule}: set {place}, row {row} is {values[place, row].tolist()}")
