"""Modules with one energy layer: EnergyLayer, DecoderFreeEncoder, SparseAutoencoder and EMClassifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from em_lightning.activations import NegLogSoftminActivation
from em_lightning.checks import check_at_least
from em_lightning.losses import EMLoss, WeightRedundancyLoss
from em_lightning.metrics import layer_metrics
from em_lightning.modules import EMModule


class EnergyLayer(EMModule):
    r"""One energy layer :math:`d = \mathrm{relu}(W x + b)` (low energy wins) with metrics.

    A subclass defines the terms whose sum is minimized, in :meth:`loss_terms`; it may override :meth:`energies`, or set
    another ``encoder``. In validation and test it logs :func:`~em_lightning.metrics.layer_metrics` of the energies and
    the redundancy of the prototypes W.

    Args:
        num_features: D.
        num_components: K, the number of competing units.
        **options: arguments of :class:`~em_lightning.modules.EMModule`, such as ``lr`` and ``optimizer``.

    Shape:
        - batch: x (N, ...) with D features per item, and labels y (N,).
        - ``energies(x)``: (N, K).
    """

    def __init__(self, num_features: int, num_components: int, **options: Any) -> None:
        super().__init__(**options)
        check_at_least(1, num_features=num_features, num_components=num_components)
        self.encoder = nn.Linear(num_features, num_components)
        self.add_metrics(("val", "test"), energies=layer_metrics())

    @property
    def prototypes(self) -> Tensor:
        """The weights (K, D) of the units."""
        return self.encoder.weight

    def energies(self, x: Tensor) -> Tensor:
        """Return the energies (N, K) of items (N, ...)."""
        return torch.relu(self.encoder(x.flatten(1)))

    def loss_terms(self, x: Tensor, y: Tensor, energies: Tensor, stage: str) -> dict[str, Tensor]:
        """Return the terms whose sum is minimized, by name."""
        raise NotImplementedError(f"{type(self).__name__} must define loss_terms(x, y, energies, stage)")

    def step(self, batch: Any, stage: str) -> dict[str, Tensor]:
        x, y = batch
        energies = self.energies(x)
        terms = self.loss_terms(x, y, energies, stage)
        loss: Any = sum(terms.values())
        terms = {"loss": loss, **terms}
        if stage != "train":
            self.metrics_of(stage)["energies"].update(energies)
            terms["weight_redundancy"] = WeightRedundancyLoss()(self.prototypes)
        return terms


class DecoderFreeEncoder(EnergyLayer):
    r"""A sparse encoder trained without a decoder, by free energy and volume control.

    The loss is :math:`-\sum_n \log \sum_j e^{-d_{nj}} - \sum_j \log(\mathrm{Var}(d_j) + 10^{-6})
    + \sum_{i \ne j} \mathrm{Corr}(d_i, d_j)^2`, with a weight for each term. The free energy is summed over the batch,
    so its relative weight grows with the batch size. The output is the energies (N, K).

    Example:
        >>> module = DecoderFreeEncoder(num_features=64, num_components=16)
        >>> module(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 16])
        >>> list(module.step((torch.rand(5, 64), None), "train"))
        ['loss', 'free_energy', 'variance', 'decorrelation']

    Source: Oursland, arXiv 2601.06478.
    """

    def __init__(
        self,
        num_features: int = 784,
        num_components: int = 64,
        free_energy: float = 1.0,
        variance: float = 1.0,
        decorrelation: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(num_features, num_components, **options)
        self.save_hyperparameters()
        self.loss = EMLoss(free_energy=free_energy, variance=variance, decorrelation=decorrelation)

    def forward(self, x: Tensor) -> Tensor:
        return self.energies(x)

    def loss_terms(self, x: Tensor, y: Tensor, energies: Tensor, stage: str) -> dict[str, Tensor]:
        return self.loss(energies)


class SparseAutoencoder(EnergyLayer):
    r"""The standard sparse autoencoder: activations :math:`a = \mathrm{relu}(W x + b)` and a linear decoder.

    ``energies(x)`` returns :math:`a`. The loss is :math:`\mathrm{MSE} + \lambda\,\mathrm{mean}|a|` with
    :math:`\lambda` = ``sparsity``: units do not compete. The output is the reconstruction (N, D).
    """

    def __init__(
        self, num_features: int = 784, num_components: int = 64, sparsity: float = 0.01, **options: Any
    ) -> None:
        super().__init__(num_features, num_components, **options)
        check_at_least(0, sparsity=sparsity)
        self.save_hyperparameters()
        self.sparsity = sparsity
        self.decoder = nn.Linear(num_components, num_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.energies(x))

    def loss_terms(self, x: Tensor, y: Tensor, energies: Tensor, stage: str) -> dict[str, Tensor]:
        error = functional.mse_loss(self.decoder(energies), x.flatten(1))
        return {"reconstruction": error, "sparsity": self.sparsity * energies.abs().mean()}


class EMClassifier(EnergyLayer):
    r"""A classifier with one hidden layer of energies and volume control on them.

    From the energies d (N, K), the activation is :math:`a = d + \log \sum_j e^{-d_j}`, or :math:`a = d` without
    ``neg_log_softmin``. A linear head and a LayerNorm turn a into logits (N, C). The loss is cross-entropy, in place of
    the free energy of :class:`DecoderFreeEncoder`, plus the variance and decorrelation losses of d, times
    ``weight * variance`` and ``weight * decorrelation``.

    Example:
        >>> module = EMClassifier(num_features=64, num_components=16)
        >>> module(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])
        >>> list(module.step((torch.rand(5, 64), torch.arange(5)), "train"))
        ['loss', 'cross_entropy', 'variance', 'decorrelation']

    Source: Oursland, 2026, github.com/alanoursland/implicit_em_in_neural_activations (supervised_study).
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
        **options: Any,
    ) -> None:
        super().__init__(num_features, num_components, **options)
        check_at_least(2, num_classes=num_classes)
        check_at_least(0, weight=weight)
        self.save_hyperparameters()
        self.activation = NegLogSoftminActivation() if neg_log_softmin else nn.Identity()
        self.head = nn.Sequential(nn.Linear(num_components, num_classes), nn.LayerNorm(num_classes))
        factors: dict[str, Any] = {"variance": weight * variance, "decorrelation": weight * decorrelation}
        self.loss = EMLoss(free_energy=0.0, **factors) if weight else None
        self.add_metrics(("val", "test"), accuracy=MulticlassAccuracy(num_classes, average="micro"))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.energies(x)))

    def loss_terms(self, x: Tensor, y: Tensor, energies: Tensor, stage: str) -> dict[str, Tensor]:
        logits = self.head(self.activation(energies))
        if stage != "train":
            self.metrics_of(stage)["accuracy"].update(logits, y)
        terms = {} if self.loss is None else self.loss(energies)
        return {"cross_entropy": functional.cross_entropy(logits, y), **terms}
