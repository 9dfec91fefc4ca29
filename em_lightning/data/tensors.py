"""In-memory data sets: TensorBatches, a loader, and TensorDataModule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from em_lightning.checks import check_at_least
from em_lightning.data.base import RankLoader, SplitDataModule

_SPLIT_SEED = 0  # the same validation items for every seed


class TensorBatches(RankLoader):
    """A loader that indexes whole batches, without collation of single items.

    The order of an epoch is a function of (seed, epoch). Lightning calls ``set_epoch``; in a plain loop, call it to get
    a new order. Each global batch is split among the ranks, so all ranks have the same number of batches.

    Args:
        tensors: tensors of equal length N along their first axis. uint8 is converted to float32 in [0, 1].
        batch_size: items per batch and rank; the last batch may have fewer.
        shuffle: whether to draw a new order in every epoch.
        num_replicas, rank, seed: number of ranks, rank of this process, and seed of the order.

    Raises:
        ValueError: the lengths differ, or there are fewer items than ranks.

    Example:
        >>> batches = TensorBatches([torch.arange(5), torch.arange(5) > 2], batch_size=2, shuffle=False)
        >>> list(batches)[-1]
        (tensor([4]), tensor([True]))
    """

    def __init__(
        self,
        tensors: list[Tensor],
        batch_size: int,
        shuffle: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        lengths = {len(tensor) for tensor in tensors}
        if len(lengths) != 1:
            raise ValueError(f"tensors must have equal lengths, got {sorted(lengths)}")
        check_at_least(1, batch_size=batch_size)
        self.num_items = lengths.pop()
        super().__init__(self.num_items, shuffle, num_replicas, rank, seed)
        self.tensors = tensors
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(self.num_items / (self.batch_size * self.num_replicas))

    def indices(self) -> Iterator[Tensor]:
        """Yield the indices of this rank's batches in this epoch."""
        order = self.order(self.num_items)
        whole = self.batch_size * self.num_replicas
        left = self.num_items % whole
        if 0 < left < self.num_replicas:
            # Repeat items, so that every rank has one: batch statistics are reduced over all ranks.
            order = torch.cat([order, order[: self.num_replicas - left]])
        for batch in order.split(whole):
            yield batch[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for index in self.indices():
            yield self.take(index)

    def take(self, index: Tensor) -> tuple[Tensor, ...]:
        """Return the items of these indices."""
        taken = (tensor.index_select(0, index) for tensor in self.tensors)
        return tuple(part.float().div_(255) if part.dtype == torch.uint8 else part for part in taken)


class Tensors(NamedTuple):
    """Items x (N, ...) and their labels y (N,)."""

    x: Tensor
    y: Tensor


@dataclass(eq=False, repr=False, kw_only=True)
class TensorDataModule(SplitDataModule):
    """A data set in memory. Subclasses define :meth:`load`, ``source``, ``shape`` and ``class_names``.

    Args:
        batch_size: items per training batch and rank; the last batch of an epoch may have fewer.
        eval_batch_size: items per batch of validation, test and prediction.
        val_size: number of training items for validation, a fixed random choice. 0 validates on the test items, as the
            published tables do; do not select models by it.
        seed: at least 0; seed of the order of training items.

    Raises:
        ValueError: an argument is out of range.
    """

    batch_size: int = 128
    eval_batch_size: int = 2000
    val_size: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        check_at_least(1, batch_size=self.batch_size, eval_batch_size=self.eval_batch_size)
        check_at_least(0, val_size=self.val_size, seed=self.seed)
        self.shape: tuple[int, ...]
        self.splits: dict[str, Tensors] = {}

    @property
    def num_features(self) -> int:
        """Number of features D of an item, over all its axes."""
        return math.prod(self.shape)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def load(self, train: bool) -> Tensors:
        """Return the training or the test items, floats or uint8 from 0 to 255."""
        raise NotImplementedError(f"{type(self).__name__} must define load(train)")

    def describe(self) -> str:
        self.setup()
        same = self.splits["val"] is self.splits["test"]
        sizes = [f"{len(part.y)} {split}" for split, part in self.splits.items() if not (same and split == "val")]
        return f"{self.source}: {', '.join(sizes)}" + (" (also used for validation)" if same else "")

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        train, test = self.load(True), self.load(False)
        if self.val_size >= len(train.y):
            raise ValueError(f"val_size={self.val_size} must be less than the {len(train.y)} training items")
        val = test
        if self.val_size:
            order = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(_SPLIT_SEED))
            train_rows, val_rows = order[: -self.val_size].sort().values, order[-self.val_size :].sort().values
            train, val = (Tensors(train.x[rows], train.y[rows]) for rows in (train_rows, val_rows))
        self.splits = {"train": train, "val": val, "test": test}

    def whole(self, split: str) -> Tensors:
        """Return all items of a split, as floats."""
        self.setup()
        part = self.splits[split]
        return Tensors(*TensorBatches(list(part), len(part.y)).take(torch.arange(len(part.y))))

    def loader(self, split: str) -> TensorBatches:
        """Return the batches (x, y) of a split; those of ``"train"`` are shuffled."""
        self.setup()
        train = split == "train"
        batch_size = self.batch_size if train else self.eval_batch_size
        return TensorBatches(list(self.splits[split]), batch_size, train, *self.ranks, self.seed)
