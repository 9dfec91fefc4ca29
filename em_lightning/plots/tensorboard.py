"""The TensorBoard writers of a Trainer, for figures, histograms, text and point clouds."""

from __future__ import annotations

import functools
from typing import Any


def tensorboard_writers(trainer: Any, content: str | None = None) -> list[Any]:
    """Return the ``SummaryWriter`` of each TensorBoard logger of a Trainer, on the first rank.

    If there is none, one line per process says that ``content`` is left out, as other loggers have no interface for it.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> tensorboard_writers(Trainer(logger=False, accelerator="cpu"))
        []
    """
    writers = [logger.experiment for logger in trainer.loggers if hasattr(logger.experiment, "add_histogram")]
    if content and not writers:
        _say_once(f"No {content} are logged: they need a TensorBoardLogger.")
    return writers


@functools.cache
def _say_once(text: str) -> None:
    from lightning.pytorch.utilities import rank_zero_info  # figures alone do not need Lightning

    rank_zero_info(text)
