"""A loader that is its own sampler, which is how Lightning tells it the epoch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def generator_of(*key: int) -> torch.Generator:
    """Return a generator seeded by several numbers, of which torch's own seed would take 32 bits together."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


class RankLoader:
    """What loaders of whole batches share: each epoch's order, which is a function of (seed, epoch), on each rank.

    Args:
        length: of the data.
        shuffle: whether to draw the order.
        num_replicas: the number of ranks.
        rank: this one.
        seed: of the order.

    Raises:
        ValueError: there is less data than ranks.
    """

    batch_sampler = None

    def __init__(self, length: int, shuffle: bool, num_replicas: int, rank: int, seed: int) -> None:
        if length < num_replicas:
            raise ValueError(f"{length} rows are too few for {num_replicas} ranks; give one for each or more")
        self.shuffle = shuffle
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.epoch = 0

    @property
    def sampler(self) -> RankLoader:
        """Return itself: Lightning looks here for :meth:`set_epoch`, as in a ``DataLoader``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch's order comes next."""
        self.epoch = epoch

    def order(self, size: int) -> Tensor:
        """Return the order of so many things in this epoch, the same on all ranks."""
        if not self.shuffle:
            return torch.arange(size)
        return torch.randperm(size, generator=generator_of(self.seed, self.epoch))
