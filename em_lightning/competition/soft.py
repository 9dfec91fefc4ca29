"""Softmin, the competition of implicit EM."""

from __future__ import annotations

import torch
from torch import Tensor

from em_lightning.competition.base import COMPETITIONS, Competition, scale_back, to_logits, widen
from em_lightning.competition.posterior import Posterior


def softmin(
    energies: Tensor, temperature: float | Tensor = 1.0, log_prior: Tensor | None = None, dim: int = -1
) -> Posterior:
    r"""Let hypotheses compete by the Gibbs distribution of their energies.

    F = -T log sum_k pi_k exp(-d_k / T) and r_k = dF/dd_k = pi_k exp(-d_k / T) / sum_j pi_j exp(-d_j / T), with
    prior weights pi = exp(log_prior). As T -> 0 the lowest energy takes all; as T -> inf, r tends to pi.

    An energy of +inf excludes its hypothesis: r = 0, and gradients stay finite. Where all are excluded nothing is
    responsible: F = +inf, r = 0 and the gradient is 0.

    Args:
        energies: d, shape (..., K) with the hypotheses on axis ``dim``; half precision is computed in float32.
        temperature: T > 0, a number or a tensor that broadcasts with the energies, of size 1 on axis ``dim``.
        log_prior: log pi, shape (K,) or one that broadcasts with the energies; it need not be normalized.
        dim: the hypothesis axis.

    Raises:
        ValueError: the temperature is a number and not positive.
        TypeError: the energies are no floating-point tensor.

    Example:
        >>> posterior = softmin(torch.tensor([0.0, 0.0, torch.inf]))
        >>> posterior.responsibilities
        tensor([0.5000, 0.5000, 0.0000])
        >>> posterior.free_energy
        tensor(-0.6931)
    """
    logits = to_logits(widen(energies), temperature, log_prior, dim)
    empty = logits.amax(dim, keepdim=True) == -torch.inf
    logits = logits.masked_fill(empty, 0.0)
    responsibilities = logits.softmax(dim).masked_fill(empty, 0.0)
    free = scale_back(-logits.logsumexp(dim), temperature, dim).masked_fill(empty.squeeze(dim), torch.inf)
    return Posterior(energies, responsibilities.to(energies.dtype), free.to(energies.dtype))


@COMPETITIONS.register("softmin")
class Softmin(Competition):
    """The module of :func:`softmin`: F = -T log sum_k pi_k exp(-d_k / T).

    Args:
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the hypothesis axis, unless a call names another.

    Example:
        >>> Softmin(temperature=2.0)(torch.tensor([1.0, 1.0])).responsibilities
        tensor([0.5000, 0.5000])
    """

    def compete(self, energies: Tensor, log_prior: Tensor | None, dim: int) -> Posterior:
        """Return the softmin posterior at the module's temperature."""
        return softmin(energies, self.temperature, log_prior, dim)
