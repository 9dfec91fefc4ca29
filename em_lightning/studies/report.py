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
from em_lightning.plots.style import save_figure


class Report(lightning.Callback):
    """Call :meth:`report` on the first rank when a fit is over, with the module in evaluation mode, without gradients.

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

    def report(self, trainer: Any, module: Any, folder: Path) -> None:
        """Measure and write to ``folder``, the folder of the logger."""
        raise NotImplementedError

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Run :meth:`report`."""
        if trainer.fast_dev_run or not trainer.is_global_zero or trainer.interrupted:
            return
        folder = Path(getattr(trainer.logger, "log_dir", None) or trainer.default_root_dir)
        modes = {module: module.training for module in pl_module.modules()}
        pl_module.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                self.report(trainer, pl_module, folder)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def save_figures(self, trainer: Any, figures: Mapping[str, Any], folder: Path) -> None:
        """Save matplotlib figures as ``<name>.png``, and add them to TensorBoard if the logger is one."""
        writer: Any = getattr(trainer.logger, "experiment", None)
        for name, figure in figures.items():
            save_figure(figure, folder / f"{name}.png")
            if hasattr(writer, "add_figure"):
                writer.add_figure(name, figure, trainer.global_step, close=False)
        if hasattr(writer, "flush"):
            writer.flush()


def fit_sklearn(rows: Any, components: int, covariance: str, **options: Any) -> tuple[Mixture, int, float]:
    """Fit scikit-learn's ``GaussianMixture`` to rows (N, D); return the mixture, its iterations and the seconds."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = GaussianMixture(components, covariance_type=covariance, **options).fit(rows)
    seconds = time.perf_counter() - began
    weights, means, covariances = (torch.as_tensor(x).double() for x in (fit.weights_, fit.means_, fit.covariances_))
    mixture = Mixture(weights.log()[None], means[None], COVARIANCES[covariance].from_sklearn(covariances))
    return mixture, fit.n_iter_, seconds
