"""EM of spherical mixtures for many small sets."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from em_lightning.mixture.points import accumulation_dtype

_FLOOR = 1e-6  # added to every variance
_CORE = 0.4  # as in initialization.parameters_around
# Sets of more points take products with means instead of those between points, which are quadratic in N.
_MOST_PAIRED = 16


class Mixtures(NamedTuple):
    """Spherical mixtures: log-weights and variances (K, B), and coefficients (N, K, B) of the means."""

    log_weights: Tensor
    variances: Tensor
    coefficients: Tensor


def fit_small_sets(x: Tensor, mask: Tensor, num_components: int, num_iters: int) -> Mixtures:
    r"""Fit a spherical mixture to each set by T iterations of EM from the farthest points, in float64.

    The result is that of ``EMOperator(K, D, covariance="spherical", residual=False, prior={"mean_strength": 0.0,
    "covariance_strength": 1.0})``, where sets of a few points spend most of the time on means (B, K, D). Here means are
    combinations of the points, and distances from them follow from those between points:

    .. math::
        \mu_k = \sum_m c_{mk} x_m, \quad \textstyle\sum_m c_{mk} = 1, \qquad
        h_{nk} = -\frac12 \sum_m c_{mk} |x_n - x_m|^2, \quad q_k = \sum_n c_{nk} h_{nk}, \\
        -\frac12 |x_n - \mu_k|^2 = h_{nk} - \frac12 q_k, \qquad \sum_n c_{nk} |x_n - \mu_k|^2 = -q_k.

    Sets are the last axis of all tensors, (N, K, B), which is the fastest layout for many small sets.

    Args:
        x: points (B, N, D); padded rows repeat a row of their set.
        mask: (B, N), false where a row is padding, true for the first row of each set.
        num_components: K.
        num_iters: T.
    """
    with torch.autocast(x.device.type, enabled=False):
        sets = _Sets(x, mask, num_components)
        state = sets.start()
        for _ in range(num_iters):
            state = sets.em_step(state)
        return Mixtures((state.mass / sets.count).log(), state.variances, state.coefficients)


class _State(NamedTuple):
    """Mixtures with masses and variances (K, B), coefficients and h (N, K, B), and q (K, B)."""

    mass: Tensor
    variances: Tensor
    coefficients: Tensor
    h: Tensor
    q: Tensor


class _Sets:
    """Points relative to the first of each set, z (B, N, D)."""

    def __init__(self, x: Tensor, mask: Tensor, num_components: int) -> None:
        self.z = x - x[:, :1].detach().to(accumulation_dtype(x))
        self.valid = mask.mT.unsqueeze(1).to(self.z.dtype)  # (N, 1, B)
        self.num_components, self.num_features = num_components, x.shape[-1]
        self.padded = not mask.all()
        self.paired = x.shape[1] <= _MOST_PAIRED
        if self.paired:
            self.pairs, self.pairs_with_constants = _HalfSquaredDistances.apply(self.z)
        else:
            self.half_squares = 0.5 * self.z.square().sum(-1).mT.unsqueeze(1)
        self.count = self.valid.sum(0)
        share = self.valid / self.count
        self.h_of_mean = self.h(share)
        # The prior of MixturePrior: one point per component, of the share K^(-2 / D) of the total variance.
        self.prior = (share * self.h_of_mean).sum(0) * -(num_components ** (-2.0 / self.num_features))

    def h(self, coefficients: Tensor) -> Tensor:
        """Return h (N, K, B)."""
        if self.paired:
            return _Combine.apply(self.pairs, coefficients)
        products = (self.z @ (coefficients.permute(2, 1, 0) @ self.z).mT).permute(1, 2, 0)
        return products - self.half_squares - (coefficients * self.half_squares).sum(0)

    def h_of_row(self, row: Tensor) -> Tensor:
        """Return ``-|x_n - x_r|^2 / 2`` (N, 1, B) for one row r (1, 1, B) of each set, where ``x_r`` is a constant."""
        if self.paired:
            return self.pairs_with_constants.gather(1, row.expand(len(self.valid), -1, -1))
        constant = self.z.detach().gather(1, row.permute(2, 0, 1).expand(-1, -1, self.num_features))
        return -0.5 * (self.z - constant).square().sum(-1).mT.unsqueeze(1)

    def start(self) -> _State:
        """Return the mixtures around the farthest points, as ``initialization.parameters_around``."""
        found: list[Tensor] = []
        nearest = self.h_of_mean.detach()
        for _ in range(self.num_components):
            found.append(self.h_of_row(torch.where(self.valid > 0, nearest, 1.0).argmin(0, keepdim=True)))
            nearest = found[0].detach() if len(found) == 1 else torch.maximum(nearest, found[-1].detach())
        h_of_centers = torch.cat(found, 1)
        cell = h_of_centers.detach().argmax(1, keepdim=True)
        cells = torch.zeros_like(h_of_centers).scatter_(1, cell, self.valid)
        within = -2.0 * (self.valid * h_of_centers.gather(1, cell)).sum(0)
        shared = within / (self.num_features * self.count) + _FLOOR
        state = self._m_step(cells, torch.zeros_like(self.prior), 0.0)
        mass = cells.sum(0)
        state = state._replace(variances=torch.where(mass > self.num_features, state.variances, shared))
        if len(cells) <= 2 * self.num_features:
            return state
        reach = _CORE * (cells * nearest).sum(0) / mass.clamp(min=1.0)
        cores = cells * (nearest >= reach)
        cores = torch.where(cores.sum(0) > 2 * self.num_features, cores, cells)
        return self._m_step(cores, torch.zeros_like(self.prior), 0.0)._replace(
            mass=state.mass, variances=state.variances
        )

    def em_step(self, state: _State) -> _State:
        """Return the mixtures after one iteration."""
        precisions = state.variances.reciprocal()
        peak = torch.sub(state.mass.log(), state.variances.log(), alpha=0.5 * self.num_features)
        level = torch.addcmul(peak, precisions, state.q, value=-0.5)
        responsibilities = torch.addcmul(level, state.h, precisions).softmax(1)
        return self._m_step(responsibilities * self.valid if self.padded else responsibilities, self.prior, 1.0)

    def _m_step(self, members: Tensor, scatter: Tensor, count: float) -> _State:
        """Return the mixtures for responsibilities (N, K, B) and the scatter and number of a prior's points."""
        mass = members.sum(0) + 10.0 * torch.finfo(members.dtype).eps  # the guard of mixture.m_step
        coefficients = members / mass
        h = self.h(coefficients)
        q = (coefficients * h).sum(0)
        variances = torch.addcmul(scatter, mass, q, value=-1.0) / (mass + count) / self.num_features + _FLOOR
        return _State(mass, variances, coefficients, h, q)


class _HalfSquaredDistances(torch.autograd.Function):
    """``-|x_n - x_m|^2 / 2`` (N, N, B) between the points x (B, N, D) of each set, twice: the second for constant x_m.

    Autograd's own derivative is several times slower: it multiplies matrices in a permuted layout.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        products = (x @ x.mT).permute(1, 2, 0).contiguous()
        half = 0.5 * products.diagonal().mT
        pairs = products.sub_(half.unsqueeze(1)).sub_(half)
        return pairs, pairs.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        weights = (grads[0] + grads[0].transpose(0, 1) + grads[1]).permute(2, 0, 1).contiguous()
        gradient = weights @ x - weights.sum(-1, keepdim=True) * x
        if torch.is_grad_enabled():  # for second derivatives, the constants again
            gradient = gradient - grads[1].permute(2, 0, 1) @ (x - x.detach())
        return gradient


class _Combine(torch.autograd.Function):
    """``sum_m p_nm c_mk`` (N, K, B) of symmetric p (N, N, B) and c (N, K, B), without temporaries (N, N, K, B)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pairs: Tensor, coefficients: Tensor) -> Tensor:
        columns, rows = pairs.split(1, 1), coefficients.unbind()
        total = columns[0] * rows[0]
        for column, row in zip(columns[1:], rows[1:], strict=True):
            total.addcmul_(column, row)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        pairs, coefficients = ctx.saved_tensors
        components = zip(grads[0].unbind(1), coefficients.unbind(1), strict=True)
        by_pairs = functools.reduce(torch.add, (grad.unsqueeze(1) * own for grad, own in components))
        return by_pairs, _Combine.apply(pairs, grads[0])
