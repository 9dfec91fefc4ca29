"""Remaining time of a run in its progress bar."""

from __future__ import annotations

import time
from typing import Any

import lightning


class TimeLeft(lightning.Callback):
    """Shows the remaining minutes of the whole fit; the progress bar itself shows only those of the epoch.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[TimeLeft()], logger=False, enable_checkpointing=False)
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock at the first step of this run."""
        self._start, self._first = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Extrapolate from the finished steps."""
        done = trainer.global_step - self._first
        total = trainer.estimated_stepping_batches
        if done > 0 and total < float("inf"):
            left = (time.monotonic() - self._start) / done * max(total - trainer.global_step, 0)
            pl_module.log("minutes_left", left / 60, prog_bar=True, logger=False, batch_size=1)
