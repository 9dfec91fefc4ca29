"""Procedural surfaces: 18 families of shapes with random parameters, as triangle meshes and as clouds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from em_lightning.checks import check_choice
from em_lightning.data.point_clouds import PointCloudDataModule, Shape, ShapeSource, random_rotation

Mesh = tuple[Tensor, Tensor]  # vertices (V, 3) float64, faces (F, 3) long


@cache
def _grid_faces(rows: int, columns: int) -> Tensor:
    """Return the faces (F, 3) of a grid; its cells are cut into two triangles by the diagonal from the upper left."""
    index = torch.arange(rows * columns).view(rows, columns)
    upper_left, upper_right, lower_left, lower_right = index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]
    triangles = (upper_left, upper_right, lower_right), (upper_left, lower_right, lower_left)
    return torch.cat([torch.stack(corners, -1).view(-1, 3) for corners in triangles])


def _grid(points: Tensor) -> Mesh:
    """Return the mesh of a grid of points (rows, columns, 3)."""
    return points.reshape(-1, 3), _grid_faces(*points.shape[:2])


@cache
def _linspace(low: float, high: float, steps: int) -> Tensor:
    return torch.linspace(low, high, steps, dtype=torch.float64)


def _revolve(radius: Tensor, height: Tensor, sides: int = 48) -> Mesh:
    """Return the surface of revolution of a profile, radii and heights (P,); few sides give a prism or pyramid."""
    angle = _linspace(0.0, 2 * math.pi, sides + 1)
    x, y = radius[:, None] * angle.cos(), radius[:, None] * angle.sin()
    return _grid(torch.stack([x, y, height[:, None].expand_as(x)], -1))


def _revolve_corners(*corners: tuple[float, float], sides: int = 48) -> Mesh:
    """Return the surface of revolution of a polygonal profile with corners (radius, height)."""
    radius, height = torch.tensor(corners, dtype=torch.float64).unbind(-1)
    return _revolve(radius, height, sides)


def _tube(curve: Tensor, radius: float, sides: int = 16) -> Mesh:
    """Return the tube around a curve (P, 3) that is nowhere parallel to the z axis."""
    tangent = torch.gradient(curve, dim=0)[0]
    tangent = tangent / tangent.norm(dim=-1, keepdim=True)
    up = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64).expand_as(tangent)
    side = torch.linalg.cross(tangent, up)
    side = side / side.norm(dim=-1, keepdim=True)
    normal = torch.linalg.cross(side, tangent)
    angle = _linspace(0.0, 2 * math.pi, sides + 1)[None, :, None]
    return _grid(curve[:, None] + radius * (angle.cos() * side[:, None] + angle.sin() * normal[:, None]))


_CORNERS = torch.tensor([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)], dtype=torch.float64)
_BOX_FACES = torch.tensor(
    [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1]]
    + [[2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]]
)


def _boxes(*boxes: tuple[float, float, float, float, float, float]) -> Mesh:
    """Return the mesh of boxes, each given by its centre (x, y, z) and its sizes along x, y and z."""
    table = torch.tensor(boxes, dtype=torch.float64)
    vertices = table[:, None, :3] + table[:, None, 3:] * _CORNERS
    faces = _BOX_FACES + 8 * torch.arange(len(boxes))[:, None, None]
    return vertices.reshape(-1, 3), faces.reshape(-1, 3)


def _legs(w: float, d: float, top: float, thick: float) -> list[tuple[float, float, float, float, float, float]]:
    """Return the boxes of four legs under the corners of a board of size (w, d) at height ``top``."""
    half_x, half_y = (w - thick) / 2, (d - thick) / 2
    return [(x, y, top / 2, thick, thick, top) for x in (-half_x, half_x) for y in (-half_y, half_y)]


class _RandomSurfaces:
    """Random surfaces: each public method draws the parameters of one family and returns its mesh.

    Superellipsoids (Barr, 1981) range from rounded boxes to pinched stars; a vase is an open surface of revolution
    whose radius is a sine of the height; a knot is a tube along the torus knot (2, 3) or (3, 2). Tables and chairs keep
    the hidden faces at which their boxes touch. Ranges and resolutions are chosen, not measured.
    """

    def __init__(self, generator: torch.Generator) -> None:
        # More uniform numbers than any family needs, at once: a call of torch.rand per parameter is slow.
        self._values = iter(torch.rand(32, dtype=torch.float64, generator=generator).tolist())

    def _draw(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._values)

    def _integer(self, low: int, high: int) -> int:
        return math.floor(self._draw(low, high + 1))

    def _superellipsoid(self, exponents: tuple[float, float], min_axis: float) -> Mesh:
        def power(value: Tensor, exponent: float) -> Tensor:
            return value.sign() * value.abs() ** exponent

        latitude = _linspace(-math.pi / 2, math.pi / 2, 25)[:, None]
        longitude = _linspace(-math.pi, math.pi, 49)
        flat = power(latitude.cos(), exponents[0])
        x, y = flat * power(longitude.cos(), exponents[1]), flat * power(longitude.sin(), exponents[1])
        grid = torch.stack([x, y, power(latitude.sin(), exponents[0]).expand(-1, 49)], -1)
        return _grid(grid * torch.tensor([self._draw(min_axis, 1), self._draw(min_axis, 1), 1], dtype=torch.float64))

    def sphere(self) -> Mesh:
        return self._superellipsoid((1.0, 1.0), 1.0)

    def ellipsoid(self) -> Mesh:
        return self._superellipsoid((1.0, 1.0), 0.3)

    def superellipsoid(self) -> Mesh:
        return self._superellipsoid((self._draw(0.3, 2.5), self._draw(0.3, 2.5)), 0.5)

    def box(self) -> Mesh:
        return _boxes((0, 0, 0, self._draw(0.3, 1), self._draw(0.3, 1), self._draw(0.3, 1)))

    def cylinder(self) -> Mesh:
        h = self._draw(0.3, 2)
        return _revolve_corners((0, -h), (1, -h), (1, h), (0, h))

    def cone(self) -> Mesh:
        h, top = self._draw(0.5, 1.5), max(0.0, self._draw(-0.5, 0.6))  # pointed in 5 of 11 draws, else cut
        return _revolve_corners((0, -h), (1, -h), (top, h), (0, h))

    def pyramid(self) -> Mesh:
        h = self._draw(0.4, 1.2)
        return _revolve_corners((0, -h), (1, -h), (0, h), sides=self._integer(3, 6))

    def prism(self) -> Mesh:
        h = self._draw(0.3, 1.5)
        return _revolve_corners((0, -h), (1, -h), (1, h), (0, h), sides=(3, 5, 6)[self._integer(0, 2)])  # 4 give a box

    def capsule(self) -> Mesh:
        angle, h = _linspace(-math.pi / 2, math.pi / 2, 32), self._draw(0.3, 2)  # even: at angle 0, sign would be 0
        return _revolve(angle.cos(), angle.sin() + h * angle.sign())

    def vase(self) -> Mesh:
        z = _linspace(-1.0, 1.0, 40)
        radius = 0.5 + self._draw(0.1, 0.35) * torch.sin(self._draw(2, 5) * z + self._draw(0, 2 * math.pi))
        return _revolve(radius, self._draw(0.7, 1.3) * z)

    def torus(self) -> Mesh:
        angle, r = _linspace(0.0, 2 * math.pi, 33), self._draw(0.15, 0.6)
        return _revolve(1 + r * angle.cos(), r * angle.sin())

    def helix(self) -> Mesh:
        turns, pitch = self._draw(1.5, 3), self._draw(0.4, 0.8)
        t = _linspace(0.0, 1.0, 97) * turns
        angle = 2 * math.pi * t
        return _tube(torch.stack([angle.cos(), angle.sin(), pitch * t], -1), self._draw(0.08, 0.18))

    def knot(self) -> Mesh:
        p, q = ((2, 3), (3, 2))[self._integer(0, 1)]
        t = _linspace(0.0, 2 * math.pi, 129)
        ring = 1 + self._draw(0.35, 0.5) * (q * t).cos()
        curve = torch.stack([ring * (p * t).cos(), ring * (p * t).sin(), 0.5 * (q * t).sin()], -1)
        return _tube(curve, self._draw(0.08, 0.16))

    def moebius(self) -> Mesh:
        u, v = _linspace(0.0, 2 * math.pi, 97)[:, None], _linspace(-1.0, 1.0, 9)[None] * self._draw(0.2, 0.45)
        twist = (1, 3)[self._integer(0, 1)] * u / 2  # one or three half-turns
        ring = 1 + v * twist.cos()
        return _grid(torch.stack([ring * u.cos(), ring * u.sin(), v * twist.sin()], -1))

    def saddle(self) -> Mesh:
        x, y = _linspace(-1.0, 1.0, 33)[:, None].expand(-1, 33), _linspace(-1.0, 1.0, 33)[None].expand(33, -1)
        return _grid(torch.stack([x, y, self._draw(0.4, 1) * x**2 - self._draw(0.4, 1) * y**2], -1))

    def bowl(self) -> Mesh:
        radius = _linspace(0.0, 1.0, 33)
        return _revolve(radius, self._draw(0.4, 1.5) * radius**2)

    def table(self) -> Mesh:
        w, d, h, thick = self._draw(0.8, 1.6), self._draw(0.6, 1), self._draw(0.4, 0.9), self._draw(0.05, 0.12)
        return _boxes((0, 0, h + thick / 2, w, d, thick), *_legs(w, d, h, thick))

    def chair(self) -> Mesh:
        w, d, h = self._draw(0.5, 0.7), self._draw(0.5, 0.7), self._draw(0.4, 0.6)
        thick, back = self._draw(0.05, 0.1), self._draw(0.4, 0.8)
        seat, rest = (0, 0, h + thick / 2, w, d, thick), (0, (d - thick) / 2, h + thick + back / 2, w, thick, back)
        return _boxes(seat, rest, *_legs(w, d, h, thick))


FAMILIES = tuple(name for name in vars(_RandomSurfaces) if not name.startswith("_"))


def random_surface(family: str, generator: torch.Generator) -> Mesh:
    """Return the vertices (V, 3) float64 and faces (F, 3) of a random surface of a family, one of ``FAMILIES``."""
    check_choice("family", family, FAMILIES)
    return getattr(_RandomSurfaces(generator), family)()


def _random_shape(families: Sequence[str], index: int, generator: torch.Generator) -> Shape:
    label = index % len(families)
    vertices, faces = random_surface(families[label], generator)
    return Shape.of(vertices @ random_rotation(generator).T, faces, label)


@dataclass(eq=False, repr=False)
class ProceduralSurfaces(PointCloudDataModule):
    """Random surfaces of 18 families with random parameters and rotations; needs no download.

    Every item is a new surface; item i is of family i modulo the number of families, in all splits.

    Args:
        train_clouds, val_clouds, test_clouds: clouds per split; those of training are per epoch.
        families: names of families; ``None`` means all (``em_lightning.studies.FAMILIES``).

    Raises:
        ValueError: a family is unknown, or as in :class:`PointCloudDataModule`.

    Example:
        >>> data = ProceduralSurfaces(num_points=64, batch_size=4, train_clouds=8)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.points.shape, batch.mask.all().item(), batch.label.shape
        (torch.Size([4, 64, 3]), True, torch.Size([4]))
    """

    train_clouds: int = 640
    val_clouds: int = 64
    test_clouds: int = 64
    families: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.families == [] or not set(self.families or ()) <= set(FAMILIES):
            raise ValueError(f"families={self.families} must be some of {', '.join(FAMILIES)}")
        self.class_names = list(self.families or FAMILIES)
        self.source = f"procedural surfaces of {len(self.class_names)} families with random shape and pose"

    def shapes(self, split: str) -> tuple[ShapeSource, int]:
        return partial(_random_shape, self.class_names), getattr(self, f"{split}_clouds")
