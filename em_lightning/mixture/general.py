"""The passes over points for anything but softmin among Gaussians: robust kernels, a background, other competitions.

Blocks of points are formed again in the backward pass, so memory does not grow with the number of iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from em_lightning.mixture.covariance import State, Structure
from em_lightning.mixture.radial import Radial
from em_lightning.mixture.step import Cloud

# Responsibilities a block.
_BLOCK = 2**18


def log_joint(
    points: Tensor, theta: Tensor, peak: Tensor, structure: Structure, radial: Radial | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Return features (B, F, N), ``log pi_k + log p_k(x_n)`` (B, K, N) and the pulls ``u_nk`` (B, K, N) of points.

    Args:
        points: (B, D, N), centred.
        theta: (B, K, F), natural parameters of Gaussians.
        peak: (B, K, 1), what ``theta . phi`` is at the mean: a point's Mahalanobis distance is what it lies below.
        structure: the covariance structure.
        radial: the density, ``None`` for the Gaussian's, whose pulls are ``None``.
    """
    features = structure.features(points, theta.dtype)
    gaussian = torch.bmm(theta, features)
    if radial is None:
        return features, gaussian, None
    energies, pull = radial.energy((2.0 * (peak - gaussian)).clamp(min=0.0))
    # The Gaussian's normalizer gives way to the kernel's.
    constant = 0.5 * points.shape[1] * math.log(2.0 * math.pi) - radial.log_normalizer
    return features, peak + constant - energies, pull


def peaks(theta: Tensor, state: State, structure: Structure) -> Tensor:
    """Return ``theta_k . phi(mu_k)`` as (B, K, 1)."""
    return (theta * structure.features(state.means.mT, theta.dtype).mT).sum(-1, keepdim=True)


def general_moments(
    cloud: Cloud, state: State, structure: Structure, radial: Radial | None, respond: Callable[..., Tensor], whole: bool
) -> tuple[Tensor, Tensor | None]:
    r"""Return moments ``sum_n w_n r_nk [1, u_nk x_n, u_nk x_n x_n^T]`` (B, K, F) and ``sum_n w_n r_nk u_nk`` (B, K).

    Args:
        cloud: the point sets.
        state: the mixture.
        structure: its covariance structure.
        radial: its density, ``None`` for the Gaussian's: then ``u = 1`` and the second result is ``None``.
        respond: from ``log pi_k + log p_k(x_n)`` (b, K, n) and the slice of the clouds to responsibilities (b, K, n).
        whole: whether ``respond`` must see all points at once.
    """
    theta = structure.natural(state)
    peak = peaks(theta, state, structure)

    def block(points: Tensor, weights: Tensor | None, theta: Tensor, peak: Tensor, clouds: slice) -> Tensor:
        features, joint, pull = log_joint(points, theta, peak, structure, radial)
        share = respond(joint.to(points.dtype), clouds)
        if weights is not None:
            share = share * weights.unsqueeze(1)
        share = share.to(theta.dtype)
        pulled = share if pull is None else share * pull
        return torch.cat([share.sum(-1, keepdim=True), torch.bmm(pulled, features.mT)], -1)

    sets, _, items = cloud.points.shape
    rows = items if whole else max(_BLOCK // theta.shape[1], 1)
    parts = []
    size = sets if whole else max(rows // items, 1)
    for first in range(0, sets, size):
        clouds = slice(first, first + size)
        total = torch.zeros_like(theta[:1, :1, :1])
        for row in range(0, items, rows):
            some = slice(row, row + rows)
            weights = None if cloud.weights is None else cloud.weights[clouds, some]
            arguments = (cloud.points[clouds, :, some], weights, theta[clouds], peak[clouds], clouds)
            if torch.is_grad_enabled():
                total = total + checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                total = total + block(*arguments)
        parts.append(total)
    sums = torch.cat(parts)
    if radial is None:
        return sums[..., 1:], None
    return torch.cat([sums[..., :1], sums[..., 2:]], -1), sums[..., 1]
