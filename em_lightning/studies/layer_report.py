"""LayerReport: metrics, linear probe and figures of a layer of energies at the end of a fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from em_lightning.checks import check_at_least
from em_lightning.studies.report import Findings, Report
from em_lightning.studies.style import figure_style, new_figure

_IN_PERCENT = ("accuracy", "probe", "calibration_error")


class LayerReport(Report):
    """Report metrics of an :class:`~em_lightning.studies.EnergyLayer`, a linear probe and figures.

    The table has the validation metrics, the mean training loss of the epoch that each validation follows, and the
    number of parameters; metrics and loss are means over the last validations. The figures are ``prototypes`` (weights
    as images) and ``training``. With ``probe=False`` and ``figures=False`` any module that logs ``val/...`` will do.

    Args:
        last_epochs: number of the last validations that are averaged.
        probe: whether to score a linear probe of the energies.
        figures: whether to draw.
    """

    def __init__(self, last_epochs: int = 1, probe: bool = False, figures: bool = True) -> None:
        super().__init__()
        check_at_least(1, last_epochs=last_epochs)
        self.last_epochs = last_epochs
        self.probe = probe
        self.figures = figures
        self._losses: list[Tensor] = []  # of the batches of this epoch

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Validate after the last epoch if the fit would end before its first validation."""
        every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
        if every and epochs and 0 < epochs < every:
            trainer.check_val_every_n_epoch = epochs

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._losses = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._losses.append(outputs["loss"].detach())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or not self._losses:
            return
        logged = trainer.callback_metrics.items()
        metrics = {name.removeprefix("val/"): float(value) for name, value in logged if name.startswith("val/")}
        loss = float(torch.stack(self._losses).mean())
        self.history.append({"epoch": trainer.current_epoch + 1, **metrics, "loss": loss})  # replaces val/loss

    def report(self, trainer: Any, module: Any, folder: Path) -> Findings | None:
        if not self.history:
            print("There is no report, because nothing was validated.")
            return None
        data = trainer.datamodule
        row = self._row(data, module)
        notes = [
            f"Data: {data.describe()}. Seed {data.seed}, {trainer.current_epoch} epochs; validation metrics and "
            f"training loss, mean over the last {min(self.last_epochs, len(self.history))} validations."
        ]
        metric = next((name for name in ("accuracy %", "probe %") if name in row), "loss")
        title = type(module).__name__
        figures = {}
        if self.figures and len(data.shape) == 3 and data.shape[0] == 1:  # images with one channel
            figures["prototypes"] = _prototype_grid(module.prototypes, data.shape[1:])
        rows = [{"metric": name, "value": value} for name, value in row.items()]
        facts = {"values": row, "history": self.history}
        return Findings(title, notes, rows, f"{title}: {metric} {row[metric]:.4g}.", figures, facts)

    def _row(self, data: Any, module: Any) -> dict[str, float]:
        last = self.history[-self.last_epochs :]
        row = {name: sum(epoch[name] for epoch in last) / len(last) for name in last[0] if name != "epoch"}
        row["parameters"] = sum(parameter.numel() for parameter in module.parameters())
        if self.probe:
            train, test = data.whole("train"), data.whole("test")
            train_energies, test_energies = (module.energies(part.x.to(module.device)) for part in (train, test))
            row["probe"] = linear_probe(train_energies, train.y, test_energies, test.y)
        percents = {f"{name} %": 100 * row.pop(name) for name in _IN_PERCENT if name in row}
        return {**row, **percents}


def linear_probe(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """Return the test accuracy, from 0 to 1, of a logistic regression on standardized features (N, D)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))  # the digits take 29 iterations
    probe.fit(features.detach().cpu().numpy(), labels.cpu().numpy())
    return float(probe.score(test_features.detach().cpu().numpy(), test_labels.cpu().numpy()))


@figure_style()
def _prototype_grid(prototypes: Tensor, shape: Sequence[int]) -> Figure:
    """Draw the weights (K, H * W) of each unit as an image (H, W), all on one symmetric colour scale."""
    images = prototypes.detach().float().cpu().unflatten(1, shape)
    figure, axes = new_figure(len(images), 16, width=0.45, height=0.45)
    limit = float(images.abs().max()) or 1.0
    for ax, image in zip(axes, images, strict=True):
        ax.axis("off")
        ax.imshow(image.numpy(), cmap="PuOr", vmin=-limit, vmax=limit)
    return figure
