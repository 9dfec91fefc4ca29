"""Curvature of the softmin free energy: the largest eigenvalue of diag(r) - r r^T, without the matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from em_lightning.competition.base import check_temperature
from em_lightning.distributed import accumulation_dtype

_NUM_STEPS = 5  # iterations of the solver: 3 make the value exact to rounding, the others are a reserve


def curvature(responsibilities: Tensor, temperature: float | Tensor = 1.0, dim: int = -1) -> Tensor:
    r"""Return the spectral norm, per item, of the Hessian of a softmin's free energy with respect to its energies.

    .. math:: \kappa = \lambda_{\max}(\mathrm{diag}(r) - r r^\top) / T \le \frac{1}{2 T}

    It is 0 for a single winner, 1/(2T) for two equal winners and 1/(KT) for K equal ones, so constant (dead) units
    that share the lowest energy raise it above 0 without any competition. The eigenvalue is the root of
    :math:`\sum_k r_k^2 / (r_k - \lambda) = 1` between the two largest responsibilities, found in float64 (float32
    on MPS). The gradient is exact, but a subgradient for one-hot rows and ties of three or more winners.

    Args:
        responsibilities: r, shape (..., K), non-negative with sum 1 along ``dim``. A row of zeros gives 0.
        temperature: T > 0, a number or a tensor that broadcasts with the result.
        dim: axis of the hypotheses.

    Raises:
        ValueError: ``temperature`` is a number and not positive.
        TypeError: ``responsibilities`` are not floating-point.
        RuntimeError: in a backward pass with ``create_graph=True``.

    Example:
        >>> curvature(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.75, 0.0]]))
        tensor([0.5000, 0.0000, 0.3750])

    Source: Böhning, "Multinomial logistic regression algorithm", 1992, for the bound.
    """
    check_temperature(temperature)
    if not responsibilities.is_floating_point():
        raise TypeError(f"responsibilities of dtype {responsibilities.dtype} must be floating-point")
    r = responsibilities.movedim(dim, -1).to(accumulation_dtype(responsibilities))
    r = functional.pad(r, (0, 1)).sort(-1, descending=True).values  # one more hypothesis, of r = 0, as K may be 1
    # The Rayleigh quotient is stationary in the vector, so its derivative with respect to r is that of the eigenvalue.
    vector = _eigenvector(r)
    value = (r * vector.square()).sum(-1) - (r * vector).sum(-1).square()
    value = value / (temperature.to(value) if isinstance(temperature, Tensor) else temperature)
    if value.requires_grad:
        value.register_hook(_refuse_second_derivatives)
    return value.to(responsibilities.dtype)


def _refuse_second_derivatives(grad: Tensor) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("curvature() has no second derivatives: its eigenvector is a constant of the gradient")


@torch.no_grad()
def _eigenvector(r: Tensor) -> Tensor:
    """Return the unit eigenvector of the largest eigenvalue for r (..., K) in descending order; 0 for a row of zeros.

    With the gap g = r_1 - r_2, distances d_k = r_2 - r_k and lambda = r_2 + t g, the equation of :func:`curvature` for
    lambda, times g, is r_1^2 / (1 - t) + psi(t) = g, where psi(t) = -sum_{k > 1} g r_k^2 / (d_k + t g) and 0 < t < 1.
    Each step replaces psi by p - q / t with the value and slope of psi at the last t, and solves for the new t, a zero
    of c t^2 + (r_1^2 + q - c) t - q with c = g - p: quadratic convergence (Bunch, Nielsen and Sorensen, 1978).
    """
    tiny, eps = torch.finfo(r.dtype).tiny, torch.finfo(r.dtype).eps
    first, rest = r[..., :1], r[..., 1:]
    gap, distance = first - rest[..., :1], rest[..., :1] - rest
    is_tied = distance == 0  # for the second place: poles at t = 0, where others / (distance + t * gap) may be 0 / 0
    tied, others = rest.masked_fill(~is_tied, 0.0), rest.masked_fill(is_tied, 0.0)
    t = torch.full_like(first, 0.5)
    for _ in range(_NUM_STEPS):
        u = (others / (distance + t * gap).clamp_min(tiny)).square()  # g^2 u_k is the slope of term k of psi
        q = tied.square().sum(-1, keepdim=True) + (t * gap).square() * u.sum(-1, keepdim=True)
        c = gap + gap * (distance * u).sum(-1, keepdim=True)  # p = psi + q / t = -g sum_k d_k u_k
        middle = first.square() + q - c
        larger = (middle.square() + 4 * c * q).sqrt() + middle.abs()
        t = torch.where(middle >= 0, 2 * q / larger.clamp_min(tiny), larger / (2 * c).clamp_min(tiny))
        t = t.clamp(tiny, 1 - eps)
    minus_rest = tied / t + others * gap / (distance + t * gap).clamp_min(tiny)
    return functional.normalize(torch.cat([first / (1 - t), -minus_rest], -1), dim=-1, eps=tiny)  # g r / (r - lambda)
