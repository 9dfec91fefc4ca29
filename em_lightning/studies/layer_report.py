"""LayerReport: metrics, linear probe and figures of a layer of energies at the end of a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from em_lightning.plots.figures import DIVERGING, figure_style, new_figure
from em_lightning.studies.report import Findings, Report

_PANELS = {
    "loss": "training loss",
    "accuracy": "accuracy",
    "l0": "active units per item",
    "entropy": "entropy of r (nats)",
    "redundancy": "redundancy",
    "min_variance": "smallest variance of a unit",
    "effective_rank": "effective rank",
}
_IN_PERCENT = ("accuracy", "probe", "calibration_error")
_CHUNK_SIZE = 10_000


class LayerReport(Report):
    """Report metrics of an :class:`~em_lightning.studies.EnergyLayer`, a linear probe and figures.

    The table has the validation metrics, averaged over the last epochs. The figures are ``prototypes`` (weights as
    images) and ``training``. With ``probe=False`` and ``figures=False`` the module may be any
    that logs ``val/...`` in validation.

    Args:
        last_epochs: number of epochs whose validation metrics are averaged.
        probe: whether to score a linear probe of the energies.
        figures: whether to draw.
    """

    def __init__(self, last_epochs: int = 1, probe: bool = False, figures: bool = True) -> None:
        super().__init__()
        if last_epochs < 1:
            raise ValueError(f"last_epochs={last_epochs} must be at least 1")
        self.last_epochs = last_epochs
        self.probe = probe
        self.figures = figures
        self._loss_sum: Any = 0.0
        self._num_batches = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Validate after the last epoch if the fit would end before its first validation."""
        every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
        if every and epochs and 0 < epochs < every:
            trainer.check_val_every_n_epoch = epochs

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Reset the mean of the loss."""
        self._loss_sum, self._num_batches = 0.0, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Accumulate the loss of the batch."""
        self._loss_sum, self._num_batches = self._loss_sum + outputs["loss"].detach(), self._num_batches + 1

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Record the metrics of the epoch."""
        if trainer.sanity_checking or not self._num_batches:
            return
        logged = trainer.callback_metrics.items()
        values = {name.removeprefix("val/"): float(value) for name, value in logged if name.startswith("val/")}
        values["loss"] = float(self._loss_sum) / self._num_batches
        self.history.append({"epoch": trainer.current_epoch + 1, **values})

    def report(self, trainer: Any, module: Any, folder: Path) -> Findings | None:
        """Average the metrics, score the probe and draw."""
        if not self.history:
            print("There is no report, because nothing was validated.")
            return None
        data = trainer.datamodule
        row = self._row(data, module)
        notes = [
            f"Data: {data.describe()}. Seed {data.seed}, {trainer.current_epoch} epochs; validation metrics, "
            f"mean over the last {min(self.last_epochs, len(self.history))} validations."
        ]
        metric = next((name for name in ("accuracy %", "probe %") if name in row), "loss")
        title = type(module).__name__
        return Findings(
            title,
            notes,
            [{"metric": name, "value": value} for name, value in row.items()],
            f"{title}: {metric} {row[metric]:.4g}.",
            self._draw(module, data.shape) if self.figures else {},
            {"values": row, "history": self.history},
        )

    def _row(self, data: Any, module: Any) -> dict[str, float]:
        last = self.history[-self.last_epochs :]
        row = {name: sum(each[name] for each in last) / len(last) for name in last[0] if name != "epoch"}
        row["parameters"] = sum(p.numel() for p in module.parameters())
        if self.probe:
            train, test = data.whole("train"), data.whole("test")
            features = [_in_parts(module, module.energies, part.x) for part in (train, test)]
            row["probe"] = linear_probe(features[0], train.y, features[1], test.y)
        percents = {f"{name} %": 100 * value for name, value in row.items() if name in _IN_PERCENT}
        return {name: value for name, value in row.items() if name not in _IN_PERCENT} | percents

    def _draw(self, module: Any, shape: Sequence[int]) -> dict[str, Any]:
        series = {title: [each[k] for each in self.history] for k, title in _PANELS.items() if k in self.history[0]}
        figures = {"training": _panels([each["epoch"] for each in self.history], series, "epoch")}
        if len(shape) == 3 and shape[0] == 1:
            figures["prototypes"] = _prototype_grid(module.prototypes, shape[1:])
        return figures


def linear_probe(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """Return the test accuracy, from 0 to 1, of a logistic regression on standardized features (N, D).

    Example:
        >>> labels = torch.arange(20) % 2
        >>> linear_probe(labels[:, None] - 0.5, labels, labels[:, None] - 0.5, labels)
        1.0
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    probe.fit(features.detach().cpu().numpy(), labels.cpu().numpy())
    return float(probe.score(test_features.detach().cpu().numpy(), test_labels.cpu().numpy()))


@torch.no_grad()
def _in_parts(module: Any, function: Any, x: Tensor) -> Tensor:
    return torch.cat([function(part.to(module.device)).cpu() for part in x.split(_CHUNK_SIZE)])


@figure_style()
def _prototype_grid(prototypes: Tensor, shape: Sequence[int]) -> Figure:
    """Draw the weights (K, H * W) of each unit as an image (H, W), all on one symmetric colour scale."""
    images = prototypes.detach().float().cpu().unflatten(1, shape)
    figure, axes = new_figure(len(images), 16, width=0.45, height=0.45)
    limit = float(images.abs().max()) or 1.0
    for ax, image in zip(axes, images, strict=True):
        ax.axis("off")
        ax.imshow(image.numpy(), cmap=DIVERGING, vmin=-limit, vmax=limit)
    return figure


@figure_style()
def _panels(x: Sequence[float], series: Mapping[str, Sequence[float]], xlabel: str) -> Figure:
    """Draw several series, by title, over the same x, each in its own panel."""
    figure, axes = new_figure(len(series), 3, width=2.6, height=2.0, sharex=True)
    for ax, (title, y) in zip(axes, series.items(), strict=True):
        ax.plot(x, y, marker="o" if len(x) <= 20 else None, markersize=3)
        ax.set(title=title, xlabel=xlabel)
    return figure
