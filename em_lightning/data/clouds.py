"""Point clouds as items of a dataset, and as padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, DistributedSampler

from em_lightning.data.loader import generator_of
from em_lightning.data.sampling import Normalization, Surface, random_rotation

SPLITS = ("train", "val", "test")


class Cloud(NamedTuple):
    """One cloud: points to fit and fresh points of the same shape, both normalized in the same way.

    Args:
        points: (N, D) float32.
        held_out: (M, D) float32; drawn from the same shape, and no point of it is in ``points``.
        normalization: the change of units that both went through.
        label: the class.
        index: the item of the dataset.
    """

    points: Tensor
    held_out: Tensor
    normalization: Normalization
    label: int
    index: int  # type: ignore[assignment]


class PointCloudBatch(NamedTuple):
    """Clouds padded with zeros to the longest of them; a mask is true where there is a point.

    Args:
        points: (B, N, D) float32, normalized.
        mask: (B, N) bool.
        held_out: (B, M, D) float32, fresh points of the same shapes in the same units.
        held_out_mask: (B, M) bool.
        center: (B, D), and
        scale: (B,), the normalization of each cloud.
        label: (B,) long.
        index: (B,) long, the items of the dataset.
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
        """Return the change of units of every cloud."""
        return Normalization(self.center, self.scale)


def collate_clouds(clouds: Sequence[Cloud]) -> PointCloudBatch:
    """Return clouds as one batch, padded with zeros.

    Args:
        clouds: at least one.

    Example:
        >>> unit = Normalization(torch.zeros(3), torch.tensor(1.0))
        >>> batch = collate_clouds([Cloud(torch.ones(n, 3), torch.ones(2, 3), unit, 0, n) for n in (2, 1)])
        >>> batch.points.shape, batch.mask.tolist(), batch.index.tolist()
        (torch.Size([2, 2, 3]), [[True, True], [True, False]], [2, 1])
    """
    points, mask = _pad([cloud.points for cloud in clouds])
    held_out, held_out_mask = _pad([cloud.held_out for cloud in clouds])
    return PointCloudBatch(
        points,
        mask,
        held_out,
        held_out_mask,
        torch.stack([cloud.normalization.center for cloud in clouds]).float(),
        torch.stack([cloud.normalization.scale for cloud in clouds]).float(),
        torch.tensor([cloud.label for cloud in clouds]),
        torch.tensor([cloud.index for cloud in clouds]),
    )


def _pad(sets: list[Tensor]) -> tuple[Tensor, Tensor]:
    sizes = torch.tensor([len(points) for points in sets])
    padded = pad_sequence(sets, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < sizes[:, None]


def from_pyg(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the points of a PyG batch as padded sets and their mask.

    Unlike ``torch_geometric.utils.to_dense_batch``, which scrambles the sets in silence when the batch index is not
    sorted, any order of the index is right. The order inside a set is kept, and an empty graph is a row without points.

    Args:
        batch: a ``Data`` or ``Batch`` with positions ``pos`` (or features ``x``) and, for several graphs, ``batch``.

    Returns:
        Points (B, N, D) and the mask (B, N).

    Raises:
        ValueError: there are neither positions nor features.

    Example:
        >>> from types import SimpleNamespace
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> points, mask = from_pyg(SimpleNamespace(pos=x, batch=torch.tensor([1, 0, 1]), num_graphs=2))
        >>> points.squeeze(-1).tolist(), mask.tolist()
        ([[2.0, 0.0], [1.0, 3.0]], [[True, False], [True, True]])
    """
    points = getattr(batch, "pos", None)
    points = getattr(batch, "x", None) if points is None else points
    if points is None:
        raise ValueError("batch has neither positions 'pos' nor features 'x'; give one of them")
    index = getattr(batch, "batch", None)
    index = torch.zeros(len(points), dtype=torch.long, device=points.device) if index is None else index
    sizes = torch.bincount(index, minlength=getattr(batch, "num_graphs", None) or 1)
    order = index.argsort(stable=True)
    index = index[order]
    rank = torch.arange(len(index), device=index.device) - (sizes.cumsum(0) - sizes)[index]
    padded = points.new_zeros(len(sizes), int(sizes.max()), *points.shape[1:])
    padded[index, rank] = points[order]
    return padded, torch.arange(padded.shape[1], device=index.device) < sizes[:, None]


class Shape(NamedTuple):
    """What clouds are drawn from, in normalized units: a surface, or a set of points without faces.

    Args:
        content: a surface, or points (N, 3).
        normalization: the change of units; for a set of points ``None``, since only the points to fit may decide it.
        label: the class.
    """

    content: Surface | Tensor
    normalization: Normalization | None
    label: int

    @classmethod
    def of(cls, points: Tensor, faces: Tensor | None, label: int = 0) -> Shape:
        """Return the shape of a mesh, or of a set of points where there are no faces."""
        if faces is None:
            return cls(points.float(), None, label)
        # A vertex that no face touches is no part of the surface.
        points = points.double()
        used = torch.zeros(len(points), dtype=torch.bool)
        used[faces] = True
        normalization = Normalization.of(points if used.all() else points[used])
        return cls(Surface.of(normalization.apply(points), faces), normalization, label)


class Shapes(Protocol):
    """A source of shapes: as many as ``len`` says, each by its number; the generator is for shapes drawn at random."""

    def __len__(self) -> int: ...

    def __call__(self, index: int, generator: torch.Generator) -> Shape:
        """Return shape number ``index``."""
        ...


class KnownShapes:
    """Shapes at hand, each drawn from several times.

    Args:
        known: the shapes.
        repeats: clouds of each.
    """

    def __init__(self, known: Sequence[Shape], repeats: int = 1) -> None:
        self.known, self.repeats = list(known), repeats

    def __len__(self) -> int:
        return len(self.known) * self.repeats

    def __call__(self, index: int, generator: torch.Generator) -> Shape:
        """Return shape ``index``, which goes round."""
        return self.known[index % len(self.known)]


def item_generator(seed: int, split: str, epoch: int, index: int) -> torch.Generator:
    """Return the randomness of one item, a function of these numbers and of nothing else.

    No state is shared, so neither the number of workers nor of ranks, nor a resumed run, changes any cloud.
    """
    return generator_of(seed, SPLITS.index(split), epoch, index)


class CloudDataset(Dataset[Cloud]):
    """Clouds drawn from shapes: item ``index`` of an epoch is the same wherever and whenever it is asked for.

    An item is asked for by its index (epoch 0: what validation and test use), or by (epoch, index), which
    :class:`EpochSampler` does; then every epoch has fresh clouds.

    Args:
        shapes: the source.
        split: ``"train"``, ``"val"`` or ``"test"``; each has its own randomness.
        num_points: points to fit, and as many held out. A set of points is split in two disjoint halves, of
            ``num_points`` at most.
        seed: a number of 0 or more.
        noise: standard deviation of the Gaussian jitter, in normalized units.
        rotate: ``"none"``, ``"z"`` or ``"so3"``: a random rotation of each cloud about its center.
    """

    def __init__(
        self, shapes: Shapes, split: str, num_points: int, seed: int = 0, noise: float = 0.0, rotate: str = "none"
    ) -> None:
        self.shapes = shapes
        self.split = split
        self.num_points = num_points
        self.seed = seed
        self.noise = noise
        self.rotate = rotate

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, key: int | tuple[int, int]) -> Cloud:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index={index} is outside the {len(self)} clouds of the {self.split} split")
        generator = item_generator(self.seed, self.split, epoch, index)
        shape = self.shapes(index, generator)
        if isinstance(shape.content, Surface):
            both = shape.content.sample(2 * self.num_points, generator)
            fit, normalization = self.num_points, shape.normalization
        else:
            order = torch.randperm(len(shape.content), generator=generator)
            fit = min(self.num_points, (len(order) + 1) // 2)
            both = shape.content[order[: fit + self.num_points]].double()
            normalization = Normalization.of(both[:fit])
            both = normalization.apply(both).float()
        assert normalization is not None
        if self.rotate != "none":
            both = both @ random_rotation(generator, self.rotate).float().T
        if self.noise > 0:
            both = both + self.noise * torch.randn(both.shape, generator=generator)
        return Cloud(both[:fit], both[fit:], normalization, shape.label, index)


class EpochSampler(DistributedSampler[Any]):
    """Shuffles as ``DistributedSampler`` and yields (epoch, index), so that a dataset can draw afresh every epoch.

    The epoch travels with the index: workers that live on, ranks and resumed runs need no further word. Lightning calls
    ``set_epoch`` at the start of each epoch; a plain loop does so itself.

    Args:
        dataset: what is sampled.
        num_replicas: the number of ranks.
        rank: this one.
        seed: of the shuffling.
    """

    def __init__(self, dataset: Dataset[Any], num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)

    def __iter__(self) -> Iterator[Any]:
        # Not before the first item is asked for: a resumed run makes its iterator before it tells the epoch.
        for index in super().__iter__():
            yield self.epoch, index
