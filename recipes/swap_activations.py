"""Swap the ReLUs of a plain classifier for competitive activations; default data: scikit-learn's digits.

    em-lightning run swap_activations --trainer.callbacks.activation=gated
    em-lightning run swap_activations --data MNIST --data.root PATH/TO/mnist --model.network=cnn
    em-lightning run swap_activations --config comparison --data.root PATH/TO/mnist

The callback SwapActivations changes the classifier without editing its code. Afterwards the same network with its
ReLUs is trained from the same weights, and the report compares the two; --report.baseline=false omits this. The variant
`comparison` runs every activation in a network with two hidden layers and in a small convolutional network, with
several seeds, and reports accuracy, calibration, dead units, redundancy and effective rank. Without --data.root MNIST
is downloaded.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from em_lightning.callbacks import SwapActivations
from em_lightning.checks import check_at_least, check_choice
from em_lightning.cli import Recipe
from em_lightning.data import TensorDataModule
from em_lightning.metrics import DeadUnits, EffectiveRank, Redundancy
from em_lightning.modules import EMModule
from em_lightning.studies import LayerReport


class ImageClassifier(EMModule):
    r"""A classifier with two hidden layers, each a linear map and a ReLU, and metrics of its activations.

    :class:`~em_lightning.callbacks.SwapActivations` can replace ``activation1`` and ``activation2`` of its
    ``network``. In validation and test it logs accuracy, the expected calibration error with 15 bins, and for each of
    the two activations, as ``val/activation1/...``, dead units, redundancy and effective rank. As activations differ in
    scale, a unit is dead if its variance is below 0.001 (chosen) of the mean variance of its layer. The units of a
    feature map are its channels, and its positions are items. The output is the logits (N, C).

    Args:
        shape: shape of an image, channels first.
        num_classes: C.
        network: ``"mlp"``, two layers of ``width`` units, by default 128; or ``"cnn"``, two convolutions of stride 2
            with ``width`` and 2 ``width`` channels, by default 8 and 16.
        width: see ``network``.
        lr: as in :class:`~em_lightning.modules.EMModule`.
    """

    def __init__(
        self,
        shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
        network: Literal["mlp", "cnn"] = "mlp",
        width: int | None = None,
        lr: float = 1e-3,
    ) -> None:
        super().__init__(lr)
        check_choice("network", network, ("mlp", "cnn"))
        check_at_least(2, num_classes=num_classes)
        width = {"mlp": 128, "cnn": 8}[network] if width is None else width
        check_at_least(1, width=width)
        self.save_hyperparameters()
        layers = (_mlp if network == "mlp" else _cnn)(shape, num_classes, width)
        self.network = nn.Sequential(OrderedDict(layers))
        layer_metrics: dict[str, Any] = {
            "dead_units": DeadUnits(threshold=1e-3, relative=True, dim=1),
            "redundancy": Redundancy(dim=1),
            "effective_rank": EffectiveRank(dim=1),
        }
        self.add_metrics(
            ("val", "test"),
            accuracy=MulticlassAccuracy(num_classes, average="micro"),
            calibration_error=MulticlassCalibrationError(num_classes, n_bins=15),
            activation1=MetricCollection(layer_metrics, prefix="activation1/"),
            activation2=MetricCollection(layer_metrics, prefix="activation2/"),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def step(self, batch: Any, stage: str) -> Tensor:
        x, y = batch
        if stage == "train":
            return functional.cross_entropy(self.network(x), y)
        metrics = self.metrics_of(stage)
        logits = x
        for name, layer in self.network.named_children():
            logits = layer(logits)
            if name in metrics:  # an activation
                metrics[name].update(logits)
        metrics["accuracy"].update(logits, y)
        metrics["calibration_error"].update(logits.softmax(-1), y)
        return functional.cross_entropy(logits, y)


def _mlp(shape: Sequence[int], num_classes: int, width: int) -> dict[str, nn.Module]:
    return {
        "flatten": nn.Flatten(),
        "linear1": nn.Linear(math.prod(shape), width),
        "activation1": nn.ReLU(),
        "linear2": nn.Linear(width, width),
        "activation2": nn.ReLU(),
        "head": nn.Linear(width, num_classes),
    }


def _cnn(shape: Sequence[int], num_classes: int, width: int) -> dict[str, nn.Module]:
    positions = math.prod(math.ceil(size / 4) for size in shape[1:])  # two convolutions of stride 2
    return {
        # The names of _mlp, so that the same selections fit both networks.
        "linear1": nn.Conv2d(shape[0], width, 5, stride=2, padding=2),
        "activation1": nn.ReLU(),
        "linear2": nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        "activation2": nn.ReLU(),
        "flatten": nn.Flatten(),
        "head": nn.Linear(2 * width * positions, num_classes),
    }


class _History(LayerReport):
    """Records the metrics of a fit and writes nothing."""

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        pass


class SwapReport(LayerReport):
    """Report the metrics of the swapped network beside those of the network with its ReLUs.

    Args:
        last_epochs, figures: as in :class:`~em_lightning.studies.LayerReport`.
        baseline: whether to train the network with its ReLUs too, which needs a run of one process.
    """

    def __init__(self, last_epochs: int = 1, figures: bool = False, baseline: bool = True) -> None:
        super().__init__(last_epochs, figures=figures)
        self.baseline = baseline

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.initial: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        if not self.initial:  # a resumed run has restored them from its checkpoint
            self.initial = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "initial": self.initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.initial = state_dict["initial"]

    def report(self, trainer: Any, module: Any, folder: Any) -> Any:
        """Add a column with the metrics of the baseline."""
        findings = super().report(trainer, module, folder)
        is_swapped = any(isinstance(callback, SwapActivations) for callback in trainer.callbacks)
        if findings is None or not self.baseline or not is_swapped or trainer.world_size > 1:
            return findings
        swapped, relu = findings.facts["values"], self.values_of_baseline(trainer, module)
        rows = [{"metric": name, "swapped": swapped[name], "ReLU": relu[name]} for name in relu]
        gain = swapped["accuracy %"] - relu["accuracy %"]
        verdict = (
            f"Accuracy {swapped['accuracy %']:.2f} %, with ReLU {relu['accuracy %']:.2f} %: {gain:+.2f} points in this "
            "run. --seeds 0,1,2,3,4 shows how much of this is chance."
        )
        return findings._replace(rows=rows, verdict=verdict, facts={**findings.facts, "baseline": relu})

    @torch.enable_grad()  # Report calls report() under no_grad
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
        findings: Any = history.report(plain, model.eval(), folder=Path())
        return findings.facts["values"]


recipe = Recipe(
    __file__,
    model=ImageClassifier,
    data=TensorDataModule,
    report=SwapReport,
    data_to_model=["shape", "num_classes"],
    threads=1,  # more threads are slower for networks of this size
)

if __name__ == "__main__":
    recipe.main()
