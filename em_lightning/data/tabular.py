"""LightningDataModules of large tables, from the user's files or drawn from a known mixture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from torch import Tensor

from em_lightning.data.base import at_least
from em_lightning.data.loader import generator_of
from em_lightning.data.tables import Table, TableBlocks
from em_lightning.mixture import Mixture

STORAGES = ("memory", "npy", "shards")
_DRAWN = 2**16


class TabularDataModule(lightning.LightningDataModule):
    """Blocks of a large table for training, and of a held-out one for validation and test.

    Args:
        data: a tensor (N, D), the path of an ``.npy`` file, or a folder of ``.npy`` shards; files are memory-mapped
            (:class:`~em_lightning.data.Table`).
        weights: how often each row counts, (N,), in the same forms.
        held_out: further rows, for validation and test.
        block_rows: rows of a block, on each rank.
        shuffle: whether to draw the order of the training blocks in every epoch.
        seed: 0 or more, of that order.

    Raises:
        ValueError: an argument is out of range, or a file cannot be read.

    Example:
        >>> data = TabularDataModule(torch.randn(100, 3), block_rows=40)
        >>> [len(points) for points, weights in data.train_dataloader()]
        [33, 33, 34]
    """

    def __init__(
        self,
        data: Tensor | str,
        weights: Tensor | str | None = None,
        held_out: Tensor | str | None = None,
        block_rows: int = 2**16,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, block_rows=block_rows)
        at_least(0, seed=seed)
        self.data = data
        self.weights = weights
        self.held_out = held_out
        self.block_rows = block_rows
        self.shuffle = shuffle
        self.seed = seed
        self.tables: dict[str, Table] = {}
        if held_out is None and type(self).sources is TabularDataModule.sources:
            # Lightning validates unless this is the method of its own base class.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    def sources(self) -> dict[str, Any]:
        """Return what holds the rows of ``"train"``, and where given of ``"weights"`` and ``"held_out"``."""
        given = {"train": self.data, "weights": self.weights, "held_out": self.held_out}
        return {name: source for name, source in given.items() if source is not None}

    def setup(self, stage: str | None = None) -> None:
        """Open the tables, once."""
        if not self.tables:
            self.tables = {
                name: Table(source, ndim=1 + (name != "weights"), name={"train": "data"}.get(name, name))
                for name, source in self.sources().items()
            }
            train, held_out = self.tables["train"], self.tables.get("held_out")
            if held_out is not None and held_out.shape[1] != train.shape[1]:
                raise ValueError(f"held_out has {held_out.shape[1]} features and data {train.shape[1]}; give as many")

    @property
    def num_features(self) -> int:
        """Number of features D."""
        self.setup()
        return self.tables["train"].shape[1]

    def describe(self) -> str:
        """Return one line that says what data is used."""
        self.setup()
        train = self.tables["train"]
        counts = f"{len(train):,} x {train.shape[1]} from {train.source}"
        counts += ", weighted" if "weights" in self.tables else ""
        return counts + (f"; {len(self.tables['held_out']):,} held out" if "held_out" in self.tables else "")

    def blocks(self, split: str = "train", whole: bool = False) -> TableBlocks:
        """Return the blocks of ``"train"`` or ``"held_out"``: this rank's, or all of them in order."""
        self.setup()
        alone = self.trainer is None or whole
        replicas, rank = (1, 0) if alone else (self.trainer.world_size, self.trainer.global_rank)  # type: ignore[union-attr]
        shuffle = self.shuffle and split == "train" and not whole
        weights = self.tables.get("weights") if split == "train" else None
        return TableBlocks(self.tables[split], weights, self.block_rows, shuffle, replicas, rank, self.seed)

    def train_dataloader(self) -> TableBlocks:
        """Return this rank's blocks of the table."""
        return self.blocks()

    def val_dataloader(self) -> TableBlocks:
        """Return this rank's blocks of the held-out table."""
        return self.blocks("held_out")

    def test_dataloader(self) -> TableBlocks:
        """Return this rank's blocks of the held-out table, or where there is none, of the table itself."""
        self.setup()
        return self.blocks("held_out" if "held_out" in self.tables else "train")

    def predict_dataloader(self) -> TableBlocks:
        """Return the same as for a test."""
        return self.test_dataloader()


class GaussianBlobs(TabularDataModule):
    """A table drawn from a Gaussian mixture that is known: nothing to download, and a truth to compare with.

    Components have unequal weights and full covariances; they overlap. Rows are a function of the arguments, whatever
    the storage.

    Args:
        num_points: N.
        num_features: D.
        true_components: of the mixture that rows are drawn from.
        held_out_points: further rows for validation and test.
        storage: ``"memory"``; ``"npy"``, a memory-mapped file; or ``"shards"``, a folder of them of unequal lengths.
        folder: where files are written, once.
        block_rows: rows of a block, on each rank.
        shuffle: whether to draw the order of the training blocks in every epoch.
        seed: 0 or more, of the mixture, the rows and that order.

    Example:
        >>> data = GaussianBlobs(num_points=1000, num_features=2, held_out_points=100)
        >>> data.describe()
        '1,000 x 2 from a mixture of 12 Gaussians (a tensor of float32); 100 held out'
    """

    def __init__(
        self,
        num_points: int = 50_000,
        num_features: int = 8,
        true_components: int = 12,
        held_out_points: int = 10_000,
        storage: Literal["memory", "npy", "shards"] = "memory",
        folder: str = "lightning_logs/gaussian_mixture/data",
        block_rows: int = 2**16,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        at_least(1, num_features=num_features, true_components=true_components, held_out_points=held_out_points)
        at_least(3, num_points=num_points)
        if storage not in STORAGES:
            raise ValueError(f"storage={storage!r} is unknown; choose from {', '.join(STORAGES)}")
        super().__init__("", block_rows=block_rows, shuffle=shuffle, seed=seed)
        self.num_points = num_points
        self.true_components = true_components
        self.held_out_points = held_out_points
        self.storage = storage
        self._features = num_features
        name = f"blobs-{num_points}-{num_features}-{true_components}-{seed}"
        self.path = Path(folder) / (f"{name}.npy" if storage == "npy" else name)

    def truth(self) -> Mixture:
        """Return the mixture that rows are drawn from, of one set and in double precision."""
        generator = torch.Generator().manual_seed(self.seed)
        size, features = self.true_components, self._features
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
        weights = 0.5 + torch.rand(size, **options)
        means = 3.0 * torch.randn(size, features, **options)
        root = torch.randn(size, features, features, **options) / features**0.5 + 0.5 * torch.eye(features).double()
        return Mixture((weights / weights.sum()).log()[None], means[None], (root @ root.mT)[None])

    def _draw(self, stream: int, rows: int) -> Tensor:
        truth, found = self.truth(), []
        scale = torch.linalg.cholesky(truth.covariances[0])
        for number, start in enumerate(range(0, rows, _DRAWN)):
            generator = generator_of(self.seed, stream, number)
            size = min(_DRAWN, rows - start)
            label = torch.multinomial(truth.weights[0], size, replacement=True, generator=generator)
            noise = torch.randn(size, self._features, generator=generator)
            for k in range(self.true_components):
                chosen = label == k
                noise[chosen] = noise[chosen] @ scale[k].T.float() + truth.means[0, k].float()
            found.append(noise)
        return torch.cat(found)

    def prepare_data(self) -> None:
        """Write the file or the shards, unless they are there."""
        if self.storage == "memory" or self.path.exists():
            return
        rows = self._draw(1, self.num_points).numpy()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        if self.storage == "npy":
            with open(partial, "wb") as file:
                np.save(file, rows)
        else:
            partial.mkdir()
            cuts = [0, self.num_points // 2, 5 * self.num_points // 6, self.num_points]
            for number in range(3):
                np.save(partial / f"{number}.npy", rows[cuts[number] : cuts[number + 1]])
        partial.rename(self.path)

    def sources(self) -> dict[str, Any]:
        """Return the rows, or the path that holds them, and the held-out rows."""
        train: Tensor | Path = self.path
        if self.storage == "memory":
            train = self._draw(1, self.num_points)
        return {"train": train, "held_out": self._draw(2, self.held_out_points)}

    def describe(self) -> str:
        """Return one line that says what data is used."""
        described = super().describe()
        source = self.tables["train"].source
        return described.replace(f"from {source}", f"from a mixture of {self.true_components} Gaussians ({source})")
