"""SwapReport: the metrics of a network with swapped activations beside those of the same network with its ReLUs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning
import torch

from em_lightning.callbacks import SwapActivations
from em_lightning.studies.image_classifier import ImageClassifier
from em_lightning.studies.layer_report import LayerReport


class _History(LayerReport):
    """Records the metrics of a fit and writes nothing."""

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        pass


class SwapReport(LayerReport):
    """Report the metrics of the swapped network beside those of the network with its ReLUs.

    Args:
        baseline: whether to train the network with its ReLUs too.
    """

    def __init__(self, last_epochs: int = 1, figures: bool = False, baseline: bool = True) -> None:
        super().__init__(last_epochs, figures=figures)
        self.baseline = baseline

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        self.initial = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def report(self, trainer: Any, module: Any, folder: Any) -> Any:
        """Add a column with the metrics of the baseline."""
        found = super().report(trainer, module, folder)
        is_swapped = any(isinstance(each, SwapActivations) for each in trainer.callbacks)
        if found is None or not self.baseline or not is_swapped or trainer.world_size > 1:
            return found
        swapped, relu = found.facts["values"], self.values_of_baseline(trainer, module)
        rows = [{"metric": name, "swapped": swapped[name], "ReLU": relu[name]} for name in relu]
        gain = swapped["accuracy %"] - relu["accuracy %"]
        verdict = (
            f"Accuracy {swapped['accuracy %']:.2f} %, with ReLU {relu['accuracy %']:.2f} %: {gain:+.2f} points in this "
            "run. --seeds 0,1,2,3,4 shows how much of this is chance."
        )
        return found._replace(rows=rows, verdict=verdict, facts={**found.facts, "baseline": relu})

    @torch.enable_grad()
    def values_of_baseline(self, trainer: Any, module: Any) -> dict[str, float]:
        """Train the network with its ReLUs from the same weights, and return its metrics."""
        names = inspect.signature(ImageClassifier).parameters
        arguments = {name: value for name, value in module.hparams.items() if name in names}
        model, history = ImageClassifier(**arguments), _History(self.last_epochs, figures=False)
        model.load_state_dict(self.initial, strict=False)  # without the buffers, which training changes
        plain = lightning.Trainer(
            max_epochs=trainer.max_epochs,
            accelerator=module.device.type,
            devices=1,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=trainer.check_val_every_n_epoch,
            callbacks=[history],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        plain.fit(model, trainer.datamodule)
        found: Any = history.report(plain, model.eval(), Path())
        return found.facts["values"]
