"""Expectation-maximization: one step, and the loop to convergence, in memory or over blocks of one large set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from em_lightning.competition import Competition
from em_lightning.distributed import accumulation_dtype
from em_lightning.mixture.backends import native
from em_lightning.mixture.background import UniformBackground
from em_lightning.mixture.covariance import Covariance, covariance_of
from em_lightning.mixture.covariance.cholesky import is_factorized_natively
from em_lightning.mixture.e_step import POSTERIOR, Likelihood, SufficientStatistics, e_step, is_posterior
from em_lightning.mixture.m_step import PseudoCounts, m_step
from em_lightning.mixture.mixture import Mixture, check_points, mixture_of
from em_lightning.mixture.points import Frame, Parameters, Points, power_of_two, prepare
from em_lightning.mixture.prior import MixturePrior

State = TypeVar("State", bound=tuple[Tensor, ...])


def em_step(
    x: Tensor, mixture: Mixture, mask: Tensor | None = None, weights: Tensor | None = None, floor: float = 1e-6
) -> Mixture:
    r"""Return the mixtures after one EM iteration.

    :math:`r_{nk} = \pi_k N(x_n \mid \mu_k, \Sigma_k) / p(x_n)`; component k is fitted to the points with weights r_nk.

    Args:
        x: points (B, N, D), or (1, N, D) for all mixtures.
        mixture: B mixtures of any covariance type, which is kept.
        mask: (B, N) or (1, N), false where a row is padding.
        weights: (B, N) or (1, N), how often each point counts.
        floor: added to every variance, in squared units of ``x``; scikit-learn's ``reg_covar``.

    Raises:
        ValueError: ``x`` does not match the mixtures, or has no rows.
        TypeError: ``x`` is not a floating-point tensor.

    Example:
        >>> x = torch.tensor([[[-1.0], [-0.9], [1.0], [1.1]]])
        >>> start = Mixture(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[[-1.0], [1.0]]]), torch.ones(1, 2))
        >>> em_step(x, start).means.shape
        torch.Size([1, 2, 1])

    Source: Dempster, Laird and Rubin, Maximum Likelihood from Incomplete Data via the EM Algorithm, 1977.
    """
    check_points(mixture, x)
    if x.shape[1] == 0:
        raise ValueError(f"x of shape {tuple(x.shape)} must have at least one row; mask the rows of empty sets")
    covariance = covariance_of(mixture.covariances, mixture.means)
    x = x.expand(mixture.sets, -1, -1)
    mask, weights = (None if part is None else part.expand(x.shape[:2]) for part in (mask, weights))
    points = prepare(x, mask, weights)
    parameters = points.frame.enter_parameters(mixture.parameters())
    after, _ = iteration(points, parameters, Likelihood(covariance), points.floor(floor))
    return mixture_of(points, after, covariance, x.dtype)


def iteration(
    points: Points,
    parameters: Parameters,
    likelihood: Likelihood,
    floor: Tensor,
    prior: PseudoCounts | None = None,
    background: UniformBackground | None = None,
    competition: Competition = POSTERIOR,
    mask: Tensor | None = None,
    *,
    with_log_likelihood: bool = False,
) -> tuple[Parameters, SufficientStatistics]:
    """Return the parameters after an EM iteration, and its statistics; arguments are those of e_step and m_step.

    C++ does the whole step if it is that of Gaussian components without a prior, and no derivative is wanted.
    """
    family, tensors, covariances = likelihood.family, (points.weights, *parameters), parameters.covariances
    others = prior, background, likelihood.kernel, likelihood.background
    plain = family.native_m_step and is_posterior(competition) and all(part is None for part in others)
    # A whole step has the factors of C++ only: for equal results of singular covariances, separate ones must have them.
    plain = plain and (family.native_kind != "full" or is_factorized_natively(covariances))
    if plain and native.serves_step(points.x, family, tensors):
        arguments = points.x, *tensors, *points.frame, floor, family.native_kind, with_log_likelihood
        sums, log_likelihood, *after = native.em_step(*arguments)
        return Parameters(*after), SufficientStatistics.of_gaussians(points, sums, log_likelihood)
    statistics = e_step(points, parameters, likelihood, competition, mask, with_log_likelihood=with_log_likelihood)
    return m_step(statistics, family, floor, covariances, prior, background), statistics


class Fit(NamedTuple):
    """The result of EM iterations to convergence.

    state: the parameters of each set.
    steps: (B,), iterations of each set.
    converged: (B,), whether the objective of a set changed by less than the tolerance.
    objectives: one (B,) per iteration, the objective per point before its M-step.
    """

    state: tuple[Tensor, ...]
    steps: Tensor
    converged: Tensor
    objectives: list[Tensor]


def fit(
    step: Callable[[State, int], tuple[State, Tensor]],
    state: State,
    *,
    max_iters: int,
    tol: float,
    previous: Tensor | None = None,
) -> Fit:
    """Iterate until the objective per point of each set changes by less than ``tol``, as scikit-learn does.

    A set that has converged keeps its parameters, so that its result does not depend on the other sets.
    ``step(state, iteration)``, from iteration 1, takes a named tuple of tensors (B, ...). It returns the next state and
    the objective (B,) of the given state. ``previous`` is the last objective of a fit to continue; ``tol=0`` runs all.
    """
    running = torch.ones(len(state[0]), dtype=torch.bool, device=state[0].device)
    steps = torch.zeros_like(running, dtype=torch.long)
    objectives = []
    for iteration in range(1, max_iters + 1):
        after, objective = step(state, iteration)
        state, steps = where(running, after, state), steps + running
        if previous is not None:
            running = running & ~((objective - previous).abs() < tol)
        previous = objective
        objectives.append(objective)
        if not running.any():
            break
    return Fit(state, steps, ~running, objectives)


def where(condition: Tensor, one: State, other: State) -> State:
    """Return ``torch.where`` of each tensor (B, ...) of two named tuples, by a condition (B,)."""
    parts = (torch.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(one, other, strict=True))
    return type(one)(*parts)


class StreamedEM(NamedTuple):
    """EM over data in blocks: the caller adds the statistics of blocks, and of ranks, before the M-step.

    covariance: the covariance type.
    frame: centered near the mean of all points, the same for all blocks of a pass.

    Example:
        >>> x = torch.tensor([[-1.0], [-0.9], [1.0], [1.1]])
        >>> mixture = Mixture(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[[-1.0], [1.0]]]), torch.ones(1, 2, 1))
        >>> streamed = StreamedEM.about(mixture)
        >>> first, second = (streamed.e_step(block, mixture) for block in x.split(2))
        >>> streamed.m_step(first.plus(second), mixture).means.shape
        torch.Size([1, 2, 1])
    """

    covariance: Covariance
    frame: Frame

    @classmethod
    def about(cls, mixture: Mixture, center: Tensor | None = None, variance: Tensor | None = None) -> StreamedEM:
        """Return streamed EM for points of given mean and variance (1, D), by default those of the mixture."""
        center = mixture.mean if center is None else center
        variance = mixture.variance if variance is None else variance
        dtype = accumulation_dtype(center)
        frame = Frame(center.detach().to(dtype), power_of_two(variance.detach().to(dtype).amax(-1).sqrt()))
        return cls(covariance_of(mixture.covariances, mixture.means), frame)

    def zeros(self, num_components: int) -> SufficientStatistics:
        """Return the statistics of no points."""
        zeros = self.frame.center.new_zeros(1)
        mass = zeros.expand(1, num_components)
        first = zeros.expand(1, num_components, self.frame.center.shape[1])
        second = self.covariance.second_degree(first.mT).mT  # zeros
        return SufficientStatistics(mass, mass, first, second, zeros, background_mass=zeros, num_points=zeros)

    def e_step(self, x: Tensor, mixture: Mixture, weights: Tensor | None = None) -> SufficientStatistics:
        """Return the sufficient statistics, in frame coordinates, of points (n, D) with weights (n,)."""
        if x.shape[-1] != mixture.features:
            raise ValueError(f"x has shape {tuple(x.shape)}; the mixture has {mixture.features} features")
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # sums need more than half precision
            weights = None if weights is None else weights.unsqueeze(0)
            points = prepare(x[None], weights=weights, frame=self.frame, normalized_weights=False)
            parameters = points.frame.enter_parameters(mixture.parameters())
            statistics = e_step(points, parameters, Likelihood(self.covariance), with_log_likelihood=True)
            log_likelihood = statistics.log_likelihood - points.log_jacobian() * points.mass  # in the user's units
            return statistics._replace(log_likelihood=log_likelihood)

    def m_step(
        self,
        statistics: SufficientStatistics,
        mixture: Mixture,
        floor: float = 1e-6,
        prior: MixturePrior | None = None,
        variance: Tensor | None = None,
    ) -> Mixture:
        """Return the mixture of the M-step; ``mixture`` is that of the E-step.

        A prior without a mean uses the center of the frame. If its ``covariance_strength`` is > 0 and its covariance a
        fraction of the variance, as by default, give the ``variance`` (1, D) of all points. The floor is in its units.
        """
        center, scale = self.frame
        with torch.no_grad():
            statistics = statistics.with_mean_weight_one()
            counts = None
            if prior is not None:
                if variance is None and prior.covariance is None and bool(prior.count("covariance") > 0):
                    raise ValueError("variance must be given, not None: the prior's covariance is a fraction of it")
                # A prior that does not read the variance needs only a tensor of its shape (1, D), such as the center.
                variance = center if variance is None else variance.to(center) / scale.square().unsqueeze(-1)
                mean = torch.zeros_like(center)  # the center in frame coordinates
                counts = prior.pseudo_counts(self.frame, mean, variance, self.covariance, mixture.components)
            covariances = self.frame.enter_parameters(mixture.parameters()).covariances
            after = m_step(statistics, self.covariance, floor / scale.square(), covariances, counts)
            return Mixture(*after).affine(scale, center)


class BlockFit(NamedTuple):
    """The mixture that EM found, the log-likelihood per point before each M-step, and whether EM converged."""

    mixture: Mixture
    log_likelihoods: list[float]
    converged: bool


def fit_blocks(
    blocks: Callable[[], Iterable[tuple[Tensor, Tensor | None]]],
    start: Mixture,
    *,
    max_iters: int = 100,
    tol: float = 1e-3,
    floor: float = 1e-6,
    previous: float | None = None,
    report: Callable[[int, float], None] | None = None,
) -> BlockFit:
    """Fit one mixture to points in blocks by EM, one pass over the blocks per iteration.

    Args:
        blocks: returns the blocks of a pass, each as points (n, D) and how often each counts (n,) or ``None``.
        start: a mixture of one set.
        max_iters: largest number of iterations; this default, and those of ``tol`` and ``floor``, are scikit-learn's.
        tol: stop if the log-likelihood changes by less, in nats per point; 0 runs all iterations.
        floor: added to every variance, in squared units of the points.
        previous: the log-likelihood per point of the last iteration of an earlier fit that this one continues.
        report: is called after each iteration with its number and its log-likelihood per point.

    Raises:
        ValueError: ``blocks()`` yields no block, or the log-likelihood is not finite.

    Example:
        >>> x = torch.tensor([[-2.0], [-1.9], [3.0], [3.1]])
        >>> start = Mixture(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[[-1.0], [1.0]]]), torch.ones(1, 2, 1))
        >>> fit = fit_blocks(lambda: [(x[:3], None), (x[3:], None)], start)
        >>> [round(mean, 2) for mean in fit.mixture.means.flatten().tolist()], fit.converged
        ([-1.95, 3.05], True)
    """
    start = start.to(accumulation_dtype(start.means))
    streamed = StreamedEM.about(start)

    def step(parameters: Parameters, iteration: int) -> tuple[Parameters, Tensor]:
        mixture = Mixture(*parameters)
        statistics = None
        for x, weights in blocks():
            of_block = streamed.e_step(x, mixture, weights)
            statistics = of_block if statistics is None else statistics.plus(of_block)
        if statistics is None:
            raise ValueError("blocks() must yield at least one block")
        log_likelihood = statistics.log_likelihood / statistics.mass.sum(-1)
        if not math.isfinite(float(log_likelihood)):
            raise ValueError(f"the log-likelihood is {float(log_likelihood)}; give finite points and a positive weight")
        if report is not None:
            report(iteration, float(log_likelihood))
        return streamed.m_step(statistics, mixture, floor).parameters(), log_likelihood

    objective = None if previous is None else start.means.new_tensor([previous])
    result = fit(step, start.parameters(), max_iters=max_iters, tol=tol, previous=objective)
    return BlockFit(Mixture(*result.state), [float(value) for value in result.objectives], bool(result.converged))
