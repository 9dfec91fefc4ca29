"""Point sets drawn from random Gaussian mixtures: the data of amortized clustering."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Dirichlet

from em_lightning.checks import check_at_least, check_positive
from em_lightning.data.base import EpochSampler, RandomDataset, ResumableLoader, SplitDataModule
from em_lightning.mixture import Mixture


class MixtureSetBatch(NamedTuple):
    """Point sets and the mixtures that they were drawn from."""

    points: Tensor  # (B, N, D) float32, zeros where masked
    mask: Tensor  # (B, N) bool, true for points, false for padding
    held_out: Tensor  # (B, M, D), further points of the same mixtures
    labels: Tensor  # (B, N) long, the component of each point
    truth: Mixture  # spherical


@dataclass(eq=False, repr=False)
class MixtureSets(SplitDataModule):
    r"""Sets of n ~ Uniform{min_points..max_points} points, each from its own random mixture.

    .. math:: \mu_k \sim U([-a, a]^D), \quad \pi \sim \text{Dirichlet}(\alpha), \quad x_i \sim
        \textstyle\sum_k \pi_k N(\mu_k, \sigma^2 I)

    Training sets are resampled every epoch; validation and test sets are fixed by the seed. A batch is a function
    of (seed, split, epoch, index).

    Args:
        num_components: K.
        num_features: D.
        min_points, max_points: range of the number of points of a set.
        extent: a.
        scale: sigma.
        concentration: alpha.
        batch_size: sets per batch.
        train_batches: batches per epoch, over all ranks.
        val_sets, test_sets: number of sets.
        train_held_out: held-out points per training set.
        held_out: held-out points per validation or test set.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> batch = next(iter(MixtureSets(batch_size=2, held_out=10).val_dataloader()))
        >>> batch.points.shape, batch.held_out.shape
        (torch.Size([2, 500, 2]), torch.Size([2, 10, 2]))

    Source: Lee et al., Set Transformer, 2019, section 2.3.1 of the supplement.
    """

    num_components: int = 4
    num_features: int = 2
    min_points: int = 100
    max_points: int = 500
    extent: float = 4.0
    scale: float = 0.3
    concentration: float = 1.0
    batch_size: int = 16
    train_batches: int = 100
    val_sets: int = 160
    test_sets: int = 1000
    train_held_out: int = 300
    held_out: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(extent=self.extent, scale=self.scale, concentration=self.concentration)
        check_at_least(self.min_points, max_points=self.max_points)

    def describe(self) -> str:
        return (
            f"random sets of {self.min_points} to {self.max_points} points, K = {self.num_components} components of "
            f"scale {self.scale:g} in [-{self.extent:g}, {self.extent:g}]^{self.num_features}"
        )

    def loader(self, split: str) -> ResumableLoader:
        train = split == "train"
        num_sets = self.train_batches * self.batch_size if train else getattr(self, f"{split}_sets")
        batch = partial(self._batch, num_sets, self.train_held_out if train else self.held_out)
        batches = RandomDataset(batch, math.ceil(num_sets / self.batch_size), split, self.seed)
        sampler = EpochSampler(batches, seed=self.seed, **self.replica) if train else None
        return ResumableLoader(batches, batch_size=None, sampler=sampler)

    def _batch(self, num_sets: int, held_out: int, index: int, generator: torch.Generator) -> MixtureSetBatch:
        """Return batch ``index`` of ``num_sets`` sets with ``held_out`` held-out points each."""
        batch_size = min(self.batch_size, num_sets - index * self.batch_size)
        sizes = torch.randint(self.min_points, self.max_points + 1, (batch_size,), generator=generator)
        shape = (batch_size, self.num_components, self.num_features)
        means = self.extent * (2.0 * torch.rand(shape, generator=generator) - 1.0)
        # torch's Dirichlet has no argument for a generator and draws from the global one.
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator.get_state())
            weights = Dirichlet(torch.full(shape[:2], self.concentration)).sample()
            generator.set_state(torch.get_rng_state())
        weights = weights.clamp(min=torch.finfo(torch.float32).tiny)  # log 0 is infinite
        points, labels = self._points(means, weights, self.max_points, generator)
        held_out_points, _ = self._points(means, weights, held_out, generator)
        mask = torch.arange(self.max_points) < sizes[:, None]
        truth = Mixture(weights.log(), means, torch.full(shape[:2], self.scale**2))
        return MixtureSetBatch(points * mask.unsqueeze(-1), mask, held_out_points, labels, truth)

    def _points(self, means: Tensor, weights: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return n points of each mixture, (B, n, D), and their components (B, n)."""
        labels = torch.multinomial(weights, n, replacement=True, generator=generator)
        noise = torch.randn(*labels.shape, self.num_features, generator=generator)
        return means.gather(1, labels.unsqueeze(-1).expand_as(noise)) + self.scale * noise, labels
