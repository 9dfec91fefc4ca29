"""Reseed every training step, so that resumed runs reproduce uninterrupted ones."""

from __future__ import annotations

from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import RandomSampler

from em_lightning.data.base import Resumable


class StepSeeds(lightning.Callback):
    """Seeds PyTorch's generators at every training step, so that a resumed run draws the same random numbers.

    Checkpoints do not store the state of generators, so dropout, noise and augmentation of a resumed run would differ
    from an uninterrupted one. With this callback they depend only on (seed, rank, epoch, batch), and the order of a
    shuffling ``DataLoader`` only on (seed, rank, epoch); within an epoch, ``ResumableLoader`` resumes such a loader.

    Args:
        seed: at least 0; by default PyTorch's seed when the fit starts, as set by ``lightning.seed_everything``. A
            resumed run uses the seed of its checkpoint.

    Raises:
        ValueError: ``seed`` is negative.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        if seed is not None and seed < 0:
            raise ValueError(f"seed={seed} must be at least 0")
        self.seed = seed
        self._used_seed: int | None = None  # of this fit: the argument, PyTorch's or that of the checkpoint
        self._epoch = 0  # the current epoch, or the next one between epochs
        self._loader_states: list[Any] = []  # of the checkpoint, one per loader that has a state

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Reset the state of an earlier fit, before a checkpoint is loaded."""
        self._used_seed, self._epoch, self._loader_states = None, 0, []

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._used_seed, "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._used_seed, self._epoch = state_dict["seed"], state_dict["epoch"]

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._loader_states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Seed the order of the first epoch, whose iterator Lightning makes before any hook of training."""
        if self._used_seed is None:
            self._used_seed = torch.initial_seed() if self.seed is None else self.seed
        torch.manual_seed(self._seed_of(trainer, self._epoch, step=0))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Seed the samplers, as Lightning does not call on_train_epoch_start when it resumes within an epoch."""
        self._seed_samplers(trainer)
        # If configure_optimizers reads estimated_stepping_batches, it makes the loaders, and Lightning restores none.
        loaders = (each for each in CombinedLoader(trainer.train_dataloader).flattened if hasattr(each, "state_dict"))
        for loader, state in zip(loaders, self._loader_states, strict=False):
            if isinstance(loader, Resumable):
                loader.load_state_dict(state)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._epoch = trainer.current_epoch
        torch.manual_seed(self._seed_of(trainer, self._epoch, step=0))
        self._seed_samplers(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(self._seed_of(trainer, trainer.current_epoch, step=batch_idx + 1))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the epoch as finished after its last batch, for checkpoints saved at its end."""
        self._epoch = trainer.current_epoch + trainer.is_last_batch

    def _seed_samplers(self, trainer: Any) -> None:
        """Give each sampler its own generator, so that the order does not depend on when the loader draws it.

        A loader with worker processes draws the first order before this method runs, from PyTorch's generator, which
        on_fit_start has seeded. One without workers draws it later, from the sampler's generator: the same order.
        """
        for loader in CombinedLoader(trainer.train_dataloader).flattened:
            sampler: Any = getattr(loader, "sampler", None)
            if hasattr(sampler, "generator"):
                sampler.generator = torch.Generator().manual_seed(self._seed_of(trainer, self._epoch, step=0))
                _draw(sampler.generator)  # as a loader first draws a base for the seeds of workers
                if isinstance(sampler, RandomSampler):  # without a generator, it then draws the seed of one
                    sampler.generator.manual_seed(_draw(sampler.generator))

    def _seed_of(self, trainer: Any, epoch: int, step: int) -> int:
        """Return the seed of a step, counted from 1 in each epoch; step 0 is the order of the epoch."""
        assert self._used_seed is not None
        sequence = np.random.SeedSequence((self._used_seed, trainer.global_rank, epoch, step))
        return int(sequence.generate_state(1, np.uint64)[0]) >> 1  # 63 bits, as in _draw


def _draw(generator: torch.Generator) -> int:
    """Draw an integer as DataLoader and RandomSampler draw their seeds."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator))
