"""The E-step: joint log-densities, responsibilities and sufficient statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from em_lightning.kernels import EllipticalKernel
from em_lightning.mixture.backends import map_blocks, native, sum_blocks
from em_lightning.mixture.covariance import Covariance, Parameters
from em_lightning.mixture.points import Points

# From joint log-densities (B, K, N) to responsibilities (B, K, N).
Respond = Callable[[Tensor], Tensor]


class Family(Protocol):
    """Densities whose logarithm is linear in features ``phi(x)``: a covariance type, or von Mises-Fisher."""

    def features(self, x: Tensor) -> Tensor:
        """Return ``phi(x)`` (B, F, N) of points (B, D, N)."""

    def natural_parameters(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Return theta (B, K, F) with ``log pi_k + log p_k(x) = theta_k . phi(x)``, and its value at the mean (B, K)."""


class BackgroundLevel(NamedTuple):
    """A constant component beside the others, for one batch of sets.

    log_density: (B,), ``log(w_0 p_0)`` in the coordinates of the points.
    log_weight: (B,), ``log w_0``.
    log_rest: (B,), added to the log-weights of the components: ``log(1 - w_0)``, or 0 where they contain it.
    """

    log_density: Tensor
    log_weight: Tensor
    log_rest: Tensor


class Likelihood(NamedTuple):
    """The density of the points.

    family: the covariance type, or von Mises-Fisher.
    kernel: a robust kernel of the Mahalanobis distance; ``None`` for Gaussian components.
    background: a constant component; ``None`` for none.
    """

    family: Family
    kernel: EllipticalKernel | None = None
    background: BackgroundLevel | None = None

    def shared(self) -> tuple[Tensor, ...]:
        """Return the trained parameters of the kernel."""
        return () if self.kernel is None else tuple(self.kernel.parameters())


class SufficientStatistics(NamedTuple):
    r"""Sums over points under responsibilities :math:`r_{nk}`, weights :math:`w_n` and IRLS weights :math:`u_{nk}`.

    mass: (B, K), :math:`\sum_n w_n r_{nk}`.
    zeroth: (B, K), :math:`\sum_n w_n r_{nk} u_{nk}`: the mass for Gaussian components, where :math:`u_{nk} = 1`.
    first: (B, K, D), :math:`\sum_n w_n r_{nk} u_{nk} x_n`.
    second: (B, K, S), :math:`\sum_n w_n r_{nk} u_{nk} s(x_n)`.
    log_likelihood: (B,), :math:`\sum_n w_n \log p(x_n)`; zero where it was not asked for.
    background_mass: (B,), the mass of the background.
    count: (B,), number of points that count.
    """

    mass: Tensor
    zeroth: Tensor
    first: Tensor
    second: Tensor
    log_likelihood: Tensor
    background_mass: Tensor
    count: Tensor

    def plus(self, other: SufficientStatistics) -> SufficientStatistics:
        """Return the statistics of the points of both."""
        return SufficientStatistics(*(own + more for own, more in zip(self, other, strict=True)))

    def with_mean_weight_one(self) -> SufficientStatistics:
        """Return the statistics under weights that are divided by their mean."""
        total = self.mass.sum(-1) + self.background_mass
        ratio = self.count / torch.where(total > 0, total, 1.0)
        parts = (part * ratio.reshape(-1, *[1] * (part.ndim - 1)) for part in self[:-1])
        return SufficientStatistics(*parts, self.count)


def e_step(
    points: Points,
    parameters: Parameters,
    likelihood: Likelihood,
    respond: Respond | None = None,
    *,
    temperature: float | Tensor = 1.0,
    with_log_likelihood: bool = False,
    couples_points: bool = False,
    shared: Sequence[Tensor] = (),
    block_size: int | None = None,
) -> SufficientStatistics:
    r"""Return the sufficient statistics of points under the responsibilities of a mixture.

    .. math::
        r_{nk} = \frac{\pi_k p_k(x_n)}{\sum_j \pi_j p_j(x_n)}, \qquad
        S_k = \sum_n w_n r_{nk} u_{nk} \, [1, x_n, s(x_n)]

    Args:
        points: the point sets.
        parameters: of the mixture, in the coordinates of the points.
        likelihood: the density of the points.
        respond: from joint log-densities (B, K, N), the background last, to responsibilities; softmax by default.
        temperature: divides the joint log-densities before the softmax.
        with_log_likelihood: whether the log-likelihood is wanted.
        couples_points: whether ``respond`` needs all points of a set at once.
        shared: trained parameters of ``respond``.
        block_size: see :func:`~em_lightning.mixture.backends.sum_blocks`.
    """
    tempered = isinstance(temperature, Tensor) or temperature != 1.0
    plain = respond is None and likelihood.kernel is None and likelihood.background is None
    plain = plain and not (tempered and with_log_likelihood)
    family = likelihood.family
    if plain and not points.lifted and isinstance(family, Covariance) and native.serves(points.source, family.whitening):
        return _fused_statistics(points, parameters, family, temperature, with_log_likelihood)
    theta, peak = family.natural_parameters(parameters)
    width = max(theta.shape[1:])
    if couples_points:
        block_size = points.source.shape[0] * points.source.shape[2] * width
    function: Callable[..., tuple[Tensor, ...]]
    if plain:
        function = _SoftmaxStatistics(points, with_log_likelihood)
        theta = theta / temperature if tempered else theta
    else:
        responding = respond or (lambda joint: (joint / temperature).softmax(1))
        function = _GeneralStatistics(points, likelihood, responding, with_log_likelihood, theta.shape[1])
    level = () if likelihood.background is None else likelihood.background
    mass, moments, log_likelihood, outside = sum_blocks(
        function,
        (points.source, points.weights),
        (theta, peak, *level),
        width,
        (*likelihood.shared(), *shared),
        block_size,
    )
    first, second = moments[..., 1 : 1 + points.num_features], moments[..., 1 + points.num_features :]
    return SufficientStatistics(mass, moments[..., 0], first, second, log_likelihood, outside, points.count)


def _fused_statistics(
    points: Points,
    parameters: Parameters,
    covariance: Covariance,
    temperature: float | Tensor,
    with_log_likelihood: bool,
) -> SufficientStatistics:
    """Return the statistics by the native backend."""
    log_weights, means, covariances = parameters
    features = points.num_features
    factor = covariance.factorize(covariances, means)
    scale, inverse = (part.expand(-1, means.shape[1], *part.shape[2:]) for part in factor)
    peak = covariance.log_peak(log_weights, inverse, features) / temperature
    root = temperature**0.5
    sums, log_likelihood = native.FusedSums.apply(
        points.source,
        points.weights,
        means,
        inverse / root,
        peak,
        (scale * root).detach(),
        *points.frame,
        covariance,
        with_log_likelihood,
    )
    zeroth, first, second = sums.tensor_split([1, 1 + features], -1)
    mass = zeroth.squeeze(-1)
    return SufficientStatistics(mass, mass, first, second, log_likelihood, torch.zeros_like(points.mass), points.count)


def log_density(
    points: Points, parameters: Parameters, likelihood: Likelihood, block_size: int | None = None
) -> Tensor:
    """Return ``log p(x_n)`` (B, N) in the coordinates of the points; arguments are those of :func:`e_step`."""
    theta, peak = likelihood.family.natural_parameters(parameters)

    def density_of_block(sets: slice, source: Tensor, theta: Tensor, peak: Tensor, *level: Tensor) -> tuple[Tensor]:
        features = points.lift(source, sets)
        joint, _ = log_joint(features, theta, peak, points.num_features, likelihood.kernel)
        return (with_background(joint, level).logsumexp(1),)

    level = () if likelihood.background is None else likelihood.background
    width = max(theta.shape[1:])
    (density,) = map_blocks(
        density_of_block, (points.source,), (theta, peak, *level), width, likelihood.shared(), block_size
    )
    return density


def log_joint(
    features: Tensor, theta: Tensor, peak: Tensor, num_features: int, kernel: EllipticalKernel | None
) -> tuple[Tensor, Tensor | None]:
    r"""Return :math:`\log \pi_k + \log p_k(x_n)` and the IRLS weights :math:`u_{nk}`, both (B, K, N).

    Args:
        features: ``phi(x)`` (B, F, N).
        theta: (B, K, F), natural parameters.
        peak: (B, K), the log-density of each Gaussian component at its mean.
        num_features: D.
        kernel: of the Mahalanobis distance; ``None`` for Gaussian components, whose IRLS weights are 1 (``None``).
    """
    gaussian = theta @ features
    if kernel is None:
        return gaussian, None
    squared_distance = (2.0 * (peak.unsqueeze(-1) - gaussian)).clamp(min=0.0)
    log_ratio = 0.5 * num_features * math.log(2.0 * math.pi) - kernel.elliptical_log_normalizer(num_features)
    joint = peak.unsqueeze(-1) + log_ratio - kernel.rho(squared_distance, num_features)
    return joint, kernel.irls_weight(squared_distance, num_features)


def with_background(joint: Tensor, level: Sequence[Tensor]) -> Tensor:
    """Return joint log-densities (B, K, N), and with the level (B,) of a background each that last: (B, K + 1, N)."""
    if not level:
        return joint
    log_density, _, log_rest = (part[:, None, None] for part in level)
    return torch.cat([joint + log_rest, log_density.expand(-1, 1, joint.shape[-1])], 1)


class _GeneralStatistics(NamedTuple):
    """The statistics of a block under any kernel, background and competition."""

    points: Points
    likelihood: Likelihood
    respond: Respond
    with_log_likelihood: bool
    num_components: int

    def __call__(
        self, sets: slice, source: Tensor, weights: Tensor | None, theta: Tensor, peak: Tensor, *level: Tensor
    ) -> tuple[Tensor, ...]:
        features = self.points.lift(source, sets)
        joint, irls_weights = log_joint(features, theta, peak, self.points.num_features, self.likelihood.kernel)
        joint = with_background(joint, level)
        responsibilities = self.respond(joint).to(joint.dtype)
        log_likelihood = theta.new_zeros(len(theta))
        if self.with_log_likelihood:
            log_density = joint.logsumexp(1)
            log_likelihood = (log_density if weights is None else log_density * weights).sum(-1)
        if weights is not None:
            responsibilities = responsibilities * weights.unsqueeze(1)
        mass = responsibilities.sum(-1)
        outside = mass[:, self.num_components :].sum(1)
        responsibilities = responsibilities[:, : self.num_components]
        if irls_weights is not None:
            responsibilities = responsibilities * irls_weights
        return mass[:, : self.num_components], responsibilities @ features.mT, log_likelihood, outside


class _SoftmaxStatistics(NamedTuple):
    """The statistics of a block under plain Gaussian EM, with a derivative written by hand.

    It returns what :class:`_GeneralStatistics` returns, twice as fast, as features are normalized in place of
    responsibilities, and its derivative needs no intermediate results of the forward pass.
    """

    points: Points
    with_log_likelihood: bool

    def __call__(
        self, sets: slice, source: Tensor, weights: Tensor | None, theta: Tensor, peak: Tensor
    ) -> tuple[Tensor, ...]:
        features = self.points.lift(source, sets)
        exponentials, total, largest = _exponentials(theta, features)
        share = total.reciprocal() if weights is None else weights.unsqueeze(1) / total
        # The longer side first: half the time for a handful of components.
        moments = ((features * share) @ exponentials.mT).mT
        log_likelihood = theta.new_zeros(len(theta))
        if self.with_log_likelihood:
            log_density = (total.log() + largest).squeeze(1)
            log_likelihood = (log_density if weights is None else log_density * weights).sum(-1)
        return moments[..., 0], moments, log_likelihood, theta.new_zeros(len(theta))

    def vjp(
        self,
        grads: Sequence[Tensor | None],
        wanted: Sequence[bool],
        sets: slice,
        source: Tensor,
        weights: Tensor | None,
        theta: Tensor,
        peak: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of source, weights and theta.

        With ``a_kn = G_k . phi_n`` for the gradient ``G`` of the moments and ``l`` of the log-likelihood, that of the
        joint log-density is ``w_n r_nk (a_kn - sum_j r_jn a_jn + l)``.
        """
        of_mass, of_moments, of_log_likelihood, _ = grads
        with torch.set_grad_enabled(wanted[0]):
            source = source.detach().requires_grad_(wanted[0])
            lifted = self.points.lift(source, sets)
        features = lifted.detach()
        outer = torch.zeros_like(theta) if of_moments is None else of_moments
        if of_mass is not None:
            outer = torch.cat([outer[..., :1] + of_mass.unsqueeze(-1), outer[..., 1:]], -1)
        exponentials, total, largest = _exponentials(theta, features)
        responsibilities = exponentials.div_(total)
        slope = outer @ features
        mean = (slope * responsibilities).sum(1, keepdim=True)
        of_weights = mean
        if of_log_likelihood is not None:
            by_set = of_log_likelihood[:, None, None]
            of_weights = mean + by_set * (total.log_() + largest)
            mean = mean - by_set
        if weights is not None:
            responsibilities.mul_(weights.unsqueeze(1))
        slope = slope.sub_(mean).mul_(responsibilities)
        of_theta = slope @ features.mT if wanted[2] else None
        of_source = None
        if wanted[0]:
            of_features = theta.mT @ slope
            of_features.baddbmm_(outer.mT, responsibilities)
            of_source = of_features if lifted is source else torch.autograd.grad(lifted, source, of_features)[0]
        return of_source, of_weights.squeeze(1) if wanted[1] else None, of_theta, None


def _exponentials(theta: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``exp(theta . phi - m)`` (B, K, N), its sum over components and the largest exponent ``m`` (B, 1, N)."""
    joint = theta @ features
    largest = joint.detach().amax(1, keepdim=True)
    exponentials = joint.sub_(largest).exp_()
    return exponentials, exponentials.sum(1, keepdim=True), largest
