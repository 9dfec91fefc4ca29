"""Point sets with centered and scaled coordinates and weights that are zero where masked; mixture parameters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from em_lightning.checks import is_exporting
from em_lightning.distributed import accumulation_dtype
from em_lightning.mixture.backends import sum_blocks

# Up to this many numbers, points are copied to features-first layout, which is faster to read.
_LARGEST_COPY = 2**22  # 16 MiB in float32; more are read in place, to save memory. Chosen, not measured.


class Parameters(NamedTuple):
    """The parameters of a mixture inside the EM loop, in coordinates of the :class:`Frame` of its points.

    log_weights: (B, K).
    means: (B, K, D).
    covariances: in the shape of the covariance type; concentrations (B, K) for von Mises-Fisher.
    """

    log_weights: Tensor
    means: Tensor
    covariances: Tensor


class Frame(NamedTuple):
    """Frame coordinates ``z = (x - center) / scale`` of point sets x, which are given in the user's units.

    center: (B, D), near the mean of the points; a constant without gradient, like the scale.
    scale: (B,), a power of two, so that divisions are exact.
    """

    center: Tensor
    scale: Tensor

    def enter(self, x: Tensor) -> Tensor:
        """Return coordinates (B, D, N) of points (B, D, N)."""
        return (x - self.center.unsqueeze(-1)) / self.scale[:, None, None]

    def enter_parameters(self, parameters: Parameters) -> Parameters:
        """Convert parameters from the user's units to frame coordinates."""
        log_weights, means, covariances = (part.to(self.center.dtype) for part in parameters)
        ratio = self.scale.square().reshape(-1, *[1] * (covariances.ndim - 1))
        means = (means - self.center.unsqueeze(1)) / self.scale[:, None, None]
        return Parameters(log_weights, means, covariances / ratio)


class Points(NamedTuple):
    """A batch of point sets with the frame of their coordinates.

    x: (B, D, N), the points in the user's units and dtype; masked rows are set to the center.
    weights: (B, N), zero where masked; the mean of positive weights is 1, except in blocks. ``None``: all are 1.
    mass: (B,), the sum of the weights.
    num_points: (B,), the number of points of positive weight.
    frame: its coordinates are called z below.
    mean: (B, D), weighted mean of z; zero if not requested.
    variance: (B, D), weighted variance of z; zero if not requested.
    eps: relative precision of the points.
    """

    x: Tensor
    weights: Tensor | None
    mass: Tensor
    num_points: Tensor
    frame: Frame
    mean: Tensor
    variance: Tensor
    eps: float

    @property
    def num_features(self) -> int:
        """D, the number of features of x."""
        return self.x.shape[1]

    def coordinates(self, block: Tensor | None = None, sets: slice = slice(None)) -> Tensor:
        """Return frame coordinates (b, D, n) of a block (b, D, n) of points of some sets, or of all points."""
        center, scale = self.frame
        block = self.x if block is None else block
        return Frame(center[sets], scale[sets]).enter(block.to(center.dtype))

    def floor(self, covariance_floor: float) -> Tensor:
        """Convert a floor of variances from the user's units to frame coordinates (B,), at least their round-off."""
        return (covariance_floor / self.frame.scale.square()).clamp(min=self.eps**2)

    def root_mean_variance(self) -> Tensor:
        """Return the root of the mean variance over features (B,), at least ``eps``."""
        return self.variance.mean(-1).clamp(min=self.eps**2).sqrt()

    def log_jacobian(self) -> Tensor:
        """Return ``log |dx/dz| = D log(scale)`` (B,), which is subtracted from log-densities of z to get those of x."""
        return self.num_features * self.frame.scale.log()


def prepare(
    x: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    frame: Frame | None = None,
    normalized_weights: bool = True,
    with_moments: bool = False,
) -> Points:
    """Return points (B, N, D) with weights (B, N) ready for EM.

    The frame is by default that of the mean and the extent of each set. Rows with a false mask (B, N) may hold any
    value. Weights are divided by their mean, unless the points are a block of a larger set
    (``normalized_weights=False``). With ``with_moments``, mean and variance are computed.
    """
    dtype = accumulation_dtype(x)
    weights, counted = join_weights(mask, weights, dtype, normalized_weights)
    x = features_first(x)
    if mask is not None:
        x = torch.where(mask.unsqueeze(1), x, 0.0)
    frame = frame_of(x, mask) if frame is None else frame
    if mask is not None:
        x = torch.where(mask.unsqueeze(1), x, frame.center.unsqueeze(-1).to(x.dtype))
    mass = torch.full_like(frame.scale, x.shape[-1]) if weights is None else weights.sum(-1)
    num_points = torch.full_like(frame.scale, x.shape[-1]) if counted is None else counted.sum(-1).to(dtype)
    zeros, eps = torch.zeros_like(frame.center), torch.finfo(x.dtype).eps
    points = Points(x, weights, mass, num_points, frame, zeros, zeros, eps)
    if not with_moments:
        return points
    mean, variance = _moments(points)
    return points._replace(mean=mean, variance=variance)


def features_first(x: Tensor) -> Tensor:
    """Return points (B, N, D) as (B, D, N)."""
    return x.mT.contiguous() if is_exporting() or x.numel() <= _LARGEST_COPY else x.mT


def frame_of(x: Tensor, mask: Tensor | None = None) -> Frame:
    """Return the frame of points (B, D, N) from mean and extent; masked points must be zero."""
    x, dtype = x.detach(), accumulation_dtype(x)
    if mask is None:
        center = x.mean(-1).to(dtype)
    else:
        center = x.sum(-1).to(dtype) / mask.sum(1, keepdim=True).clamp(min=1)
    center = torch.where(center.isfinite(), center, 0.0)  # the sum may overflow
    if mask is not None:
        x = torch.where(mask.unsqueeze(1), x, center.unsqueeze(-1).to(x.dtype))
    low, high = (x.amin(-1), x.amax(-1)) if x.is_contiguous() else x.aminmax(dim=-1)  # the faster way for each layout
    extent = torch.maximum(high.to(dtype) - center, center - low.to(dtype)).amax(-1)
    return Frame(center, power_of_two(extent))


def power_of_two(extent: Tensor) -> Tensor:
    """Return the smallest power of two that is not below an extent; 1 for an extent of zero."""
    return torch.where(extent > 0, extent.log2().ceil().exp2(), 1.0)


def join_weights(
    mask: Tensor | None, weights: Tensor | None, dtype: torch.dtype, normalized: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Return the weights of points and the mask of positive ones, both (B, N); both None without mask and weights.

    Weights are zero where masked. With ``normalized`` the mean of the positive ones is 1.
    """
    if weights is None:
        return (None, None) if mask is None else (mask.to(dtype), mask)
    weights = weights.to(dtype) if mask is None else torch.where(mask, weights.to(dtype), 0.0)
    counted = weights > 0
    if normalized:
        # Divide by the largest weight first, so that the sum is neither zero nor infinite.
        largest = weights.detach().amax(-1, keepdim=True)
        weights = weights / torch.where(largest > 0, largest, 1.0)
        total = weights.sum(-1, keepdim=True)
        weights = weights * (counted.sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0))
    return weights, counted


def _moments(points: Points) -> tuple[Tensor, Tensor]:
    """Return the weighted mean and variance (B, D) of the coordinates; zero for sets without points."""

    def sums_of_block(sets: slice, block: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        z = points.coordinates(block, sets)
        weighted = z if weights is None else z * weights.unsqueeze(1)
        return weighted.sum(-1), (weighted * z).sum(-1)

    first, second = sum_blocks(sums_of_block, (points.x, points.weights), (), numbers_per_point=points.num_features)
    mass = torch.where(points.mass > 0, points.mass, 1.0).unsqueeze(-1)
    mean = first / mass
    return mean, (second / mass - mean.square()).clamp(min=0.0)
