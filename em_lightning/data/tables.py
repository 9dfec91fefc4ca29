"""Large numeric tables in memory or .npy files, loaders of blocks of their rows, and LightningDataModules."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from em_lightning.checks import check_at_least
from em_lightning.data.base import RankLoader, SplitDataModule

# Scattered rows per memory map. Linux maps 64 KiB around each, which count as memory until the map is closed.
_ROWS_PER_MAP = 4096  # 256 MiB


class TableBatch(NamedTuple):
    """A block of a table: points (n, D) and weights (n,), ``None`` if all are 1."""

    points: Tensor
    weights: Tensor | None


def _shards(folder: Path, name: str) -> list[Path]:
    """Return the shards in a folder, without hidden files, in the order of their names."""
    shards = sorted(path for path in folder.glob("*.npy") if not path.name.startswith("."))
    for path in shards:  # file managers call copies "x (1).npy", "x copy.npy" and "x - Copy.npy"
        if any(path.stem.startswith(f"{other.stem} ") for other in shards):
            raise ValueError(f"{name}: {path} has the name of a copy of another shard; remove it or rename it")
    return shards


class Table:
    """The rows of an array, or of several concatenated shards, read on demand.

    Files are memory-mapped only during a read, so the memory of the process does not grow. They are read as float32, or
    float64 if float32 cannot represent their type. Tensors that are not floating-point get the default dtype.

    Args:
        source: a tensor or array, the path of an ``.npy`` file, or a folder of ``.npy`` shards in order of names.
        ndim: 2 for a table (N, D), 1 for a column (N,).
        name: name of the argument in errors.

    Raises:
        ValueError: the file does not exist, is not a regular file, or does not hold real numbers; shards have different
            numbers of columns, or one has the name of a copy (``x (copy).npy``); or a file changed during a read.

    Example:
        >>> Table(torch.arange(6.0).reshape(3, 2)).rows(1, 2)
        tensor([[2., 3.]])
    """

    def __init__(self, source: Tensor | np.ndarray | str | Path, ndim: int = 2, name: str = "data") -> None:
        self.name = name
        self.parts: Sequence[Tensor | Path]
        if isinstance(source, (Tensor, np.ndarray)):
            tensor = torch.as_tensor(source)
            self.parts, self.source = [tensor], f"a tensor of {tensor.dtype}".replace("torch.", "")
        else:
            path = Path(source)
            self.parts = _shards(path, name) if path.is_dir() else [path]
            self.source = f"{len(self.parts)} shards in {path}" if path.is_dir() else str(path)
            if not self.parts or not path.exists():
                raise ValueError(f"{name}={str(source)!r} is neither an .npy file nor a folder of .npy files")
        # Shape, dtype and time of the last change of each file at the start.
        self._initial: dict[Path, tuple[tuple[int, ...], np.dtype[Any], int]] = {}
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else self._open(part).shape for part in self.parts]
        for part, shape in zip(self.parts, shapes, strict=True):
            if len(shape) != ndim or shape[1:] != shapes[0][1:]:
                place = "" if isinstance(part, Tensor) else f" in {part.name}"
                rule = "(N,)" if ndim == 1 else "(N, D) with the same D in all shards"
                raise ValueError(f"{name} has shape {shape}{place}, which must be {rule}")
        self.starts = [0, *itertools.accumulate(shape[0] for shape in shapes)]  # first row of each part; total of rows
        self.shape = (self.starts[-1], *shapes[0][1:])
        if not all(self.shape):
            raise ValueError(f"{name} has shape {self.shape}, which must have at least one row and one column")

    def __len__(self) -> int:
        return self.shape[0]

    def _open(self, path: Path) -> np.ndarray:
        if not path.is_file():  # a pipe would wait for a writer
            problem = "is not a regular file" if path.exists() else "does not exist"
            raise ValueError(f"{self.name}: {path} {problem}; every rank must be able to read all shards")
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # NumPy evaluates the header as Python, which may raise errors of any type
            rule = "is not a plain NumPy array; write it with numpy.save"
            raise ValueError(f"{self.name}: {path} {rule} ({error})") from error
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{self.name}: {path} must hold real numbers, got {array.dtype}")
        now = array.shape, array.dtype, path.stat().st_mtime_ns
        shape, dtype, time = self._initial.setdefault(path, now)
        if now != (shape, dtype, time):
            raise ValueError(
                f"{self.name}: {path} was written during the run: it was {dtype} of shape {shape} at the start and is "
                f"{array.dtype} of shape {array.shape} now; restore it and resume"
            )
        return array

    def _read(self, part: Tensor | Path, rows: slice | Tensor) -> Tensor:
        if isinstance(part, Tensor):
            block = part[rows]
            return block if block.is_floating_point() else block.to(torch.get_default_dtype())
        array = self._open(part)
        dtype = np.float32 if np.result_type(array.dtype, np.float32) == np.float32 else np.float64
        return torch.from_numpy(np.array(array[rows if isinstance(rows, slice) else rows.numpy()], dtype, order="C"))

    def to(self, device: torch.device) -> Table:
        """Return a table of a copy of all rows on a device, copied in blocks to bound the memory of the host."""
        block_rows = 2**16  # chosen, not measured
        blocks = [self.rows(first, first + block_rows).to(device) for first in range(0, len(self), block_rows)]
        return Table(torch.cat(blocks), ndim=len(self.shape), name=self.name)

    def locate(self, row: int) -> str:
        """Return the name of the shard that holds a row, and the number of the row in it."""
        shard = bisect.bisect_right(self.starts, row) - 1
        part = self.parts[shard]
        return f"row {row - self.starts[shard]} of {self.name if isinstance(part, Tensor) else part}"

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` - 1 or the last: a view of a tensor in memory, a copy of rows in files."""
        blocks = []
        for part, first, end in zip(self.parts, self.starts, self.starts[1:], strict=False):
            if max(start, first) < min(stop, end):
                blocks.append(self._read(part, slice(max(start - first, 0), stop - first)))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def take(self, rows: Tensor) -> Tensor:
        """Return the rows of these indices, which must be ascending."""
        blocks = []
        for group in rows.split(_ROWS_PER_MAP):
            bounds = torch.searchsorted(group, torch.tensor(self.starts)).tolist()
            for part, first, low, high in zip(self.parts, self.starts, bounds, bounds[1:], strict=False):
                if low < high:
                    blocks.append(self._read(part, group[low:high] - first))
        return torch.cat(blocks)


@dataclass(eq=False, repr=False)
class TableBlocks(RankLoader):
    """A loader of contiguous blocks of a table, divided among ranks.

    With N rows and W ranks, each rank has ``min(ceil(N / (W b)), N // W)`` blocks. All rows are used once, and the
    sizes of blocks differ by at most one row. A resumed loader continues after the last block it returned.

    Args:
        table: the points.
        weights: a column with as many rows as the table.
        block_rows: b, the intended number of rows per block.
        shuffle: whether to draw a new order of the blocks in every epoch, a function of (seed, epoch). Rows are not
            shuffled within blocks: shuffle an ordered table when writing it.
        num_replicas, rank, seed: W, the rank of this process, and the seed of the order.

    Raises:
        ValueError: the number of weights is wrong, or there are fewer rows than ranks; during a read, a weight is
            negative or NaN, or a point of positive weight is not finite.

    Example:
        >>> [len(batch.points) for batch in TableBlocks(Table(torch.zeros(10, 2)), block_rows=4)]
        [3, 3, 4]
    """

    table: Table
    weights: Table | None = None
    block_rows: int = 2**16
    shuffle: bool = False
    num_replicas: int = 1
    rank: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(1, block_rows=self.block_rows)
        rows = len(self.table)
        if self.weights is not None and len(self.weights) != rows:
            raise ValueError(f"weights must have as many rows as the data, got {len(self.weights)} and {rows}")
        self._check_ranks(rows)
        self.num_blocks = min(math.ceil(rows / (self.num_replicas * self.block_rows)), rows // self.num_replicas)

    def keep_on(self, device: torch.device) -> None:
        """Copy all rows to a GPU, if they take at most a third of its free memory (chosen, to leave room for EM)."""
        parts = [self.table] if self.weights is None else [self.table, self.weights]
        if sum(len(part) * part.rows(0, 1).nbytes for part in parts) <= torch.cuda.mem_get_info(device)[0] / 3:
            self.table = self.table.to(device)
            self.weights = None if self.weights is None else self.weights.to(device)

    def __len__(self) -> int:
        return self.num_blocks

    def batches(self, first: int) -> Iterator[TableBatch]:
        total = self.num_replicas * self.num_blocks
        for block in self.order(self.num_blocks)[first:].tolist():
            index = self.rank * self.num_blocks + block
            start, stop = len(self.table) * index // total, len(self.table) * (index + 1) // total
            weights = None if self.weights is None else self.weights.rows(start, stop)
            yield self._checked(self.table.rows(start, stop), weights, torch.arange(start, stop))

    def _checked(self, points: Tensor, weights: Tensor | None, rows: Tensor) -> TableBatch:
        """Return a block; raise ValueError if a weight is negative or NaN, or a point of positive weight not finite."""
        valid = torch.isfinite(points).all(1)
        if weights is not None:
            valid = torch.where(weights > 0, valid, weights == 0)
        if not bool(valid.all()):
            bad = int(valid.int().argmin())
            row = int(rows[bad])
            if weights is not None and self.weights is not None and not weights[bad] >= 0:
                got = f"{float(weights[bad])} in {self.weights.locate(row)}"
                raise ValueError(f"weights must be at least 0 and not NaN, got {got}")
            raise ValueError(f"data must be finite, got {points[bad].tolist()} in {self.table.locate(row)}")
        return TableBatch(points, weights)

    def sample(self, size: int, seed: int = 0) -> TableBatch:
        """Return a random row of each of ``size`` equal intervals, the same on every rank, without duplicates."""
        total = len(self.table)
        size = min(size, total)
        within = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        rows = ((torch.arange(size) + within) * (total / size)).long().clamp(max=total - 1).unique()
        weights = None if self.weights is None else self.weights.take(rows)
        return self._checked(self.table.take(rows), weights, rows)


@dataclass(eq=False, repr=False)
class TabularDataModule(SplitDataModule):
    """Blocks of a large table for training and of a held-out table for validation and test.

    Args:
        data: a tensor (N, D), the path of an ``.npy`` file, or a folder of ``.npy`` shards (:class:`Table`).
        weights: weights of the rows, (N,), in the same forms.
        held_out: a table for validation and test; without it there is no validation, and the test uses ``data``.
        block_rows: rows per block and rank.
        shuffle: whether to draw a new order of the training blocks in every epoch.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.held_out is None:
            # Lightning skips validation if the method is its own, but warns of an empty list of loaders.
            self.val_dataloader = super(SplitDataModule, self).val_dataloader  # type: ignore[method-assign]

    @cached_property
    def tables(self) -> dict[str, Table]:
        tables = {"train": Table(self.data)}
        if self.weights is not None:
            tables["weights"] = Table(self.weights, ndim=1, name="weights")
        if self.held_out is not None:
            tables["held_out"] = Table(self.held_out, name="held_out")
            if tables["held_out"].shape[1] != tables["train"].shape[1]:
                shapes = f"{tables['held_out'].shape} and {tables['train'].shape}"
                raise ValueError(f"held_out and data must have equal numbers of columns, got shapes {shapes}")
        return tables

    @property
    def num_features(self) -> int:
        return self.tables["train"].shape[1]

    def describe(self) -> str:
        train = self.tables["train"]
        weighted = ", weighted" if "weights" in self.tables else ""
        held_out = f"; {len(self.tables['held_out']):,} held out" if "held_out" in self.tables else ""
        return f"{len(train):,} x {train.shape[1]} from {train.source}{weighted}{held_out}"

    def blocks(self, split: str = "train", whole: bool = False) -> TableBlocks:
        """Return the blocks of ``"train"`` or ``"held_out"``: those of this rank, or the ``whole`` table in order."""
        train = split == "train"
        weights = self.tables.get("weights") if train else None
        shuffle = self.shuffle and train and not whole
        replica = {} if whole else self.replica
        return TableBlocks(self.tables[split], weights, self.block_rows, shuffle, seed=self.seed, **replica)

    def loader(self, split: str) -> TableBlocks:
        blocks = self.blocks("train" if split == "train" or self.held_out is None else "held_out")
        if self.trainer is not None and self.trainer.strategy.root_device.type == "cuda":
            blocks.keep_on(self.trainer.strategy.root_device)  # so that no epoch copies them again
        return blocks
