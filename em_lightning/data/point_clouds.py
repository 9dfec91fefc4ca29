"""Point clouds drawn from meshes and sets of points: batches, and the base class of their LightningDataModules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from em_lightning.checks import check_at_least, check_choice, check_positive
from em_lightning.data.base import SPLITS, EpochSampler, RandomDataset, ResumableLoader, SplitDataModule


class PointCloudBatch(NamedTuple):
    """Clouds padded with zeros to the longest of them; one cloud has the same fields without the axis B.

    Clouds are normalized to the unit ball, x' = (x - c) / s. Densities satisfy log p(x) = log p'(x') - D log s.
    """

    points: Tensor  # (B, N, D) float32, normalized
    mask: Tensor  # (B, N) bool, true for points, false for padding
    held_out: Tensor  # (B, M, D) float32, held-out points of the same shapes in the same units
    held_out_mask: Tensor  # (B, M) bool
    center: Tensor  # c, (B, D) float64
    scale: Tensor  # s, (B,) float64
    label: Tensor  # (B,) long, classes
    index: Tensor  # type: ignore[assignment]  # (B,) long, indices in the dataset


def collate_clouds(clouds: Sequence[PointCloudBatch]) -> PointCloudBatch:
    """Return clouds without a batch axis as one batch, padded with zeros."""
    columns = map(list, zip(*clouds, strict=True))
    return PointCloudBatch(*(pad_sequence(x, batch_first=True) if x[0].ndim else torch.stack(x) for x in columns))


def unit_ball(points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the center of the bounding box of points (N, D), and the largest distance from it, or 1 if that is 0.

    Unlike the mean, these do not depend on how densely parts of the shape are sampled.
    """
    center = (points.amin(0) + points.amax(0)) / 2
    scale = (points - center).norm(dim=-1).amax()
    return center, torch.where(scale > 0, scale, torch.ones_like(scale))


class Shape(NamedTuple):
    """The source of a cloud: a triangle mesh in the unit ball, or a set of points in the units of the data.

    Example:
        >>> points = Shape.of(torch.eye(3), torch.tensor([[0, 1, 2]])).sample(1000)
        >>> points.shape, torch.allclose(points.sum(1), points.sum(1).mean())
        (torch.Size([1000, 3]), True)

    Source: Osada et al., Shape distributions, 2002.
    """

    points: Tensor  # (V, 3), vertices in float64, or points
    faces: Tensor | None = None  # (F, 3) long, rows of the vertices; None for a set of points
    cumulative_areas: Tensor | None = None  # (F,) float64, the total area of the triangles up to each
    center: Tensor | None = None  # of a mesh, in the units of the data; None for a set: that of its points to fit
    scale: Tensor | None = None  # as center
    label: int = 0

    @classmethod
    def of(cls, points: Tensor, faces: Tensor | None, label: int = 0) -> Shape:
        """Return the shape of a mesh, or of a set of points if ``faces`` is ``None``.

        Raises:
            ValueError: a tensor has the wrong shape, a face refers to a missing vertex, or the area is 0 or not finite.
        """
        if faces is None:
            return cls(points, label=label)
        if points.shape[1:] != (3,) or faces.shape[1:] != (3,):
            shapes = f"{tuple(points.shape)} and {tuple(faces.shape)}"
            raise ValueError(f"vertices and faces must have shapes (V, 3) and (F, 3), got {shapes}")
        low, high = map(int, faces.aminmax()) if faces.numel() else (0, -1)
        if not 0 <= low <= high < len(points):
            raise ValueError(f"faces must hold indices 0 to {len(points) - 1} in at least one row, got {low} to {high}")
        corners = points.double().index_select(0, faces.flatten())  # vertices without a face are not on the surface
        center, scale = unit_ball(corners)
        a, b, c = ((corners - center) / scale).view(-1, 3, 3).unbind(1)
        cumulative = torch.linalg.cross(b - a, c - a).norm(dim=-1).cumsum(0) / 2
        if not 0 < cumulative[-1] < float("inf"):
            raise ValueError(f"the area of the surface must be positive and finite, got {float(cumulative[-1])}")
        return cls((points.double() - center) / scale, faces, cumulative, center, scale, label)

    def sample(self, num_points: int, generator: torch.Generator | None = None) -> Tensor:
        """Return points (num_points, 3) float32 of a mesh, uniform by area.

        In a triangle, x = a + sqrt(u) ((1 - v) (b - a) + v (c - a)) with u, v uniform in [0, 1].
        """
        assert self.faces is not None and self.cumulative_areas is not None
        uniform = torch.rand(num_points, 3, dtype=torch.float64, generator=generator)
        # right=True skips triangles of zero area; clamp handles a product rounded up to the total area.
        face = torch.searchsorted(self.cumulative_areas, uniform[:, 0] * self.cumulative_areas[-1], right=True)
        corners = self.faces.index_select(0, face.clamp_(max=len(self.faces) - 1))
        a, b, c = self.points.index_select(0, corners.flatten()).view(num_points, 3, 3).unbind(1)
        root, v = uniform[:, 1:2].sqrt(), uniform[:, 2:3]
        return (a + root * ((b - a) * (1 - v) + (c - a) * v)).float()


# A list of shapes to repeat, or a function of an index and a source of randomness.
ShapeSource = Sequence[Shape] | Callable[[int, torch.Generator], Shape]


def random_rotation(generator: torch.Generator | None = None, axis: str = "so3") -> Tensor:
    """Return a rotation matrix (3, 3) float64, uniform over all rotations (``"so3"``) or those about ``"z"``."""
    from scipy.spatial.transform import Rotation

    # A normalized Gaussian quaternion w, x, y, z is a uniform rotation (Shoemake, Uniform random rotations, 1992).
    quaternion = torch.randn(4, dtype=torch.float64, generator=generator)
    if axis == "z":
        quaternion[1:3] = 0
    return torch.from_numpy(Rotation.from_quat(quaternion.roll(-1).numpy()).as_matrix())  # SciPy puts w last


def draw_cloud(
    shapes: ShapeSource,
    num_points: int,
    noise: float | tuple[float, float],
    holes: int,
    rotate: str,
    index: int,
    generator: torch.Generator,
) -> PointCloudBatch:
    """Draw a cloud from shape ``index``, modulo the length of a list.

    Other arguments: see :class:`PointCloudDataModule`. A set of points is split into halves of at most ``num_points``.
    """
    shape = shapes(index, generator) if callable(shapes) else shapes[index % len(shapes)]
    center, scale = shape.center, shape.scale
    if shape.faces is not None:
        points = shape.sample((3 if holes else 2) * num_points, generator)  # holes take up to a third
        points, num_fitted = _cut_holes(points, holes, generator)[: 2 * num_points], num_points
    else:
        available = _cut_holes(shape.points, holes, generator)
        order = torch.randperm(len(available), generator=generator)
        num_fitted = min(num_points, (len(order) + 1) // 2)
        # float64 until the points are centered: float32 rounds coordinates far from the origin.
        points = available[order[: num_fitted + num_points]].double()
        center, scale = unit_ball(points[:num_fitted])
        points = ((points - center) / scale).float()
    assert center is not None and scale is not None
    if rotate != "none":
        points = points @ random_rotation(generator, rotate).float().T
    if isinstance(noise, tuple):
        coin, level = torch.rand(2, generator=generator).tolist()
        noise = 0.0 if coin < 0.5 else noise[0] ** (1.0 - level) * noise[1] ** level
    if noise > 0:
        points = points + noise * torch.randn(points.shape, generator=generator)
    fitted, held_out = points[:num_fitted], points[num_fitted:]
    mask, held_out_mask = (torch.ones(len(part), dtype=torch.bool) for part in (fitted, held_out))
    return PointCloudBatch(
        fitted, mask, held_out, held_out_mask, center, scale, torch.tensor(shape.label), torch.tensor(index)
    )


def _cut_holes(points: Tensor, max_holes: int, generator: torch.Generator) -> Tensor:
    """Remove 0 to ``max_holes`` balls from points (N, D), each with a random share of up to 1 / (3 ``max_holes``)."""
    num_holes = int(torch.randint(max_holes + 1, (1,), generator=generator)) if max_holes else 0
    for _ in range(num_holes):
        center = points[torch.randint(len(points), (1,), generator=generator)]
        max_share = 1.0 / 3.0 / max_holes
        min_share = min(0.05, max_share)  # holes of fewer points are hard to see
        share = min_share + (max_share - min_share) * torch.rand(1, generator=generator)
        distance = (points - center).norm(dim=-1)
        points = points[distance > distance.quantile(share.to(distance))]
    return points


@dataclass(eq=False, repr=False, kw_only=True)
class PointCloudDataModule(SplitDataModule):
    """Batches of point clouds, each with points to fit and held-out points of the same shape.

    Training clouds are resampled every epoch; validation and test clouds are fixed by the seed. An item is a
    function of (seed, split, epoch, index). Subclasses define :meth:`shapes` and ``source``.

    Args:
        num_points: points per cloud to fit; as many are held out. Sets of fewer than twice as many points are halved.
        batch_size: clouds per batch and rank.
        num_workers: number of processes that draw clouds; 0 draws them in the main process.
        noise: standard deviation of Gaussian jitter, relative to the radius of the shape. With a pair it is drawn
            for each cloud: zero with probability 1/2, else log-uniform between the two numbers. Points on a surface
            have no density in space, so without jitter the likelihood of a mixture is unbounded.
        holes: largest number of missing regions of a cloud, up to a third of its points together.
        rotate: random rotation of each training cloud: ``"none"``, ``"z"`` (about this axis) or ``"so3"`` (any).
    """

    num_features = 3

    num_points: int = 1024
    batch_size: int = 32
    num_workers: int = 0
    noise: float | tuple[float, float] = 0.0
    holes: int = 0
    rotate: Literal["none", "z", "so3"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.noise, (tuple, list)):
            low, high = self.noise = (float(self.noise[0]), float(self.noise[1]))
            check_positive(noise=low)
            check_at_least(low, noise=high)
        else:
            check_at_least(0, noise=self.noise)
        check_choice("rotate", self.rotate, ("none", "z", "so3"))
        self.class_names: list[str] = []

    @property
    def num_classes(self) -> int:
        self.setup()
        return len(self.class_names)

    def shapes(self, split: str) -> tuple[ShapeSource, int]:
        """Return the shapes of a split and its number of clouds (per epoch), and set ``class_names``."""
        raise NotImplementedError(f"{type(self).__name__} must define shapes(split)")

    def describe(self) -> str:
        counts = ", ".join(f"{len(data)} {split}" for split, data in self.datasets.items())
        changes = f", noise {self.noise}" if self.noise else ""
        changes += f", up to {self.holes} missing regions" if self.holes else ""
        return f"{self.source}: {counts} clouds of {self.num_points} points to fit and as many held out{changes}"

    @cached_property
    def datasets(self) -> dict[str, RandomDataset]:
        datasets = {}
        for split in SPLITS:
            shapes, num_clouds = self.shapes(split)
            rotate = self.rotate if split == "train" else "none"
            draw = partial(draw_cloud, shapes, self.num_points, self.noise, self.holes, rotate)
            datasets[split] = RandomDataset(draw, num_clouds, split, self.seed)
        return datasets

    def transfer_batch_to_device(self, batch: PointCloudBatch, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; center and scale become float32 on devices without float64."""
        if device.type == "mps":
            batch = batch._replace(center=batch.center.float(), scale=batch.scale.float())
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def loader(self, split: str) -> ResumableLoader:
        data = self.datasets[split]
        sampler = EpochSampler(data, seed=self.seed, **self.replica) if split == "train" else None
        options: dict[str, Any] = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return ResumableLoader(data, batch_size=self.batch_size, sampler=sampler, collate_fn=collate_clouds, **options)
