"""EMClassifier: a classifier with a competitive hidden layer and volume control as an auxiliary loss."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from em_lightning.activations import NegLogSoftminActivation
from em_lightning.losses import EMLoss
from em_lightning.modules.checks import check_at_least
from em_lightning.modules.layer import EnergyLayer


class EMClassifier(EnergyLayer):
    r"""A classifier with one hidden layer of energies and volume control on them.

    With :math:`d = \mathrm{relu}(W x + b)`, :math:`y = d + \log \sum_j e^{-d_j}` (or :math:`y = d`) and logits
    :math:`\mathrm{LayerNorm}(V y + c)`, the loss is cross-entropy :math:`+ \lambda\,(` variance + decorrelation of d
    :math:`)`. Cross-entropy takes the place of the free energy of :class:`DecoderFreeEncoder`.

    Args:
        num_features: D.
        num_components: K.
        num_classes: C.
        neg_log_softmin: whether the head reads :math:`d + \log \sum_j e^{-d_j}` instead of d.
        weight: lambda; 0 disables the auxiliary loss.
        variance: weight, inside lambda, of the term against dead units.
        decorrelation: weight, inside lambda, of the term against redundant units.
        terms: further terms or arguments of :class:`~em_lightning.EMLoss`, inside lambda.
        lr: learning rate.
        optimizer: ``"adam"`` or ``"sgd"``.

    Shape:
        - batch: x (N, ...) of D features in all, and labels y (N,).
        - ``forward(x)``: logits (N, C).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> module = EMClassifier(num_features=64, num_components=16)
        >>> module(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])
        >>> list(module.step((torch.rand(5, 64), torch.arange(5)), "train"))
        ['loss', 'cross_entropy', 'variance', 'decorrelation']

    Source: Oursland, the supervised study of implicit EM.
    """

    def __init__(
        self,
        num_features: int = 784,
        num_components: int = 25,
        num_classes: int = 10,
        neg_log_softmin: bool = True,
        weight: float = 1e-3,
        variance: float = 1.0,
        decorrelation: float = 1.0,
        terms: dict[str, Any] | None = None,
        lr: float = 1e-3,
        optimizer: Literal["adam", "sgd"] = "adam",
    ) -> None:
        super().__init__(num_features, num_components, lr, optimizer)
        check_at_least(2, num_classes=num_classes)
        check_at_least(0, weight=weight)
        self.save_hyperparameters()
        self.weight = weight
        self.activation = NegLogSoftminActivation() if neg_log_softmin else nn.Identity()
        self.head = nn.Sequential(nn.Linear(num_components, num_classes), nn.LayerNorm(num_classes))
        self.loss = None
        if weight:
            weights = {"free_energy": 0.0, "variance": variance, "decorrelation": decorrelation}
            self.loss = EMLoss(**{**weights, **(terms or {})})
            self.loss.weights = {name: weight * inner for name, inner in self.loss.weights.items()}
        self.add_metrics(("val", "test"), accuracy=MulticlassAccuracy(num_classes, average="micro"))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, C) of items (N, ...)."""
        return self.head(self.activation(self.energies(x)))

    def objective(self, x: Tensor, y: Tensor, energies: Tensor, stage: str) -> dict[str, Tensor]:
        """Return the cross-entropy, and the weighted volume control of the energies."""
        logits = self.head(self.activation(energies))
        if stage != "train":
            self.metrics_of(stage)["accuracy"].update(logits, y)
        terms = {} if self.loss is None else self.loss(energies)
        return {"cross_entropy": functional.cross_entropy(logits, y), **terms}
