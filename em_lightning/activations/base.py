"""Base class and registry of the activations."""

from __future__ import annotations

from torch import Tensor, nn

from em_lightning.competition import Posterior, Tempered
from em_lightning.competition.base import widen
from em_lightning.registry import Registry


class Activation(Tempered):
    """Base class of the activations: shape-preserving summaries of a posterior.

    A subclass defines the hypotheses and their competition in :meth:`posterior` and the statistic in :meth:`summarize`.
    Half-precision inputs are computed in float32. Arguments are those of :class:`Tempered`.

    Attributes:
        competes: whether the units on ``dim`` compete with each other.

    Example:
        >>> import torch
        >>> from em_lightning.competition import softmin
        >>> class Certainty(Activation):
        ...     def posterior(self, z):
        ...         return softmin(-z, self.temperature, dim=self.dim)
        ...
        ...     def summarize(self, z, posterior):
        ...         return z * posterior.responsibilities.square()
        >>> Certainty()(torch.tensor([[2.0, 2.0]]))
        tensor([[0.5000, 0.5000]])
    """

    competes: bool = True

    def forward(self, z: Tensor) -> Tensor:
        """Return the activation of z, in its shape and dtype; ValueError if units compete and z lacks axis ``dim``."""
        if self.competes and not -z.dim() <= self.dim < z.dim():
            raise ValueError(f"dim={self.dim} must be an axis of z, which has shape {tuple(z.shape)}")
        return self.closed_form(widen(z)).to(z.dtype)

    def posterior(self, z: Tensor) -> Posterior:
        """Return the posterior that the activation summarizes."""
        raise NotImplementedError

    def summarize(self, z: Tensor, posterior: Posterior) -> Tensor:
        """Return the statistic of the posterior that is the output."""
        raise NotImplementedError

    def generic(self, z: Tensor) -> Tensor:
        """Return the activation computed from its definition: energies, competition, posterior, statistic."""
        return self.summarize(z, self.posterior(z))

    def closed_form(self, z: Tensor) -> Tensor:
        """Return the value of :meth:`generic`; override it where there is a cheaper or more accurate formula."""
        return self.generic(z)

    def tempered(self, z: Tensor) -> Tensor:
        """Return z / T, or z itself if T is fixed at 1."""
        return times(z, 1 / self.temperature)


def times(z: Tensor, factor: float | Tensor) -> Tensor:
    """Return the product in the dtype of z, or z itself if the factor is the number 1."""
    if isinstance(factor, Tensor):
        return z * factor.to(z.dtype)
    return z if factor == 1 else z * factor


ACTIVATIONS: Registry[Activation] = Registry("activation", "activations", nn.Module)
