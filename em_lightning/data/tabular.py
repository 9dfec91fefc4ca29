"""LightningDataModules of large tables, from the user's files or drawn from a known Gaussian mixture."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import lightning
import numpy as np
import torch
from torch import Tensor

from em_lightning.checks import check_at_least, check_choice
from em_lightning.data.base import SplitDataModule, generator_of
from em_lightning.data.tables import Table, TableBlocks
from em_lightning.mixture import Mixture

_DRAWN_ROWS = 2**16  # rows per random generator


@dataclass(eq=False, repr=False)
class TabularDataModule(SplitDataModule):
    """Blocks of a large table for training and of a held-out table for validation and test.

    Args:
        data: a tensor (N, D), the path of an ``.npy`` file, or a folder of ``.npy`` shards; files are memory-mapped
            (:class:`~em_lightning.data.Table`).
        weights: weights of the rows, (N,), in the same forms.
        held_out: a table for validation and test; without it there is no validation, and the test uses ``data``.
        block_rows: rows per block and rank.
        shuffle: whether to draw a new order of the training blocks in every epoch.
        seed: at least 0; seed of the order of blocks.

    Raises:
        ValueError: an argument is out of range, or a file cannot be read.

    Example:
        >>> data = TabularDataModule(torch.randn(100, 3), block_rows=40)
        >>> [len(points) for points, weights in data.train_dataloader()]
        [33, 33, 34]
    """

    data: Tensor | str
    weights: Tensor | str | None = None
    held_out: Tensor | str | None = None
    _: KW_ONLY
    block_rows: int = 2**16
    shuffle: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        check_at_least(1, block_rows=self.block_rows)
        check_at_least(0, seed=self.seed)
        self.tables: dict[str, Table] = {}
        if self.held_out is None:
            # Lightning skips validation if this is the method of its own class, and warns of an empty list.
            self.val_dataloader = MethodType(lightning.LightningDataModule.val_dataloader, self)  # type: ignore[method-assign]

    def setup(self, stage: str | None = None) -> None:
        if self.tables:
            return
        tables = {"train": Table(self.data)}
        if self.weights is not None:
            tables["weights"] = Table(self.weights, ndim=1, name="weights")
        if self.held_out is not None:
            tables["held_out"] = Table(self.held_out, name="held_out")
            widths = tables["held_out"].shape[1], tables["train"].shape[1]
            if widths[0] != widths[1]:
                raise ValueError(f"held_out and data must have equal widths, got {widths[0]}, {widths[1]}")
        self.tables = tables

    @property
    def num_features(self) -> int:
        """Number of features D."""
        self.setup()
        return self.tables["train"].shape[1]

    def describe(self) -> str:
        self.setup()
        train = self.tables["train"]
        counts = f"{len(train):,} x {train.shape[1]} from {train.source}"
        counts += ", weighted" if "weights" in self.tables else ""
        return counts + (f"; {len(self.tables['held_out']):,} held out" if "held_out" in self.tables else "")

    def blocks(self, split: str = "train", whole: bool = False) -> TableBlocks:
        """Return the blocks of ``"train"`` or ``"held_out"``: those of this rank, or all of them in order."""
        self.setup()
        train = split == "train"
        ranks = (1, 0) if whole else self.ranks
        weights = self.tables.get("weights") if train else None
        shuffle = self.shuffle and train and not whole
        return TableBlocks(self.tables[split], weights, self.block_rows, shuffle, *ranks, self.seed)

    def loader(self, split: str) -> TableBlocks:
        self.setup()
        return self.blocks("held_out" if split != "train" and "held_out" in self.tables else "train")


@dataclass(eq=False, repr=False)
class GaussianBlobs(TabularDataModule):
    """A table drawn from a known Gaussian mixture; needs no download.

    The components have unequal weights and full covariances, and overlap. The rows are a function of the arguments,
    independent of the storage.

    Args:
        num_points: N.
        num_features: D.
        true_components: number of components of the mixture.
        held_out_points: rows for validation and test.
        storage: ``"memory"``, or ``"shards"``, a folder of memory-mapped files, which are written once.
        folder: folder of the shards.
        seed: at least 0; seed of the mixture, the rows and the order of blocks.

    Example:
        >>> data = GaussianBlobs(num_points=1000, num_features=2, held_out_points=100)
        >>> data.describe()
        '1,000 x 2 from a mixture of 12 Gaussians (a tensor of float32); 100 held out'
    """

    data: Tensor | str = field(init=False, default="")
    weights: None = field(init=False, default=None)
    held_out: Tensor | str | None = field(init=False, default="")
    num_points: int = 50_000
    num_features: int = 8
    true_components: int = 12
    held_out_points: int = 10_000
    storage: Literal["memory", "shards"] = "memory"
    folder: str = "lightning_logs/gaussian_mixture/data"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, num_features=self.num_features, true_components=self.true_components)
        check_at_least(1, held_out_points=self.held_out_points)
        check_at_least(3, num_points=self.num_points)
        check_choice("storage", self.storage, ("memory", "shards"))
        name = f"blobs-{self.num_points}-{self.num_features}-{self.true_components}-{self.seed}"
        self.path = Path(self.folder) / name

    def truth(self) -> Mixture:
        """Return the mixture that rows are drawn from, one set in float64."""
        generator = torch.Generator().manual_seed(self.seed)
        size, features = self.true_components, self.num_features
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
        weights = 0.5 + torch.rand(size, **options)
        means = 3.0 * torch.randn(size, features, **options)
        root = torch.randn(size, features, features, **options) / features**0.5 + 0.5 * torch.eye(features).double()
        return Mixture((weights / weights.sum()).log()[None], means[None], (root @ root.mT)[None])

    def _draw(self, stream: int, rows: int) -> Tensor:
        truth, blocks = self.truth(), []
        weights = truth.log_weights[0].exp()
        factors = torch.linalg.cholesky(truth.covariances[0])
        for start in range(0, rows, _DRAWN_ROWS):
            generator = generator_of(self.seed, stream, start // _DRAWN_ROWS)
            size = min(_DRAWN_ROWS, rows - start)
            label = torch.multinomial(weights, size, replacement=True, generator=generator)
            noise = torch.randn(size, self.num_features, generator=generator)
            for k in range(self.true_components):
                drawn = label == k
                noise[drawn] = noise[drawn] @ factors[k].T.float() + truth.means[0, k].float()
            blocks.append(noise)
        return torch.cat(blocks)

    def prepare_data(self) -> None:
        """Write the shards, unless they exist."""
        if self.storage == "memory" or self.path.exists():
            return
        rows = self._draw(1, self.num_points).numpy()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The complete folder is renamed, so that an interrupted run leaves no partial one.
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        partial.mkdir()
        for number, shard in enumerate(np.split(rows, [self.num_points // 2, 5 * self.num_points // 6])):
            np.save(partial / f"{number}.npy", shard)
        partial.rename(self.path)

    def setup(self, stage: str | None = None) -> None:
        """Draw the rows, or open the files that hold them, once."""
        if not self.tables:
            self.data = self._draw(1, self.num_points) if self.storage == "memory" else str(self.path)
            self.held_out = self._draw(2, self.held_out_points)
            super().setup()
            train = self.tables["train"]
            train.source = f"a mixture of {self.true_components} Gaussians ({train.source})"
