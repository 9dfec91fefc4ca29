"""The EM operator, a differentiable layer that fits a Gaussian mixture to each point set."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from em_lightning.checks import check_at_least, check_choice
from em_lightning.competition import COMPETITIONS, Background, Posterior
from em_lightning.kernels import EllipticalKernel, GaussianKernel, density_kernel
from em_lightning.mixture.background import UniformBackground
from em_lightning.mixture.covariance import COVARIANCES, Covariance, LowRankCovariance, covariance_of
from em_lightning.mixture.e_step import Likelihood, SufficientStatistics, log_density, log_joint_of_points
from em_lightning.mixture.em import iteration, where
from em_lightning.mixture.initialization import CENTERS, parameters_around
from em_lightning.mixture.m_step import m_step
from em_lightning.mixture.mixture import Mixture, check_points, mixture_of
from em_lightning.mixture.points import Parameters, Points, prepare
from em_lightning.mixture.prior import MixturePrior, log_prior
from em_lightning.operators import gradients
from em_lightning.operators.base import SetOperator, build, check_sets
from em_lightning.operators.residual import ResidualCorrection
from em_lightning.operators.start import LearnedStart, Sets

_TRIAL_ITERATIONS = 5  # largest number of exact iterations before starts are compared; the default of ``num_iters``


class EMOperator(SetOperator):
    r"""Fit a Gaussian mixture to each point set by T unrolled EM iterations with learned corrections.

    .. math::
        r_{nk} = \frac{\pi_k N(x_n \mid \mu_k, \Sigma_k)}{p(x_n)}, \quad
        N_k = \sum_n r_{nk}, \quad
        \pi_k = \frac{N_k}{N}, \quad
        \mu_k = \frac{1}{N_k} \sum_n r_{nk} x_n, \quad
        \Sigma_k = \frac{1}{N_k} \sum_n r_{nk} (x_n - \mu_k)(x_n - \mu_k)^\top + \epsilon I

    with the covariance floor :math:`\epsilon`. A :class:`ResidualCorrection` corrects pseudo-counts, means and
    covariances, which stay positive definite. It starts at zero: **an untrained operator is exactly classical EM**. The
    correction of the last iteration is dropped for sets whose log-likelihood it lowers by more than AICc's term for
    overfitting. The result is invariant to the order of the points and equivariant in the initial components.

    Args:
        num_components: K.
        num_features: D.
        num_iters: T, iterations per call.
        covariance: ``"full"``, ``"diag"``, ``"spherical"``, ``"tied"``, or ``"lowrank"``: low rank plus a
            diagonal (:class:`~em_lightning.mixture.LowRankCovariance`), returned as full covariances.
        rank: rank of low-rank covariances, at least 1 and less than D.
        kernel: a key or an instance of ``KERNELS``: ``"gaussian"``, or a robust kernel of the Mahalanobis distance,
            ``"student_t"`` (with ``density=True``, and ``df=1`` unless given), ``"laplace"``, ``"huber"`` or
            ``"pseudo_huber"`` (:class:`~em_lightning.kernels.EllipticalKernel`). Their M-step is IRLS, covariances are
            scale matrices, and :meth:`log_prob` is their density; ``Mixture.log_prob`` is that of Gaussians.
        competition: a key or an instance of ``COMPETITIONS``, which computes the responsibilities.
        background: the weight of a component for outliers, uniform over the bounding box of each set, or a
            :class:`~em_lightning.mixture.UniformBackground` or its arguments, such as ``{"estimate": True}``.
        init: initial centers: ``"farthest"`` (deterministic), ``"kmeans++"``, ``"random"`` or ``"learned"``
            (trained centers and scales, in standard deviations of the set).
        num_starts: number of random starts. Each set uses the one with the highest objective after ``num_iters`` exact
            iterations, at most five. In training mode, calls use one if an input or parameter needs gradients.
        seed: of random starts, the same in every call; ``None`` draws from torch's global generator.
        residual: ``True`` for learned corrections, ``False`` for none, or a :class:`ResidualCorrection`.
        prior: a :class:`~em_lightning.mixture.MixturePrior` of weights, means and covariances, or its arguments; the
            M-step is then maximum a posteriori.
        covariance_floor: added to every variance, in squared units of the points, like ``reg_covar`` in scikit-learn.
            Tilted components thinner than a thousandth of their length need float64 points or a higher floor.
        gradient: ``"unrolled"`` and ``"checkpoint"`` differentiate all iterations exactly, ``"last"`` only the last
            one, and ``"implicit"`` the fixed point, with a RuntimeError if the loop has not converged.

    Shape:
        - x: (B, N, D); mask: (B, N), true for points that count; weights: (B, N), relative to their mean.
        - output: a :class:`~em_lightning.mixture.Mixture` of B mixtures, in float32 where x is of half precision.

    Raises:
        ValueError: an argument is out of range, a shape does not fit, or points are NaN or infinite.
        TypeError: points are not floating-point, the mask is not boolean, or a prior or background has a wrong type.

    Example:
        >>> operator = EMOperator(num_components=2, num_features=1, num_iters=10, residual=False)
        >>> x = torch.tensor([[[-2.0], [-1.9], [-2.1], [3.0], [3.1], [2.9]]])
        >>> operator(x).means.sort(1).values.squeeze()
        tensor([-2.,  3.])

    Source: Dempster, Laird and Rubin, Maximum Likelihood from Incomplete Data via the EM Algorithm, 1977.
    """

    inits_known = (*SetOperator.inits_known, "learned")
    gradients_known = gradients.GRADIENTS
    shown = ("num_iters", "covariance", "init", "num_starts", "covariance_floor", "gradient")

    def __init__(
        self,
        num_components: int,
        num_features: int,
        *,
        num_iters: int = 5,
        covariance: str = "full",
        rank: int | None = None,
        kernel: object = "gaussian",
        competition: object = "softmin",
        init: str = "farthest",
        num_starts: int = 1,
        seed: int | None = None,
        residual: bool | ResidualCorrection = True,
        prior: MixturePrior | Mapping[str, Any] | None = None,
        covariance_floor: float = 1e-6,
        background: UniformBackground | Mapping[str, Any] | float | None = None,
        gradient: str = "unrolled",
    ) -> None:
        super().__init__(num_components, num_features, num_iters, init, gradient)
        check_at_least(1, num_starts=num_starts)
        is_random = init in ("kmeans++", "random")
        if num_starts > 1 and not is_random:
            raise ValueError(
                f"num_starts={num_starts} with init={init!r} would all be equal; use 'kmeans++' or 'random'"
            )
        if seed is not None and not is_random:
            raise ValueError(f"seed={seed} has no effect with init={init!r}; it is for 'kmeans++' and 'random'")
        check_choice("covariance", covariance, (*COVARIANCES, "lowrank"))
        if (rank is not None) != (covariance == "lowrank"):
            raise ValueError(f"rank={rank} with covariance={covariance!r}: 'lowrank' needs a rank, others have none")
        if rank is not None and not 1 <= rank < num_features:
            raise ValueError(f"rank={rank} must be at least 1 and less than num_features={num_features}")
        check_at_least(0, covariance_floor=covariance_floor)
        self.covariance = covariance
        self.family: Covariance = COVARIANCES[covariance] if rank is None else LowRankCovariance(rank)
        built = density_kernel(kernel)
        if not isinstance(built, EllipticalKernel):
            raise ValueError(
                f"kernel={built!r} has no closed-form M-step; use 'gaussian', 'student_t', 'laplace', 'huber' or "
                f"'pseudo_huber', em_lightning.operators.DirectionalEM for the cosine, or GeneralizedEM for any kernel"
            )
        self.kernel = built
        self.kernel.elliptical_log_normalizer(num_features)  # raises if exp(-rho) is not a density
        self.competition = COMPETITIONS.build(competition)
        if isinstance(background, (int, float)):
            background = {"weight": background}
        self.background = build("background", UniformBackground, background)
        self.prior = build("prior", MixturePrior, prior)
        if self.background is not None and isinstance(self.competition, Background):
            raise ValueError("background and competition='background' are two backgrounds; give one of them")
        self.num_starts = num_starts
        self.seed = seed
        self.covariance_floor = covariance_floor
        if residual is True:
            residual = ResidualCorrection(num_features, self.family)
        self.correction: ResidualCorrection | None = residual or None
        self.start = LearnedStart(num_components, num_features) if init == "learned" else None

    def log_prob(
        self, x: Tensor, mixture: Mixture, mask: Tensor | None = None, background_energies: Tensor | None = None
    ) -> Tensor:
        """Return ``log p(x)`` of points (B, N, D) under the operator's kernel and background, as (B, N).

        Zero where masked. A background without an energy is uniform over the bounding box of **these** points. For
        points other than those of the fit, give ``operator.background.energies(points_of_the_fit)`` (B,).
        """
        points, state, likelihood = self._evaluation(x, mixture, mask, background_energies)
        density = (log_density(points, state, likelihood) - points.log_jacobian().unsqueeze(1)).to(x.dtype)
        return density if mask is None else torch.where(mask, density, 0.0)

    def posterior(
        self, x: Tensor, mixture: Mixture, mask: Tensor | None = None, background_energies: Tensor | None = None
    ) -> Posterior:
        """Return the posterior of the competition for points (B, N, D): responsibilities (B, N, K).

        A background is an additional last hypothesis; see :func:`~em_lightning.competition.none_of_the_above`.
        ``background_energies`` are those of :meth:`log_prob`.
        """
        points, state, likelihood = self._evaluation(x, mixture, mask, background_energies)
        energies = -log_joint_of_points(points, state, likelihood).to(x.dtype)
        coupling = {"item_dim": 1, "mask": mask} if self.competition.couples_items else {}
        return self.competition(energies, **coupling)

    def objective(
        self, x: Tensor, mixture: Mixture, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Return the objective (B,): ``sum_n w_n log p(x_n)``, plus the log-density of a prior up to a constant."""
        check_points(mixture, x)
        x = check_sets(x, mask, weights, self.num_features)
        family = covariance_of(mixture.covariances, mixture.means)
        with torch.autocast(x.device.type, enabled=False):
            sets = self._prepare(x, mask, weights, family)
            state = self._with_room_for_background(sets.points.frame.enter_parameters(mixture.parameters()))
            return self._objective(sets, state).to(x.dtype)

    def _evaluation(
        self, x: Tensor, mixture: Mixture, mask: Tensor | None, background_energies: Tensor | None
    ) -> tuple[Points, Parameters, Likelihood]:
        """Return points, parameters and the density of given mixtures, of any covariance type."""
        check_points(mixture, x)
        if background_energies is not None:
            if self.background is None:
                raise ValueError("background_energies are given, but the operator has background=None")
            if (shape := tuple(background_energies.shape)) != (mixture.sets,):
                raise ValueError(f"background_energies {shape} must have shape ({mixture.sets},)")
        elif self.background is not None and self.background.energy is None and x.shape[1] == 1:
            raise ValueError("x has one point per set, whose box is empty: give the background_energies of the fit")
        check_sets(x, mask, None, self.num_features)
        family = covariance_of(mixture.covariances, mixture.means)
        points = prepare(x.expand(mixture.sets, -1, -1), mask)
        state = self._with_room_for_background(points.frame.enter_parameters(mixture.parameters()))
        return points, state, self._likelihood(points, state, family, background_energies)

    def classical(self) -> EMOperator:
        """Return the same operator without its corrections: classical EM from the same start."""
        plain = copy.copy(self)
        plain._modules = {**self._modules, "correction": None}  # a new dict: that of the copy is shared with self
        return plain

    def _prepare(
        self, x: Tensor, mask: Tensor | None, weights: Tensor | None, family: Covariance | None = None
    ) -> Sets:
        family = family or self.family  # a given mixture may have another covariance type
        needs_moments = any(part is not None for part in (self.start, self.prior, self.correction))
        points = prepare(x, mask, weights, with_moments=needs_moments)
        floor, counts = points.floor(self.covariance_floor), None
        if self.prior is not None:
            counts = self.prior.pseudo_counts(points.frame, points.mean, points.variance, family, self.num_components)
        return Sets(points, points.mass, mask, family, floor, pseudo_counts=counts, dtype=x.dtype)

    def _start(self, sets: Sets, try_several: bool) -> Parameters:
        """Return the learned start, or around drawn centers: of several starts, that with the highest objective."""
        points = sets.points
        if self.start is not None:
            return self._with_room_for_background(self.start(sets))
        generator = None if self.seed is None else torch.Generator(points.x.device).manual_seed(self.seed)

        def around(centers: Tensor) -> Parameters:
            return self._with_room_for_background(parameters_around(points, centers, self.family, sets.floor))

        def score(state: Parameters) -> Tensor:
            """Return the objective (B,) after a few exact iterations."""
            for _ in range(min(max(self.num_iters, 1), _TRIAL_ITERATIONS)):
                state, _, _ = self._iteration(sets, state)
            return self._objective(sets, state)

        with torch.no_grad():
            options: Any = {"weights": points.weights, "generator": generator}
            count, x, choose = self.num_starts if try_several else 1, points.x.detach().mT, CENTERS[self.init]
            drawn = [choose(x, self.num_components, **options) for _ in range(count)]
            best = drawn[0]
            if len(drawn) > 1:
                objectives = torch.stack([score(around(centers)) for centers in drawn])
                winner = objectives.masked_fill(objectives.isnan(), -torch.inf).argmax(0)  # argmax would take NaN
                best = torch.stack(drawn)[winner, torch.arange(best.shape[0], device=best.device)]
        return around(best)

    def _enter(self, sets: Sets, mixture: Mixture) -> Parameters:
        given = covariance_of(mixture.covariances, mixture.means)
        needed = "full" if self.covariance == "lowrank" else self.covariance
        if given.name != needed and (self.covariance, given.name) != ("tied", "full"):
            raise ValueError(f"init has {given.name} covariances; covariance={self.covariance!r} needs {needed} ones")
        shape = (sets.mass.shape[0], self.num_components, self.num_features)
        if tuple(mixture.means.shape) != shape:
            raise ValueError(f"init.means has shape {tuple(mixture.means.shape)}; it must be {shape}")
        state = sets.points.frame.enter_parameters(mixture.parameters())
        return self._with_room_for_background(state._replace(covariances=self.family.from_public(state.covariances)))

    def _step(
        self, sets: Sets, state: Parameters, progress: float, with_objective: bool = False
    ) -> tuple[Parameters, Tensor]:
        after, statistics, objective = self._iteration(sets, state, with_objective)
        if self.correction is None:
            return after, objective
        correction = self.correction(sets.points, statistics.mass, state, after, sets.floor, progress)
        counts = None if sets.pseudo_counts is None else correction.pseudo_counts(sets.pseudo_counts, self.family)
        corrected = m_step(statistics, self.family, sets.floor, state.covariances, counts, self.background)
        corrected = correction.apply(self.family, state.means, corrected, sets.floor)
        # Progress is 1 in the last iteration. Earlier ones need no safeguard, as an exact M-step follows them.
        return (corrected if progress < 1.0 else self._safeguarded(sets, after, corrected)), objective

    def _iteration(
        self, sets: Sets, state: Parameters, with_objective: bool = False
    ) -> tuple[Parameters, SufficientStatistics, Tensor]:
        """Return the state after exact EM, the statistics, and the objective (B,), which is 0 if not requested."""
        points = sets.points
        likelihood = self._likelihood(points, state, self.family)
        given = sets.floor, sets.pseudo_counts, self.background, self.competition, sets.mask
        after, statistics = iteration(points, state, likelihood, *given, with_log_likelihood=with_objective)
        if not with_objective:
            return after, statistics, statistics.log_likelihood
        log_likelihood = statistics.log_likelihood - points.log_jacobian() * points.mass
        return after, statistics, self._with_prior(sets, state, log_likelihood)

    def _safeguarded(self, sets: Sets, plain: Parameters, corrected: Parameters) -> Parameters:
        """Return corrected parameters, or plain ones for sets whose log-likelihood the correction lowers too much.

        With p parameters, the log-likelihood of N fitted points exceeds that of N new points by about
        ``N p / (N - p - 1)`` (Hurvich and Tsai, 1989); no correction that lowers it by more can help on new points.
        """
        p = self.num_components * (1 + self.num_features) - 1  # means and weights
        p += self.family.num_parameters(self.num_components, self.num_features)
        n = sets.points.num_points
        allowed = torch.where(n - p - 1 > 0, n * p / (n - p - 1), torch.inf)
        with torch.no_grad():
            keep = self._log_likelihood(sets, corrected) >= self._log_likelihood(sets, plain) - allowed
        return where(keep, corrected, plain)

    def _objective(self, sets: Sets, state: Parameters) -> Tensor:
        return self._with_prior(sets, state, self._log_likelihood(sets, state))

    def _log_likelihood(self, sets: Sets, state: Parameters) -> Tensor:
        points = sets.points
        likelihood = self._likelihood(points, state, sets.family)
        density = log_density(points, state, likelihood) - points.log_jacobian().unsqueeze(1)
        return (density if points.weights is None else density * points.weights).sum(-1)

    def _with_prior(self, sets: Sets, state: Parameters, log_likelihood: Tensor) -> Tensor:
        """Return a log-likelihood (B,) plus the log-density of the prior in the user's units."""
        counts = sets.pseudo_counts
        if counts is None:
            return log_likelihood
        of_prior = log_prior(state, sets.family, counts)
        num_covariances = self.num_components / sets.family.sharing(self.num_components)  # 1 if all share one
        # The prior has -covariance_count / 2 log det per covariance; the user's units add 2 log_jacobian to a log det.
        of_prior = of_prior - counts.covariance_count.squeeze(-1) * num_covariances * sets.points.log_jacobian()
        if self.background is not None and self.background.estimate:  # the Dirichlet prior has K + 1 weights
            background = self.background.terms(sets.points, state.log_weights)
            of_prior = of_prior + counts.weight_count.squeeze(-1) * background.log_weight
        return log_likelihood + of_prior

    def _mixture(self, sets: Sets, state: Parameters) -> Mixture:
        return mixture_of(sets.points, state, self.family, sets.dtype)

    def _likelihood(
        self, points: Points, state: Parameters, family: Covariance, background_energies: Tensor | None = None
    ) -> Likelihood:
        uniform = self.background
        background = None if uniform is None else uniform.terms(points, state.log_weights, background_energies)
        return Likelihood(family, None if isinstance(self.kernel, GaussianKernel) else self.kernel, background)

    def _with_room_for_background(self, state: Parameters) -> Parameters:
        """With an estimated background of weight w_0, scale the weights to the sum 1 - w_0; otherwise keep them."""
        if self.background is None:
            return state
        return state._replace(log_weights=self.background.reserve_share(state.log_weights))
