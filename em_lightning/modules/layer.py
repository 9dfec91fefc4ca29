"""EnergyLayer, the base class of modules with one layer of energies and metrics of it."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any, Literal

import torch
from torch import Tensor, nn

from em_lightning.losses import WeightRedundancyLoss
from em_lightning.metrics import layer_metrics
from em_lightning.modules.base import EMModule
from em_lightning.modules.checks import check_at_least


class EnergyLayer(EMModule):
    r"""One layer of energies, :math:`d = \mathrm{relu}(W x + b)`, low energy wins, with its metrics.

    A subclass defines the terms that are minimized in :meth:`objective`; it may override :meth:`energies`, or set
    another ``encoder``. In validation and test it logs :func:`~em_lightning.metrics.layer_metrics` of the energies and
    the redundancy of the prototypes W.

    Args:
        num_features: D.
        num_components: K, the competing units.
        lr: learning rate.
        optimizer: ``"adam"`` or ``"sgd"``.

    Shape:
        - batch: x (N, ...) of D features in all, and labels y (N,).
        - ``energies(x)``: (N, K).
    """

    def __init__(
        self, num_features: int, num_components: int, lr: float = 1e-3, optimizer: Literal["adam", "sgd"] = "adam"
    ) -> None:
        super().__init__(lr, optimizer=optimizer)
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

    def objective(self, x: Tensor, y: Tensor, energies: Tensor, stage: str) -> dict[str, Tensor]:
        """Return the terms whose sum is minimized, by name."""
        raise NotImplementedError(f"{type(self).__name__} must define objective(x, y, energies, stage)")

    def step(self, batch: Any, stage: str) -> dict[str, Tensor]:
        """Return the terms and their sum; outside training, update the metrics."""
        x, y = batch
        energies = self.energies(x)
        terms = self.objective(x, y, energies, stage)
        terms = {"loss": reduce(add, terms.values()), **terms}
        if stage != "train":
            self.metrics_of(stage)["energies"].update(energies)
            terms["weight_redundancy"] = WeightRedundancyLoss()(self.prototypes)
        return terms
