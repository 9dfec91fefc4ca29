"""Several small networks of one kind trained at once, as if each were alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from em_lightning.data import TensorBatches, TensorDataModule
from em_lightning.modules.layer import EnergyLayer


class Replicas(lightning.LightningModule):
    """Train R layers of energies at once: what differs is where they start, and the order of their data.

    A step of a network of this size is mostly the calls that it takes. Here one call serves all replicas: their
    parameters are stacked (R, ...), the objective is mapped over them by ``vmap``, and the optimizer acts element by
    element, so each replica goes the way that it would go alone, up to rounding. The layers given are views of the
    stacked parameters and stay usable. Their metrics are logged as ``<r>/val/...`` for r from 0 to R - 1.

    Args:
        layers: of the same class and arguments.

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
                f"layers are {[type(layer).__name__ for layer in layers]} with hyperparameters that differ; give "
                f"layers that are made alike, from different seeds"
            )
        stacked, _ = stack_module_state(list(layers))
        self.names = list(stacked)
        self.stacked = nn.ParameterList([nn.Parameter(stacked[name].detach()) for name in self.names])
        self.layers = nn.ModuleList(layers)
        # Not a submodule: it lends its code alone.
        self._one = [_Objective(copy.deepcopy(first))]
        for r, layer in enumerate(layers):
            for name, values in zip(self.names, self.stacked, strict=True):
                parameter = layer.get_parameter(name).requires_grad_(False)
                parameter.data = values.data[r]
            layer.log = partial(self._log_of, r)  # type: ignore[method-assign]

    def _log_of(self, replica: int, name: str, value: Any, **options: Any) -> None:
        self.log(f"{replica}/{name}", value, **options)

    def objectives(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each replica (R,), given its own batch: x (R, N, ...) and y (R, N)."""

        def objective(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return functional_call(self._one[0], parameters, (x, y))

        parameters = {f"layer.{name}": values for name, values in zip(self.names, self.stacked, strict=True)}
        return torch.vmap(objective)(parameters, x, y)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the sum of all losses, whose gradients do not mix, and each loss (R,)."""
        losses = self.objectives(*batch)
        return {"loss": losses.sum(), "losses": losses.detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the metrics of each replica on the same batch."""
        for layer in self.layers:
            layer.validation_step(batch, batch_idx)  # type: ignore[operator]

    def configure_optimizers(self) -> Any:
        """Return the layers' optimizer for the stacked parameters."""
        return self.layers[0].make_optimizer(list(self.stacked))  # type: ignore[operator]


class _Objective(nn.Module):
    """The objective of a layer as a forward, which is what can be called with other parameters."""

    def __init__(self, layer: EnergyLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer.step((x, y), "train")["loss"]


class ReplicaData(lightning.LightningDataModule):
    """The training batches of several data modules side by side, x (R, N, ...); the first one's validation.

    Args:
        sources: of the same data and batch size, with seeds of their own.
    """

    def __init__(self, sources: Sequence[TensorDataModule]) -> None:
        super().__init__()
        self.sources = list(sources)

    def train_dataloader(self) -> _SideBySide:
        """Return batches of all sources, each in its own order."""
        return _SideBySide([source.train_dataloader() for source in self.sources])

    def val_dataloader(self) -> TensorBatches:
        """Return the validation batches of the first source."""
        return self.sources[0].val_dataloader()


class _SideBySide:
    batch_sampler = None

    def __init__(self, loaders: Sequence[TensorBatches]) -> None:
        self.loaders = loaders

    @property
    def sampler(self) -> _SideBySide:
        return self

    def set_epoch(self, epoch: int) -> None:
        for loader in self.loaders:
            loader.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loaders[0])

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for indices in zip(*(loader.indices() for loader in self.loaders), strict=True):
            index = torch.stack(indices)
            parts = self.loaders[0].take(index.flatten())
            yield tuple(part.unflatten(0, index.shape) for part in parts)
