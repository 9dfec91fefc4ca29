"""The competitions with exact zeros: sparsemax, 1.5-entmax and, outside the scope, the hard minimum."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from em_lightning.competition.base import COMPETITIONS, Competition, scale_back, to_logits, widen
from em_lightning.competition.entropic import entmax
from em_lightning.competition.posterior import Posterior


class ScopeWarning(UserWarning):
    """A user leaves the scope of implicit EM; the message names the assumption that no longer holds."""


def _sparse(
    energies: Tensor, temperature: float | Tensor, log_prior: Tensor | None, dim: int, alpha: float
) -> Posterior:
    value, responsibilities = entmax(to_logits(widen(energies), temperature, log_prior, dim), dim, alpha)
    free = scale_back(-value, temperature, dim)
    return Posterior(energies, responsibilities.to(energies.dtype), free.to(energies.dtype))


def sparsemin(
    energies: Tensor, temperature: float | Tensor = 1.0, log_prior: Tensor | None = None, dim: int = -1
) -> Posterior:
    r"""Let hypotheses compete by sparsemax: those far above the lowest energy have r = 0 exactly.

    F = min_r <r, d> - T (H(r) + <r, log_prior>) over the simplex, with the Tsallis entropy H(r) = 1/2 sum(r - r^2);
    its gradient is r = relu(log_prior - d / T - tau), with tau such that r sums to 1. A hypothesis of r = 0 receives
    no gradient until its energy comes within about T of the lowest.

    Args:
        energies: d, shape (..., K) with the hypotheses on axis ``dim``.
        temperature: T > 0, a number or a tensor that broadcasts with the energies, of size 1 on axis ``dim``.
        log_prior: added to -d / T, shape (K,) or one that broadcasts with the energies.
        dim: the hypothesis axis.

    Example:
        >>> posterior = sparsemin(torch.tensor([0.0, 0.5, 2.0]))
        >>> posterior.responsibilities, posterior.free_energy
        (tensor([0.7500, 0.2500, 0.0000]), tensor(-0.0625))

    Source: Martins and Astudillo, "From softmax to sparsemax", 2016.
    """
    return _sparse(energies, temperature, log_prior, dim, 2.0)


@COMPETITIONS.register("sparsemin")
class Sparsemin(Competition):
    """The module of :func:`sparsemin`: F = min_r <r, d> - T H(r), H(r) = 1/2 sum(r - r^2).

    Args:
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the hypothesis axis, unless a call names another.

    Example:
        >>> Sparsemin()(torch.tensor([0.0, 0.5, 2.0])).responsibilities
        tensor([0.7500, 0.2500, 0.0000])
    """

    def compete(self, energies: Tensor, log_prior: Tensor | None, dim: int) -> Posterior:
        """Return the sparsemin posterior at the module's temperature."""
        return sparsemin(energies, self.temperature, log_prior, dim)


def entmin(
    energies: Tensor, temperature: float | Tensor = 1.0, log_prior: Tensor | None = None, dim: int = -1
) -> Posterior:
    r"""Let hypotheses compete by 1.5-entmax, half-way between softmin and sparsemin.

    F = min_r <r, d> - T (H(r) + <r, log_prior>) over the simplex, with the Tsallis entropy
    H(r) = 4/3 sum(r - r^1.5); its gradient is r = relu((log_prior - d / T) / 2 - tau)^2. Far hypotheses have r = 0.

    Args:
        energies: d, shape (..., K) with the hypotheses on axis ``dim``.
        temperature: T > 0, a number or a tensor that broadcasts with the energies, of size 1 on axis ``dim``.
        log_prior: added to -d / T, shape (K,) or one that broadcasts with the energies.
        dim: the hypothesis axis.

    Example:
        >>> entmin(torch.tensor([0.0, 0.5, 3.0])).responsibilities
        tensor([0.6740, 0.3260, 0.0000])

    Source: Peters, Niculae and Martins, "Sparse sequence-to-sequence models", 2019.
    """
    return _sparse(energies, temperature, log_prior, dim, 1.5)


@COMPETITIONS.register("entmin")
class Entmin(Competition):
    """The module of :func:`entmin`: F = min_r <r, d> - T H(r), H(r) = 4/3 sum(r - r^1.5).

    Args:
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the hypothesis axis, unless a call names another.

    Example:
        >>> Entmin()(torch.tensor([0.0, 0.5, 3.0])).responsibilities
        tensor([0.6740, 0.3260, 0.0000])
    """

    def compete(self, energies: Tensor, log_prior: Tensor | None, dim: int) -> Posterior:
        """Return the entmin posterior at the module's temperature."""
        return entmin(energies, self.temperature, log_prior, dim)


def hardmin(
    energies: Tensor, temperature: float | Tensor = 1.0, log_prior: Tensor | None = None, dim: int = -1
) -> Posterior:
    """Give all responsibility to the lowest energy: outside the scope of implicit EM, and it warns so.

    F = min_k d_k - T log pi_k; hypotheses that tie share the responsibility. The temperature matters only beside a
    prior.

    Args:
        energies: d, shape (..., K) with the hypotheses on axis ``dim``.
        temperature: T > 0, which multiplies the prior's part.
        log_prior: log pi, shape (K,) or one that broadcasts with the energies.
        dim: the hypothesis axis.

    Warns:
        ScopeWarning: always; softmin at a low temperature stays inside.

    Example:
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", ScopeWarning)
        ...     hardmin(torch.tensor([1.0, 0.0])).responsibilities
        tensor([0., 1.])
    """
    _warn_hard("hardmin")
    return _hardmin(energies, temperature, log_prior, dim)


def _hardmin(energies: Tensor, temperature: float | Tensor, log_prior: Tensor | None, dim: int) -> Posterior:
    logits = to_logits(widen(energies), temperature, log_prior, dim)
    top = logits.amax(dim, keepdim=True)
    best = ((logits == top) & (top > -torch.inf)).to(logits.dtype)
    responsibilities = best / best.sum(dim, keepdim=True).clamp_min(1.0)
    free = scale_back(-top.squeeze(dim), temperature, dim)
    return Posterior(energies, responsibilities.to(energies.dtype), free.to(energies.dtype))


def _warn_hard(name: str) -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"{name} is hard gating, outside the scope of implicit EM: one hypothesis has all responsibility, the "
            f"others get no gradient and cannot recover; softmin at a low temperature stays inside",
            ScopeWarning,
            stacklevel=3,
        )


@COMPETITIONS.register("hardmin")
class Hardmin(Competition):
    """The module of :func:`hardmin`; it warns once, when it is built.

    Args:
        temperature: T > 0, which multiplies the prior's part.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the hypothesis axis, unless a call names another.

    Warns:
        ScopeWarning: always.
    """

    def __init__(self, temperature: float = 1.0, learnable: bool = False, dim: int = -1) -> None:
        super().__init__(temperature, learnable, dim)
        _warn_hard("Hardmin")

    def compete(self, energies: Tensor, log_prior: Tensor | None, dim: int) -> Posterior:
        """Return the posterior of the winner."""
        return _hardmin(energies, self.temperature, log_prior, dim)
