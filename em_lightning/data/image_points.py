"""Images as sets of points: the places of their bright pixels, drawn afresh in every epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import lightning
import torch
from torch import Tensor

from em_lightning.data.base import at_least
from em_lightning.data.clouds import SPLITS
from em_lightning.data.images import MNIST, Digits
from em_lightning.data.loader import generator_of
from em_lightning.data.tensors import TensorBatches, TensorDataModule

IMAGES = ("digits", "mnist")


class PointSetBatch(NamedTuple):
    """Point sets of equal size with their classes.

    Args:
        points: (B, N, D) float32.
        mask: (B, N) bool, true where there is a point.
        label: (B,) long.
    """

    points: Tensor
    mask: Tensor
    label: Tensor


def bright_pixels(images: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the places of bright pixels, as wide as the fullest image needs (at least 1), and how many each has.

    Args:
        images: (B, 1, H, W), uint8 from 0 to 255 or floats from 0 to 1.
        threshold: what a bright pixel exceeds, from 0 to 1.

    Returns:
        Indices into the H W pixels (B, M) int32, in order and padded with zeros, and counts (B,).

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
    """Batches of point sets that are drawn from the bright pixels of images.

    Every pixel of an image is drawn equally often, but for a remainder that is drawn without replacement, and moved by
    Gaussian noise. The draw is a function of (seed, split, epoch, rank, number of the batch); without ``shuffle`` it is
    the same in all epochs.

    Args:
        pixels: (N, M), indices into an image.
        counts: (N,), how many of a row are meant.
        labels: (N,).
        shape: height and width of an image.
        num_points: of a set.
        jitter: standard deviation of the noise, which is clipped at three of them.
        split: whose draw it is.
        **options: the further arguments of :class:`TensorBatches`.
    """

    def __init__(
        self,
        pixels: Tensor,
        counts: Tensor,
        labels: Tensor,
        *,
        shape: Sequence[int],
        num_points: int,
        jitter: float,
        split: str,
        **options: Any,
    ) -> None:
        super().__init__([pixels, counts, labels], **options)
        self.shape = shape
        self.num_points = num_points
        self.jitter = jitter
        self.split = split

    def __iter__(self) -> Iterator[PointSetBatch]:
        key = self.seed, SPLITS.index(self.split), self.epoch if self.shuffle else 0, self.rank
        for number, index in enumerate(self.indices()):
            yield self.draw(index, generator_of(*key, number))

    def draw(self, index: Tensor, generator: torch.Generator) -> PointSetBatch:
        """Return the point sets of these images."""
        pixels, counts, labels = (tensor.index_select(0, index) for tensor in self.tensors)
        counts = counts.unsqueeze(1)
        noise = torch.rand(pixels.shape, generator=generator)
        # The pixels of an image in random order; behind them the padding, which no rank below the count reaches.
        order = noise.masked_fill_(torch.arange(pixels.shape[1]) >= counts, 2.0).argsort(dim=1)
        ranks = torch.arange(self.num_points) % counts.clamp(min=1)
        chosen = pixels.gather(1, order.gather(1, ranks)).long()
        height, width = self.shape
        row, column = chosen.div(width, rounding_mode="floor"), chosen % width
        points = torch.stack([column - (width - 1) / 2, (height - 1) / 2 - row], -1) * (2 / max(height, width))
        moved = torch.randn(points.shape, generator=generator).clamp_(-3, 3).mul_(self.jitter)
        mask = (counts > 0).expand(-1, self.num_points)
        return PointSetBatch((points + moved) * mask.unsqueeze(-1), mask, labels)


class ImagePointSets(lightning.LightningDataModule):
    """Images as sets of points in the plane: pixels brighter than ``threshold``, a fixed number with jitter.

    The longer side of an image reaches from -1 to 1, x to the right and y upwards. Training sets are drawn afresh in
    every epoch; those of validation and test are fixed by the seed. An image without a bright pixel is an empty set.

    Args:
        images: ``"digits"``, those of scikit-learn, or ``"mnist"``.
        root: folder of MNIST's four files, or of others in its format; ``None`` downloads MNIST.
        num_points: points of a set.
        threshold: what a pixel must exceed, where the brightest possible is 1.
        jitter: standard deviation of the noise, which is clipped at three of them.
        batch_size: sets a training batch (on each rank).
        eval_batch_size: sets a batch of validation and test.
        val_size: training images set aside for validation; with 0 validation is on the test images.
        seed: 0 or more, of order and points.
        split_seed: of the choice of validation images.

    Raises:
        ValueError: an argument is outside its range, or ``root`` lacks a file.

    Example:
        >>> data = ImagePointSets(num_points=32, batch_size=16)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.points.shape, batch.mask.all().item(), batch.label.shape
        (torch.Size([16, 32, 2]), True, torch.Size([16]))

    Source: the set-up of Qi et al., PointNet++, 2017, section 4.1.
    """

    num_features = 2

    def __init__(
        self,
        images: Literal["digits", "mnist"] = "digits",
        root: str | None = None,
        num_points: int = 128,
        threshold: float = 0.5,
        jitter: float = 0.01,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        val_size: int = 0,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        if images not in IMAGES:
            raise ValueError(f"images={images!r} is unknown; choose 'digits' or 'mnist'")
        if images == "digits" and root is not None:
            raise ValueError(f"root={root!r} is for images='mnist'; the digits come with scikit-learn")
        at_least(1, num_points=num_points)
        at_least(0, jitter=jitter)
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold={threshold} must be at least 0 and less than 1; 0.5 is usual")
        options = {
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "val_size": val_size,
            "seed": seed,
            "split_seed": split_seed,
        }
        self.images: TensorDataModule = Digits(**options) if images == "digits" else MNIST(root, **options)
        self.num_points = num_points
        self.threshold = threshold
        self.jitter = jitter
        self.seed = seed
        self.pixels: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.images.num_classes

    def prepare_data(self) -> None:
        """Download MNIST where no ``root`` was given."""
        self.images.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Load all images and find their bright pixels, once."""
        if not self.pixels:
            self.images.setup()
            self.pixels = {split: bright_pixels(part.x, self.threshold) for split, part in self.images.splits.items()}

    def describe(self) -> str:
        """Return one line that says what data is used."""
        return f"{self.images.describe()} images, each as {self.num_points} points"

    def _batches(self, split: str) -> PointSetBatches:
        self.setup()
        train = split == "train"
        replicas, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        return PointSetBatches(
            *self.pixels[split],
            self.images.splits[split].y,
            shape=self.images.shape[1:],
            num_points=self.num_points,
            jitter=self.jitter,
            split=split,
            batch_size=self.images.batch_size if train else self.images.eval_batch_size,
            shuffle=train,
            num_replicas=replicas,
            rank=rank,
            seed=self.seed,
        )

    def train_dataloader(self) -> PointSetBatches:
        """Return training batches, in another order and of other points in every epoch."""
        return self._batches("train")

    def val_dataloader(self) -> PointSetBatches:
        """Return the validation batches."""
        return self._batches("val")

    def test_dataloader(self) -> PointSetBatches:
        """Return the test batches."""
        return self._batches("test")

    def predict_dataloader(self) -> PointSetBatches:
        """Return the test batches."""
        return self._batches("test")
