"""Point clouds as items of a Dataset and as padded batches; a sampler that resamples clouds every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, DistributedSampler

from em_lightning.data.base import SPLITS, generator_of
from em_lightning.data.sampling import Normalization, Surface, random_rotation


class Cloud(NamedTuple):
    """One cloud: points to fit (N, D) and held-out points (M, D) of the same shape, float32, in normalized units."""

    points: Tensor
    held_out: Tensor
    normalization: Normalization
    label: int
    index: int  # type: ignore[assignment]


class PointCloudBatch(NamedTuple):
    """Clouds padded with zeros to the longest of them.

    Attributes:
        points: (B, N, D) float32, normalized.
        mask: (B, N) bool, true for points, false for padding.
        held_out: (B, M, D) float32, held-out points of the same shapes in the same units.
        held_out_mask: (B, M) bool.
        center: (B, D) float64, of the normalization.
        scale: (B,) float64, of the normalization.
        label: (B,) long, classes.
        index: (B,) long, indices in the dataset.
    """

    points: Tensor
    mask: Tensor
    held_out: Tensor
    held_out_mask: Tensor
    center: Tensor
    scale: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]

    @property
    def normalization(self) -> Normalization:
        """The change of units of every cloud."""
        return Normalization(self.center, self.scale)


def collate_clouds(clouds: Sequence[Cloud]) -> PointCloudBatch:
    """Return clouds as one batch, padded with zeros.

    Example:
        >>> unit = Normalization(torch.zeros(3), torch.tensor(1.0))
        >>> batch = collate_clouds([Cloud(torch.ones(n, 3), torch.ones(2, 3), unit, 0, n) for n in (2, 1)])
        >>> batch.points.shape, batch.mask.tolist(), batch.index.tolist()
        (torch.Size([2, 2, 3]), [[True, True], [True, False]], [2, 1])
    """
    return PointCloudBatch(
        *_pad([cloud.points for cloud in clouds]),
        *_pad([cloud.held_out for cloud in clouds]),
        torch.stack([cloud.normalization.center for cloud in clouds]).double(),
        torch.stack([cloud.normalization.scale for cloud in clouds]).double(),
        torch.tensor([cloud.label for cloud in clouds]),
        torch.tensor([cloud.index for cloud in clouds]),
    )


def _pad(sets: list[Tensor]) -> tuple[Tensor, Tensor]:
    sizes = torch.tensor([len(points) for points in sets])
    padded = pad_sequence(sets, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < sizes[:, None]


class Shape(NamedTuple):
    """The source of one cloud: a surface in normalized units, or a set of points in the units of the data.

    Args:
        content: a surface, or points (N, 3).
        normalization: the change of units of a surface; ``None`` for points, where only the points to fit decide it.
        label: the class.
    """

    content: Surface | Tensor
    normalization: Normalization | None
    label: int

    @classmethod
    def of(cls, points: Tensor, faces: Tensor | None, label: int = 0) -> Shape:
        """Return the shape of a mesh, or of a set of points if ``faces`` is ``None``."""
        if faces is None:
            return cls(points, None, label)
        points = points.double()
        # Vertices without a face are not part of the surface.
        used = torch.zeros(len(points), dtype=torch.bool)
        used[faces] = True
        normalization = Normalization.of(points[used])
        return cls(Surface.of(normalization.apply(points), faces), normalization, label)


ShapeSource = Callable[[int, torch.Generator], Shape]  # the index of a shape and the source of randomness


def draw_cloud(
    shape: ShapeSource,
    num_points: int,
    noise: float | tuple[float, float],
    holes: int,
    rotate: str,
    index: int,
    generator: torch.Generator,
) -> Cloud:
    """Draw a cloud from shape ``index``; the arguments are those of :class:`PointCloudDataModule`.

    A set of points is divided into two disjoint halves of at most ``num_points``.
    """
    content, normalization, label = shape(index, generator)
    if isinstance(content, Surface):
        points, num_fitted = content.sample((3 if holes else 2) * num_points, generator), num_points
        points = cut_holes(points, holes, generator)[: 2 * num_points]
    else:
        content = cut_holes(content, holes, generator)
        order = torch.randperm(len(content), generator=generator)
        num_fitted = min(num_points, (len(order) + 1) // 2)
        # float64 until the points are centered: float32 rounds coordinates far from the origin.
        points = content[order[: num_fitted + num_points]].double()
        normalization = Normalization.of(points[:num_fitted])
        points = normalization.apply(points).float()
    assert normalization is not None
    if rotate != "none":
        points = points @ random_rotation(generator, rotate).float().T
    if isinstance(noise, tuple):
        clean, level = torch.rand(2, generator=generator).tolist()
        noise = 0.0 if clean < 0.5 else noise[0] ** (1.0 - level) * noise[1] ** level
    if noise > 0:
        points = points + noise * torch.randn(points.shape, generator=generator)
    return Cloud(points[:num_fitted], points[num_fitted:], normalization, label, index)


def cut_holes(points: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Return points (N, D) without 0 to ``most`` balls about points, at least two thirds of the points.

    Each ball holds 5 % of the points or more; all numbers of balls are equally likely.
    """
    count = int(torch.randint(most + 1, (1,), generator=generator)) if most else 0
    for _ in range(count):
        center = points[torch.randint(len(points), (1,), generator=generator)]
        share = (0.05 + (1.0 / 3.0 / most - 0.05) * torch.rand(1, generator=generator)).clamp(min=0.0)
        distance = (points - center).norm(dim=-1)
        points = points[distance > distance.quantile(share.to(distance))]
    return points


class RandomDataset(Dataset[Any]):
    """Random items: an item is a function of (seed, split, epoch, index), independent of workers and ranks.

    The key of an item is its index, which means epoch 0, or (epoch, index) from :class:`EpochSampler`. ``draw`` returns
    an item, given its index and a source of randomness.
    """

    def __init__(self, draw: Callable[[int, torch.Generator], Any], size: int, split: str, seed: int = 0) -> None:
        self.draw, self.size, self.split, self.seed = draw, size, split, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < self.size:
            raise IndexError(f"index={index} must be from 0 to {self.size - 1} in the {self.split} split")
        return self.draw(index, generator_of(self.seed, SPLITS.index(self.split), epoch, index))


class EpochSampler(DistributedSampler[Any]):
    """A ``DistributedSampler`` that yields (epoch, index), so that a dataset can resample items every epoch.

    Lightning calls ``set_epoch`` at the start of each epoch; a plain loop must call it.
    """

    def __init__(self, dataset: Dataset[Any], num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)

    def __iter__(self) -> Iterator[Any]:
        # A generator reads the epoch at the first item: a resumed run creates the iterator before it sets the epoch.
        for index in super().__iter__():
            yield self.epoch, index
