"""Competitions by softmin: over all hypotheses, within groups, with a background, and over the k best."""

from __future__ import annotations

import torch
from torch import Tensor

from em_lightning.checks import check_at_least
from em_lightning.competition.base import COMPETITIONS, Competition, align, to_logits, to_posterior, widen
from em_lightning.competition.entropic import logsumexp_and_softmax
from em_lightning.competition.posterior import Posterior


def softmin(
    energies: Tensor, temperature: float | Tensor = 1.0, log_prior: Tensor | None = None, dim: int = -1
) -> Posterior:
    r"""Competition by the Gibbs distribution of the energies.

    F = -T log sum_k pi_k exp(-d_k / T) and r_k = dF/dd_k = pi_k exp(-d_k / T) / sum_j pi_j exp(-d_j / T), with prior
    weights pi = exp(log_prior). As T -> 0 the lowest energy has r = 1; as T -> inf, r tends to pi.

    An energy of +inf excludes its hypothesis: r = 0, with finite gradients. If all are +inf, F = +inf and r = 0.

    Args:
        energies: d, shape (..., K) with the hypotheses on axis ``dim``; half precision is computed in float32.
        temperature: T > 0, a number or a tensor that broadcasts with the energies and has size 1 on axis ``dim``.
        log_prior: log pi, shape (K,) or any shape that broadcasts with the energies; need not be normalized.
        dim: axis of the hypotheses.

    Raises:
        ValueError: ``temperature`` is a number and not positive.
        TypeError: ``energies`` are not floating-point.

    Example:
        >>> posterior = softmin(torch.tensor([0.0, 0.0, torch.inf]))
        >>> posterior.responsibilities
        tensor([0.5000, 0.5000, 0.0000])
        >>> posterior.free_energy
        tensor(-0.6931)
    """
    logits = to_logits(widen(energies), temperature, log_prior, dim)
    return to_posterior(energies, temperature, dim, *logsumexp_and_softmax(logits, dim))


@COMPETITIONS.register("softmin")
class Softmin(Competition):
    """Module form of :func:`softmin`, with the arguments of :class:`Competition`."""

    function = staticmethod(softmin)


def grouped(
    energies: Tensor,
    temperature: float | Tensor = 1.0,
    log_prior: Tensor | None = None,
    dim: int = -1,
    *,
    group_size: int = 2,
) -> Posterior:
    """Competition by softmin within equally large groups of neighbouring hypotheses.

    Each of the G groups is an independent competition: the free energy has shape (..., G) with the groups on axis
    ``dim``, responsibilities sum to 1 within each group, and dF_g/dd_k = r_k for k in group g. Arguments are those
    of :func:`softmin` and ``group_size`` = K / G.

    Raises:
        ValueError: ``group_size`` is less than 1 or does not divide K.
    """
    axis = dim % energies.ndim
    check_at_least(1, group_size=group_size)
    if energies.shape[axis] % group_size:
        raise ValueError(f"group_size={group_size} must divide the {energies.shape[axis]} hypotheses on axis dim={dim}")
    logits = to_logits(widen(energies), temperature, log_prior, dim).unflatten(axis, (-1, group_size))
    log_sum, responsibilities = logsumexp_and_softmax(logits, axis + 1)
    return to_posterior(energies, temperature, dim, log_sum, responsibilities.flatten(axis, axis + 1))


@COMPETITIONS.register("grouped")
class Grouped(Competition):
    """Module form of :func:`grouped`, with its ``group_size`` and the arguments of :class:`Competition`."""

    function = staticmethod(grouped)
    options = ("group_size",)

    def __init__(self, group_size: int = 2, temperature: float = 1.0, learnable: bool = False, dim: int = -1) -> None:
        super().__init__(temperature, learnable, dim)
        check_at_least(1, group_size=group_size)
        self.group_size = group_size


def background(
    energies: Tensor,
    temperature: float | Tensor = 1.0,
    log_prior: Tensor | None = None,
    dim: int = -1,
    *,
    energy: float | Tensor = 0.0,
) -> Posterior:
    """Competition by softmin with one more hypothesis, the background ("none of the above"), of constant energy b.

    The posterior has K + 1 hypotheses, with the background last on axis ``dim``; :func:`none_of_the_above` selects its
    responsibility. F(d + c, b + c) = F(d, b) + c, but a constant added to d alone changes the responsibilities.
    Arguments are those of :func:`softmin` and ``energy``: b, a number or a tensor that broadcasts with the energies and
    has size 1 on axis ``dim``. The log prior weight of the background is 0.

    Example:
        >>> posterior = background(torch.tensor([0.0, 50.0]), energy=0.0)
        >>> posterior.responsibilities
        tensor([5.0000e-01, 9.6437e-23, 5.0000e-01])
        >>> none_of_the_above(posterior)
        tensor(0.5000)
    """
    axis = dim % energies.ndim
    background_shape = [*energies.shape[:axis], 1, *energies.shape[axis + 1 :]]
    if log_prior is not None:
        log_prior = align(dim, log_prior, energies).expand_as(energies)  # a vector (K,) along axis dim
        log_prior = torch.cat([log_prior, log_prior.new_zeros(background_shape)], axis)
    energy = energy.to(energies) if isinstance(energy, Tensor) else energies.new_full((), energy)
    return softmin(torch.cat([energies, energy.expand(background_shape)], axis), temperature, log_prior, dim)


def none_of_the_above(posterior: Posterior, dim: int = -1) -> Tensor:
    """Return the responsibility of the background in a posterior of :func:`background`, shape (...)."""
    return posterior.responsibilities.select(dim, -1)


@COMPETITIONS.register("background")
class Background(Competition):
    """Module form of :func:`background`, with its ``energy`` and the arguments of :class:`Competition`."""

    function = staticmethod(background)
    options = ("energy",)

    def __init__(self, energy: float = 0.0, temperature: float = 1.0, learnable: bool = False, dim: int = -1) -> None:
        super().__init__(temperature, learnable, dim)
        self.energy = float(energy)


def topk(
    energies: Tensor, temperature: float | Tensor = 1.0, log_prior: Tensor | None = None, dim: int = -1, *, k: int = 2
) -> Posterior:
    """Competition by softmin among the k best hypotheses; the others have r = 0 and no gradient.

    The best have the lowest d - T log_prior; hypotheses that tie with the k-th are included, and k > K includes all. A
    hypothesis outside the k best cannot recover by its own gradient. Arguments are those of :func:`softmin` and ``k``,
    the number of hypotheses that compete, at least 1.
    """
    check_at_least(1, k=k)
    logits = to_logits(widen(energies), temperature, log_prior, dim)
    lowest_kept = logits.detach().topk(min(k, logits.shape[dim]), dim).values.amin(dim, keepdim=True)
    logits = logits.masked_fill(logits < lowest_kept, -torch.inf)
    return to_posterior(energies, temperature, dim, *logsumexp_and_softmax(logits, dim))


@COMPETITIONS.register("topk")
class TopK(Competition):
    """Module form of :func:`topk`, with its ``k`` and the arguments of :class:`Competition`."""

    function = staticmethod(topk)
    options = ("k",)

    def __init__(self, k: int = 2, temperature: float = 1.0, learnable: bool = False, dim: int = -1) -> None:
        super().__init__(temperature, learnable, dim)
        check_at_least(1, k=k)
        self.k = k
