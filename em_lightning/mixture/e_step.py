"""The E-step: joint log-densities, responsibilities and sufficient statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from em_lightning.competition import Competition, Softmin
from em_lightning.kernels import EllipticalKernel
from em_lightning.mixture.backends import map_blocks, native, sum_blocks
from em_lightning.mixture.covariance import COVARIANCES, Covariance, half_log_two_pi
from em_lightning.mixture.points import Frame, Parameters, Points

POSTERIOR = Softmin()  # the competition whose responsibilities are the posterior over components


class BackgroundTerms(NamedTuple):
    """Terms of the background with the weight w_0 and the density p_0, for one batch of sets.

    log_joint: (B,), ``log(w_0 p_0)`` in the coordinates of the :class:`~.points.Frame`.
    log_weight: (B,), ``log w_0``.
    log_rest: (B,), added to the log-weights of the components: ``log(1 - w_0)``, or 0 if their sum is 1 - w_0 already.
    """

    log_joint: Tensor
    log_weight: Tensor
    log_rest: Tensor


class Likelihood(NamedTuple):
    """The density of the points.

    family: the covariance type, or von Mises-Fisher.
    kernel: a robust kernel of the Mahalanobis distance; ``None`` for Gaussian components.
    background: the uniform component, or ``None``.
    """

    family: Covariance
    kernel: EllipticalKernel | None = None
    background: BackgroundTerms | None = None


class SufficientStatistics(NamedTuple):
    r"""Sums over points with responsibilities :math:`r_{nk}`, weights :math:`w_n` and IRLS weights :math:`u_{nk}`.

    mass: (B, K), :math:`\sum_n w_n r_{nk}`.
    zeroth: (B, K), :math:`\sum_n w_n r_{nk} u_{nk}`: the mass for Gaussian components, where :math:`u_{nk} = 1`.
    first: (B, K, D), :math:`\sum_n w_n r_{nk} u_{nk} x_n`.
    second: (B, K, S), :math:`\sum_n w_n r_{nk} u_{nk} s(x_n)`; ``s(x)`` are S products of features, see ``covariance``.
    log_likelihood: (B,), :math:`\sum_n w_n \log p(x_n)`; zero if not requested.
    background_mass: (B,), the mass of the background.
    num_points: (B,), number of points of positive weight.
    """

    mass: Tensor
    zeroth: Tensor
    first: Tensor
    second: Tensor
    log_likelihood: Tensor
    background_mass: Tensor
    num_points: Tensor

    @classmethod
    def of_gaussians(cls, points: Points, sums: Tensor, log_likelihood: Tensor) -> SufficientStatistics:
        """Return the statistics of Gaussian components without a background from their sums (B, K, F)."""
        mass, first, second = sums.tensor_split([1, 1 + points.num_features], -1)
        mass, no_background = mass.squeeze(-1), torch.zeros_like(points.mass)
        return cls(mass, mass, first, second, log_likelihood, no_background, points.num_points)

    def plus(self, other: SufficientStatistics) -> SufficientStatistics:
        """Return the sum of both, the statistics of all points."""
        return SufficientStatistics(*(a + b for a, b in zip(self, other, strict=True)))

    def flatten(self) -> Tensor:
        """Return all statistics of one set as one tensor, for instance to sum over processes."""
        return torch.cat([part.flatten() for part in self])

    def unflatten(self, flat: Tensor) -> SufficientStatistics:
        """Return statistics with the shapes of ``self`` from a flat tensor; the inverse of :meth:`flatten`."""
        parts = flat.split([part.numel() for part in self])
        return SufficientStatistics(*(part.view_as(like) for part, like in zip(parts, self, strict=True)))

    def with_mean_weight_one(self) -> SufficientStatistics:
        """Return the statistics under weights that are divided by their mean."""
        total = self.mass.sum(-1) + self.background_mass
        ratio = self.num_points / torch.where(total > 0, total, 1.0)
        scaled = SufficientStatistics(*(part * ratio.view(-1, *[1] * (part.ndim - 1)) for part in self))
        return scaled._replace(num_points=self.num_points)


def e_step(
    points: Points,
    parameters: Parameters,
    likelihood: Likelihood,
    competition: Competition = POSTERIOR,
    mask: Tensor | None = None,
    *,
    with_log_likelihood: bool = False,
) -> SufficientStatistics:
    r"""Return the sufficient statistics of points under the responsibilities of a mixture.

    .. math::
        r_{nk} = \frac{\pi_k p_k(x_n)}{\sum_j \pi_j p_j(x_n)}, \qquad
        \text{statistics}_k = \sum_n w_n r_{nk} u_{nk} \, [1, x_n, s(x_n)]

    Letters are those of :class:`SufficientStatistics`, coordinates those of the frame. Another ``competition`` computes
    other responsibilities from energies, which are minus the joint log-densities, with the background last. Points with
    a false ``mask`` (B, N) do not take part in a competition that couples points.
    """
    tempered, is_softmin = not is_posterior(competition), isinstance(competition, Softmin)
    plain = is_softmin and likelihood.kernel is None and likelihood.background is None
    # With a temperature, the native log-likelihood would be that of the tempered densities.
    tensors = points.weights, *parameters
    if plain and not (tempered and with_log_likelihood) and native.serves(points.x, likelihood.family, tensors):
        arguments = _native_arguments(points, parameters, likelihood.family, competition)
        return SufficientStatistics.of_gaussians(points, *native.e_step(*arguments, with_log_likelihood))
    theta, peak = likelihood.family.natural_parameters(parameters)
    coupling = {"item_dim": 2, "mask": mask} if competition.couples_items else {}

    def sums_of_block(
        sets: slice, block: Tensor, weights: Tensor | None, theta: Tensor, peak: Tensor, *background: Tensor
    ) -> tuple[Tensor, ...]:
        """Return mass, sums of ``w_n r_nk u_nk [1, x_n, s(x_n)]``, log-likelihood and the mass of the background."""
        lifted = likelihood.family.features(points.coordinates(block, sets))
        joint, irls_weights = log_joint(lifted, theta, peak, points.num_features, likelihood.kernel)
        joint = with_background(joint, background)
        if is_softmin:
            responsibilities = (joint / competition.temperature if tempered else joint).softmax(1)
        else:  # competitions may depend on the unit of the densities: convert to the user's units
            energies = points.log_jacobian()[sets, None, None] - joint
            responsibilities = competition(energies, dim=1, **coupling).responsibilities.to(joint.dtype)
        log_likelihood = theta.new_zeros(theta.shape[0])
        if with_log_likelihood:
            log_p = joint.logsumexp(1)
            log_likelihood = (log_p if weights is None else log_p * weights).sum(-1)
        if weights is not None:
            responsibilities = responsibilities * weights.unsqueeze(1)
        mass, background_mass = responsibilities.sum(-1).tensor_split([theta.shape[1]], 1)
        responsibilities = responsibilities[:, : theta.shape[1]]
        if irls_weights is not None:
            responsibilities = responsibilities * irls_weights
        moments = (lifted @ responsibilities.mT).mT  # for few components, twice as fast as the transposed product
        return mass, moments, log_likelihood, background_mass.sum(1)

    numbers_per_point = max(theta.shape[1:])  # K joint log-densities or F features
    tensors = (theta, peak, *(likelihood.background or ()))
    block_sizes = (2**62, 2**62) if coupling else None  # one block of all sets and points
    results = sum_blocks(sums_of_block, (points.x, points.weights), tensors, numbers_per_point, block_sizes)
    mass, moments, log_likelihood, background_mass = results
    zeroth, first, second = moments.tensor_split([1, 1 + points.num_features], -1)
    zeroth = mass if likelihood.kernel is None else zeroth.squeeze(-1)
    return SufficientStatistics(mass, zeroth, first, second, log_likelihood, background_mass, points.num_points)


def is_posterior(competition: Competition) -> bool:
    """Return whether the competition is softmin of temperature 1, without reading the value of a tensor."""
    temperature = competition.temperature if isinstance(competition, Softmin) else None
    return not isinstance(temperature, Tensor) and temperature == 1.0


def _native_arguments(
    points: Points, parameters: Parameters, family: Covariance, competition: Competition = POSTERIOR
) -> tuple[Any, ...]:
    """Return the first arguments of the operators in ``native.py``; the competition is softmin."""
    log_weights, means, covariances = parameters
    factors = family.factorize(covariances, means)
    factor, inverse = (part.expand(-1, means.shape[1], *part.shape[2:]) for part in factors)  # per component
    peak = family.log_peak(log_weights, inverse, points.num_features)
    if not is_posterior(competition):  # a temperature T divides joint log-densities: covariances are multiplied by it
        root = competition.temperature**0.5
        peak, factor, inverse = peak / competition.temperature, factor * root, inverse / root
    return points.x, points.weights, means, inverse, peak, factor.detach(), *points.frame, family.native_kind


def log_density(points: Points, parameters: Parameters, likelihood: Likelihood) -> Tensor:
    """Return ``log p(x_n)`` (B, N) in frame coordinates."""
    family, kernel, background = likelihood
    if kernel is None and background is None and native.serves(points.x, family, parameters):
        return native.log_density(*_native_arguments(points._replace(weights=None), parameters, family))
    theta, peak = family.natural_parameters(parameters)

    def log_p_of_block(sets: slice, block: Tensor, theta: Tensor, peak: Tensor, *background: Tensor) -> tuple[Tensor]:
        lifted = family.features(points.coordinates(block, sets))
        joint, _ = log_joint(lifted, theta, peak, points.num_features, kernel)
        return (with_background(joint, background).logsumexp(1),)

    tensors = (theta, peak, *(background or ()))
    (log_p,) = map_blocks(log_p_of_block, (points.x,), tensors, numbers_per_point=max(theta.shape[1:]))
    return log_p


def log_joint(
    lifted: Tensor, theta: Tensor, peak: Tensor, num_features: int, kernel: EllipticalKernel | None
) -> tuple[Tensor, Tensor | None]:
    r"""Return :math:`\log \pi_k + \log p_k(x_n)` and the IRLS weights :math:`u_{nk}`, both (B, K, N).

    ``lifted`` is ``phi(x) = [1, x, s(x)]`` (B, F, N), ``theta`` (B, K, F) the natural parameters, ``peak`` (B, K) the
    joint log-density of each Gaussian component at its mean. Gaussian components have IRLS weights of 1 (``None``).
    """
    gaussian = theta @ lifted
    if kernel is None:
        return gaussian, None
    squared_distance = (2.0 * (peak.unsqueeze(-1) - gaussian)).clamp(min=0.0)
    # The peak contains the normalizer of a Gaussian; replace it by the kernel's.
    log_ratio = half_log_two_pi(num_features) - kernel.elliptical_log_normalizer(num_features)
    joint = peak.unsqueeze(-1) + log_ratio - kernel.rho(squared_distance, num_features)
    return joint, kernel.irls_weight(squared_distance, num_features)


def log_joint_of_points(points: Points, parameters: Parameters, likelihood: Likelihood) -> Tensor:
    """Return ``log pi_k + log p_k(x_n)`` (B, N, K), with the background last, in the user's units."""
    family, kernel, background = likelihood
    lifted = family.features(points.coordinates())
    joint, _ = log_joint(lifted, *family.natural_parameters(parameters), points.num_features, kernel)
    return (with_background(joint, background or ()) - points.log_jacobian()[:, None, None]).mT


def with_background(joint: Tensor, background: Sequence[Tensor]) -> Tensor:
    """Append :class:`BackgroundTerms`, if not empty, to the joint log-densities (B, K, N) of the components."""
    if not background:
        return joint
    background_joint, _log_weight, log_rest = (part[:, None, None] for part in background)
    return torch.cat([joint + log_rest, background_joint.expand(-1, 1, joint.shape[-1])], 1)


def _e_step_in_torch(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute :func:`.native.e_step` by torch operations, which have derivatives of every order."""
    z, joint = _joint_in_torch(*arguments)
    _, weights, *_, kind, with_log_likelihood = arguments
    responsibilities, log_density = joint.softmax(1), joint.logsumexp(1)
    if weights is not None:
        responsibilities, log_density = responsibilities * weights.unsqueeze(1), log_density * weights
    return responsibilities @ COVARIANCES[kind].features(z).mT, log_density.sum(-1) * with_log_likelihood


def _joint_in_torch(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return coordinates (B, D, N) and joint log-densities (B, K, N)."""
    x, _weights, means, inverse, peak, _scale, center, unit, kind, *_ = arguments
    z = Frame(center, unit).enter(x.to(center.dtype))
    difference = z.unsqueeze(1) - means.unsqueeze(-1)
    y = inverse @ difference if kind == "full" else inverse.unsqueeze(-1) * difference
    return z, peak.unsqueeze(-1) - 0.5 * y.square().sum(2)


native.register_gradient(native.e_step, native.e_step_backward, _e_step_in_torch)
native.register_gradient(
    native.log_density, native.log_density_backward, lambda *inputs: _joint_in_torch(*inputs)[1].logsumexp(1)
)
