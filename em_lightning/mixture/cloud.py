"""Point sets made ready for EM: centred, with one weight per point."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Points up to this many numbers are centred in a copy, more of them block by block in each pass.
_WHOLE = 2**22
_CHUNK = 2**16


class Ready(NamedTuple):
    """What passes over the same points have in common.

    extent: (B, D), the largest coordinates.
    limit: (B,), up to which terms of a log-density are taken in the type of the points.
    features: (B, F, N), if small.
    """

    extent: Tensor
    limit: Tensor
    features: Tensor | None


class Cloud(NamedTuple):
    """Point sets made ready for EM.

    points: (B, D, N), masked points moved to the centre; centred but for ``shift``. Features come first so that the
        points of one feature lie side by side in memory.
    weights: (B, N), zero where masked; ``None`` where every point counts once.
    mass: (B,), the sum of the weights.
    center: (B, D), the mean, and the origin of the loop.
    variance: (B, D), of each feature.
    shift: (B, D), what is still to be subtracted from the points: large sets are not copied. Mostly ``None``.
    ready: what passes over the points share, where there are several.
    narrow: whether components may be so narrow beside the cloud that double precision loses them.

    What is not of the size of the points is held in double precision, which costs nothing and keeps thin components.
    """

    points: Tensor
    weights: Tensor | None
    mass: Tensor
    center: Tensor
    variance: Tensor
    shift: Tensor | None = None
    ready: Ready | None = None
    narrow: bool = False

    def part(self, clouds: slice = slice(None), rows: slice = slice(None)) -> Tensor:
        """Return centred points (b, D, n) of some clouds."""
        return centred(self.points, self.shift, clouds, rows)


def centred(points: Tensor, shift: Tensor | None, clouds: slice = slice(None), rows: slice = slice(None)) -> Tensor:
    """Return a block (b, D, n) of points (B, D, N) less their shift (B, D), the difference taken in its precision."""
    block = points[clouds, :, rows]
    return block if shift is None else (block - shift[clouds].unsqueeze(-1)).to(points.dtype)


def about(x: Tensor, center: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return points (B, D, N) and what is still to be subtracted from them, for points (B, N, D) about a center."""
    points, shift = x.mT.expand(len(center), -1, -1), center
    if points.numel() > _WHOLE:
        return points, shift
    return centred(points, shift).contiguous(), None


def prepare(x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Cloud:
    """Centre points (B, N, D) and join mask and weights (B, N) into one weight per point."""
    wide = widest(x)
    if mask is not None:
        x = torch.where(mask.unsqueeze(-1), x, 0.0)
        weights = mask if weights is None else torch.where(mask, weights, 0.0)
    weights = None if weights is None else weights.to(x.dtype)
    if weights is None:
        mass = torch.full_like(x[:, 0, 0], float(x.shape[1]), dtype=wide)
        shares = (mass.reciprocal()[:, None, None]).expand(-1, x.shape[1], 1)
    else:
        mass = weights.sum(-1, dtype=wide)
        # A set without any weight has no shares, and its weights no infinite slope.
        shares = (weights / torch.where(mass > 0, mass, 1.0).unsqueeze(-1)).unsqueeze(-1)
    chunks = _chunks(x)
    center = _sum(lambda rows: (shares[:, rows] * x[:, rows]).sum(1), chunks)
    points, shift = about(x, center)
    if weights is not None:
        counted = (weights != 0).unsqueeze(1)
        points, shift = torch.where(counted, centred(points, shift), 0.0), None
    variance = _sum(lambda rows: (centred(points, shift, rows=rows).square() * shares[:, rows].mT).sum(2), chunks)
    return Cloud(points, weights, mass, center, variance, shift)


def _chunks(x: Tensor) -> list[slice]:
    """Return slices of rows: one unless the points are so many that a temporary copy of them matters."""
    sets, items, features = x.shape
    rows = items if x.numel() <= _WHOLE else max(_CHUNK // (sets * features), 1)
    return [slice(row, row + rows) for row in range(0, items, rows)]


def _sum(part: Callable[[slice], Tensor], chunks: list[slice]) -> Tensor:
    """Return the sum of a function of chunks."""
    total = part(chunks[0])
    for rows in chunks[1:]:  # a list of small results would lie between large temporaries, and keep their memory apart
        total = total + part(rows)
    return total


def effective_floor(cloud: Cloud, floor: float, relative: bool = False) -> Tensor:
    """Return the floor (B,) of a variance: as asked, but never below what the rounding of the points can show.

    A relative floor is a share of the mean variance of the cloud's features; of a cloud that has no weight, 1.
    """
    eps = torch.finfo(cloud.points.dtype).eps
    variance = cloud.variance.detach()
    least = (eps * eps * variance.sum(-1)).clamp(min=eps**4)
    if not relative:
        return least.clamp(min=floor)
    return torch.where(cloud.mass.detach() > 0, torch.maximum(least, floor * variance.mean(-1)), 1.0)


def widest(x: Tensor) -> torch.dtype:
    """Return the widest floating-point type of the device: double, but for Apple's."""
    return torch.float32 if x.device.type == "mps" else torch.float64
