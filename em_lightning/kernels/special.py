"""Special functions that normalizers need and torch lacks, or has without a derivative."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class _ScaledBesselK(torch.autograd.Function):
    """exp(x) K_0(x) and exp(x) K_1(x); each derivative is made of both, so that every order exists."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: int) -> Tensor:
        bessel = torch.special.scaled_modified_bessel_k1 if order else torch.special.scaled_modified_bessel_k0
        return bessel(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        x, ctx.order = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        # K_0' = -K_1 and K_1' = -K_0 - K_1 / x (Abramowitz and Stegun 9.6.26-28), and exp(x) adds the function itself.
        zeroth, first = _ScaledBesselK.apply(x, 0), _ScaledBesselK.apply(x, 1)
        slope = first - zeroth - first / x if ctx.order else zeroth - first
        return grads[0] * slope, None


def scaled_bessel_k(x: Tensor, order: int) -> Tensor:
    """Return exp(x) K_order(x) for x > 0 and order 0 or 1, differentiable at every order.

    Example:
        >>> scaled_bessel_k(torch.tensor(1.0), order=1)
        tensor(1.6362)
    """
    return _ScaledBesselK.apply(x, order)


def log_sphere_integral(num_features: int) -> float:
    r"""Return the log of the integral of :math:`e^{-(1 - \cos\theta)}` over the unit sphere of R^D.

    That is :math:`\log\bigl((2 \pi)^{D/2} I_{D/2 - 1}(1) / e\bigr)`, from the power series of the modified Bessel
    function (Abramowitz and Stegun 9.6.10), whose terms all have one sign and shrink at least as fast as 2^-k / k!.

    Example:
        >>> round(log_sphere_integral(1), 6)  # the two points +-1: log(1 + exp(-2))
        0.126928
    """
    order = num_features / 2 - 1
    term, total = 1.0, 0.0
    for k in range(1, 20):
        total += term
        term *= 0.25 / (k * (order + k))
    log_bessel = -order * math.log(2) - math.lgamma(order + 1) + math.log(total)
    return 0.5 * num_features * math.log(2 * math.pi) + log_bessel - 1
