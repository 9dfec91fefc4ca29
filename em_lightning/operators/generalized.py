r"""EM operator for mixtures under any kernel, by a generalized M-step that needs only the kernel's energy.

The expected energy of a component, :math:`Q_k(\mu) = \sum_n w_n r_{nk} \, d(x_n, \mu)`, has the gradient
:math:`\sum_n w_n r_{nk} \, g_n` with :math:`g_n = \partial d(x_n, \mu) / \partial \mu`. The M-step is

.. math:: \mu \leftarrow \mu - t \, \frac{\sum_n w_n r_{nk} \, g_n}{\sum_n w_n r_{nk} \, u_n}

with the IRLS weights :math:`u_n = |g_n| / |\mu - x_n|` of each feature, or the second derivative for a point at the
center. It gives the weighted mean for a Gaussian, the IRLS step for a robust kernel and a scaled gradient step
otherwise. t is halved from 1 until the expected energy falls enough (Armijo), and is 0 if it never does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.export import register_dataclass

from em_lightning.competition import Posterior, softmin
from em_lightning.distributed import accumulation_dtype
from em_lightning.kernels import Kernel, LearnedEnergyKernel, NoDensityError, density_kernel
from em_lightning.mixture import initialization
from em_lightning.mixture.points import Parameters, join_weights
from em_lightning.operators.base import SetOperator

_BLOCK_SIZE = 2**22  # numbers (B, K, n, D) per block of points, 16 MiB in float32: derivatives need several copies
_TRIALS = 30  # of the line search; the shortest, 2^-29 of a full step, is below the rounding of most float32 centers
# Armijo constant: the expected energy must fall by this share of what the gradient predicts; the usual value.
_ARMIJO = 1e-4
# Distance from a center, in sizes of the bounding box, below which the IRLS weight is the second derivative: it bounds
# the weights of kernels whose slope is not 0 at the center (logistic, cosine). Chosen, not measured.
_NEAR = 1e-9
# Sums of IRLS weights, and of the shares of points that have one, count as zero below this. Gradients divide by their
# squares, and 1e-60 is far above the smallest float64.
_SMALLEST_WEIGHT = 1e-30


@dataclass(frozen=True)
class KernelMixture:
    """A batch of mixtures under a kernel: log-weights (B, K), normalized over components, and centers (B, K, D)."""

    log_weights: Tensor
    centers: Tensor


register_dataclass(KernelMixture, serialized_type_name="em_lightning.KernelMixture")


class _Sets(NamedTuple):
    """Points (B, N, D), zero where masked, weights (B, N), their sums (B,), and corners (B, 1, D) of bounding boxes."""

    x: Tensor
    weights: Tensor
    mass: Tensor
    low: Tensor
    high: Tensor


class GeneralizedEM(SetOperator):
    r"""Fit a mixture under any kernel to each set by T iterations of generalized EM.

    The E-step is softmin; the M-step lowers the expected energy of each center. No iteration lowers the objective

    .. math:: \sum_n w_n \log \sum_k \pi_k \, e^{-d(x_n, \mu_k) - \log Z}

    The objective is a log-likelihood if the kernel is a density (Gaussian, Student-t, Laplace, Huber, pseudo-Huber,
    exponential, Mahalanobis; the cosine on the unit sphere). Otherwise Z is omitted: objectives of different kernels
    are then not comparable, and centers, which are restricted to the bounding box, may end on its border. For energies
    with a kink (Laplace, exponential), centers may stop before the optimum, at a coordinate of a point.

    :class:`EMOperator` is faster for kernels of the Mahalanobis distance; :class:`DirectionalEM` fits concentrations.

    Args:
        num_components: K.
        num_features: D.
        kernel: a key of ``KERNELS`` or an instance (``"student_t"`` has ``density=True``). EM does not change
            its shape parameters; learnable ones have gradients. Memory is proportional to N x K x D.
        num_iters, gradient: as in :class:`EMOperator`; ``"implicit"`` is not available.
        init: how the initial centers are chosen: ``"farthest"``, ``"kmeans++"`` or ``"random"`` points.

    Shape:
        - x: (B, N, D); mask: (B, N), true for points that count; weights: (B, N), relative to their mean.
        - output: a :class:`KernelMixture` of B mixtures.

    Raises:
        ValueError: an argument is out of range, the kernel has no centers, or a shape does not fit.

    Example:
        >>> x = torch.tensor([[[-2.0], [-1.9], [-2.1], [3.0], [3.1], [2.9]]])
        >>> GeneralizedEM(2, 1, kernel="gaussian")(x).centers.sort(1).values.flatten().round(decimals=3)
        tensor([-2.,  3.])

    Source: Dempster, Laird and Rubin, Maximum Likelihood from Incomplete Data via the EM Algorithm, 1977 (generalized
    EM); Armijo, Minimization of functions having Lipschitz continuous first partial derivatives, 1966.
    """

    def __init__(
        self,
        num_components: int,
        num_features: int,
        *,
        kernel: object = "gaussian",
        num_iters: int = 10,
        init: str = "farthest",
        gradient: str = "unrolled",
    ) -> None:
        super().__init__(num_components, num_features, num_iters, init, gradient)
        self.kernel = density_kernel(kernel)
        if isinstance(self.kernel, LearnedEnergyKernel):
            raise ValueError("kernel=LearnedEnergyKernel has no centers; train it with FreeEnergyLoss")

    def log_prob(self, x: Tensor, mixture: KernelMixture, mask: Tensor | None = None) -> Tensor:
        """Return ``log p(x)`` of points (B, N, D) under a kernel that is a density, as (B, N); zero where masked."""
        density = -self.posterior(x, mixture, mask).free_energy - self.kernel.log_normalizer(self.num_features).to(x)
        return density if mask is None else torch.where(mask, density, 0.0)

    def posterior(self, x: Tensor, mixture: KernelMixture, mask: Tensor | None = None) -> Posterior:
        """Return the posterior over components of points (B, N, D); energies contain ``-log pi_k``."""
        x = x if mask is None else torch.where(mask.unsqueeze(-1), x, 0.0)
        return softmin(self.kernel(x, mixture.centers) - mixture.log_weights.unsqueeze(1))

    # The loop of SetOperator. Its state holds centers as means and no covariances; here progress has no effect.

    def _prepare(self, x: Tensor, mask: Tensor | None, weights: Tensor | None) -> _Sets:
        weights, _ = join_weights(mask, weights, x.dtype)
        weights = torch.ones_like(x[..., 0]) if weights is None else weights
        counted = (weights > 0).unsqueeze(-1)
        low = torch.where(counted, x, torch.inf).amin(1, keepdim=True)
        high = torch.where(counted, x, -torch.inf).amax(1, keepdim=True)
        low, high = (torch.where(side.isfinite(), side, 0.0) for side in (low, high))  # infinite without points
        x = x if mask is None else torch.where(mask.unsqueeze(-1), x, 0.0)
        return _Sets(x, weights, weights.sum(-1), low, high)

    @torch.no_grad()
    def _start(self, sets: _Sets, try_several: bool) -> Parameters:
        """Return equal weights and drawn centers, of one start only."""
        centers = initialization.CENTERS[self.init](sets.x, self.num_components, weights=sets.weights)
        return Parameters(torch.zeros_like(centers[..., 0]).log_softmax(-1), centers, centers[..., :0])

    def _enter(self, sets: _Sets, mixture: KernelMixture) -> Parameters:
        shape = (sets.x.shape[0], self.num_components, self.num_features)
        if tuple(mixture.centers.shape) != shape:
            raise ValueError(f"init.centers has shape {tuple(mixture.centers.shape)}; it must be {shape}")
        centers = mixture.centers.to(sets.x.dtype)
        return Parameters(mixture.log_weights.to(sets.x.dtype), centers, centers[..., :0])

    def _step(
        self, sets: _Sets, state: Parameters, progress: float, with_objective: bool = False
    ) -> tuple[Parameters, Tensor]:
        # The M-step differentiates energies; record its graph only if an input requires gradients.
        inputs = (*sets, *state, *self.kernel.parameters())
        recorded = torch.is_grad_enabled() and any(part.requires_grad for part in inputs)
        # Before the block below, in which the tensors are copies.
        objective = self._objective(sets, state) if with_objective else torch.zeros_like(sets.mass)
        with torch.inference_mode(False), torch.set_grad_enabled(recorded):
            # Copies, because autograd accepts no inference tensors.
            sets = _Sets(*map(torch.clone, sets))
            log_weights, centers, covariances = map(torch.clone, state)
            log_responsibilities = (log_weights.unsqueeze(1) - self.kernel(sets.x, centers)).log_softmax(-1)
            mass = (log_responsibilities.exp() * sets.weights.unsqueeze(-1)).sum(1, dtype=accumulation_dtype(sets.x))
            mass = mass + 10.0 * torch.finfo(mass.dtype).eps  # as scikit-learn, so that no weight is zero
            log_weights = mass.log() - mass.sum(-1, keepdim=True).log()
            shares = _shares(log_responsibilities, sets.weights)
            slope, step = _irls_step(self.kernel, sets, shares, centers)
            centers = _line_search(self.kernel, sets, shares, centers, slope, step)
            return Parameters(log_weights, centers, covariances), objective

    def _objective(self, sets: _Sets, state: Parameters) -> Tensor:
        """Return the log-likelihood; without the normalizer if the kernel has none."""
        try:
            constant: Tensor | float = self.kernel.log_normalizer(self.num_features).to(sets.x)
        except NoDensityError:
            constant = 0.0
        return -((self.posterior(sets.x, self._mixture(sets, state)).free_energy + constant) * sets.weights).sum(-1)

    def _mixture(self, sets: _Sets, state: Parameters) -> KernelMixture:
        return KernelMixture(state.log_weights, state.means)


def _shares(log_responsibilities: Tensor, weights: Tensor) -> Tensor:
    """Return responsibilities times weights (B, N, K), normalized over the points of each component.

    They are computed from logarithms, so that components of tiny responsibilities still have points and gradients.
    """
    largest = (log_responsibilities + weights.unsqueeze(-1).log()).detach().amax(1, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0.0)
    # Points of zero weight may exceed ``largest``. The bound keeps products of two of their exponentials finite.
    bound = 0.5 * math.log(torch.finfo(log_responsibilities.dtype).max)
    parts = (log_responsibilities - largest).clamp(max=bound).exp() * weights.unsqueeze(-1)
    total = parts.sum(1, keepdim=True)
    return parts / torch.where(total > 0, total, 1.0)


def _irls_step(kernel: Kernel, sets: _Sets, shares: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient (B, K, D) of the expected energy, and the IRLS step, for shares (B, N, K)."""
    near = _NEAR * (sets.high - sets.low).detach()
    num_rows = _BLOCK_SIZE // max(centers.numel(), 1) or 1
    blocks = zip(sets.x.split(num_rows, 1), shares.split(num_rows, 1), strict=True)
    sums = [_irls_sums(kernel, x, share, centers, near) for x, share in blocks]
    slope, weight, share_with_weight = torch.stack(sums).sum(0)
    # Points without an IRLS weight get the mean weight of the others.
    usable = (share_with_weight > _SMALLEST_WEIGHT) & (weight > _SMALLEST_WEIGHT)
    step = -slope * share_with_weight / torch.where(usable, weight, 1.0)
    # If no point has a weight, all are at the center or have slope 0: the step is 0, with the gradient of their mean.
    to_mean = (shares.mT @ sets.x.to(shares.dtype)).to(centers.dtype) - centers
    return slope, torch.where(usable, step.to(centers.dtype), to_mean - to_mean.detach())


def _irls_sums(kernel: Kernel, x: Tensor, shares: Tensor, centers: Tensor, near: Tensor) -> Tensor:
    """Return sums (3, B, K, D) over points: of slopes, of IRLS weights, of shares of points with an IRLS weight."""

    def energy(copies: Tensor) -> Tensor:  # of x (B, 1, n, 1, D) and copies (B, K, n, 1, D): (B, K, n, 1, 1)
        return kernel(x.unsqueeze(1).unsqueeze(-2), copies.unsqueeze(-2))

    copies = centers.unsqueeze(2).expand(-1, -1, x.shape[1], -1)  # a copy of each center per point, for separate slopes
    dtype = accumulation_dtype(x)  # gradients contain 1 / distance^2
    slopes = _slope(energy, copies).to(dtype)
    distance = (copies - x.unsqueeze(1)).abs().to(dtype)
    at_center = distance <= near.unsqueeze(1)
    weights = slopes.abs() / torch.where(at_center, 1.0, distance)
    if at_center.any():
        # The sums of the rows of the Hessian. It is diagonal for energies that add over features, and at the center for
        # functions of the distance. 0 c, because autograd cannot differentiate a slope that does not depend on c.
        with torch.no_grad():
            curvature = _slope(lambda c: _slope(energy, c) + 0.0 * c, copies).nan_to_num(0.0, 0.0, 0.0).clamp(min=0.0)
        weights = torch.where(at_center, curvature.to(dtype), weights)
    share = shares.mT.unsqueeze(-1).to(dtype)
    has_weight = ~at_center | (weights > 0)  # an energy with a kink at the center has none there
    return torch.stack([(share * slopes).sum(2), (share * weights).sum(2), (share * has_weight).sum(2)])


def _line_search(kernel: Kernel, sets: _Sets, shares: Tensor, centers: Tensor, slope: Tensor, step: Tensor) -> Tensor:
    """Return the centers after the longest of the steps 1, 1/2, 1/4, ... that lowers the expected energy enough."""

    def moved(t: Tensor) -> Tensor:
        return (centers + t.unsqueeze(-1) * step).clamp(sets.low, sets.high)

    def expected_energy(centers: Tensor) -> Tensor:
        return (shares * kernel(sets.x, centers)).sum(1, dtype=accumulation_dtype(sets.x))

    with torch.no_grad():  # the length of the step is a constant
        energy = expected_energy(centers)
        t = torch.ones_like(energy, dtype=centers.dtype)
        for _ in range(_TRIALS):
            trial = moved(t)
            predicted_change = (slope * (trial - centers)).sum(-1)
            is_lower = expected_energy(trial) <= energy + _ARMIJO * predicted_change
            if is_lower.all():
                break
            t = torch.where(is_lower, t, 0.5 * t)
    return torch.where(is_lower.unsqueeze(-1), moved(t), centers)


def _slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of the sum of a function; it is differentiable if gradients are recorded."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if recorded and x.requires_grad else x.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(x).sum(), x, create_graph=recorded)
    return slope
