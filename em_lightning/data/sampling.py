"""Surfaces from which points are drawn uniformly, normalization of clouds, and random rotations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Normalization(NamedTuple):
    """The change of units x' = (x - c) / s, which maps a shape into the unit ball.

    c is the center of the bounding box and s the largest distance from it: unlike the mean, both do not depend on how
    densely parts of the shape were sampled. Densities transform as log p(x) = log p'(x') - D log s.

    Args:
        center: c, (..., D).
        scale: s, (...); positive.

    Example:
        >>> x = torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
        >>> unit = Normalization.of(x)
        >>> unit.apply(x).tolist(), unit.scale.item()
        ([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], 2.0)
        >>> torch.equal(unit.invert(unit.apply(x)), x)
        True
    """

    center: Tensor
    scale: Tensor

    @classmethod
    def of(cls, points: Tensor) -> Normalization:
        """Return the normalization of points (N, D); the scale is 1 if all points are equal."""
        center = (points.amin(0) + points.amax(0)) / 2
        scale = (points - center).norm(dim=-1).amax()
        return cls(center, torch.where(scale > 0, scale, torch.ones_like(scale)))

    def apply(self, points: Tensor) -> Tensor:
        """Return x' for points x (..., N, D)."""
        return (points - self.center.unsqueeze(-2)) / self.scale[..., None, None]

    def invert(self, points: Tensor) -> Tensor:
        """Return x for normalized points x' (..., N, D)."""
        return points * self.scale[..., None, None] + self.center.unsqueeze(-2)

    def log_jacobian(self) -> Tensor:
        """Return -D log s, (...): log p(x) minus log p'(x')."""
        return -self.center.shape[-1] * self.scale.log()


class Surface(NamedTuple):
    """A triangle mesh with its areas, from which points are drawn uniformly by area.

    A triangle is drawn with probability proportional to its area; in it, x = a + sqrt(u) ((1 - v) (b - a) + v (c - a))
    with u, v uniform in [0, 1].

    Args:
        vertices: (V, 3) float64.
        faces: (F, 3) long, rows of ``vertices``.
        cumulative_areas: (F,) float64, the cumulative sum of the triangle areas.

    Example:
        >>> surface = Surface.of(torch.eye(3), torch.tensor([[0, 1, 2]]))
        >>> points = surface.sample(1000, torch.Generator().manual_seed(0))
        >>> points.shape, torch.allclose(points.sum(1), torch.ones(1000))
        (torch.Size([1000, 3]), True)

    Source: Osada et al., Shape distributions, 2002.
    """

    vertices: Tensor
    faces: Tensor
    cumulative_areas: Tensor

    @classmethod
    def of(cls, vertices: Tensor, faces: Tensor) -> Surface:
        """Return the surface of a mesh.

        Raises:
            ValueError: a shape is wrong, a face refers to a missing vertex, or the total area is not positive.
        """
        if vertices.shape[1:] != (3,) or faces.shape[1:] != (3,):
            shapes = f"{tuple(vertices.shape)} and {tuple(faces.shape)}"
            raise ValueError(f"vertices and faces must have shapes (V, 3) and (F, 3), got {shapes}")
        low, high = faces.aminmax() if faces.numel() else (0, -1)
        if low < 0 or high >= len(vertices):
            raise ValueError(f"faces must be from 0 to {len(vertices) - 1}, got {int(low)} to {int(high)}")
        vertices = vertices.double()
        a, b, c = vertices.index_select(0, faces.flatten()).view(-1, 3, 3).unbind(1)
        cumulative = torch.linalg.cross(b - a, c - a).norm(dim=-1).cumsum(0) / 2
        area = cumulative[-1].item() if len(cumulative) else 0.0
        if not 0 < area < float("inf"):
            raise ValueError(f"the area of the surface must be positive and finite, got {area}")
        return cls(vertices, faces, cumulative)

    def sample(self, num_points: int, generator: torch.Generator | None = None) -> Tensor:
        """Return points (num_points, 3) float32, uniform on the surface."""
        u = torch.rand(num_points, 3, dtype=torch.float64, generator=generator)
        # right=True skips triangles of zero area; clamp handles a product rounded up to the total area.
        face = torch.searchsorted(self.cumulative_areas, u[:, 0] * self.cumulative_areas[-1], right=True)
        corners = self.faces.index_select(0, face.clamp_(max=len(self.faces) - 1))
        a, b, c = self.vertices.index_select(0, corners.flatten()).view(num_points, 3, 3).unbind(1)
        root, v = u[:, 1:2].sqrt(), u[:, 2:3]
        return (a + root * ((b - a) * (1 - v) + (c - a) * v)).float()


def random_rotation(generator: torch.Generator | None = None, axis: str = "so3") -> Tensor:
    """Return a rotation matrix (3, 3) float64, uniform over all rotations (``"so3"``) or those about the ``"z"`` axis.

    Source: a normalized Gaussian quaternion is a uniform rotation (Shoemake, Uniform random rotations, 1992).
    """
    from scipy.spatial.transform import Rotation

    quaternion = torch.randn(4, dtype=torch.float64, generator=generator)  # w, x, y, z
    if axis == "z":
        quaternion[1:3] = 0
    return torch.from_numpy(Rotation.from_quat(quaternion.roll(-1).numpy()).as_matrix())
