"""An ordinary image classifier with ReLUs: what competitive activations are swapped into, and compared by."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from em_lightning.metrics import DeadUnits, EffectiveRank, Redundancy
from em_lightning.modules.base import EMModule

NETWORKS = ("mlp", "cnn")


class ImageClassifier(EMModule):
    r"""A plain classifier of two hidden layers, each a linear map and a ReLU, that measures what its activations do.

    It knows nothing of EM: :class:`~em_lightning.callbacks.SwapActivations` replaces ``activation1`` and
    ``activation2`` of its ``network``. At the test it logs, besides cross-entropy and accuracy, the expected
    calibration error in 15 bins of confidence; the mean :math:`\mathrm{Corr}_{ij}^2` over pairs of units and the
    effective rank of the activations that the head reads, as ``test/redundancy`` and ``test/effective_rank``; and the
    dead units of both layers. As activations differ in scale, a unit is dead where its variance is below 0.001 of the
    mean of its layer. The units of a feature map are its channels, and each place of it is an item.

    Args:
        shape: of an image, channels first.
        num_classes: C.
        network: ``"mlp"``, two layers of ``width`` units; or ``"cnn"``, two convolutions of kernel 5 and 3 and stride 2
            with ``width`` and 2 ``width`` channels.
        width: 128 for ``"mlp"`` and 8 for ``"cnn"`` unless given.
        lr: learning rate of Adam.

    Shape:
        - batch: x (N, \*shape), and labels y (N,).
        - ``forward(x)``: logits (N, C).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> module = ImageClassifier((1, 8, 8), network="cnn")
        >>> module(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])
        >>> list(dict(module.network.named_children()))
        ['linear1', 'activation1', 'linear2', 'activation2', 'flatten', 'head']
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
        if network not in NETWORKS:
            raise ValueError(f"network={network!r} is unknown; choose 'mlp' or 'cnn'")
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes} must be at least 2")
        if width is not None and width < 1:
            raise ValueError(f"width={width} must be at least 1")
        self.save_hyperparameters()
        layers = _mlp(shape, num_classes, width or 128) if network == "mlp" else _cnn(shape, num_classes, width or 8)
        self.network = nn.Sequential(OrderedDict(layers))
        self.accuracy: Any = nn.ModuleDict(
            {stage: MulticlassAccuracy(num_classes, average="micro") for stage in ("val", "test")}
        )
        self.calibration = MulticlassCalibrationError(num_classes, n_bins=15)
        self.dead: Any = nn.ModuleDict(
            {name: DeadUnits(threshold=1e-3, relative=True, dim=1) for name in ("activation1", "activation2")}
        )
        self.redundancy, self.effective_rank = Redundancy(dim=1), EffectiveRank(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, C) of images (N, ...)."""
        return self.network(x)

    def step(self, batch: Any, stage: str) -> Tensor:
        """Return the cross-entropy, and log the metrics outside training."""
        x, y = batch
        if stage == "train":
            return functional.cross_entropy(self.network(x), y)
        logits, activations = x, {}
        for name, layer in self.network.named_children():
            logits = layer(logits)
            activations[name] = logits
        self.accuracy[stage].update(logits, y)
        self.log(f"{stage}/accuracy", self.accuracy[stage], batch_size=len(x))
        if stage == "test":
            self.calibration.update(logits.softmax(-1), y)
            for name, metric in self.dead.items():
                metric.update(activations[name])
            for metric in (self.redundancy, self.effective_rank):
                metric.update(activations["activation2"])
        return functional.cross_entropy(logits, y)

    def on_test_epoch_end(self) -> None:
        """Log what was measured of the activations."""
        units = len(self.redundancy.moments) - 1
        self.log("test/calibration_error", self.calibration)
        self.log("test/dead_units", torch.stack([metric.compute() for metric in self.dead.values()]).sum())
        self.log("test/redundancy", self.redundancy.compute() / max(units * (units - 1), 1))
        self.log("test/effective_rank", self.effective_rank.compute())
        for metric in (*self.dead.values(), self.redundancy, self.effective_rank):
            metric.reset()


def _mlp(shape: Sequence[int], num_classes: int, width: int) -> list[tuple[str, nn.Module]]:
    return [
        ("flatten", nn.Flatten()),
        ("linear1", nn.Linear(math.prod(shape), width)),
        ("activation1", nn.ReLU()),
        ("linear2", nn.Linear(width, width)),
        ("activation2", nn.ReLU()),
        ("head", nn.Linear(width, num_classes)),
    ]


def _cnn(shape: Sequence[int], num_classes: int, width: int) -> list[tuple[str, nn.Module]]:
    height, breadth = (math.ceil(math.ceil(size / 2) / 2) for size in shape[1:])
    return [
        ("linear1", nn.Conv2d(shape[0], width, 5, stride=2, padding=2)),
        ("activation1", nn.ReLU()),
        ("linear2", nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)),
        ("activation2", nn.ReLU()),
        ("flatten", nn.Flatten()),
        ("head", nn.Linear(2 * width * height * breadth, num_classes)),
    ]
