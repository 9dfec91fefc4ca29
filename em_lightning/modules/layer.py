"""What the modules with one watched layer of energies share."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any, Literal

import torch
from torch import Tensor, nn

from em_lightning.losses import weight_redundancy
from em_lightning.metrics import layer_metrics
from em_lightning.modules.base import EMModule


class EnergyLayer(EMModule):
    r"""One layer of energies, :math:`d = \mathrm{relu}(W x + b)`, low energy wins, with its metrics.

    A subclass says in :meth:`objective` what is minimized; it may override :meth:`energies`, or set another
    ``encoder``. Outside training :func:`~em_lightning.metrics.layer_metrics` of the energies are logged, and the
    redundancy of the prototypes W.

    Args:
        num_features: D.
        num_components: K, the units that compete.
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
        for name, value in {"num_features": num_features, "num_components": num_components}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.encoder = nn.Linear(num_features, num_components)
        self.metrics: Any = nn.ModuleDict({stage: layer_metrics(prefix=f"{stage}/") for stage in ("val", "test")})

    @property
    def prototypes(self) -> Tensor:
        """The weights (K, D) of the units."""
        return self.encoder.weight

    def energies(self, x: Tensor) -> Tensor:
        """Return the energies (N, K) of items (N, ...)."""
        return torch.relu(self.encoder(x.flatten(1)))

    def features(self, x: Tensor) -> Tensor:
        """Return what a linear probe reads of items (N, ...): the energies (N, K)."""
        return self.energies(x)

    def objective(self, x: Tensor, y: Tensor, energies: Tensor, stage: str) -> dict[str, Tensor]:
        """Return the terms whose sum is minimized, by name."""
        raise NotImplementedError(f"{type(self).__name__} must define objective(x, y, energies, stage)")

    def step(self, batch: Any, stage: str) -> dict[str, Tensor]:
        """Return the terms and their sum, and log what the energies are like outside training."""
        x, y = batch
        energies = self.energies(x)
        terms = self.objective(x, y, energies, stage)
        if stage != "train":
            self.metrics[stage].update(energies)
            self.log_dict(self.metrics[stage], batch_size=len(x))
            self.log(f"{stage}/weight_redundancy", weight_redundancy(self.prototypes), batch_size=len(x))
        return {"loss": reduce(add, terms.values()), **terms}
