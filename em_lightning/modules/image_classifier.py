"""An ordinary image classifier with ReLUs: what competitive activations are swapped into, and compared by."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from em_lightning.metrics import DeadUnits, EffectiveRank, Redundancy
from em_lightning.modules.base import EMModule

NETWORKS = ("mlp", "cnn")
_ACTIVATIONS = ("activation1", "activation2")


class ImageClassifier(EMModule):
    r"""A plain classifier of two hidden layers, each a linear map and a ReLU, that measures what its activations do.

    It knows nothing of EM: :class:`~em_lightning.callbacks.SwapActivations` replaces ``activation1`` and
    ``activation2`` of its ``network``. Outside training it logs, besides cross-entropy and accuracy, the expected
    calibration error in 15 bins of confidence, and for each of the two, as ``val/activation1/...``, its dead units,
    redundancy and effective rank. As activations differ in scale, a unit is dead where its variance is below 0.001 of
    the mean of its layer. The units of a feature map are its channels, and each place of it is an item.

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
        >>> import torch
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
        self.scores: Any = nn.ModuleDict({stage: _scores(stage, num_classes) for stage in ("val", "test")})
        self.units: Any = nn.ModuleDict(
            {f"{stage}/{name}": _unit_metrics(f"{stage}/{name}/") for stage in ("val", "test") for name in _ACTIVATIONS}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, C) of images (N, ...)."""
        return self.network(x)

    def step(self, batch: Any, stage: str) -> Tensor:
        """Return the cross-entropy, and log the metrics outside training."""
        x, y = batch
        if stage == "train":
            return functional.cross_entropy(self.network(x), y)
        logits = x
        for name, layer in self.network.named_children():
            logits = layer(logits)
            if name in _ACTIVATIONS:
                metrics = self.units[f"{stage}/{name}"]
                metrics.update(logits)
                self.log_dict(metrics, batch_size=len(x))
        self.scores[stage].update(logits.softmax(-1), y)
        self.log_dict(self.scores[stage], batch_size=len(x))
        return functional.cross_entropy(logits, y)


def _scores(stage: str, num_classes: int) -> MetricCollection:
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15),
        },
        prefix=f"{stage}/",
        compute_groups=False,
    )


def _unit_metrics(prefix: str) -> MetricCollection:
    metrics: dict[str, Any] = {
        "dead_units": DeadUnits(threshold=1e-3, relative=True, dim=1),
        "redundancy": Redundancy(dim=1),
        "effective_rank": EffectiveRank(dim=1),
    }
    return MetricCollection(metrics, prefix=prefix, compute_groups=[list(metrics)])


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
