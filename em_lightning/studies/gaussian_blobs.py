"""A table drawn from a known Gaussian mixture, the default data of the recipe gaussian_mixture."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from em_lightning.data import Table, TabularDataModule
from em_lightning.data.base import generator_of
from em_lightning.mixture import Mixture


@dataclass(eq=False, repr=False)
class GaussianBlobs(TabularDataModule):
    """A table drawn from a known Gaussian mixture; needs no download.

    Weights are unequal, covariances full; with few features components overlap. Equal arguments give equal rows.

    Args:
        num_points, num_features, seed: N, D and the seed of all rows.
        true_components: number of components of the mixture.
        held_out_points: rows for validation and test.
        folder: where to write the rows once, as memory-mapped shards; ``None`` keeps them in memory.

    Example:
        >>> data = GaussianBlobs(num_points=1000, num_features=2, held_out_points=100)
        >>> data.describe()
        '1,000 x 2 from a mixture of 12 Gaussians (a tensor of float32); 100 held out'
    """

    # ``tables`` sets data and held_out. Until then held_out is "", as None would mean that no rows are held out.
    data: Tensor | str = field(init=False, default="")
    weights: None = field(init=False, default=None)
    held_out: Tensor | str | None = field(init=False, default="")
    num_points: int = 50_000
    num_features: int = 8
    true_components: int = 12
    held_out_points: int = 10_000
    folder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name = f"blobs-{self.num_points}-{self.num_features}-{self.true_components}-{self.seed}"
        self.path = None if self.folder is None else Path(self.folder) / name

    def truth(self) -> Mixture:
        """Return the mixture from which the rows are drawn, one set in float64."""
        generator = torch.Generator().manual_seed(self.seed)
        size, dim = self.true_components, self.num_features  # K and D
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
        # Weights differ by a factor of at most 3; per feature, deviations are near 1 and means about 3 from 0.
        weights = 0.5 + torch.rand(size, **options)
        means = 3.0 * torch.randn(size, dim, **options)
        root = torch.randn(size, dim, dim, **options) / dim**0.5 + 0.5 * torch.eye(dim).double()
        return Mixture((weights / weights.sum()).log()[None], means[None], (root @ root.mT)[None])

    def _draw(self, rows: int, *, stream: int) -> Tensor:
        """Return rows of the mixture; a stream is a sequence of random numbers: 1 for the data, 2 for held-out rows."""
        truth, generator = self.truth(), generator_of(self.seed, stream)
        factors = torch.linalg.cholesky(truth.covariances[0])
        label = torch.multinomial(truth.weights[0], rows, replacement=True, generator=generator)
        x = torch.randn(rows, self.num_features, generator=generator)
        for k in range(self.true_components):
            drawn = label == k
            x[drawn] = x[drawn] @ factors[k].T.float() + truth.means[0, k].float()
        return x

    def prepare_data(self) -> None:
        if self.path is None or self.path.exists():
            return
        rows = self._draw(self.num_points, stream=1).numpy()
        # The complete folder is renamed, so that an interrupted run leaves no partial one.
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True)
        cuts = [self.num_points // 2, 5 * self.num_points // 6]  # unequal shards, which tables of users also have
        for number, shard in enumerate(np.split(rows, cuts)):
            np.save(partial / f"{number}.npy", shard)
        partial.rename(self.path)

    @cached_property
    def tables(self) -> dict[str, Table]:
        self.data = self._draw(self.num_points, stream=1) if self.path is None else str(self.path)
        self.held_out = self._draw(self.held_out_points, stream=2)
        tables = super().tables
        tables["train"].source = f"a mixture of {self.true_components} Gaussians ({tables['train'].source})"
        return tables
