"""Images as point sets in the plane, the data of the point cloud classifier's tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from em_lightning.checks import check_at_least, check_choice
from em_lightning.data.base import SPLITS, generator_of
from em_lightning.data.images import MNIST, Digits, TensorBatches, TensorDataModule, Tensors


class PointSetBatch(NamedTuple):
    """Point sets (B, N, D) float32, a mask (B, N) that is true for points and false for padding, and labels (B,)."""

    points: Tensor
    mask: Tensor
    label: Tensor


def bright_pixels(images: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the indices of pixels brighter than ``threshold`` and their count per image, for images (B, 1, H, W).

    Images are uint8 from 0 to 255 or floats from 0 to 1. The indices (B, M) int32 are ascending and padded with zeros;
    M is the largest of the counts (B,), at least 1.
    """
    bright = images.flatten(1) > threshold * (255 if images.dtype == torch.uint8 else 1)
    counts = bright.sum(1)
    image, pixel = bright.nonzero(as_tuple=True)
    position = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image]  # of each pixel among those of its image
    pixels = torch.zeros(len(images), max(int(counts.max()), 1), dtype=torch.int32)
    pixels[image, position] = pixel.int()
    return pixels, counts


@dataclass(eq=False, repr=False)
class ImagePointSets(TensorDataModule):
    """Images as sets of points in the plane: a fixed number of pixels brighter than ``threshold``, with jitter.

    The longer side of an image spans -1 to 1, x to the right and y upwards. Each bright pixel of an image with M of
    them is drawn floor(num_points / M) times; the remaining points are distinct random pixels. Training sets are
    resampled every epoch; validation and test sets are fixed by the seed. An image without bright pixels is empty.

    Args:
        images: ``"digits"`` (scikit-learn) or ``"mnist"``.
        root: folder of the four files of MNIST, or of another data set in MNIST's format; ``None`` downloads MNIST.
        num_points: points per set.
        threshold: brightness that a pixel must exceed, at least 0 and less than 1.
        jitter: standard deviation of the noise, which is clipped at three standard deviations.

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
    class_names = list("0123456789")

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
        check_at_least(0, jitter=self.jitter)
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold={self.threshold} must be at least 0 and less than 1")
        self.dataset: TensorDataModule = Digits() if self.images == "digits" else MNIST(self.root)
        self.source = f"sets of {self.num_points} points from {self.dataset.source}"
        self.pixels: dict[str, tuple[Tensor, Tensor]] = {}

    def prepare_data(self) -> None:
        self.dataset.prepare_data()

    def load(self, train: bool) -> Tensors:
        return self.dataset.load(train)

    def loader(self, split: str) -> TensorBatches:
        part = self.splits[split]
        if split not in self.pixels:
            self.pixels[split] = bright_pixels(part.x, self.threshold)
        return self.batches([*self.pixels[split], part.y], split == "train", partial(self._draw, split))

    def _draw(self, split: str, tensors: tuple[Tensor, Tensor, Tensor], *key: int) -> PointSetBatch:
        return self.draw(*tensors, generator_of(self.seed, SPLITS.index(split), *key))  # key: epoch, rank, batch

    def draw(self, pixels: Tensor, counts: Tensor, labels: Tensor, generator: torch.Generator) -> PointSetBatch:
        """Draw the points of images, given their bright pixels (B, M), the counts of these (B,) and labels (B,)."""
        counts = counts.unsqueeze(1)
        # A random order of the bright pixels, then the padding (key 2), which only images without bright pixels draw.
        keys = torch.rand(pixels.shape, generator=generator)
        order = keys.masked_fill_(torch.arange(pixels.shape[1]) >= counts, 2.0).argsort(dim=1)
        positions = torch.arange(self.num_points) % counts.clamp(min=1)
        drawn = pixels.gather(1, order.gather(1, positions)).long()
        _, height, width = self.dataset.shape
        row, column = drawn.div(width, rounding_mode="floor"), drawn % width
        # The origin is the middle of the image; half of its longer side is 1.
        points = torch.stack([column - (width - 1) / 2, (height - 1) / 2 - row], -1) * (2 / max(height, width))
        jitter = torch.randn(points.shape, generator=generator).clamp_(-3, 3).mul_(self.jitter)
        mask = (counts > 0).expand(-1, self.num_points)
        return PointSetBatch((points + jitter) * mask.unsqueeze(-1), mask, labels)
