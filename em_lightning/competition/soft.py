"""The competitions that are softmin on some set of hypotheses: all, groups, all and a background, the k best."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from em_lightning.competition.base import COMPETITIONS, Competition, on_axis, scale_back, to_logits, widen
from em_lightning.competition.entropic import gibbs
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
    return _posterior(energies, logits, temperature, dim)


def _posterior(energies: Tensor, logits: Tensor, temperature: float | Tensor, dim: int) -> Posterior:
    log_sum, responsibilities = gibbs(logits, dim)
    free = scale_back(-log_sum, temperature, dim)
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


def grouped(
    energies: Tensor,
    temperature: float | Tensor = 1.0,
    log_prior: Tensor | None = None,
    dim: int = -1,
    *,
    num_groups: int | None = None,
    group_size: int | None = None,
) -> Posterior:
    """Let hypotheses compete by softmin inside equal groups of neighbours on axis ``dim``.

    Each group is a competition of its own: the free energy has shape (..., G), with the G groups in the place of the
    hypothesis axis, responsibilities sum to 1 in each group, and dF_g/dd_k = r_k for k in group g.

    Args:
        energies: d, shape (..., K) with the hypotheses on axis ``dim``.
        temperature: T > 0, a number or a tensor of shape () or (1,).
        log_prior: log prior weights, shape (K,) or one that broadcasts with the energies.
        dim: the hypothesis axis.
        num_groups: G, a divisor of K.
        group_size: K / G; 2 where neither is given.

    Raises:
        ValueError: both counts are given, or the groups are not equal.

    Example:
        >>> posterior = grouped(torch.zeros(6), num_groups=2)
        >>> posterior.responsibilities, posterior.free_energy
        (tensor([0.3333, 0.3333, 0.3333, 0.3333, 0.3333, 0.3333]), tensor([-1.0986, -1.0986]))
    """
    _check_groups(num_groups, group_size)
    size = energies.shape[dim]
    group_size = group_size or (2 if num_groups is None else max(size // num_groups, 1))
    if size % group_size or (num_groups is not None and size // group_size != num_groups):
        wanted = f"group_size={group_size}" if num_groups is None else f"num_groups={num_groups}"
        raise ValueError(f"{size} hypotheses on axis dim={dim} make no equal groups with {wanted}; give a divisor")
    axis = dim % energies.ndim
    logits = to_logits(widen(energies), temperature, log_prior, dim).unflatten(axis, (-1, group_size))
    log_sum, responsibilities = gibbs(logits, axis + 1)
    free = scale_back(-log_sum, temperature, dim)
    return Posterior(energies, responsibilities.flatten(axis, axis + 1).to(energies.dtype), free.to(energies.dtype))


def _check_groups(num_groups: int | None, group_size: int | None) -> None:
    if num_groups is not None and group_size is not None:
        raise ValueError(f"num_groups={num_groups} and group_size={group_size} say the same twice; give one of them")
    for name, value in (("num_groups", num_groups), ("group_size", group_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


@COMPETITIONS.register("grouped")
class Grouped(Competition):
    """The module of :func:`grouped`: softmin inside equal groups.

    Args:
        num_groups: G, a divisor of the number of hypotheses.
        group_size: hypotheses a group; 2 where neither is given.
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the hypothesis axis, unless a call names another.

    Example:
        >>> Grouped(num_groups=2)(torch.zeros(5, 8)).free_energy.shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        num_groups: int | None = None,
        group_size: int | None = None,
        temperature: float = 1.0,
        learnable: bool = False,
        dim: int = -1,
    ) -> None:
        super().__init__(temperature, learnable, dim)
        _check_groups(num_groups, group_size)
        self.num_groups = num_groups
        self.group_size = group_size or (2 if num_groups is None else None)

    def compete(self, energies: Tensor, log_prior: Tensor | None, dim: int) -> Posterior:
        """Return the posterior of every group."""
        counts = {"num_groups": self.num_groups, "group_size": self.group_size}
        return grouped(energies, self.temperature, log_prior, dim, **counts)

    def extra_repr(self) -> str:
        """Return the settings that a reader needs."""
        groups = f"group_size={self.group_size}" if self.num_groups is None else f"num_groups={self.num_groups}"
        return f"{groups}, {super().extra_repr()}"


def background(
    energies: Tensor,
    temperature: float | Tensor = 1.0,
    log_prior: Tensor | None = None,
    dim: int = -1,
    *,
    energy: float | Tensor = 0.0,
) -> Posterior:
    """Let hypotheses compete by softmin with one more, "none of the above", of constant energy b: an open world.

    The posterior holds K + 1 hypotheses, the background last on axis ``dim``; :func:`none_of_the_above` reads its
    responsibility, and those of the others sum to 1 minus it. dF/dd = r as ever. F(d + c, b + c) = F(d, b) + c: the
    shift rule holds when the background is shifted with the rest, as absolute energies now mean something.

    Args:
        energies: d, shape (..., K) with the hypotheses on axis ``dim``.
        temperature: T > 0, a number or a tensor that broadcasts with the energies, of size 1 on axis ``dim``.
        log_prior: log prior weights of the K hypotheses; the background's is 0 (its energy can hold another).
        dim: the hypothesis axis.
        energy: b, a number or a tensor that broadcasts with the energies, of size 1 on axis ``dim``.

    Example:
        >>> posterior = background(torch.tensor([0.0, 50.0]), energy=0.0)
        >>> posterior.responsibilities
        tensor([5.0000e-01, 9.6437e-23, 5.0000e-01])
        >>> none_of_the_above(posterior)
        tensor(0.5000)
    """
    axis = dim % energies.ndim
    shape = [1 if n == axis else size for n, size in enumerate(energies.shape)]
    if log_prior is not None:
        log_prior = on_axis(log_prior, energies, dim).expand_as(energies)
        log_prior = torch.cat([log_prior, log_prior.new_zeros(shape)], axis)
    energy = torch.as_tensor(energy, dtype=energies.dtype, device=energies.device)
    energies = torch.cat([energies, energy.expand(shape)], axis)
    return softmin(energies, temperature, log_prior, dim)


def none_of_the_above(posterior: Posterior, dim: int = -1) -> Tensor:
    """Return the responsibility of the background hypothesis, shape (...), of a posterior of :func:`background`."""
    return posterior.responsibilities.select(dim, -1)


@COMPETITIONS.register("background")
class Background(Competition):
    """The module of :func:`background`: softmin with one more hypothesis of constant energy.

    Args:
        energy: b, the background's energy.
        learnable_energy: make b a parameter.
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the hypothesis axis, unless a call names another.

    Example:
        >>> none_of_the_above(Background(energy=-1.0)(torch.zeros(2, 3)))
        tensor([0.4754, 0.4754])
    """

    def __init__(
        self,
        energy: float = 0.0,
        learnable_energy: bool = False,
        temperature: float = 1.0,
        learnable: bool = False,
        dim: int = -1,
    ) -> None:
        super().__init__(temperature, learnable, dim)
        self.energy = nn.Parameter(torch.full((1,), float(energy))) if learnable_energy else float(energy)

    def compete(self, energies: Tensor, log_prior: Tensor | None, dim: int) -> Posterior:
        """Return the posterior over the K hypotheses and the background."""
        return background(energies, self.temperature, log_prior, dim, energy=self.energy)

    def extra_repr(self) -> str:
        """Return the settings that a reader needs."""
        learnable = ", learnable_energy=True" if isinstance(self.energy, Tensor) else ""
        return f"energy={float(torch.as_tensor(self.energy).detach()):g}{learnable}, {super().extra_repr()}"


def topk(
    energies: Tensor,
    temperature: float | Tensor = 1.0,
    log_prior: Tensor | None = None,
    dim: int = -1,
    *,
    k: int = 2,
) -> Posterior:
    """Let the k best hypotheses compete by softmin; the others have r = 0 exactly, and no gradient.

    The best are those of least d - T log_prior; hypotheses that tie with the k-th stay in, and k beyond K keeps all.
    Outside the k best the competition is hard: a hypothesis there cannot recover by its own gradient.

    Args:
        energies: d, shape (..., K) with the hypotheses on axis ``dim``.
        temperature: T > 0, a number or a tensor that broadcasts with the energies, of size 1 on axis ``dim``.
        log_prior: log prior weights, shape (K,) or one that broadcasts with the energies.
        dim: the hypothesis axis.
        k: how many hypotheses compete.

    Raises:
        ValueError: k is less than 1.

    Example:
        >>> topk(torch.tensor([0.0, 3.0, 0.0, 1.0]), k=2).responsibilities
        tensor([0.5000, 0.0000, 0.5000, 0.0000])
    """
    _check_k(k)
    logits = to_logits(widen(energies), temperature, log_prior, dim)
    least = logits.detach().topk(min(k, logits.shape[dim]), dim).values.amin(dim, keepdim=True)
    return _posterior(energies, logits.masked_fill(logits < least, -torch.inf), temperature, dim)


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k={k} must be at least 1, the number of hypotheses that compete")


@COMPETITIONS.register("topk")
class TopK(Competition):
    """The module of :func:`topk`: softmin over the k lowest energies.

    Args:
        k: how many hypotheses compete.
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the hypothesis axis, unless a call names another.

    Example:
        >>> TopK(k=1)(torch.tensor([2.0, 1.0])).responsibilities
        tensor([0., 1.])
    """

    def __init__(self, k: int = 2, temperature: float = 1.0, learnable: bool = False, dim: int = -1) -> None:
        super().__init__(temperature, learnable, dim)
        _check_k(k)
        self.k = k

    def compete(self, energies: Tensor, log_prior: Tensor | None, dim: int) -> Posterior:
        """Return the posterior of the k best."""
        return topk(energies, self.temperature, log_prior, dim, k=self.k)

    def extra_repr(self) -> str:
        """Return the settings that a reader needs."""
        return f"k={self.k}, {super().extra_repr()}"
