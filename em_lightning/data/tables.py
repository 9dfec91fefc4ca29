"""Large tables of numbers: in memory, memory-mapped or in shards, cut into contiguous blocks of rows."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from em_lightning.data.base import at_least
from em_lightning.data.loader import RankLoader
from em_lightning.data.readers import map_npy

# Rows that are read under one mapping: pages count as memory of the process until the mapping is closed.
_SCATTERED = 4096


class TableBatch(NamedTuple):
    """A block of a table: points (n, D), and how often each row counts (n,), ``None`` where each does once."""

    points: Tensor
    weights: Tensor | None


class Table:
    """Rows of an array, or of several one after the other, read when they are asked for.

    Files are memory-mapped for as long as a read takes, so that what was read does not stay in the memory of the
    process. Floating-point numbers of 32 and 64 bits keep their type; others become the smaller of these that holds
    them.

    Args:
        source: a tensor or array, the path of an ``.npy`` file, or a folder whose ``.npy`` files are shards, in the
            order of their names.
        ndim: 2 for a table (N, D), 1 for a column (N,).
        name: of the argument, for errors.

    Raises:
        ValueError: there is no such file, it is no array of real numbers, or shards do not fit together.

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
            self.parts = sorted(path.glob("*.npy")) if path.is_dir() else [path]
            self.source = f"{len(self.parts)} shards in {path}" if path.is_dir() else str(path)
            if not any(part.is_file() for part in self.parts if isinstance(part, Path)):
                raise ValueError(f"{name}={str(source)!r} is neither an .npy file nor a folder of them; check the path")
        shapes = []
        for part in self.parts:
            array: Any = part if isinstance(part, Tensor) else self._open(part)
            shapes.append(tuple(array.shape))
            if len(shapes[-1]) != ndim or shapes[-1][1:] != shapes[0][1:]:
                wanted = ("(N,)", "(N, D)")[ndim - 1]
                place = "" if isinstance(part, Tensor) else f" in {part.name}"
                raise ValueError(f"{name} has shape {shapes[-1]}{place}; give {wanted}, of the same D in all shards")
        self.starts = [0, *itertools.accumulate(shape[0] for shape in shapes)]
        self.shape = (self.starts[-1], *shapes[0][1:])
        if not all(self.shape):
            raise ValueError(f"{name} has shape {self.shape} and holds nothing; give at least one row and one column")

    def __len__(self) -> int:
        return self.shape[0]

    def _open(self, path: Path) -> np.ndarray:
        try:
            array = map_npy(path)
        except ValueError as error:
            raise ValueError(f"{self.name}: {path} cannot be read ({error}); write it with numpy.save") from error
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{self.name}: {path} is no array of real numbers; write one with numpy.save")
        return array

    def _read(self, part: Tensor | Path, rows: slice | Tensor) -> Tensor:
        if isinstance(part, Tensor):
            block = part[rows]
            return block if block.is_floating_point() else block.to(torch.get_default_dtype())
        array = self._open(part)
        dtype = np.float64 if np.result_type(array.dtype, np.float32) == np.float64 else np.float32
        return torch.from_numpy(np.array(array[rows if isinstance(rows, slice) else rows.numpy()], dtype, order="C"))

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows from ``start`` up to ``stop``: a view of a tensor in memory, a copy of what is in files."""
        found = []
        for number in range(bisect.bisect_right(self.starts, start) - 1, len(self.parts)):
            first = self.starts[number]
            if first >= stop:
                break
            low, high = max(start - first, 0), min(stop, self.starts[number + 1]) - first
            if low < high:
                found.append(self._read(self.parts[number], slice(low, high)))
        return found[0] if len(found) == 1 else torch.cat(found)

    def take(self, rows: Tensor) -> Tensor:
        """Return single rows, their numbers in ascending order."""
        found = []
        for group in rows.split(_SCATTERED):
            bounds = torch.searchsorted(group, torch.tensor(self.starts))
            for number, part in enumerate(self.parts):
                own = group[bounds[number] : bounds[number + 1]] - self.starts[number]
                if len(own):
                    found.append(self._read(part, own))
        return torch.cat(found)


class TableBlocks(RankLoader):
    """A loader of contiguous blocks of a table, this rank's share of them.

    With N rows, W ranks and blocks of b rows, each rank has ``ceil(N / (W b))`` blocks, and the sizes of all blocks
    differ by one row at most: no row is left out, none is there twice, and ranks take the same number of steps. A
    loader that is resumed goes on behind the block that it gave last.

    Args:
        table: the points.
        weights: a column of the same length: how often each row counts.
        block_rows: b.
        shuffle: whether to draw the order of the blocks in every epoch, as a function of (seed, epoch). Rows within a
            block stay together, so a table in some order of its rows is best shuffled when it is written.
        num_replicas: W.
        rank: this one.
        seed: of the order.

    Raises:
        ValueError: weights are of another length, or rows are fewer than ranks.

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
        at_least(1, block_rows=block_rows)
        if weights is not None and len(weights) != len(table):
            raise ValueError(f"weights count {len(weights)} rows and the data has {len(table)}; give one for each row")
        super().__init__(len(table), shuffle, num_replicas, rank, seed)
        self.table = table
        self.weights = weights
        self.position = 0
        self.size = min(math.ceil(len(table) / (num_replicas * block_rows)), len(table) // num_replicas)

    def state_dict(self) -> dict[str, int]:
        """Return how many blocks of this epoch were given."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next epoch begin behind the blocks that were given."""
        self.position = state["position"]

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[TableBatch]:
        first, self.position = self.position % self.size, 0
        return self._blocks(first)

    def _blocks(self, first: int) -> Iterator[TableBatch]:
        order = self.order(self.size).tolist()
        for place in range(first, self.size):
            self.position = place + 1
            yield self._block(self.rank * self.size + order[place])

    def _block(self, number: int) -> TableBatch:
        total = self.num_replicas * self.size
        start, stop = (len(self.table) * place // total for place in (number, number + 1))
        return TableBatch(self.table.rows(start, stop), self._checked(start, stop))

    def _checked(self, start: int, stop: int) -> Tensor | None:
        if self.weights is None:
            return None
        weights = self.weights.rows(start, stop)
        if not bool((weights >= 0).all()):
            raise ValueError(f"weights of rows {start} to {stop} are not all 0 or more; mend them, NaN too")
        return weights

    def sample(self, size: int, seed: int = 0) -> TableBatch:
        """Return rows of the whole table, one drawn from each of ``size`` equal stretches: the same on every rank."""
        total = len(self.table)
        size = min(size, total)
        within = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        rows = ((torch.arange(size) + within) * (total / size)).long().clamp(max=total - 1).unique()
        return TableBatch(self.table.take(rows), None if self.weights is None else self.weights.take(rows))
