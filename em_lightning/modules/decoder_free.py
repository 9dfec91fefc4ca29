"""DecoderFreeEncoder: a sparse encoder with one layer, trained by free energy and volume control."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from em_lightning.losses import EMLoss
from em_lightning.modules.layer import EnergyLayer


class DecoderFreeEncoder(EnergyLayer):
    r"""A sparse encoder trained without a decoder, by free energy and volume control.

    With energies :math:`d = \mathrm{relu}(W x + b)` the loss is
    :math:`-\sum_n \log \sum_j e^{-d_{nj}} - \sum_j \log(\mathrm{Var}(d_j) + 10^{-6})
    + \sum_{i \ne j} \mathrm{Corr}(d_i, d_j)^2`. The free energy is summed over the batch, so its relative
    weight grows with the batch size.

    Args:
        num_features: D.
        num_components: K.
        free_energy: weight of the free energy.
        variance: weight of the term against dead units.
        decorrelation: weight of the term against redundant units.
        terms: further terms or arguments of :class:`~em_lightning.EMLoss`, such as
            ``{"variance": 0, "bounded_variance": 1}``; they override the three weights.
        lr: learning rate.
        optimizer: ``"adam"`` or ``"sgd"``.

    Shape:
        - batch: x (N, ...) of D features in all, and labels y (N,), not used.
        - ``forward(x)``: energies (N, K).

    Example:
        >>> import torch
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
        terms: dict[str, Any] | None = None,
        lr: float = 1e-3,
        optimizer: Literal["adam", "sgd"] = "adam",
    ) -> None:
        super().__init__(num_features, num_components, lr, optimizer)
        self.save_hyperparameters()
        weights = {"free_energy": free_energy, "variance": variance, "decorrelation": decorrelation}
        self.loss = EMLoss(**{**weights, **(terms or {})})

    def forward(self, x: Tensor) -> Tensor:
        """Return the energies (N, K) of items (N, ...)."""
        return self.energies(x)

    def objective(self, x: Tensor, y: Tensor, energies: Tensor, stage: str) -> dict[str, Tensor]:
        """Return free energy and volume control."""
        return self.loss(energies)
