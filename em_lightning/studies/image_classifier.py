"""ImageClassifier: an MLP or CNN with ReLUs, the baseline into which competitive activations are swapped."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from em_lightning.checks import check_at_least, check_choice
from em_lightning.metrics import DeadUnits, EffectiveRank, Redundancy
from em_lightning.modules import EMModule


class ImageClassifier(EMModule):
    r"""A classifier with two hidden layers, each a linear map and a ReLU, and metrics of its activations.

    :class:`~em_lightning.callbacks.SwapActivations` can replace ``activation1`` and ``activation2`` of its
    ``network``. In validation and test it logs accuracy, the expected calibration error with 15 bins, and for each of
    the two activations, as ``val/activation1/...``, dead units, redundancy and effective rank. A unit is dead if its
    variance is below 0.001 of the mean variance of its layer, as activations differ in scale. The units of a feature
    map are its channels, and its positions are items. The output is the logits (N, C).

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
        "linear1": nn.Conv2d(shape[0], width, 5, stride=2, padding=2),
        "activation1": nn.ReLU(),
        "linear2": nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        "activation2": nn.ReLU(),
        "flatten": nn.Flatten(),
        "head": nn.Linear(2 * width * positions, num_classes),
    }
