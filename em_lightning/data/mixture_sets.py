"""Sets of points that are drawn from mixtures drawn at random: the data of amortized clustering."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from em_lightning.data.base import at_least
from em_lightning.data.clouds import EpochSampler, item_generator
from em_lightning.mixture import Mixture


class MixtureSetBatch(NamedTuple):
    """Sets of points beside the mixtures that they were drawn from.

    Args:
        points: (B, N, D) float32, zeros where there is none.
        mask: (B, N) bool, true where there is a point.
        held_out: (B, M, D), fresh points of the same mixtures.
        labels: (B, N) long, the components that the points came from.
        truth: the mixtures, spherical.
    """

    points: Tensor
    mask: Tensor
    held_out: Tensor
    labels: Tensor
    truth: Mixture


class MixtureSets(lightning.LightningDataModule):
    r"""Sets of n ~ Uniform{min_points..max_points} points of mixtures that are drawn afresh for each set.

    .. math:: \mu_k \sim U([-a, a]^D), \quad \pi \sim \text{Dirichlet}(\alpha), \quad x_n \sim
        \textstyle\sum_k \pi_k N(\mu_k, \sigma^2 I)

    Training sets are new in every epoch, those of validation and test are fixed by the seed; a batch depends on (seed,
    split, epoch, index) alone.

    Args:
        num_components: K.
        num_features: D.
        min_points: the fewest points of a set.
        max_points: the most.
        extent: a.
        scale: sigma.
        concentration: alpha.
        batch_size: sets per batch.
        train_batches: batches of an epoch, over all ranks.
        val_sets: sets for validation.
        test_sets: sets for the final table.
        train_held_out: fresh points of each training set.
        held_out: fresh points of each validation and test set.
        seed: 0 or more.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> batch = next(iter(MixtureSets(batch_size=2, held_out=10).val_dataloader()))
        >>> batch.points.shape, batch.held_out.shape
        (torch.Size([2, 500, 2]), torch.Size([2, 10, 2]))

    Source: Lee et al., Set Transformer, 2019, section 2.3.1 of the supplement.
    """

    def __init__(
        self,
        num_components: int = 4,
        num_features: int = 2,
        min_points: int = 100,
        max_points: int = 500,
        extent: float = 4.0,
        scale: float = 0.3,
        concentration: float = 1.0,
        batch_size: int = 16,
        train_batches: int = 100,
        val_sets: int = 160,
        test_sets: int = 1000,
        train_held_out: int = 300,
        held_out: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, num_components=num_components, num_features=num_features, min_points=min_points)
        at_least(1, batch_size=batch_size, train_batches=train_batches, val_sets=val_sets, test_sets=test_sets)
        at_least(1, train_held_out=train_held_out, held_out=held_out)
        at_least(0, seed=seed)
        at_least(min_points, max_points=max_points)
        for name, value in {"extent": extent, "scale": scale, "concentration": concentration}.items():
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        self.num_components = num_components
        self.num_features = num_features
        self.min_points = min_points
        self.max_points = max_points
        self.extent = extent
        self.scale = scale
        self.concentration = concentration
        self.batch_size = batch_size
        self.num_sets = {"train": train_batches * batch_size, "val": val_sets, "test": test_sets}
        self.fresh = {"train": train_held_out, "val": held_out, "test": held_out}
        self.seed = seed

    def describe(self) -> str:
        """Return one line that says what is drawn."""
        return (
            f"drawn sets of {self.min_points} to {self.max_points} points, K = {self.num_components} components of "
            f"scale {self.scale:g} in [-{self.extent:g}, {self.extent:g}]^{self.num_features}"
        )

    def draw(self, num_sets: int, held_out: int, generator: torch.Generator) -> MixtureSetBatch:
        """Draw sets, each with so many fresh points."""
        sizes = torch.randint(self.min_points, self.max_points + 1, (num_sets,), generator=generator)
        shape = (num_sets, self.num_components, self.num_features)
        means = self.extent * (2.0 * torch.rand(shape, generator=generator) - 1.0)
        # Torch's public Dirichlet takes no generator.
        counts = torch.full(shape[:2], self.concentration)
        weights = torch._sample_dirichlet(counts, generator=generator).clamp(min=torch.finfo(torch.float32).tiny)
        points, labels = self._points(means, weights, self.max_points, generator)
        fresh, _ = self._points(means, weights, held_out, generator)
        mask = torch.arange(self.max_points) < sizes[:, None]
        truth = Mixture(weights.log(), means, torch.full(shape[:2], self.scale**2))
        return MixtureSetBatch(points * mask.unsqueeze(-1), mask, fresh, labels, truth)

    def _points(self, means: Tensor, weights: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.multinomial(weights, n, replacement=True, generator=generator)
        noise = torch.randn(*labels.shape, self.num_features, generator=generator)
        return means.gather(1, labels.unsqueeze(-1).expand_as(noise)) + self.scale * noise, labels

    def _loader(self, split: str) -> DataLoader[MixtureSetBatch]:
        batches = _Batches(self, split)
        sampler = None
        if split == "train":
            replicas, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
            sampler = EpochSampler(batches, replicas, rank, self.seed)
        return DataLoader(batches, batch_size=None, sampler=sampler)

    def train_dataloader(self) -> DataLoader[MixtureSetBatch]:
        """Return batches that are drawn afresh in every epoch, this rank's share of them."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[MixtureSetBatch]:
        """Return the fixed validation sets."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[MixtureSetBatch]:
        """Return the fixed test sets."""
        return self._loader("test")


class _Batches(Dataset[MixtureSetBatch]):
    """Batches as items, by index, or by (epoch, index) where they change from epoch to epoch."""

    def __init__(self, source: MixtureSets, split: str) -> None:
        self.source = source
        self.split = split

    def __len__(self) -> int:
        return -(-self.source.num_sets[self.split] // self.source.batch_size)

    def __getitem__(self, key: Any) -> MixtureSetBatch:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = self.source
        start = index * source.batch_size
        num_sets = min(source.batch_size, source.num_sets[self.split] - start)
        generator = item_generator(source.seed, self.split, epoch, index)
        return source.draw(num_sets, source.fresh[self.split], generator)
