"""The competition in which hypotheses also share the batch: entropic optimal transport."""

from __future__ import annotations

import torch
from torch import Tensor

from em_lightning.competition.base import COMPETITIONS, Competition, check_temperature, widen
from em_lightning.competition.entropic import gibbs
from em_lightning.competition.posterior import Posterior


def balanced(
    energies: Tensor,
    temperature: float | Tensor = 1.0,
    log_prior: Tensor | None = None,
    dim: int = -1,
    *,
    item_dim: int | None = None,
    num_iters: int = 40,
) -> Posterior:
    r"""Let hypotheses compete for every item and share the batch: each gets the same total responsibility N / K.

    The responsibilities R minimize <R, d> - T H(R) among those that sum to 1 for each item and to N pi_k for each
    hypothesis. With the prices g of the dual problem, r_nk = softmax_k((g_k - d_nk) / T) and

    F_n = sum_k r_nk d_nk - T H(r_n) = -T log sum_k exp((g_k - d_nk) / T) + sum_k r_nk g_k,

    whose sum over the items is the transport cost: d(sum_n F_n)/dd_nk = r_nk by the envelope theorem. A single F_n also
    depends on the other items, through g. Gradients through g are implicit, and exact to first order.

    The prices are found by pairs of a Sinkhorn and a damped Newton step on the dual, at temperatures that fall to T in
    the first three quarters of the steps: errors of the shares are near rounding at energies a thousand times T.

    Args:
        energies: d, shape (..., K) with the hypotheses on axis ``dim``; finite.
        temperature: T > 0, a number or a tensor of shape () or (1,).
        log_prior: log of the shares pi, shape (K,), finite; normalized here, equal where it is left out.
        dim: the hypothesis axis.
        item_dim: the axis of the N items, the others being batches of problems; ``None`` takes all others as items.
        num_iters: steps, each with one K x K system for the Newton part.

    Raises:
        ValueError: the axes are one, there is no step, or the prior has another shape than (K,).

    Example:
        >>> posterior = balanced(torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
        >>> posterior.responsibilities.sum(0), posterior.responsibilities.sum(1)
        (tensor([1., 1.]), tensor([1., 1.]))

    Source: Cuturi, "Sinkhorn distances", 2013; Peyre and Cuturi, "Computational optimal transport", 2019, chapter 4.
    """
    check_temperature(temperature)
    _check_steps(num_iters)
    axis = dim % energies.ndim
    if item_dim is not None and item_dim % energies.ndim == axis:
        raise ValueError(f"item_dim={item_dim} is the hypothesis axis dim={dim}; name the axis of the items")
    if log_prior is not None and log_prior.shape != energies.shape[axis : axis + 1]:
        raise ValueError(
            f"log_prior of shape {tuple(log_prior.shape)} must hold one share for each of {energies.shape[axis]} "
            f"hypotheses"
        )
    wide = widen(energies)
    moved = wide.movedim(axis, -1)
    if item_dim is not None:
        # Moving the hypotheses away shifts the axes behind them.
        item = item_dim % energies.ndim
        item -= item > axis
        moved = moved.movedim(item, -2)
    shape = moved.shape
    table = moved.reshape(-1, shape[-1]) if item_dim is None else moved
    free, responsibilities = _transport(table, temperature, log_prior, num_iters)
    free, responsibilities = free.reshape(shape[:-1]), responsibilities.reshape(shape)
    if item_dim is not None:
        free, responsibilities = free.movedim(-1, item), responsibilities.movedim(-2, item)
    responsibilities = responsibilities.movedim(-1, axis)
    return Posterior(energies, responsibilities.to(energies.dtype), free.to(energies.dtype))


def _transport(
    d: Tensor, temperature: float | Tensor, log_prior: Tensor | None, num_iters: int
) -> tuple[Tensor, Tensor]:
    """Return F (..., N) and R (..., N, K) of energies (..., N, K)."""
    items, size = d.shape[-2:]
    if log_prior is None:
        log_share = d.new_zeros(size).log_softmax(-1)
    else:
        log_share = log_prior.to(d.dtype).log_softmax(-1)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(d.dtype).reshape(())
    if items == 0:
        return d.sum(-1), d
    share = log_share.exp()
    fixed = temperature.detach() if isinstance(temperature, Tensor) else temperature
    prices, system = _solve(d.detach(), fixed, log_share.detach(), items, num_iters)
    # One more Newton step changes nothing in the value and carries the implicit function theorem's gradient.
    error = items * share - ((prices.unsqueeze(-2) - d) / temperature).softmax(-1).sum(-2)
    prices = prices + fixed * torch.linalg.solve(system, error.unsqueeze(-1)).squeeze(-1)
    log_sum, responsibilities = gibbs((prices.unsqueeze(-2) - d) / temperature, -1)
    return (prices.unsqueeze(-2) * responsibilities).sum(-1) - temperature * log_sum, responsibilities


@torch.no_grad()
def _solve(
    d: Tensor, temperature: float | Tensor, log_share: Tensor, items: int, num_iters: int
) -> tuple[Tensor, Tensor]:
    """Return the prices g (..., K) and the matrix of the Newton system at them (..., K, K)."""
    # A quarter of the energies' range: warm enough for Sinkhorn steps to mix all hypotheses.
    spread = (d.amax(-2) - d.amin(-2)).amax(-1, keepdim=True)
    warmth = (spread / (4 * temperature)).clamp_min(1.0)
    log_mass = log_share + torch.log(torch.tensor(float(items), dtype=d.dtype, device=d.device))
    prices = torch.zeros_like(d[..., 0, :])
    mass = log_mass.exp()
    # The system's null vector is a shift of all prices; the ridge is for hypotheses that share no item.
    ridge = torch.full_like(log_mass, items * torch.finfo(d.dtype).eps).diag_embed() + items / log_mass.shape[-1] ** 2
    for step in range(num_iters):
        warm = temperature * warmth ** (1 - min(step / (0.75 * num_iters), 1.0))
        log_r = ((prices.unsqueeze(-2) - d) / warm.unsqueeze(-2)).log_softmax(-1)
        prices = prices + warm * (log_mass - log_r.logsumexp(-2))
        total, system = _totals_and_system(prices, d, warm.unsqueeze(-2), ridge)
        move = torch.linalg.solve(system, (mass - total).unsqueeze(-1)).squeeze(-1)
        prices = prices + warm * move * (4 / move.abs().amax(-1, keepdim=True).clamp_min(4.0))
    return prices, _totals_and_system(prices, d, temperature, ridge)[1]


def _totals_and_system(prices: Tensor, d: Tensor, temperature: float | Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """Return the total responsibilities (..., K) and T times their derivative by the prices (..., K, K)."""
    r = ((prices.unsqueeze(-2) - d) / temperature).softmax(-1)
    total = r.sum(-2)
    return total, total.diag_embed() - r.mT @ r + ridge


def _check_steps(num_iters: int) -> None:
    if num_iters < 1:
        raise ValueError(f"num_iters={num_iters} must be at least 1, the steps of the solver")


@COMPETITIONS.register("balanced")
class Balanced(Competition):
    """The module of :func:`balanced`: every hypothesis gets the same share of the batch.

    Args:
        item_dim: the axis of the items; ``None`` takes all axes but the hypotheses'.
        num_iters: steps of the solver.
        temperature: T > 0, which divides the energies.
        learnable: make the temperature a positive parameter, exactly ``temperature`` at the start.
        dim: the hypothesis axis, unless a call names another.

    Example:
        >>> Balanced()(torch.randn(6, 3)).responsibilities.sum(0).round(decimals=4)
        tensor([2., 2., 2.])
    """

    def __init__(
        self,
        item_dim: int | None = None,
        num_iters: int = 40,
        temperature: float = 1.0,
        learnable: bool = False,
        dim: int = -1,
    ) -> None:
        super().__init__(temperature, learnable, dim)
        _check_steps(num_iters)
        self.item_dim, self.num_iters = item_dim, num_iters

    def compete(self, energies: Tensor, log_prior: Tensor | None, dim: int) -> Posterior:
        """Return the balanced posterior at the module's temperature."""
        return balanced(energies, self.temperature, log_prior, dim, item_dim=self.item_dim, num_iters=self.num_iters)

    def extra_repr(self) -> str:
        """Return the settings that a reader needs."""
        item = "" if self.item_dim is None else f"item_dim={self.item_dim}, "
        return f"{item}num_iters={self.num_iters}, {super().extra_repr()}"
