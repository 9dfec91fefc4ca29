"""Balanced competition: entropic optimal transport between items and hypotheses."""

from __future__ import annotations

import torch
from torch import Tensor

from em_lightning.checks import check_at_least
from em_lightning.competition.base import COMPETITIONS, Competition, check_temperature, widen
from em_lightning.competition.entropic import logsumexp_and_softmax
from em_lightning.competition.posterior import Posterior
from em_lightning.distributed import accumulation_dtype

# Two constants, chosen with 8 and 20 steps. With the default of 40, other values change results by round-off only.
# Fraction of the solver's steps in which the temperature decreases to T; the rest are at T. With 20 steps and energies
# of about 1,000 T, 0.5 misses the mass of a hypothesis by up to 0.3 items, 0.9 by 0.01, and 0.75 by round-off.
_ANNEALED_FRACTION = 0.75
# Largest change of a price in a Newton step, in units of the step's temperature. In 8 steps and at energies of 1,000 T,
# masses are within 1 item for limits of 2 to 8, but only within 30 without a limit.
_LARGEST_MOVE = 4.0


def balanced(
    energies: Tensor,
    temperature: float | Tensor = 1.0,
    log_prior: Tensor | None = None,
    dim: int = -1,
    *,
    item_dim: int | None = None,
    num_iters: int = 40,
    mask: Tensor | None = None,
) -> Posterior:
    r"""Competition in which hypothesis k receives total responsibility N pi_k, by default N / K, from the N items.

    The responsibilities R minimize <R, d> - T H(R) subject to sum_k r_nk = 1 for each item and sum_n r_nk = N pi_k for
    each hypothesis. With dual variables g (prices) of the second constraint, r_nk = softmax_k((g_k - d_nk) / T) and

    F_n = sum_k r_nk d_nk - T H(r_n) = -T log sum_k exp((g_k - d_nk) / T) + sum_k g_k r_nk,

    whose sum over the items is the entropic transport cost; d(sum_n F_n)/dd_nk = r_nk by the envelope theorem. A
    single F_n depends on the other items through g; first and second derivatives are exact (implicit function theorem).

    The dual is solved in float64 (float32 on MPS) by alternating Sinkhorn and damped Newton steps, at temperatures that
    decrease to T. An energy of +inf excludes the hypothesis for that item; an item without any finite energy has r = 0
    and F = +inf and does not count in N, and a hypothesis without any finite energy has pi = 0. If other exclusions
    make the constraints infeasible, the second one is violated.

    Args:
        energies: d, shape (..., K) with the hypotheses on axis ``dim``.
        temperature: T > 0, a number or a tensor of shape () or (1,).
        log_prior: log of the shares pi, shape (K,), finite; it is normalized. ``None`` gives equal shares.
        dim: axis of the hypotheses.
        item_dim: axis of the N items; other axes hold independent problems. ``None``: all axes but ``dim`` hold items.
        num_iters: number of solver steps; each solves one K x K system.
        mask: booleans of the shape of the energies without ``dim``; False items do not count and have r = 0 and F = 0.

    Raises:
        ValueError: ``item_dim`` equals ``dim``, a number is out of range, or a shape or the mask's dtype does not fit.

    Example:
        >>> posterior = balanced(torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
        >>> posterior.responsibilities.sum(0), posterior.responsibilities.sum(1)
        (tensor([1., 1.]), tensor([1., 1.]))

    Source: Cuturi, "Sinkhorn distances", 2013; Peyre and Cuturi, "Computational optimal transport", 2019, chapter 4.
    """
    check_temperature(temperature)
    check_at_least(1, num_iters=num_iters)
    axis = dim % energies.ndim
    if item_dim is not None and item_dim % energies.ndim == axis:
        raise ValueError(f"item_dim={item_dim} must differ from the axis of the hypotheses, dim={dim}")
    if log_prior is not None and log_prior.shape != energies.shape[axis : axis + 1]:
        raise ValueError(f"log_prior {tuple(log_prior.shape)} must match the {energies.shape[axis]} hypotheses")
    if mask is not None:
        if mask.shape != energies.shape[:axis] + energies.shape[axis + 1 :] or mask.dtype != torch.bool:
            raise ValueError(f"mask {tuple(mask.shape)}, {mask.dtype}, must be boolean and have one entry per item")
        energies = energies.masked_fill(~mask.unsqueeze(axis), torch.inf)
    dims = (axis,) if item_dim is None else (item_dim % energies.ndim, axis)
    last = tuple(range(-len(dims), 0))
    moved = widen(energies).to(accumulation_dtype(energies)).movedim(dims, last)
    items = moved.reshape(-1, moved.shape[-1]) if item_dim is None else moved
    free, responsibilities = _transport(items, temperature, log_prior, num_iters)
    responsibilities = responsibilities.reshape(moved.shape).movedim(last, dims)
    free = free.reshape(*moved.shape[:-1], 1).movedim(last, dims).squeeze(axis)
    free = free if mask is None else free.masked_fill(~mask, 0.0)
    return Posterior(energies, responsibilities.to(energies.dtype), free.to(energies.dtype))


def _transport(
    d: Tensor, temperature: float | Tensor, log_prior: Tensor | None, num_iters: int
) -> tuple[Tensor, Tensor]:
    """Return F (..., N) and R (..., N, K) of energies (..., N, K)."""
    if d.shape[-2] == 0:
        return d.sum(-1), d
    # Create numbers on the device to avoid copies from the host.
    t = temperature.to(d).reshape(()) if isinstance(temperature, Tensor) else d.new_full((), temperature)
    share = (d.new_zeros(d.shape[-1]) if log_prior is None else log_prior.to(d.dtype)).expand_as(d[..., 0, :])
    share = share.masked_fill((d == torch.inf).all(-2), torch.finfo(d.dtype).min).softmax(-1)
    # F(d + c) = F(d) + c for each item, so the derivatives do not depend on the shift.
    lowest = d.detach().amin(-1, keepdim=True)
    excluded = d == torch.inf
    d = (d - lowest).masked_fill(excluded, 0.0)
    counted = ~excluded.all(-1, keepdim=True)
    num_items = counted.sum(-2).clamp_min(1).to(d.dtype)
    mass = num_items * share
    prices, system = _solve(d.detach().masked_fill(excluded, torch.inf), t.detach(), mass.detach(), num_iters)
    for _ in range(2):  # Newton steps of value 0, which make the first, then the second derivatives exact
        _, responsibilities = _compete(d, excluded, prices, t)
        error = mass - responsibilities.sum(-2)
        step = torch.linalg.solve(system, (error - error.detach()).unsqueeze(-1)).squeeze(-1)
        prices = prices + t.detach() * step
    log_sum, responsibilities = _compete(d, excluded, prices, t)
    correction = (mass - responsibilities.sum(-2)) / num_items  # of the sums, whose error large prices would amplify
    # Its prices are detached, so that d(sum_n F_n) / dg is exactly 0, and d(sum_n F_n) / dd exactly r.
    price = responsibilities * prices.unsqueeze(-2) + counted * (correction * prices.detach()).unsqueeze(-2)
    return lowest.squeeze(-1) + price.sum(-1) - t * log_sum.masked_fill(~counted.squeeze(-1), 0.0), responsibilities


def _compete(d: Tensor, excluded: Tensor, prices: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Return logsumexp and softmax of (g - d) / T over the hypotheses."""
    return logsumexp_and_softmax(((prices.unsqueeze(-2) - d) / temperature).masked_fill(excluded, -torch.inf), -1)


@torch.no_grad()
def _solve(d: Tensor, temperature: Tensor, mass: Tensor, num_iters: int) -> tuple[Tensor, Tensor]:
    """Return the prices g (..., K) and the matrix of the Newton system at them (..., K, K)."""
    # The temperature starts at 1/4 of the energy range. With 20 steps, fractions of 1 to 1/64 leave round-off only.
    energy_range = d.masked_fill(d == torch.inf, 0.0).amax((-2, -1)).unsqueeze(-1)
    initial_ratio = (energy_range / (4 * temperature)).clamp_min(1.0)
    prices = torch.zeros_like(d[..., 0, :])
    finfo = torch.finfo(d.dtype)
    num_items, num_hypotheses = mass.sum(-1, keepdim=True), mass.shape[-1]
    # Makes the system regular for hypotheses without responsibility (N eps) and for equal shifts of prices (N / K^2).
    ridge = (num_items * finfo.eps).expand_as(mass).diag_embed() + (num_items / num_hypotheses**2).unsqueeze(-1)

    def total_and_system(t: Tensor) -> tuple[Tensor, Tensor]:
        responsibilities = ((prices.unsqueeze(-2) - d) / t.unsqueeze(-1)).softmax(-1).nan_to_num(0.0)
        total = responsibilities.sum(-2)
        return total, total.diag_embed() - responsibilities.mT @ responsibilities + ridge

    for step in range(num_iters):
        t = temperature * initial_ratio ** (1 - min(step / (_ANNEALED_FRACTION * num_iters), 1.0))
        prices = prices + t * (mass.clamp_min(finfo.tiny) / total_and_system(t)[0].clamp_min(finfo.tiny)).log()
        total, system = total_and_system(t)
        move = torch.linalg.solve(system, (mass - total).unsqueeze(-1)).squeeze(-1)
        prices = prices + t * move * (_LARGEST_MOVE / move.abs().amax(-1, keepdim=True).clamp_min(_LARGEST_MOVE))
    return prices, total_and_system(temperature.reshape(1))[1]


@COMPETITIONS.register("balanced")
class Balanced(Competition):
    """Module form of :func:`balanced`, with its options and the arguments of :class:`Competition`."""

    function = staticmethod(balanced)
    options = ("item_dim", "num_iters")
    couples_items = True

    def __init__(
        self,
        item_dim: int | None = None,
        num_iters: int = 40,
        temperature: float = 1.0,
        learnable: bool = False,
        dim: int = -1,
    ) -> None:
        super().__init__(temperature, learnable, dim)
        check_at_least(1, num_iters=num_iters)
        self.item_dim, self.num_iters = item_dim, num_iters
