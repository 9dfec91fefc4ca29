"""The passes over points for anything but softmin among Gaussians: robust kernels, a background, other competitions.

Blocks of points are formed again in the backward pass, so memory does not grow with the number of iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from em_lightning.mixture.background import Level
from em_lightning.mixture.cloud import Cloud
from em_lightning.mixture.covariance import Structure
from em_lightning.mixture.factors import State
from em_lightning.mixture.moments import loses_all_digits
from em_lightning.mixture.radial import Radial

Sums = tuple[Tensor, ...]
# Responsibilities a block.
_BLOCK = 2**18


class Frame(NamedTuple):
    """What log-densities of components are formed of.

    theta: (B, K, F), natural parameters of Gaussians.
    peak: (B, K, 1), what ``theta . phi`` is at the mean: a point's Mahalanobis distance is what it lies below.
    origins: (B, K, D), what points are taken about, where components have frames of their own.
    """

    theta: Tensor
    peak: Tensor
    origins: Tensor | None = None


def frame_of(
    state: State, structure: Structure, radial: Radial | None, cloud: Cloud | None = None, apart: Tensor | None = None
) -> Frame:
    """Return the frame of a mixture: one for each component where ``apart`` (B,) says so, or a cloud calls for it.

    That costs K times as much: squares are those of differences ``x - mu_k``, which keeps the digits of components that
    are narrow beside where they lie.
    """
    theta = structure.natural(state)
    if cloud is not None:
        apart = loses_all_digits(cloud, theta, structure)
    origins = None
    if apart is not None:
        origins = origins_of(state, apart)
        state = state._replace(means=state.means - origins)
        theta = structure.natural(state)
    if radial is None:
        return Frame(theta, theta[..., :1], origins)  # Gaussians do without their peaks
    # Of a mixture about zero: theta . phi at a mean far away is a difference of terms as large as its square.
    peak = structure.natural(state._replace(means=torch.zeros_like(state.means)))[..., :1]
    return Frame(theta, peak, origins)


def origins_of(state: State, apart: Tensor) -> Tensor:
    """Return what points are taken about (B, K, D): the mean of each component where ``apart`` (B,), else zero."""
    return torch.where(apart[:, None, None], state.means, 0.0)


def log_joint(
    points: Tensor, frame: Frame, structure: Structure, radial: Radial | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Return features, ``log pi_k + log p_k(x_n)`` (B, K, N) and the pulls ``u_nk`` (B, K, N) of points.

    Features are (B, F, N), or (B, K, F, N) where components have frames of their own.

    Args:
        points: (B, D, N), centred.
        frame: of the mixture.
        structure: the covariance structure.
        radial: the density, ``None`` for the Gaussian's, whose pulls are ``None``.
    """
    theta, peak, origins = frame
    features = features_about(points, origins, structure, theta.dtype)
    gaussian = torch.bmm(theta, features) if origins is None else (theta.unsqueeze(2) @ features).squeeze(2)
    if radial is None:
        return features, gaussian, None
    energies, pull = radial.energy((2.0 * (peak - gaussian)).clamp(min=0.0))
    # The Gaussian's normalizer gives way to the kernel's.
    constant = 0.5 * points.shape[1] * math.log(2.0 * math.pi) - radial.log_normalizer
    return features, peak + constant - energies, pull


def features_about(points: Tensor, origins: Tensor | None, structure: Structure, dtype: torch.dtype) -> Tensor:
    """Return features (B, F, N) of points (B, D, N), or (B, K, F, N) of points as seen from origins (B, K, D)."""
    if origins is None:
        return structure.features(points, dtype)
    own = points.unsqueeze(1) - origins.unsqueeze(-1)
    return structure.features(own.flatten(0, 1), dtype).unflatten(0, origins.shape[:2])


def background_row(theta: Tensor, level: Level) -> Tensor:
    """Return natural parameters (B, K + 1, F) of the components and, last, of the background: phi begins with 1."""
    row = torch.cat([level.background.reshape(-1, 1, 1), torch.zeros_like(theta[:, :1, 1:])], -1)
    return torch.cat([torch.cat([theta[..., :1] + level.rest, theta[..., 1:]], -1), row], 1)


def with_background(joint: Tensor, level: Level | None, clouds: slice = slice(None)) -> Tensor:
    """Return ``log pi_k + log p_k`` (B, K, N), and where there is a background that last: (B, K + 1, N)."""
    if level is None:
        return joint
    constant = level.background[clouds, None, None].to(joint).expand(-1, 1, joint.shape[-1])
    return torch.cat([joint + level.rest.to(joint), constant], 1)


def general_moments(
    cloud: Cloud,
    state: State,
    structure: Structure,
    radial: Radial | None,
    level: Level | None,
    respond: Callable[[Tensor], Tensor],
    whole: bool,
    apart: Tensor | None = None,
    origins: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    r"""Return moments ``sum_n w_n r_nk [1, u_nk x_n, u_nk x_n x_n^T]`` (B, K, F) and ``sum_n w_n r_nk u_nk`` (B, K).

    The third result is the log-likelihood ``sum_n w_n log p(x_n)`` (B,), which has no gradient; the fourth the mass
    (B,) of the background, zero without one.

    Args:
        cloud: the point sets.
        state: the mixture.
        structure: its covariance structure.
        radial: its density, ``None`` for the Gaussian's: then ``u = 1`` and the second result is ``None``.
        level: its background.
        respond: from ``log pi_k + log p_k(x_n)`` (b, K, n), the background last, to responsibilities (b, K, n).
        whole: whether ``respond`` must see all points at once.
        apart: (B,), where points are taken about the mean of each component, and moments too: see :func:`frame_of`.
        origins: (B, K, D), what moments are taken about instead; a constant.
    """
    frame = frame_of(state, structure, radial, apart=apart)
    theta = frame.theta

    def block(points: Tensor, weights: Tensor | None, clouds: slice, *parts: Tensor) -> Sums:
        features, joint, pull = log_joint(points, Frame(*parts), structure, radial)
        if origins is not None:
            features = features_about(points, origins[clouds], structure, theta.dtype)
        logits = with_background(joint.to(points.dtype), level, clouds)
        density = logits.detach().logsumexp(1)
        density = density if weights is None else density * weights.detach()
        share = respond(logits).to(theta.dtype)
        if weights is not None:
            share = share * weights.unsqueeze(1)
        share, outside = share.split([theta.shape[1], share.shape[1] - theta.shape[1]], 1)
        pulled = share if pull is None else share * pull
        moments = (pulled if features.ndim == 3 else pulled.unsqueeze(2)) @ features.mT
        sums = torch.cat([share.sum(-1, keepdim=True), moments.view_as(theta[clouds])], -1)
        return sums, density.sum(-1, dtype=theta.dtype), outside.sum((1, 2))

    parts = []
    for clouds, blocks in _blocks(cloud, theta, frame.origins is not None or origins is not None, whole):
        total: Sums | None = None
        for rows in blocks:
            weights = None if cloud.weights is None else cloud.weights[clouds, rows]
            sums = _again(block, cloud.part(clouds, rows), weights, clouds, *_part(frame, clouds))
            total = sums if total is None else tuple(map(torch.add, total, sums))
        parts.append(total)
    sums, likelihood, outside = map(torch.cat, zip(*parts, strict=True))
    if radial is None:
        return sums[..., 1:], None, likelihood, outside
    return torch.cat([sums[..., :1], sums[..., 2:]], -1), sums[..., 1], likelihood, outside


def softmin_moments(
    cloud: Cloud, state: State, structure: Structure, apart: Tensor | None, origins: Tensor
) -> tuple[Tensor, Tensor]:
    """Return moments and log-likelihood of Gaussians as :func:`general_moments` does, of plain EM."""
    softmax = partial(torch.softmax, dim=1)
    moments, _, likelihood, _ = general_moments(
        cloud, state, structure, None, None, softmax, whole=False, apart=apart, origins=origins
    )
    return moments, likelihood


def general_log_density(
    cloud: Cloud, state: State, structure: Structure, radial: Radial | None, level: Level | None
) -> Tensor:
    """Return ``log p(x_n)`` (B, N) of points; arguments are those of :func:`general_moments`."""
    frame = frame_of(state, structure, radial, cloud)

    def block(points: Tensor, clouds: slice, *parts: Tensor) -> Tensor:
        joint = log_joint(points, Frame(*parts), structure, radial)[1].to(points.dtype)
        return with_background(joint, level, clouds).logsumexp(1)

    parts = []
    for clouds, blocks in _blocks(cloud, frame.theta, frame.origins is not None, False):
        rows = [_again(block, cloud.part(clouds, row), clouds, *_part(frame, clouds)) for row in blocks]
        parts.append(torch.cat(rows, -1))
    return torch.cat(parts)


def _part(frame: Frame, clouds: slice) -> list[Tensor]:
    return [part[clouds] for part in frame if part is not None]


def _blocks(cloud: Cloud, theta: Tensor, framed: bool, whole: bool) -> list[tuple[slice, list[slice]]]:
    """Return which clouds, and which of their points, are worked on together."""
    sets, _, items = cloud.points.shape
    numbers = theta.shape[1] * (theta.shape[2] if framed else 1)
    rows = items if whole else max(_BLOCK // numbers, 1)
    size = sets if whole else max(rows // items, 1)
    points = [slice(row, row + rows) for row in range(0, items, rows)]
    # Of no sets there is one block, empty.
    return [(slice(first, first + size), points) for first in range(0, max(sets, 1), size)]


def _again(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function that the backward pass is to call once more instead of keeping what it made."""
    if torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)
