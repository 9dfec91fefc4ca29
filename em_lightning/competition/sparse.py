"""Competitions with exact zeros: sparsemax, 1.5-entmax and hard assignment."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from em_lightning.competition.base import COMPETITIONS, Competition, to_logits, to_posterior, widen
from em_lightning.competition.entropic import entmax
from em_lightning.competition.posterior import Posterior


class ScopeWarning(UserWarning):
    """The operation is outside the scope of implicit EM; the message names the assumption that does not hold."""


def sparsemin(
    energies: Tensor, temperature: float | Tensor = 1.0, log_prior: Tensor | None = None, dim: int = -1
) -> Posterior:
    r"""Competition by sparsemax: hypotheses far above the lowest energy have r = 0 exactly.

    F = min_r <r, d> - T (H(r) + <r, log_prior>) over the simplex, with the Tsallis entropy H(r) = 1/2 sum(r - r^2).
    Its gradient is r = relu(log_prior - d / T - tau), with tau such that r sums to 1. A hypothesis with r = 0 receives
    no gradient until its energy is within about T of the lowest. Arguments as in :func:`softmin`.

    Source: Martins and Astudillo, "From softmax to sparsemax", 2016.
    """
    logits = to_logits(widen(energies), temperature, log_prior, dim)
    return to_posterior(energies, temperature, dim, *entmax(logits, dim, power=1))


@COMPETITIONS.register("sparsemin")
class Sparsemin(Competition):
    """Module form of :func:`sparsemin`, with the arguments of :class:`Competition`."""

    function = staticmethod(sparsemin)


def entmin(
    energies: Tensor, temperature: float | Tensor = 1.0, log_prior: Tensor | None = None, dim: int = -1
) -> Posterior:
    r"""Competition by 1.5-entmax, between softmin and sparsemin: distant hypotheses have r = 0 exactly.

    F = min_r <r, d> - T (H(r) + <r, log_prior>) over the simplex, with the entropy H(r) = 4/3 sum(r - r^1.5). Its
    gradient is r = relu((log_prior - d / T) / 2 - tau)^2. Arguments as in :func:`softmin`.

    Source: Peters, Niculae and Martins, "Sparse sequence-to-sequence models", 2019.
    """
    logits = to_logits(widen(energies), temperature, log_prior, dim)
    return to_posterior(energies, temperature, dim, *entmax(logits, dim, power=2))


@COMPETITIONS.register("entmin")
class Entmin(Competition):
    """Module form of :func:`entmin`, with the arguments of :class:`Competition`."""

    function = staticmethod(entmin)


def hardmin(
    energies: Tensor, temperature: float | Tensor = 1.0, log_prior: Tensor | None = None, dim: int = -1
) -> Posterior:
    """Hard assignment to the lowest energy, which is outside the scope of implicit EM.

    F = min_k d_k - T log pi_k; tied hypotheses share the responsibility equally. Arguments as in :func:`softmin`; the
    temperature has an effect only with a prior.

    Warns:
        ScopeWarning: always; use softmin at a low temperature to stay inside the scope.
    """
    if not torch.compiler.is_compiling():
        rule = "outside the scope of implicit EM: hypotheses with r = 0 get no gradient, at any distance"
        warnings.warn(f"hardmin is {rule}; use softmin at a low temperature", ScopeWarning, stacklevel=2)
    logits = to_logits(widen(energies), temperature, log_prior, dim)
    top = logits.amax(dim, keepdim=True)
    best = ((logits == top) & (top > -torch.inf)).to(logits.dtype)
    responsibilities = best / best.sum(dim, keepdim=True).clamp_min(1.0)
    return to_posterior(energies, temperature, dim, top.squeeze(dim), responsibilities)


@COMPETITIONS.register("hardmin")
class Hardmin(Competition):
    """Module form of :func:`hardmin`, with the arguments of :class:`Competition`."""

    function = staticmethod(hardmin)
