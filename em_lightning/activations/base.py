"""What all activations share: a temperature, an axis, and the generic path beside the closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from em_lightning.competition import Posterior
from em_lightning.competition.base import Tempered
from em_lightning.registry import Registry


class Activation(Tempered):
    """Base class of the activations: shape-preserving posterior summaries.

    A subclass defines the hypotheses in :meth:`posterior` and the summary in :meth:`summarize`; that is a whole
    activation. Where a closed form exists it also defines :meth:`closed_form`, which :meth:`forward` then takes.
    Half precision is computed in float32.

    Args:
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the axis of the units (features or channels): -1, or 1 for images.

    Attributes:
        competes: whether the units on ``dim`` compete with each other.

    Example:
        >>> from em_lightning.competition import softmin
        >>> class Certainty(Activation):
        ...     competes = True
        ...
        ...     def posterior(self, z):
        ...         return softmin(-z, self.temperature, dim=self.dim)
        ...
        ...     def summarize(self, z, posterior):
        ...         return z * posterior.responsibilities.square()
        >>> Certainty()(torch.tensor([[2.0, 2.0]]))
        tensor([[0.5000, 0.5000]])
    """

    competes: bool = True

    def __init__(self, temperature: float = 1.0, learnable: bool = False, dim: int = -1) -> None:
        super().__init__(temperature, learnable)
        self.dim = dim

    def forward(self, z: Tensor) -> Tensor:
        """Return the activation of pre-activations z of any shape, in the same shape and dtype."""
        if not z.is_floating_point():
            raise TypeError(f"z is of dtype {z.dtype}; give a floating-point tensor")
        if self.competes and not -z.dim() <= self.dim < z.dim():
            raise ValueError(f"dim={self.dim} is no axis of z of shape {tuple(z.shape)}; name the axis of the units")
        if z.dtype in (torch.float16, torch.bfloat16):
            return self.closed_form(z.float()).to(z.dtype)
        return self.closed_form(z)

    def posterior(self, z: Tensor) -> Posterior:
        """Return the competition that the activation summarizes."""
        raise NotImplementedError

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        """Return the statistic of the posterior that flows forward."""
        raise NotImplementedError

    def generic(self, z: Tensor) -> Tensor:
        """Return the activation by its definition: energies, competition, posterior, statistic."""
        return self.summarize(z, self.posterior(z))

    def closed_form(self, z: Tensor) -> Tensor:
        """Return the same number by a shorter way, where there is one."""
        return self.generic(z)

    def divided(self, z: Tensor) -> Tensor:
        """Return z / T, and z itself where T is fixed at 1."""
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            return z / temperature.to(z.dtype)
        return z if temperature == 1 else z / temperature

    def extra_repr(self) -> str:
        """Return the settings that a reader needs."""
        return super().extra_repr() + (f", dim={self.dim}" if self.dim != -1 else "")


ACTIVATIONS: Registry[Activation] = Registry("activation", "activations", nn.Module)
