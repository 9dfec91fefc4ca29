"""LightningDataModules of labeled images in memory: scikit-learn's digits and MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from em_lightning.checks import check_at_least
from em_lightning.data.base import CACHE, RankLoader, SplitDataModule, download

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# MD5 of the published files, which are compressed by gzip.
MNIST_HASHES = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}


@dataclass(eq=False, repr=False)
class TensorBatches(RankLoader):
    """A loader that indexes whole batches, without collation of single items.

    Each global batch is split among the ranks, so all ranks have the same number of batches.

    Args:
        tensors: tensors of equal length N. Without ``draw``, uint8 is converted to float32 in [0, 1].
        batch_size: items per batch and rank; the last batch may have fewer.
        shuffle, num_replicas, rank, seed: as in :class:`torch.utils.data.DistributedSampler`.
        draw: a function ``draw(tensors, epoch, rank, number)`` that returns a batch, given its tensors, the epoch (0
            without ``shuffle``), the rank and the number of the batch.

    Raises:
        ValueError: the lengths differ, or there are fewer items than ranks.

    Example:
        >>> batches = TensorBatches([torch.arange(5), torch.arange(5) > 2], batch_size=2, shuffle=False)
        >>> list(batches)[-1]
        (tensor([4]), tensor([True]))
    """

    tensors: list[Tensor]
    batch_size: int
    shuffle: bool = True
    num_replicas: int = 1
    rank: int = 0
    seed: int = 0
    draw: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        lengths = {len(tensor) for tensor in self.tensors}
        if len(lengths) != 1:
            raise ValueError(f"tensors must have equal lengths, got {sorted(lengths)}")
        check_at_least(1, batch_size=self.batch_size)
        self.num_items = lengths.pop()
        self._check_ranks(self.num_items)

    def __len__(self) -> int:
        return math.ceil(self.num_items / (self.batch_size * self.num_replicas))

    def batches(self, first: int) -> Iterator[Any]:
        order = self.order(self.num_items)
        global_size = self.batch_size * self.num_replicas
        remainder = self.num_items % global_size
        if 0 < remainder < self.num_replicas:
            # Repeat items, so that every rank has one: batch statistics are reduced over all ranks.
            order = torch.cat([order, order[: self.num_replicas - remainder]])
        for number, batch in enumerate(order.split(global_size)[first:], first):
            tensors = tuple(tensor.index_select(0, batch[self.rank :: self.num_replicas]) for tensor in self.tensors)
            if self.draw is None:
                yield tuple(x.float().div_(255) if x.dtype == torch.uint8 else x for x in tensors)
            else:
                yield self.draw(tensors, self.epoch if self.shuffle else 0, self.rank, number)


class Tensors(NamedTuple):
    """Items x (N, ...), floats or uint8 from 0 to 255, and their classes y (N,) long."""

    x: Tensor
    y: Tensor


@dataclass(eq=False, repr=False, kw_only=True)
class TensorDataModule(SplitDataModule):
    """A data set in memory. Subclasses define :meth:`load`, ``source``, ``shape`` and ``class_names``.

    Args:
        batch_size: items per training batch and rank; the last batch of an epoch may have fewer.
        eval_batch_size: items per batch of validation, test and prediction.
        val_size: number of training items for validation, a fixed random choice. 0 validates on the test items, as the
            published tables do; do not select models by that score.
    """

    shape: ClassVar[tuple[int, ...]]  # of an item
    batch_size: int = 128
    eval_batch_size: int = 2000
    val_size: int = 0

    @property
    def num_features(self) -> int:
        return math.prod(self.shape)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def load(self, train: bool) -> Tensors:
        """Return the training or the test items."""
        raise NotImplementedError(f"{type(self).__name__} must define load(train)")

    def describe(self) -> str:
        same = self.splits["val"] is self.splits["test"]
        sizes = [f"{len(part.y)} {split}" for split, part in self.splits.items() if not (same and split == "val")]
        return f"{self.source}: {', '.join(sizes)}" + (" (also used for validation)" if same else "")

    @cached_property
    def splits(self) -> dict[str, Tensors]:
        train, test = self.load(train=True), self.load(train=False)
        if self.val_size >= len(train.y):
            raise ValueError(f"val_size={self.val_size} must be less than the {len(train.y)} training items")
        val = test
        if self.val_size:
            fixed = torch.Generator().manual_seed(0)  # the same validation items for every seed
            order = torch.randperm(len(train.y), generator=fixed)
            parts = order[: -self.val_size].sort().values, order[-self.val_size :].sort().values  # in the given order
            train, val = (Tensors(train.x[rows], train.y[rows]) for rows in parts)
        return {"train": train, "val": val, "test": test}

    def whole(self, split: str) -> Tensors:
        """Return all items of a split in one batch, as the loader returns them."""
        part = self.splits[split]
        return Tensors(*next(iter(TensorBatches(list(part), len(part.y), shuffle=False))))

    def loader(self, split: str) -> TensorBatches:
        return self.batches(list(self.splits[split]), train=split == "train")

    def batches(self, tensors: list[Tensor], train: bool, draw: Callable[..., Any] | None = None) -> TensorBatches:
        """Return a loader of these tensors: shuffled for training, else in order with ``eval_batch_size``."""
        batch_size = self.batch_size if train else self.eval_batch_size
        return TensorBatches(tensors, batch_size, shuffle=train, seed=self.seed, draw=draw, **self.replica)


class Digits(TensorDataModule):
    """scikit-learn's digits: 1,797 images of 8 x 8 pixels, bundled with scikit-learn; needs no download.

    The test set is the last fifth of the file; most of its writers do not occur in the training set.

    Example:
        >>> data = Digits(batch_size=32)
        >>> x, y = next(iter(data.train_dataloader()))
        >>> x.shape, y.shape, data.num_features
        (torch.Size([32, 1, 8, 8]), torch.Size([32]), 64)
    """

    shape = (1, 8, 8)
    class_names = list("0123456789")
    source = "scikit-learn's digits (8 x 8 pixels, no download)"

    def load(self, train: bool) -> Tensors:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        cut = len(labels) * 4 // 5
        part = slice(cut) if train else slice(cut, None)
        x = torch.from_numpy(images[part].astype(np.float32) / 16).unflatten(1, self.shape)
        return Tensors(x, torch.from_numpy(labels[part]))


def read_idx(path: str | Path) -> Tensor:
    """Read a uint8 IDX file, which may be compressed by gzip; raise ValueError if it is damaged."""
    data = Path(path).read_bytes()
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data  # how gzip files begin
        if data[:3] != b"\0\0\x08" or len(data) < 4:  # 8 stands for uint8
            raise ValueError(f"it must begin with 0, 0, 8 and the number of axes, got {data[:4]!r}")
        shape = tuple(np.frombuffer(data, ">u4", count=data[3], offset=4).tolist())
        return torch.from_numpy(np.frombuffer(bytearray(data[4 + 4 * data[3] :]), np.uint8).reshape(shape))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path}: damaged or not an IDX file ({error})") from error


@dataclass(eq=False, repr=False)
class MNIST(TensorDataModule):
    """MNIST, or a data set in four files of the same names and format, such as Fashion-MNIST.

    Args:
        root: folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two ``t10k`` files, with or
            without the suffix ``.gz``. ``None`` downloads MNIST to ~/.cache/em_lightning/MNIST and verifies its MD5.

    Raises:
        ValueError: a file is missing or damaged, or images and labels do not match.
        ConnectionError: the download failed.
    """

    shape = (1, 28, 28)
    class_names = list("0123456789")

    root: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source = "MNIST" if self.root is None else f"images in {self.root}"
        self.folder = Path(f"{CACHE}/MNIST" if self.root is None else self.root).expanduser()

    def prepare_data(self) -> None:
        if self.root is None:
            remedy = "download the four files of MNIST and pass their folder as root"
            for name, md5 in MNIST_HASHES.items():
                download(f"{MNIST_URL}{name}.gz", self.folder / f"{name}.gz", f"md5:{md5}", remedy)

    def _read(self, name: str) -> Tensor:
        for path in (self.folder / name, self.folder / f"{name}.gz"):
            if path.is_file():
                return read_idx(path)
        raise ValueError(f"root={str(self.folder)!r} has no {name} or {name}.gz; all four files are needed")

    def load(self, train: bool) -> Tensors:
        self.prepare_data()
        part = "train" if train else "t10k"
        x, y = self._read(f"{part}-images-idx3-ubyte"), self._read(f"{part}-labels-idx1-ubyte")
        largest = max(y.flatten().tolist(), default=10)  # 10 refuses files without labels
        if x.shape[1:] != (28, 28) or y.shape != x.shape[:1] or largest > 9:
            rule = "images (N, 28, 28) and N labels from 0 to 9"
            got = f"{tuple(x.shape)} and {tuple(y.shape)}, the largest label {largest}"
            raise ValueError(f"{self.folder}: the {part} files must hold {rule}, got {got}")
        return Tensors(x.unsqueeze(1), y.long())
