"""Images as point sets: positions of bright pixels, resampled every epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from em_lightning.checks import check_at_least, check_choice
from em_lightning.data.base import SPLITS, generator_of
from em_lightning.data.images import MNIST, Digits
from em_lightning.data.tensors import TensorBatches, TensorDataModule, Tensors


class PointSetBatch(NamedTuple):
    """Point sets of equal size with their classes.

    Attributes:
        points: (B, N, D) float32.
        mask: (B, N) bool, true for points, false for padding.
        label: (B,) long.
    """

    points: Tensor
    mask: Tensor
    label: Tensor


def bright_pixels(images: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the indices of pixels brighter than ``threshold`` and their count per image, for images (B, 1, H, W).

    Images are uint8 from 0 to 255 or floats from 0 to 1. The indices (B, M) int32 are ascending and padded with zeros;
    M is the largest of the counts (B,), at least 1.

    Example:
        >>> bright_pixels(torch.tensor([[[[0.9, 0.2], [0.1, 0.8]]], [[[0.0, 0.0], [0.7, 0.0]]]]), 0.5)
        (tensor([[0, 3],
                [2, 0]], dtype=torch.int32), tensor([2, 1]))
    """
    bright = images.flatten(1) > threshold * (255 if images.dtype == torch.uint8 else 1)
    counts = bright.sum(1)
    image, pixel = bright.nonzero(as_tuple=True)
    rank = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image]
    pixels = torch.zeros(len(images), max(int(counts.max()), 1), dtype=torch.int32)
    pixels[image, rank] = pixel.int()
    return pixels, counts


class PointSetBatches(TensorBatches):
    """A loader of point sets that are drawn from the bright pixels of images.

    Each bright pixel of an image with M of them is drawn floor(num_points / M) times; the remaining points are distinct
    random pixels. Gaussian noise is added. The draw is a function of (seed, split, epoch, rank, number of the batch);
    without ``shuffle`` it is the same in all epochs. The tensors are those of :func:`bright_pixels`, and labels (N,).

    Args:
        *args: arguments of :class:`TensorBatches`.
        shape: height and width of an image.
        num_points: points per set.
        jitter: standard deviation of the noise, which is clipped at three standard deviations.
        split: ``"train"``, ``"val"`` or ``"test"``.
        **options: further arguments of :class:`TensorBatches`.
    """

    def __init__(
        self, *args: Any, shape: Sequence[int], num_points: int, jitter: float, split: str, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.shape = shape
        self.num_points = num_points
        self.jitter = jitter
        self.split = split

    def __iter__(self) -> Iterator[PointSetBatch]:
        key = self.seed, SPLITS.index(self.split), self.epoch if self.shuffle else 0, self.rank
        for batch_index, indices in enumerate(self.indices()):
            yield self.draw(indices, generator_of(*key, batch_index))

    def draw(self, indices: Tensor, generator: torch.Generator) -> PointSetBatch:
        """Return the point sets of these images."""
        pixels, counts, labels = (tensor.index_select(0, indices) for tensor in self.tensors)
        counts = counts.unsqueeze(1)
        noise = torch.rand(pixels.shape, generator=generator)
        # A random order of the bright pixels of each image; padding comes last and is never chosen.
        order = noise.masked_fill_(torch.arange(pixels.shape[1]) >= counts, 2.0).argsort(dim=1)
        positions = torch.arange(self.num_points) % counts.clamp(min=1)
        drawn = pixels.gather(1, order.gather(1, positions)).long()
        height, width = self.shape
        row, column = drawn.div(width, rounding_mode="floor"), drawn % width
        points = torch.stack([column - (width - 1) / 2, (height - 1) / 2 - row], -1) * (2 / max(height, width))
        shift = torch.randn(points.shape, generator=generator).clamp_(-3, 3).mul_(self.jitter)
        mask = (counts > 0).expand(-1, self.num_points)
        return PointSetBatch((points + shift) * mask.unsqueeze(-1), mask, labels)


@dataclass(eq=False, repr=False)
class ImagePointSets(TensorDataModule):
    """Images as sets of points in the plane: a fixed number of pixels brighter than ``threshold``, with jitter.

    The longer side of an image spans -1 to 1, x to the right and y upwards. Training sets are resampled every epoch;
    validation and test sets are fixed by the seed. An image without bright pixels becomes an empty set.

    Args:
        images: ``"digits"`` (scikit-learn) or ``"mnist"``.
        root: folder of the four files of MNIST, or of another data set in MNIST's format; ``None`` downloads MNIST.
        num_points: points per set.
        threshold: brightness that a pixel must exceed, at least 0 and less than 1.
        jitter: standard deviation of the noise, which is clipped at three standard deviations.
        eval_batch_size: sets per batch of validation and test.

    Raises:
        ValueError: an argument is out of range, or ``root`` lacks a file.

    Example:
        >>> data = ImagePointSets(num_points=32, batch_size=16)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.points.shape, batch.mask.all().item(), batch.label.shape
        (torch.Size([16, 32, 2]), True, torch.Size([16]))

    Source: Qi et al., PointNet++, 2017, section 4.1.
    """

    num_features = 2

    images: Literal["digits", "mnist"] = "digits"
    root: str | None = None
    num_points: int = 128
    threshold: float = 0.5
    jitter: float = 0.01
    eval_batch_size: int = field(default=500, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("images", self.images, ("digits", "mnist"))
        if self.images == "digits" and self.root is not None:
            raise ValueError(f"root={self.root!r} must be None for images='digits', which are part of scikit-learn")
        check_at_least(1, num_points=self.num_points)
        check_at_least(0, jitter=self.jitter)
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold={self.threshold} must be at least 0 and less than 1")
        self.dataset: TensorDataModule = Digits() if self.images == "digits" else MNIST(self.root)
        self.shape = self.dataset.shape
        self.source = f"sets of {self.num_points} points from {self.dataset.source}"
        self.pixels: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        return self.dataset.class_names

    def prepare_data(self) -> None:
        self.dataset.prepare_data()

    def load(self, train: bool) -> Tensors:
        return self.dataset.load(train)

    def setup(self, stage: str | None = None) -> None:
        super().setup()
        if not self.pixels:
            self.pixels = {split: bright_pixels(part.x, self.threshold) for split, part in self.splits.items()}

    def loader(self, split: str) -> PointSetBatches:
        """Return the batches of a split; those of ``"train"`` have a new order and new points in every epoch."""
        self.setup()
        train = split == "train"
        return PointSetBatches(
            [*self.pixels[split], self.splits[split].y],
            self.batch_size if train else self.eval_batch_size,
            train,
            *self.ranks,
            self.seed,
            shape=self.shape[1:],
            num_points=self.num_points,
            jitter=self.jitter,
            split=split,
        )
