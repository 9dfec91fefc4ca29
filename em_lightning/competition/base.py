"""Base classes with a temperature, the registry of competitions, conversion of energies to logits and posteriors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from em_lightning.competition.posterior import Posterior
from em_lightning.registry import Registry


class Tempered(nn.Module):
    """Module with an axis of hypotheses and a temperature that is fixed, learnable or scheduled.

    A fixed temperature is a Python number. It is part of the ``state_dict``, because a schedule may have changed it.

    Args:
        temperature: T > 0, divides the energies.
        learnable: make the temperature a positive parameter with initial value ``temperature``.
        dim: axis of the hypotheses or units, for instance 1 for the channels of images.
    """

    def __init__(self, temperature: float = 1.0, learnable: bool = False, dim: int = -1) -> None:
        super().__init__()
        self.log_temperature_ratio = nn.Parameter(torch.zeros(1)) if learnable else None
        self.temperature = temperature
        self.dim = dim

    @property
    def temperature(self) -> float | Tensor:
        """The temperature T: a number, or a tensor (1,) if it is learnable. Assign a number to set it."""
        if self.log_temperature_ratio is None:
            return self._temperature
        return self._temperature * self.log_temperature_ratio.exp()

    @temperature.setter
    def temperature(self, value: float) -> None:
        check_temperature(value)
        self._temperature = float(value)
        if self.log_temperature_ratio is not None:
            nn.init.zeros_(self.log_temperature_ratio)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self._temperature], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self._temperature = float(state)

    def extra_repr(self) -> str:
        learnable = ", learnable=True" if self.log_temperature_ratio is not None else ""
        dim = f", dim={self.dim}" if self.dim != -1 else ""
        return f"temperature={torch.as_tensor(self.temperature).item():g}{learnable}{dim}"


class Competition(Tempered):
    """Base class of modules that call a competition function, with the arguments of :class:`Tempered`.

    Attributes:
        function: function that returns a posterior, given energies, temperature, log_prior, dim and the options.
        options: names of the attributes that are passed to the function as keyword arguments.
        couples_items: whether the posterior of an item depends on the other items of its set; the function then
            accepts ``item_dim``, the axis of the items, and ``mask``, which is False for items to ignore.
    """

    function: Callable[..., Posterior]
    options: tuple[str, ...] = ()
    couples_items: bool = False

    def forward(
        self, energies: Tensor, log_prior: Tensor | None = None, dim: int | None = None, **changed: Any
    ) -> Posterior:
        """Return the posterior of the function; ``dim`` and further keyword arguments replace those of the module."""
        options = {name: getattr(self, name) for name in self.options}
        dim = self.dim if dim is None else dim
        return self.function(energies, self.temperature, log_prior, dim, **{**options, **changed})

    def extra_repr(self) -> str:
        options = [f"{name}={getattr(self, name)}, " for name in self.options if getattr(self, name) is not None]
        return "".join(options) + super().extra_repr()


COMPETITIONS: Registry[Competition] = Registry("competition", "competitions", nn.Module)


def check_temperature(temperature: float | Tensor) -> None:
    """Raise ValueError for a number that is not positive; the values of a tensor are not checked."""
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be positive; use hardmin for the limit T -> 0")


def widen(energies: Tensor) -> Tensor:
    """Convert half-precision energies to float32; raise TypeError for a dtype that is not floating-point."""
    if not energies.is_floating_point():
        raise TypeError(f"the input of dtype {energies.dtype} must be floating-point")
    return energies.float() if energies.dtype in (torch.float16, torch.bfloat16) else energies


def align(dim: int, values: Tensor, like: Tensor) -> Tensor:
    """Return ``values`` in the dtype of ``like``; a vector (K,) is reshaped to broadcast along axis ``dim``."""
    values = values.to(like.dtype)
    return values.reshape([-1] + [1] * (like.ndim - 1 - dim % like.ndim)) if values.ndim == 1 else values


def to_logits(energies: Tensor, temperature: float | Tensor, log_prior: Tensor | None, dim: int) -> Tensor:
    """Return -d / T + log_prior, with finite gradients for energies of +inf."""
    check_temperature(temperature)
    if not isinstance(temperature, Tensor):
        logits = -energies if temperature == 1 else energies / -temperature
    else:
        # Without the mask, the derivative with respect to T would be infinity times zero.
        excluded = torch.isposinf(energies)
        scaled = energies.masked_fill(excluded, 0.0) / -temperature.to(energies.dtype)
        logits = scaled.masked_fill(excluded, -torch.inf)
    return logits if log_prior is None else logits + align(dim, log_prior, energies)


def to_posterior(
    energies: Tensor, temperature: float | Tensor, dim: int, log_sum: Tensor, responsibilities: Tensor
) -> Posterior:
    """Return the posterior with free energy -T ``log_sum``, which has the groups or nothing on axis ``dim``."""
    minus_t = -temperature.to(log_sum.dtype) if isinstance(temperature, Tensor) else -temperature
    has_groups = log_sum.ndim == energies.ndim  # otherwise restore axis ``dim``, on which temperatures have size 1
    free = log_sum * minus_t if has_groups else (log_sum.unsqueeze(dim) * minus_t).squeeze(dim)
    return Posterior(energies, responsibilities.to(energies.dtype), free.to(energies.dtype))
