"""EM operator for mixtures of von Mises-Fisher distributions on the unit sphere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import register_dataclass

from em_lightning.checks import check_at_least, check_positive
from em_lightning.competition import Posterior, softmin
from em_lightning.distributed import accumulation_dtype
from em_lightning.kernels import unit_vectors
from em_lightning.kernels.similarity import von_mises_fisher_normalizer
from em_lightning.mixture import initialization
from em_lightning.mixture.covariance import FullCovariance
from em_lightning.mixture.e_step import Likelihood, e_step, log_density
from em_lightning.mixture.m_step import m_step
from em_lightning.mixture.points import Frame, Parameters, prepare
from em_lightning.operators.base import SetOperator
from em_lightning.operators.start import Sets

# Intervals of the cubic interpolation: relative errors of concentrations up to 1e6 are below 1e-7.
_INTERVALS = 2048
_SMALLEST_CONCENTRATION = 1e-6  # nearly uniform; at 0, ratios would be divided by 0


@dataclass(frozen=True)
class DirectionalMixture:
    r"""A batch of mixtures on the unit sphere, :math:`p(x) = \sum_k \pi_k C_D(\kappa_k) e^{\kappa_k \mu_k \cdot x}`.

    .. math:: C_D(\kappa) = \frac{\kappa^{D/2 - 1}}{(2 \pi)^{D/2} \, I_{D/2 - 1}(\kappa)}

    Args:
        log_weights: (B, K), normalized over components.
        means: (B, K, D), of length 1.
        concentrations: (B, K), positive.

    Example:
        >>> one = DirectionalMixture(torch.zeros(1, 1), torch.tensor([[[0.0, 0.0, 1.0]]]), torch.full((1, 1), 1e-4))
        >>> one.log_prob(torch.tensor([[[5.0, 0.0, 0.0]]])).exp() * 4 * torch.pi  # nearly uniform
        tensor([[1.0000]])
    """

    log_weights: Tensor
    means: Tensor
    concentrations: Tensor

    def parameters(self) -> Parameters:
        """Return the three tensors."""
        return Parameters(self.log_weights, self.means, self.concentrations)

    def log_prob(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``log p`` of the directions of x (B, N, D), as (B, N); zero where the mask (B, N) is false."""
        density = -self.posterior(x, mask).free_energy
        return density if mask is None else torch.where(mask, density, 0.0)

    def posterior(self, x: Tensor, mask: Tensor | None = None) -> Posterior:
        """Return the posterior over components of the directions of x (B, N, D)."""
        units = _directions(x, mask)
        log_weights, means, concentrations = (part.to(units.dtype) for part in self.parameters())
        log_z, _ = von_mises_fisher_normalizer(concentrations, x.shape[-1])
        joint = torch.baddbmm((log_weights - log_z).unsqueeze(1), units, (concentrations.unsqueeze(-1) * means).mT)
        return softmin(-joint.to(x.dtype))


def _directions(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x (B, N, D) divided by its norm; zero for zero vectors, and where masked."""
    x = x if mask is None else torch.where(mask.unsqueeze(-1), x, 0.0)
    return unit_vectors(x.to(accumulation_dtype(x)))


register_dataclass(DirectionalMixture, serialized_type_name="em_lightning.DirectionalMixture")


class VonMisesFisher(FullCovariance):
    r"""The von Mises-Fisher family as a covariance type: features ``[1, x]``; ``covariances`` are kappa (B, K).

    It inherits ``features`` of points (B, D, N), and ``sharing``. Instead of Bessel functions it evaluates two smooth,
    bounded tables: with :math:`a = (D - 1) / 2`, :math:`-\log C_D(\kappa) - \kappa + a \log(\kappa + a)` as a function
    of :math:`1 / (\kappa + a)`; with the length R of the mean, :math:`\kappa (1 - R)` as a function of :math:`1 - R`.
    """

    name = "von Mises-Fisher"
    native_kind, native_m_step = None, False  # the native backend serves covariances only

    def __init__(self, num_features: int, x: Tensor) -> None:
        self.a = a = 0.5 * (num_features - 1)  # also the limit of kappa (1 - R) for large kappa
        inverse = torch.arange(1, _INTERVALS, dtype=accumulation_dtype(x), device=x.device) / (a * _INTERVALS)
        kappa = 1.0 / inverse - a
        log_z, r = von_mises_fisher_normalizer(kappa, num_features)  # -log C and R
        r_slope = 1.0 - r.square() - 2.0 * a * r / kappa  # dR / dkappa
        # Chain rule, t = inverse: d(-log C) / dkappa = R, dkappa / dt = -1 / t^2, d(1 - R) / dkappa = -r_slope.
        log_area = math.log(2.0) + 0.5 * num_features * math.log(math.pi) - math.lgamma(0.5 * num_features)
        self.normalizer = _Cubic(  # first: the limits for kappa -> infinity; last: for kappa -> 0
            knots=(0.0, inverse, 1.0 / a),
            values=(a * math.log(2.0 * math.pi), log_z - kappa - a * inverse.log(), log_area + a * math.log(a)),
            slopes=(0.5 * a * (a + 1.0), (1.0 - r - a * inverse) / inverse.square(), 0.0),
        )
        self.concentration = _Cubic(
            knots=(0.0, 1.0 - r, 1.0),
            values=(a, kappa * (1.0 - r), 0.0),
            slopes=(0.5 * (1.0 - a), kappa - (1.0 - r) / r_slope, -float(num_features)),
        )
        self.axis = torch.eye(1, num_features, dtype=inverse.dtype, device=x.device)  # where the mean is 0

    def second_degree(self, x: Tensor) -> Tensor:
        """Return (B, 0, N): the density has no quadratic features."""
        return x[:, :0]

    def natural_parameters(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Return theta (B, K, 1 + D), ``theta . phi = log pi + log C(kappa) + kappa mu . x``, and its value at mu."""
        log_weights, means, concentrations = parameters
        total = concentrations + self.a  # sub(p, q, alpha=a) below is p - a q
        peak = log_weights - torch.sub(self.normalizer(total.reciprocal()), total.log(), alpha=self.a)
        return torch.cat([(peak - concentrations).unsqueeze(-1), concentrations.unsqueeze(-1) * means], -1), peak

    def estimate(
        self, means: Tensor, scatter: Tensor, mass: Tensor, floor: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return directions and concentrations for mean vectors (B, K, D); the floor (B,) bounds ``1 / kappa``."""
        length = torch.linalg.vector_norm(means, dim=-1, keepdim=True)  # R
        unit = means / length.clamp(min=torch.finfo(length.dtype).tiny)
        one_minus_r = (1.0 - length.squeeze(-1)).clamp(min=1e-12)  # kappa = a / (1 - R) is infinite at 0
        concentrations = (self.concentration(one_minus_r) / one_minus_r).clamp(min=_SMALLEST_CONCENTRATION)
        return torch.where(length > 0, unit, self.axis), concentrations.minimum(floor.unsqueeze(-1).reciprocal())


class _Cubic:
    """Cubic interpolation from increasing knots, values and slopes, each as (first, all inner ones, last)."""

    def __init__(self, **parts: tuple[float, Tensor, float]) -> None:
        knots, values, slopes = (
            torch.cat([inner.new_full((1,), first), inner, inner.new_full((1,), last)])
            for first, inner, last in (parts["knots"], parts["values"], parts["slopes"])
        )
        width = knots.diff()
        rise, left, right = values.diff() / width, slopes[:-1], slopes[1:]
        second, third = (3.0 * rise - 2.0 * left - right) / width, (left + right - 2.0 * rise) / width.square()
        self.inner = knots[1:-1].contiguous()
        self.rows = torch.stack([knots[:-1], values[:-1], left, second, third], -1)

    def __call__(self, x: Tensor) -> Tensor:
        knot, value, slope, second, third = self.rows[torch.bucketize(x, self.inner)].unbind(-1)
        step = x - knot
        return torch.addcmul(value, step, torch.addcmul(slope, step, torch.addcmul(second, step, third)))


class DirectionalEM(SetOperator):
    r"""Fit a mixture of von Mises-Fisher distributions to the directions of each set by T iterations of EM.

    The responsibilities ``r_nk`` are proportional to ``pi_k C_D(kappa_k) exp(kappa_k mu_k . x_n / |x_n|)``. No
    iteration decreases the likelihood.

    Args:
        num_components: K.
        num_features: D, at least 2.
        num_iters, gradient: as in :class:`EMOperator`; ``"implicit"`` is not available.
        init: how the initial centers are chosen: ``"farthest"``, ``"kmeans++"`` or ``"random"`` points.
        dispersion_floor: lower bound of ``1 / kappa``, so kappa is at most 1e6 by default.

    Shape:
        - x: (B, N, D); mask: (B, N), true for points that count; weights: (B, N); a common factor has no effect.
        - output: a :class:`DirectionalMixture` of B mixtures.

    Raises:
        ValueError: an argument is out of range, or a shape does not fit.

    Example:
        >>> angles = torch.tensor([0.0, 0.1, -0.1, 1.5, 1.6, 1.4])
        >>> x = torch.stack([angles.cos(), angles.sin()], -1)
        >>> DirectionalEM(2, 2)(x.unsqueeze(0)).means[0].abs().round(decimals=1).sort(0).values
        tensor([[0.1000, 0.0000],
                [1.0000, 1.0000]])

    Source: Banerjee et al., Clustering on the unit hypersphere using von Mises-Fisher distributions, 2005.
    """

    def __init__(
        self,
        num_components: int,
        num_features: int,
        *,
        num_iters: int = 10,
        init: str = "farthest",
        dispersion_floor: float = 1e-6,
        gradient: str = "unrolled",
    ) -> None:
        super().__init__(num_components, num_features, num_iters, init, gradient)
        check_at_least(2, num_features=num_features)
        check_positive(dispersion_floor=dispersion_floor)
        self.dispersion_floor = dispersion_floor

    def log_prob(self, x: Tensor, mixture: DirectionalMixture, mask: Tensor | None = None) -> Tensor:
        """Return ``log p`` of the directions of x (B, N, D), as (B, N); zero where masked."""
        return mixture.log_prob(x, mask)

    def posterior(self, x: Tensor, mixture: DirectionalMixture, mask: Tensor | None = None) -> Posterior:
        """Return the posterior over components of the directions of x (B, N, D)."""
        return mixture.posterior(x, mask)

    def _prepare(self, x: Tensor, mask: Tensor | None, weights: Tensor | None) -> Sets:
        family = VonMisesFisher(self.num_features, x)
        x, dtype = _directions(x, mask), x.dtype
        frame = Frame(torch.zeros_like(x[:, 0]), torch.ones_like(x[:, 0, 0]))
        points = prepare(x, mask, weights, frame=frame)
        floor = torch.full_like(points.mass, self.dispersion_floor)  # of 1 / kappa
        return Sets(points, points.mass, mask, family, floor, pseudo_counts=None, dtype=dtype)

    @torch.no_grad()
    def _start(self, sets: Sets, try_several: bool) -> Parameters:
        """Draw centers, assign each point to the nearest, and return the parameters of one M-step."""
        points = sets.points
        centers = initialization.CENTERS[self.init](points.x.mT, self.num_components, weights=points.weights)
        nearest = (centers @ points.x).argmax(1)  # the largest cosine
        weights = torch.ones_like(points.x[:, 0]) if points.weights is None else points.weights
        _, log_weights, means, concentrations = initialization.fit_cells(
            points, nearest, weights.unsqueeze(1), self.num_components, sets.family, sets.floor
        )
        return Parameters(log_weights, means, concentrations)

    def _enter(self, sets: Sets, mixture: DirectionalMixture) -> Parameters:
        return Parameters(*(part.to(sets.floor.dtype) for part in mixture.parameters()))

    def _step(
        self, sets: Sets, state: Parameters, progress: float, with_objective: bool = False
    ) -> tuple[Parameters, Tensor]:
        statistics = e_step(sets.points, state, Likelihood(sets.family), with_log_likelihood=with_objective)
        return m_step(statistics, sets.family, sets.floor, state.covariances), statistics.log_likelihood

    def _objective(self, sets: Sets, state: Parameters) -> Tensor:
        density = log_density(sets.points, state, Likelihood(sets.family))
        return (density if sets.points.weights is None else density * sets.points.weights).sum(-1)

    def _mixture(self, sets: Sets, state: Parameters) -> DirectionalMixture:
        return DirectionalMixture(*(part.to(sets.dtype) for part in state))
