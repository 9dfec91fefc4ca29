"""Random numbers of a step that do not depend on what went before it."""

from __future__ import annotations

from typing import Any

import lightning
import numpy as np
import torch


class StepSeeds(lightning.Callback):
    """Seed PyTorch's own generators at every training step, so that a resumed run draws what a straight one draws.

    A checkpoint does not hold the state of a generator: after a resume dropout, noise and augmentation go on with other
    numbers. Under this callback those of a step are a function of (seed, rank, epoch, batch), and so is, by epoch, the
    order of a ``DataLoader`` that shuffles. Such a loader cannot start in the middle of an epoch: resume from its end.

    Args:
        seed: 0 or more; by default PyTorch's seed as the fit begins, which is that of
            ``lightning.seed_everything`` where nothing came in between. A resumed run takes that of its checkpoint.

    Raises:
        ValueError: ``seed`` is negative.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[StepSeeds(3)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        if seed is not None and seed < 0:
            raise ValueError(f"seed={seed} must not be negative")
        self.seed = seed
        self._base: int | None = None
        self._epoch = 0  # that begins next, or has begun

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget an earlier fit, before a checkpoint tells of one."""
        self._base, self._epoch = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the seed and the epoch."""
        return {"seed": self._base, "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the seed and the epoch of the run that is resumed."""
        self._base, self._epoch = state_dict["seed"], state_dict["epoch"]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Seed the order of the first epoch, which is drawn before any hook of training."""
        if self._base is None:
            self._base = torch.initial_seed() if self.seed is None else self.seed
        self._sow(trainer, 0)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Seed the order of the epoch."""
        self._epoch = trainer.current_epoch
        self._sow(trainer, 0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Seed what the step draws."""
        self._sow(trainer, batch_idx + 1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note that an epoch is over, for a checkpoint that is made now."""
        self._epoch = trainer.current_epoch + trainer.is_last_batch

    def _sow(self, trainer: Any, number: int) -> None:
        assert self._base is not None
        epoch = trainer.current_epoch if number else self._epoch
        key = self._base, trainer.global_rank, epoch, number
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
