"""Large tables of numbers in memory, in memory-mapped .npy files or in shards, and a loader of blocks of their rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from em_lightning.checks import check_at_least
from em_lightning.data.base import RankLoader

# Rows read per memory map. The pages of a map count as memory of the process until it is closed.
_ROWS_PER_MAP = 4096


class TableBatch(NamedTuple):
    """A block of a table: points (n, D) and weights (n,), ``None`` if all are 1."""

    points: Tensor
    weights: Tensor | None


class Table:
    """The rows of an array, or of several shards one after the other, read on demand.

    Files are memory-mapped during a read only, so the memory of the process does not grow. float32 and float64 keep
    their type; other types are converted to the smaller of these that represents them.

    Args:
        source: a tensor or array, the path of an ``.npy`` file, or a folder of ``.npy`` shards, read in the order of
            their names; hidden files are skipped.
        ndim: 2 for a table (N, D), 1 for a column (N,).
        name: name of the argument in errors.

    Raises:
        ValueError: the file does not exist, does not hold real numbers, or the shapes of shards differ.

    Example:
        >>> table = Table(torch.arange(6.0).reshape(3, 2))
        >>> table.shape, table.rows(1, 3)
        ((3, 2), tensor([[2., 3.],
                         [4., 5.]]))
    """

    def __init__(self, source: Tensor | np.ndarray | str | Path, ndim: int = 2, name: str = "data") -> None:
        self.name = name
        self.parts: Sequence[Tensor | Path]
        if isinstance(source, np.ndarray):
            source = torch.from_numpy(source)
        if isinstance(source, Tensor):
            self.parts, self.source = [source], f"a tensor of {source.dtype}".replace("torch.", "")
        else:
            path = Path(source)
            shards = sorted(part for part in path.glob("*.npy") if not part.name.startswith("."))
            self.parts = shards if path.is_dir() else [path]
            self.source = f"{len(self.parts)} shards in {path}" if path.is_dir() else str(path)
            if not shards and not path.is_file():
                raise ValueError(f"{name}={str(source)!r} is neither an .npy file nor a folder of .npy files")
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else self._open(part).shape for part in self.parts]
        for part, shape in zip(self.parts, shapes, strict=True):
            if len(shape) != ndim or shape[1:] != shapes[0][1:]:
                place = "" if isinstance(part, Tensor) else f" in {part.name}"
                rule = "(N,)" if ndim == 1 else "(N, D) with the same D in all shards"
                raise ValueError(f"{name} has shape {shape}{place}, which must be {rule}")
        self.starts = [0, *itertools.accumulate(shape[0] for shape in shapes)]
        self.shape = (self.starts[-1], *shapes[0][1:])
        if not all(self.shape):
            raise ValueError(f"{name} has shape {self.shape}, which must have at least one row and one column")

    def __len__(self) -> int:
        return self.shape[0]

    def _open(self, path: Path) -> np.ndarray:
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # NumPy evaluates the header as a Python literal
            raise ValueError(
                f"{self.name}: {path} is not a plain NumPy array ({error}); write it with numpy.save"
            ) from error
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{self.name}: {path} must hold real numbers, got {array.dtype}")
        return array

    def _read(self, part: Tensor | Path, rows: slice | Tensor) -> Tensor:
        if isinstance(part, Tensor):
            block = part[rows]
            return block if block.is_floating_point() else block.to(torch.get_default_dtype())
        array = self._open(part)
        dtype = np.float64 if np.result_type(array.dtype, np.float32) == np.float64 else np.float32
        return torch.from_numpy(np.array(array[rows if isinstance(rows, slice) else rows.numpy()], dtype, order="C"))

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` - 1: a view of a tensor in memory, a copy of rows in files."""
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


class TableBlocks(RankLoader):
    """A loader of contiguous blocks of a table, divided among ranks.

    With N rows, W ranks and blocks of b rows, each rank has ``ceil(N / (W b))`` blocks. All rows are used once, and the
    sizes of blocks differ by at most one row. A resumed loader continues after the last block it returned.

    Args:
        table: the points.
        weights: a column of as many rows.
        block_rows: b.
        shuffle: whether to draw a new order of the blocks in every epoch, a function of (seed, epoch). Rows are not
            shuffled within blocks: shuffle an ordered table when writing it.
        num_replicas, rank, seed: W, the rank of this process, and the seed of the order.

    Raises:
        ValueError: the numbers of weights and rows differ, a weight is negative or NaN, or there are fewer rows than
            ranks.

    Example:
        >>> [len(batch.points) for batch in TableBlocks(Table(torch.zeros(10, 2)), block_rows=4)]
        [3, 3, 4]
    """

    def __init__(
        self,
        table: Table,
        weights: Table | None = None,
        block_rows: int = 2**16,
        shuffle: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        check_at_least(1, block_rows=block_rows)
        if weights is not None and len(weights) != len(table):
            raise ValueError(f"weights must have as many rows as the data, got {len(weights)} and {len(table)}")
        super().__init__(len(table), shuffle, num_replicas, rank, seed)
        self.table = table
        self.weights = weights
        self.position = 0
        self.num_blocks = min(math.ceil(len(table) / (num_replicas * block_rows)), len(table) // num_replicas)

    def state_dict(self) -> dict[str, int]:
        """Return the number of blocks that this epoch has returned."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next epoch after these blocks."""
        self.position = state["position"]

    def __len__(self) -> int:
        return self.num_blocks

    def __iter__(self) -> Iterator[TableBatch]:
        first, self.position = self.position % self.num_blocks, 0
        return self._blocks(first)

    def _blocks(self, first: int) -> Iterator[TableBatch]:
        total = self.num_replicas * self.num_blocks
        for block in self.order(self.num_blocks)[first:].tolist():
            first += 1
            self.position = first
            index = self.rank * self.num_blocks + block
            start, stop = len(self.table) * index // total, len(self.table) * (index + 1) // total
            weights = None if self.weights is None else self.weights.rows(start, stop)
            if weights is not None and not bool((weights >= 0).all()):
                raise ValueError(f"weights must be at least 0 and not NaN; rows {start} to {stop} are not")
            yield TableBatch(self.table.rows(start, stop), weights)

    def sample(self, size: int, seed: int = 0) -> TableBatch:
        """Return one random row of each of ``size`` equal intervals of the whole table, the same on every rank."""
        total = len(self.table)
        size = min(size, total)
        within = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        rows = ((torch.arange(size) + within) * (total / size)).long().clamp(max=total - 1).unique()
        return TableBatch(self.table.take(rows), None if self.weights is None else self.weights.take(rows))
