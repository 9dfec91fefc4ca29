"""Base class of the callbacks that write a table and figures at the end of a fit, and scikit-learn to compare with."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch

from em_lightning.mixture import COVARIANCES, Mixture
from em_lightning.plots import save_figure, tensorboard_writers


class Report(lightning.Callback):
    """Call :meth:`report` on the first rank when a fit is over, with the module in evaluation mode, without gradients.

    Then print its result, the files that it wrote, and the command for TensorBoard.
    Afterwards every submodule is in its previous mode, and the random state of the process is unchanged. An interrupted
    fit and a ``fast_dev_run`` write no report. A subclass may append to ``history``, which checkpoints contain.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the history, so that a resumed run reports all of it."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        self.history = state_dict["history"]

    def report(self, trainer: Any, module: Any, folder: Path) -> str | None:
        """Measure, write to ``folder``, the folder of the logger, and return the result in one sentence to print."""
        raise NotImplementedError

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Run :meth:`report`."""
        if trainer.fast_dev_run or not trainer.is_global_zero or trainer.interrupted:
            return
        folder, began = folder_of(trainer), time.time() - 1.0
        modes = {module: module.training for module in pl_module.modules()}
        device = pl_module.device
        pl_module.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng([device] if device.type in ("cuda", "mps") else []):
                result = self.report(trainer, pl_module, folder)
        finally:
            for module, mode in modes.items():
                module.training = mode
        if result:
            print(result)
        files = sorted(path.name for path in folder.glob("*.*") if path.stat().st_mtime > began)
        print(f"Files in {folder}: {', '.join(name for name in files if not name.startswith('events'))}")
        if tensorboard_writers(trainer):
            print(f"TensorBoard: tensorboard --logdir {folder.parent}")

    def save_figures(self, trainer: Any, figures: Mapping[str, Any], folder: Path) -> None:
        """Save matplotlib figures as ``<name>.png``, and add them to TensorBoard and Weights & Biases."""
        for name, figure in figures.items():
            path = save_figure(figure, folder / f"{name}.png")
            for writer in tensorboard_writers(trainer):
                writer.add_figure(name, figure, trainer.global_step, close=False)
                writer.flush()
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image(name, [str(path)])


def folder_of(trainer: Any) -> Path:
    """Return the folder of a run: that of its logger, in which Lightning puts the checkpoints too.

    Example:
        >>> folder_of(lightning.Trainer(logger=False, default_root_dir="runs", accelerator="cpu")).name
        'runs'
    """
    logger = trainer.logger
    if logger is None or getattr(logger, "log_dir", None):
        return Path(trainer.default_root_dir if logger is None else logger.log_dir)
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), str(logger.version))


def fit_sklearn(
    rows: Any, components: int, covariance: str, bayesian: bool = False, **options: Any
) -> tuple[Mixture, int, float]:
    """Fit scikit-learn's ``GaussianMixture``, or the Bayesian one, to rows (N, D).

    Returns the mixture, the number of iterations and the seconds.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import BayesianGaussianMixture, GaussianMixture

    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimator = BayesianGaussianMixture if bayesian else GaussianMixture
        fit = estimator(n_components=components, covariance_type=covariance, **options).fit(rows)
    seconds = time.perf_counter() - began
    weights, means, covariances = (torch.as_tensor(x).double() for x in (fit.weights_, fit.means_, fit.covariances_))
    mixture = Mixture(
        weights.log()[None], means[None], covariances.reshape(1, *COVARIANCES[covariance].shape(*means.shape))
    )
    return mixture, fit.n_iter_, seconds
