"""Terminal output of recipes: a progress bar of one line, and which of Lightning's messages are left out."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

# Warnings of Lightning and PyTorch about their own internals, or about settings that are right for these recipes.
_WARNINGS = (
    ".*does not have many workers.*",
    ".*number of training batches.*smaller than the logging interval.*",
    ".*LightningCLI's args parameter is intended to run from within Python.*",
    ".*isinstance.treespec, LeafSpec.* is deprecated.*",
    ".*torch.jit.script. is.*deprecated.*",
    ".*dirpath has changed.*",
)
_ADVERTISED = ("litlogger", "litmodels", "TPU available")
_SCORES = {"val/log_likelihood": "val likelihood", "val/accuracy": "val accuracy", "val/loss": "val loss"}


def quieten() -> None:
    """Leave out warnings that do not concern the user, and Lightning's advertisements."""
    for words in _WARNINGS:
        warnings.filterwarnings("ignore", words)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not any(word in record.getMessage() for word in _ADVERTISED)


class RecipeProgressBar(TQDMProgressBar):
    """One line per epoch: batches, training loss, one validation score, and the minutes left if they are logged."""

    BAR_FORMAT = "{desc}|{bar}| {n_fmt}/{total_fmt}{postfix}"

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """Return what the line shows after the bar."""
        logged: Any = trainer.callback_metrics
        left: Any = super().get_metrics(trainer, pl_module).get("minutes_left")
        score = next((name for name in _SCORES if name in logged), "val/loss")
        found = {"loss": logged.get("train/loss"), _SCORES[score]: logged.get(score), "minutes left": left}
        return {text: f"{float(value):.3f}" for text, value in found.items() if value is not None}

    def init_validation_tqdm(self) -> Tqdm:
        """Return a disabled bar: validation is short, and its bar would move the line."""
        return Tqdm(disable=True)


def with_progress_bar(callbacks: Any) -> list[Any]:
    """Return the callbacks of a Trainer with the bar of recipes, unless they have one or there is no terminal."""
    given = [] if callbacks is None else callbacks if isinstance(callbacks, list) else [callbacks]
    has_one = any(isinstance(callback, ProgressBar) for callback in given)
    return given if has_one or not sys.stderr.isatty() else [*given, RecipeProgressBar(refresh_rate=5)]
