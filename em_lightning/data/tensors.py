"""Whole data sets as tensors: batches are slices, so a step costs what its arithmetic costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import lightning
import torch
from torch import Tensor

from em_lightning.data.base import at_least
from em_lightning.data.loader import RankLoader


class TensorBatches(RankLoader):
    """Batches of tensors, cut from them at once and not collected item by item.

    Each epoch's order is a function of (seed, epoch). Lightning calls :meth:`set_epoch`; a plain loop does so itself,
    or has the same order again. Ranks share each batch of the epoch between them, the same number of batches to each.

    Args:
        tensors: of the same length N along their first axis. Tensors of uint8 become float32 from 0 to 1.
        batch_size: items a batch on each rank; the last batch may have fewer.
        shuffle: whether to draw the order, or to keep that of the tensors.
        num_replicas: the number of ranks.
        rank: this one.
        seed: of the order.

    Raises:
        ValueError: the tensors have no items or not equally many, or there are fewer items than ranks.

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
            raise ValueError(f"tensors have {sorted(lengths)} items; give tensors of the same length")
        at_least(1, batch_size=batch_size)
        self.size = lengths.pop()
        super().__init__(self.size, shuffle, num_replicas, rank, seed)
        self.tensors = tensors
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(self.size / (self.batch_size * self.num_replicas))

    def indices(self) -> Iterator[Tensor]:
        """Yield the indices of this rank's batches in this epoch."""
        order = self.order(self.size)
        whole = self.batch_size * self.num_replicas
        left = self.size % whole
        if 0 < left < self.num_replicas:
            # No rank may go without, as all of them take part in the statistics of a batch.
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


class TensorDataModule(lightning.LightningDataModule):
    """A data set that fits in memory: a subclass defines :meth:`load`, ``shape`` and ``class_names``.

    Args:
        batch_size: items a training batch (on each rank); the last one of an epoch may have fewer.
        eval_batch_size: items a batch of validation, test and prediction.
        val_size: training items set aside for validation, the last of a random order that ``split_seed`` alone decides.
            With 0 validation is on the test items, as published tables have it: then choose nothing by it.
        seed: 0 or more, of the order of training items.
        split_seed: see ``val_size``.

    Raises:
        ValueError: an argument is outside its range.
    """

    shape: tuple[int, ...]
    class_names: list[str]

    def __init__(
        self, batch_size: int = 128, eval_batch_size: int = 2000, val_size: int = 0, seed: int = 0, split_seed: int = 0
    ) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        at_least(0, val_size=val_size, seed=seed, split_seed=split_seed)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.seed = seed
        self.split_seed = split_seed
        self.splits: dict[str, Tensors] = {}

    @property
    def num_features(self) -> int:
        """Number of features D of an item, all axes together."""
        return math.prod(self.shape)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def load(self, train: bool) -> Tensors:
        """Return the training or the test items, floats or uint8 from 0 to 255."""
        raise NotImplementedError(f"{type(self).__name__} must define load(train)")

    def source(self) -> str:
        """Return in a few words what data this is."""
        raise NotImplementedError(f"{type(self).__name__} must define source()")

    def describe(self) -> str:
        """Return one line that says what data is used."""
        self.setup()
        same = self.splits["val"] is self.splits["test"]
        sizes = [f"{len(part.y)} {split}" for split, part in self.splits.items() if not (same and split == "val")]
        return f"{self.source()}: {', '.join(sizes)}" + (", which validate too" if same else "")

    def setup(self, stage: str | None = None) -> None:
        """Load all splits, once."""
        if self.splits:
            return
        train, test = self.load(True), self.load(False)
        if not self.val_size < len(train.y):
            raise ValueError(f"val_size={self.val_size} leaves none of {len(train.y)} training items; give fewer")
        val = test
        if self.val_size:
            order = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(self.split_seed))
            kept, aside = order[: -self.val_size].sort().values, order[-self.val_size :].sort().values
            train, val = Tensors(*(part[kept] for part in train)), Tensors(*(part[aside] for part in train))
        self.splits = {"train": train, "val": val, "test": test}

    def whole(self, split: str) -> Tensors:
        """Return all items of a split, as floats."""
        self.setup()
        part = self.splits[split]
        return Tensors(*TensorBatches(list(part), len(part.y)).take(torch.arange(len(part.y))))

    def _batches(self, split: str, shuffle: bool) -> TensorBatches:
        self.setup()
        replicas, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        size = self.batch_size if shuffle else self.eval_batch_size
        return TensorBatches(list(self.splits[split]), size, shuffle, replicas, rank, self.seed)

    def train_dataloader(self) -> TensorBatches:
        """Return training batches (x, y), shuffled afresh in every epoch."""
        return self._batches("train", shuffle=True)

    def val_dataloader(self) -> TensorBatches:
        """Return the validation batches."""
        return self._batches("val", shuffle=False)

    def test_dataloader(self) -> TensorBatches:
        """Return the test batches."""
        return self._batches("test", shuffle=False)

    def predict_dataloader(self) -> TensorBatches:
        """Return the test batches."""
        return self._batches("test", shuffle=False)
