"""Replicas: train R small networks of one class in parallel with vmap, each as if it were trained alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from em_lightning.modules import EnergyLayer


class Replicas(lightning.LightningModule):
    """Train R layers of energies at once, from different starts and with different orders of the data.

    A training step of a small network is dominated by call overhead, which the replicas share: their parameters are
    stacked (R, ...), the objective is mapped over them by ``vmap``, and the optimizer acts elementwise, so that each
    replica trains as it would alone, up to rounding. The parameters of the given layers become views of the stacked
    ones. During a fit their metrics are logged as ``<r>/val/...`` for r from 0 to R - 1. A training batch is a list of
    one batch per replica, as a list of R loaders gives it.

    Args:
        layers: layers of the same class with the same hyperparameters.

    Raises:
        ValueError: the layers differ in class or hyperparameters.

    Example:
        >>> from em_lightning.modules import DecoderFreeEncoder
        >>> replicas = Replicas([DecoderFreeEncoder(num_features=9, num_components=4) for _ in range(3)])
        >>> replicas.objectives(torch.rand(3, 5, 9), torch.zeros(3, 5)).shape
        torch.Size([3])
    """

    def __init__(self, layers: Sequence[EnergyLayer]) -> None:
        super().__init__()
        first = layers[0]
        if any(type(layer) is not type(first) or layer.hparams != first.hparams for layer in layers):
            raise ValueError(
                "layers must have the same class and hyperparameters, got "
                f"{[(type(layer).__name__, dict(layer.hparams)) for layer in layers]}"
            )
        stacked, _ = stack_module_state(list(layers))
        self.names = list(stacked)
        self.stacked = nn.ParameterList([nn.Parameter(stacked[name].detach()) for name in self.names])
        self.layers = nn.ModuleList(layers)
        # In a tuple, so that its parameters are not registered a second time.
        self._template = (_Objective(copy.deepcopy(first)),)
        for r, layer in enumerate(layers):
            for name, values in zip(self.names, self.stacked, strict=True):
                parameter = layer.get_parameter(name).requires_grad_(False)
                parameter.data = values.data[r]

    def setup(self, stage: str) -> None:
        """Let each layer log under its number."""
        for r, layer in enumerate(self.layers):
            layer.log = partial(self._log_of, r)  # type: ignore[assignment]

    def teardown(self, stage: str) -> None:
        """Let each layer log under its own names again."""
        for layer in self.layers:
            del layer.log

    def _log_of(self, replica: int, name: str, value: Any, **options: Any) -> None:
        self.log(f"{replica}/{name}", value, **options)

    def objectives(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each replica (R,), given its own batch: x (R, N, ...) and y (R, N)."""

        def objective(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return functional_call(self._template[0], parameters, (x, y))

        parameters = {f"layer.{name}": values for name, values in zip(self.names, self.stacked, strict=True)}
        return torch.vmap(objective)(parameters, x, y)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the sum of all losses, whose gradient is each replica's own gradient, and each loss (R,)."""
        x, y = (torch.stack(parts) for parts in zip(*batch, strict=True))
        losses = self.objectives(x, y)
        return {"loss": losses.sum(), "losses": losses.detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the metrics of each replica on the same batch."""
        for layer in self.layers:
            layer.validation_step(batch, batch_idx)  # type: ignore[operator]

    def configure_optimizers(self) -> Any:
        """Return the layers' optimizer for the stacked parameters."""
        return self.layers[0].make_optimizer(list(self.stacked))  # type: ignore[operator]


class _Objective(nn.Module):
    """The objective of a layer as a ``forward``, as ``functional_call`` requires."""

    def __init__(self, layer: EnergyLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer.step((x, y), "train")["loss"]
