"""What all competition operators share: the registry, the temperature, and how arguments meet the energies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from em_lightning.competition.posterior import Posterior
from em_lightning.registry import Registry


class Tempered(nn.Module):
    """A module with a temperature that is fixed, learnable or scheduled.

    A fixed temperature is a plain number, so it costs nothing where it is 1 and is exact in every dtype; it is in the
    ``state_dict`` all the same, as a schedule may have moved it.

    Args:
        temperature: T > 0, which divides the energies: they stay within the range of the dtype (3.4e38 in float32), or
            responsibilities are NaN.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.

    Raises:
        ValueError: the temperature is not positive.
    """

    def __init__(self, temperature: float = 1.0, learnable: bool = False) -> None:
        super().__init__()
        check_temperature(temperature)
        self._temperature = float(temperature)
        self.log_temperature_ratio = nn.Parameter(torch.zeros(1)) if learnable else None

    @property
    def temperature(self) -> float | Tensor:
        """The temperature T: a number, or of shape (1,) where it is learnable. Assign a number to set it."""
        if self.log_temperature_ratio is None:
            return self._temperature
        return self._temperature * self.log_temperature_ratio.exp()

    @temperature.setter
    def temperature(self, value: float) -> None:
        check_temperature(value)
        self._temperature = float(value)
        if self.log_temperature_ratio is not None:
            with torch.no_grad():
                self.log_temperature_ratio.zero_()

    def get_extra_state(self) -> Tensor:
        """Return the temperature that the learnable ratio, if any, multiplies."""
        return torch.tensor([self._temperature], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        self._temperature = float(state)

    def extra_repr(self) -> str:
        """Return the settings that a reader needs."""
        learnable = ", learnable=True" if self.log_temperature_ratio is not None else ""
        return f"temperature={float(torch.as_tensor(self.temperature).detach()):g}{learnable}"


class Competition(Tempered):
    """Base class of the operators: a subclass defines :meth:`compete`.

    Args:
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the hypothesis axis, unless a call names another.
    """

    def __init__(self, temperature: float = 1.0, learnable: bool = False, dim: int = -1) -> None:
        super().__init__(temperature, learnable)
        self.dim = dim

    def forward(self, energies: Tensor, log_prior: Tensor | None = None, dim: int | None = None) -> Posterior:
        """Let the hypotheses compete.

        Args:
            energies: d, shape (..., K) with the hypotheses on axis ``dim``.
            log_prior: log prior weights, shape (K,) or one that broadcasts with the energies.
            dim: the hypothesis axis; the constructor's where it is left out.
        """
        return self.compete(energies, log_prior, self.dim if dim is None else dim)

    def compete(self, energies: Tensor, log_prior: Tensor | None, dim: int) -> Posterior:
        """Return the posterior at the module's temperature."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the settings that a reader needs."""
        return super().extra_repr() + (f", dim={self.dim}" if self.dim != -1 else "")


COMPETITIONS: Registry[Competition] = Registry("competition", "competitions", nn.Module)


def check_temperature(temperature: float | Tensor) -> None:
    """Refuse a temperature that is a number and not positive; a tensor's values are the caller's."""
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be positive; for the limit of zero use hardmin")


def widen(energies: Tensor) -> Tensor:
    """Return the energies in float32 where they are of half precision.

    Raises:
        TypeError: the energies are no floating-point tensor.
    """
    if not energies.is_floating_point():
        raise TypeError(f"energies are of dtype {energies.dtype}; give a floating-point tensor")
    return energies.float() if energies.dtype in (torch.float16, torch.bfloat16) else energies


def on_axis(weights: Tensor, energies: Tensor, dim: int) -> Tensor:
    """Return weights of shape (K,) laid along axis ``dim`` of the energies; other shapes broadcast as they are."""
    if weights.ndim != 1 or dim % energies.ndim == energies.ndim - 1:
        return weights.to(energies.dtype)
    return weights.to(energies.dtype).reshape([-1] + [1] * (energies.ndim - 1 - dim % energies.ndim))


def to_logits(energies: Tensor, temperature: float | Tensor, log_prior: Tensor | None, dim: int) -> Tensor:
    """Return -d / T + log_prior, with finite gradients where an energy of +inf excludes a hypothesis."""
    check_temperature(temperature)
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        # The derivative by T is d / T^2 times zero there: 0 * inf.
        excluded = torch.isposinf(energies)
        logits = (energies.masked_fill(excluded, 0.0) / -temperature.to(energies.dtype)).masked_fill(
            excluded, -torch.inf
        )
    elif isinstance(temperature, Tensor):
        logits = energies / -temperature.to(energies.dtype)
    else:
        logits = -energies if temperature == 1 else energies / -temperature
    return logits if log_prior is None else logits + on_axis(log_prior, energies, dim)


def scale_back(free: Tensor, temperature: float | Tensor, dim: int) -> Tensor:
    """Return T times a reduced quantity (...), for a temperature that broadcasts with the energies."""
    if not isinstance(temperature, Tensor):
        return free if temperature == 1 else free * temperature
    if temperature.numel() == 1 and temperature.ndim <= 1:
        return free * temperature.to(free.dtype).reshape(())
    return (free.unsqueeze(dim) * temperature.to(free.dtype)).squeeze(dim)
