"""Base classes of data modules, datasets and loaders, and downloads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from em_lightning.checks import check_at_least

SPLITS = ("train", "val", "test")
CACHE = "~/.cache/em_lightning"


def generator_of(*key: int) -> torch.Generator:
    """Return a generator that is seeded by several integers."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def download(url: str, path: Path, known_hash: str | None, remedy: str) -> None:
    """Download a file, unless it exists with the right hash, such as ``"md5:..."``; errors end with the remedy."""
    import pooch

    try:
        pooch.retrieve(url, known_hash, fname=path.name, path=path.parent)
    except OSError as error:
        raise ConnectionError(f"{url} could not be downloaded ({error}); {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{url} is not the published file ({error}); {remedy}") from error


@dataclass(eq=False, repr=False, kw_only=True)
class SplitDataModule(lightning.LightningDataModule):
    """A LightningDataModule whose loaders all come from :meth:`loader`; prediction uses the test split.

    Subclasses are dataclasses; integer fields must be at least 1, or at least 0 if ``may_be_zero`` names them.

    Args:
        seed: seed of the random data and of the order of training items, at least 0.

    Raises:
        ValueError: an argument is out of range.
    """

    may_be_zero: ClassVar = ("seed", "num_workers", "holes", "held_out_classes", "val_size")  # fields of all subclasses
    seed: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self.class_names: list[str]
        self.source: str  # a short description of the data
        for field in fields(self):
            if field.type in ("int", int):
                check_at_least(0 if field.name in self.may_be_zero else 1, **{field.name: getattr(self, field.name)})

    @property
    def replica(self) -> dict[str, int]:
        """Arguments of loaders: ``num_replicas``, the number of processes, and ``rank``; 1 and 0 without a trainer."""
        trainer = self.trainer
        return {"num_replicas": trainer.world_size if trainer else 1, "rank": trainer.global_rank if trainer else 0}

    def loader(self, split: str) -> Any:
        """Return the batches of ``"train"``, ``"val"`` or ``"test"`` for this rank."""
        raise NotImplementedError(f"{type(self).__name__} must define loader(split)")

    def describe(self) -> str:
        """Return one line that describes the data."""
        return self.source

    def setup(self, stage: str | None = None) -> None:
        """Load the data, which otherwise are loaded when they are first used."""
        self.describe()

    def train_dataloader(self) -> Any:
        return self.loader("train")

    def val_dataloader(self) -> Any:
        return self.loader("val")

    def test_dataloader(self) -> Any:
        return self.loader("test")

    predict_dataloader = test_dataloader


class Resumable:
    """A loader that continues an epoch after the last batch returned; Lightning restores its state."""

    position = 0  # number of batches returned in this epoch
    _restored = 0  # the position of a checkpoint, until the next epoch starts
    batches: Any  # a method: ``batches(first)`` yields the batches of an epoch from number ``first`` on

    def __iter__(self) -> Any:
        # This runs when the first batch is requested, so a state may be loaded between iter() and next().
        self.position, self._restored = self._restored, 0
        for batch in self.batches(self.position):
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position, "length": len(self)}  # type: ignore[arg-type]

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after batch ``position``; ValueError if the number of batches has changed within an epoch."""
        position, saved_length, length = state["position"], state["length"], len(self)  # type: ignore[arg-type]
        within_epoch = 0 < position < saved_length
        if within_epoch and saved_length != length:
            found = f"the checkpoint is from batch {position} of {saved_length}, but an epoch has {length}"
            raise ValueError(f"{found}: resume it with the same data, batch size and number of processes")
        self.position, self._restored = position, position if within_epoch else 0


class RankLoader(Resumable):
    """Base class of loaders that form batches themselves; the order of an epoch is a function of (seed, epoch)."""

    shuffle: bool  # this and the next three are fields of the subclasses, which are dataclasses
    num_replicas: int
    rank: int
    seed: int
    epoch = 0
    batch_sampler = None  # Lightning reads it from any loader with a sampler

    def _check_ranks(self, rows: int) -> None:
        if rows < self.num_replicas:
            raise ValueError(f"{rows} rows are fewer than {self.num_replicas} ranks; every rank needs one")

    @property
    def sampler(self) -> RankLoader:
        """This loader, because Lightning calls ``set_epoch`` on the ``sampler`` of a loader."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, size: int) -> Tensor:
        """Return the order of ``size`` items in this epoch, the same on all ranks."""
        if not self.shuffle:
            return torch.arange(size)
        return torch.randperm(size, generator=generator_of(self.seed, self.epoch))


class ResumableLoader(Resumable, DataLoader[Any]):
    """A ``DataLoader`` that can resume: after ``load_state_dict`` it draws, but skips, the batches returned before."""

    def batches(self, first: int) -> Iterator[Any]:
        return itertools.islice(DataLoader.__iter__(self), first, None)


class RandomDataset(Dataset[Any]):
    """Random items: an item is a function of (seed, split, epoch, index), independent of workers and ranks.

    The key of an item is (epoch, index), as :class:`EpochSampler` yields it, or an index, which means epoch 0.
    ``draw(index, generator)`` returns an item.
    """

    def __init__(self, draw: Callable[[int, torch.Generator], Any], size: int, split: str, seed: int = 0) -> None:
        self.draw, self.size, self.split, self.seed = draw, size, split, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < self.size:
            raise IndexError(f"index={index} must be from 0 to {self.size - 1} in the {self.split} split")
        return self.draw(index, generator_of(self.seed, SPLITS.index(self.split), epoch, index))


class EpochSampler(DistributedSampler[Any]):
    """A ``DistributedSampler`` that yields (epoch, index), so that a dataset can resample items every epoch."""

    def __init__(self, dataset: Dataset[Any], num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)

    def __iter__(self) -> Iterator[Any]:
        # self.epoch is read at the first item, because a resumed run creates the iterator before it sets the epoch.
        for index in super().__iter__():
            yield self.epoch, index
