"""The EM operator: point sets in, mixtures out, differentiable all the way."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from em_lightning.competition import Softmin
from em_lightning.mixture.background import UniformBackground
from em_lightning.mixture.cloud import Cloud, effective_floor, prepare
from em_lightning.mixture.covariance import COVARIANCES, compiled
from em_lightning.mixture.factors import State, choose
from em_lightning.mixture.general import background_row, general_moments
from em_lightning.mixture.moments import accumulate, get_ready, may_lose_all_digits
from em_lightning.mixture.prior import MixturePrior, posterior_moments
from em_lightning.mixture.radial import radial_of
from em_lightning.mixture.state import Mixture
from em_lightning.mixture.step import Manner, Step, leave, with_all_digits
from em_lightning.operators import gradients
from em_lightning.operators.checks import check_choice, check_init, check_sets
from em_lightning.operators.model import MixtureModel
from em_lightning.operators.residual import ResidualCorrection
from em_lightning.operators.start import build_start

# Nats a point: a correction may trade some likelihood of the fitted points for that of others.
_TOLERATED_LOSS = 0.5
# Exact iterations after which one start is told from another.
_TRIAL = 5


class EMOperator(MixtureModel):
    r"""Fit a Gaussian mixture to each point set by T unrolled EM iterations with learned corrections.

    E-step ``r_nk = pi_k N(x_n | mu_k, Sigma_k) / p(x_n)``; M-step: weights, means and covariances are the moments
    of the points under ``r``; then ``mu <- mu + MLP_mu(.)`` and ``Sigma <- Sigma + MLP_Sigma(.)``, taken so that
    ``Sigma`` stays positive definite. Both MLPs start at zero: **an untrained operator is exactly classical EM**.
    A cloud whose own points the last correction makes much less likely does without it. The result is invariant to
    the order of the points, and components permute with their start.

    Args:
        num_components: K.
        num_features: D.
        num_iters: T, iterations a call.
        covariance: ``"full"``, ``"diag"``, ``"spherical"``, ``"tied"``, or ``"lowrank"``: of rank ``rank`` plus a
            diagonal (:class:`~em_lightning.mixture.LowRankCovariance`), given back as full ones.
        rank: of low-rank covariances, at least 1 and less than D.
        kernel: the energy of a point under a component, a key or an instance of ``KERNELS``: ``"gaussian"``, or a
            robust one of its Mahalanobis distance, ``"student_t"`` (the density, of one degree of freedom unless
            given), ``"laplace"``, ``"huber"`` or ``"pseudo_huber"``; the formulas are those of
            :func:`~em_lightning.mixture.radial.radial_of`. Their M-step reweights, covariances are scale matrices,
            and the likelihood is that of :meth:`log_prob`: a mixture's own is the one of Gaussians of that scale.
        competition: how components share points, a key or an instance of ``COMPETITIONS``.
        background: a component that is uniform over the bounding box of each cloud, for outliers: its weight, a
            :class:`~em_lightning.mixture.UniformBackground` or its arguments, such as ``{"estimate": True}`` for a
            weight that EM finds for each cloud.
        temperature: divides the logarithms of the joint density in the E-step; a pair ``(first, last)`` anneals
            geometrically, ``first^(1 - t/T) last^(t/T)`` in iteration t of T.
        init: where a loop starts: ``"farthest"`` (deterministic), ``"kmeans++"``, ``"random"`` or ``"learned"``
            (trained centers and scales, in units of the cloud).
        lloyd_steps: steps of k-means that centers take before a mixture is made of them.
        num_starts: of so many random starts each cloud takes the one whose objective is highest after ``num_iters``
            exact iterations, at most five; while training :meth:`forward` has one, which is cheaper and more varied.
        seed: of random starts, the same in every call; ``None`` draws from torch's global generator.
        residual: whether there are corrections to learn.
        prior: of weights, means and covariances, a :class:`~em_lightning.mixture.MixturePrior` or its arguments; the
            M-step then finds the maximum a posteriori.
        covariance_floor: added to every variance, in squared units of the points, as scikit-learn's ``reg_covar``.
        relative_floor: take the floor as a share of the variance of each cloud (the mean over features) instead, but
            no width below 1e-14 for float32 points (1e-31 for double). Where all points of a cloud are the same, its
            components are as narrow as that, and the density of other points, or in one call with points far away,
            and its gradient, may be beyond float32.
        gradient: ``"unrolled"`` or ``"checkpoint"``, exact differentiation through all iterations; ``"last"``, of the
            last iteration alone; ``"implicit"``, of the converged mixture, refused where the loop has not converged
            (:func:`~em_lightning.operators.gradients.iterate` has what each means).

    Shape:
        - x: (B, N, D), whose squares are taken: up to 1e15 in float32; mask: (B, N), true for points that count;
          weights: (B, N), how often each counts. A component of a mass below 1e-15 counts as empty.
        - output: a :class:`~em_lightning.mixture.Mixture` of B mixtures, in float32 where x is of half precision.

    Raises:
        ValueError: an argument is out of range, a shape does not fit, or points are NaN, infinite or, in float32,
            beyond 2.6e15.
        TypeError: points are no floating-point tensor, or the mask is not boolean.

    Example:
        >>> operator = EMOperator(num_components=2, num_features=1, num_iters=10, residual=False)
        >>> x = torch.tensor([[[-2.0], [-1.9], [-2.1], [3.0], [3.1], [2.9]]])
        >>> operator(x).means.sort(1).values.squeeze()
        tensor([-2.,  3.])

    Source: EM as a neural operator layer; scikit-learn's ``GaussianMixture`` is its classical case.
    """

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
        lloyd_steps: int = 0,
        num_starts: int = 1,
        seed: int | None = None,
        residual: bool = True,
        prior: MixturePrior | Mapping[str, Any] | None = None,
        covariance_floor: float = 1e-6,
        relative_floor: bool = False,
        background: UniformBackground | Mapping[str, Any] | float | None = None,
        temperature: float | tuple[float, float] = 1.0,
        gradient: str = "unrolled",
    ) -> None:
        counts = {"num_components": num_components, "num_features": num_features, "num_starts": num_starts}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if num_iters < 0:
            raise ValueError(f"num_iters={num_iters} must be at least 0, where 0 returns the start")
        check_choice("covariance", covariance, (*COVARIANCES, "lowrank"))
        check_choice("gradient", gradient, gradients.GRADIENTS)
        if not covariance_floor >= 0:
            raise ValueError(f"covariance_floor={covariance_floor} must not be negative; 1e-6 suits data of unit scale")
        super().__init__(num_components, num_features, covariance, rank, kernel, competition, prior, background)
        self.num_iters = num_iters
        self.init = init
        self.num_starts = num_starts
        self.gradient = gradient
        self.covariance_floor = covariance_floor
        self.relative_floor = relative_floor
        pair = temperature if isinstance(temperature, (tuple, list)) else (temperature, temperature)
        if len(pair) != 2 or not all(0.0 < value < math.inf for value in pair):
            raise ValueError(f"temperature={temperature!r} must be a positive number or a pair (first, last) of them")
        self.temperature = (float(pair[0]), float(pair[1]))
        self.correction = ResidualCorrection(num_features, self.structure) if residual else None
        self.start = build_start(init, num_components, num_features, lloyd_steps, num_starts, seed)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        init: Mixture | None = None,
        num_iters: int | None = None,
    ) -> Mixture:
        """Return the mixtures after the last iteration.

        Args:
            x: points (B, N, D).
            mask: (B, N), false where a row is padding, whatever it holds.
            weights: (B, N), not negative.
            init: mixtures to start from instead of the operator's own start.
            num_iters: T for this call.
        """
        *_, (cloud, state) = self._loop(x, mask, weights, init, num_iters)
        return leave(cloud, state, self.structure)

    def iterate(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        init: Mixture | None = None,
        num_iters: int | None = None,
    ) -> Iterator[Mixture]:
        """Yield the start and the mixtures after each iteration; arguments are those of :meth:`forward`."""
        for cloud, state in self._loop(x, mask, weights, init, num_iters):
            yield leave(cloud, state, self.structure)

    def _loop(
        self, x: Tensor, mask: Tensor | None, weights: Tensor | None, init: Mixture | None, num_iters: int | None
    ) -> Iterator[tuple[Cloud, State]]:
        x = self._checked(x, mask, weights, init)
        steps = self.num_iters if num_iters is None else num_iters
        if steps < 0:
            raise ValueError(f"num_iters={steps} must be at least 0, where 0 returns the start")
        with torch.autocast(x.device.type, enabled=False):
            cloud, state, floor = self._begin(x, mask, weights, init, choose=not self.training)
            if steps > 0:
                cloud = self._readied(cloud, floor)
            yield cloud, state

            def step(state: State, progress: float) -> State:
                return self._iteration(cloud, state, floor, progress)[0]

            for after in gradients.iterate(step, state, steps, self.gradient):
                yield cloud, after

    def fit(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        init: Mixture | None = None,
        max_iters: int = 100,
        tol: float = 1e-3,
    ) -> tuple[Mixture, Tensor]:
        """Iterate each cloud until its objective rises by less than ``tol`` a point; return mixtures and steps (B,).

        The objective is :meth:`objective` over the mass of the cloud. A cloud that has converged is left as it is, so
        its result does not depend on the others. A temperature schedule runs over the first ``num_iters`` iterations,
        and no cloud stops before it has. Data decide the length of the loop: use :meth:`forward` under a compiler.

        Args:
            x: points (B, N, D).
            mask: (B, N), false where a row is padding.
            weights: (B, N), how often each point counts.
            init: mixtures to start from.
            max_iters: the most iterations; a cloud that reports it may not have converged.
            tol: of the change of the objective, in nats a point, as scikit-learn's.
        """
        x = self._checked(x, mask, weights, init)
        if max_iters < 0 or not tol >= 0:
            raise ValueError(f"max_iters={max_iters} and tol={tol} must not be negative")
        with torch.autocast(x.device.type, enabled=False):
            cloud, state, floor = self._begin(x, mask, weights, init, choose=True)
            cloud = self._readied(cloud, floor)
            schedule = 1 if self.temperature[0] == self.temperature[1] else max(self.num_iters, 1)
            steps = torch.zeros(len(x), dtype=torch.long, device=x.device)
            running = torch.ones_like(steps, dtype=torch.bool)
            before = torch.full_like(cloud.mass, -torch.inf)
            for step in range(1, max_iters + 1):
                # The objective that an iteration finds is that of the state it begins with.
                after, objective = self._iteration(cloud, state, floor, min(step / schedule, 1.0), likelihood=True)
                assert objective is not None
                change = (objective - before).abs() / cloud.mass.clamp(min=torch.finfo(cloud.mass.dtype).tiny)
                before = objective
                if step > schedule:
                    running = running & (change >= tol)
                    if not running.any():
                        break
                state = _where(running, after, state)
                steps = steps + running
            return leave(cloud, state, self.structure), steps

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile what an iteration does between its passes over the points, once for all iterations.

        The loop itself stays as it is: ``torch.compile(operator)`` unrolls it, which takes long to compile and is not
        possible without a graph break in float32, where each pass chooses its precision by looking at the data. Copies
        and pickles of the operator are not compiled. Options are those of ``torch.compile``.
        """
        if args:
            raise TypeError(f"compile() takes the options of torch.compile by name; {args!r} are not named")
        self._compiled = compiled(self.structure, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes over."""
        return {name: value for name, value in super().__getstate__().items() if name != "_compiled"}

    def classical(self) -> EMOperator:
        """Return the same operator without its corrections: classical EM from the same start."""
        plain = copy.copy(self)
        plain._modules = {**self._modules, "correction": None}
        return plain

    def _iteration(self, cloud: Cloud, state: State, floor: Tensor, progress: float, likelihood: bool = False) -> Step:
        """Return the state after an iteration, and the objective (B,) of the state before it if asked for."""
        after, objective = self._exact_iteration(cloud, state, floor, progress, likelihood)
        if self.correction is None:
            return after, objective
        corrected = self.correction(cloud, state, after, floor, progress)
        # Between iterations EM itself mends what a correction spoils.
        return (corrected if progress < 1.0 else self._safeguarded(cloud, after, corrected)), objective

    def _exact_iteration(
        self, cloud: Cloud, state: State, floor: Tensor, progress: float, likelihood: bool = False
    ) -> Step:
        structure = self.structure
        counts = None if self.prior is None else self.prior.beside(cloud, structure, self.num_components)
        theta = structure.natural(state) if state.theta is None else state.theta

        def step(manner: Manner) -> Step:
            origins = manner.origins
            moments, pull, found, outside = self._moments(cloud, state, theta, progress, manner, likelihood)
            own = counts if counts is None or origins is None else counts.about(origins, structure)
            moments = posterior_moments(moments, structure, self.num_features, own, pull)
            after = structure.maximize(moments, floor, state.factors)
            if self.background is not None:
                outside = outside if counts is None else outside + counts.weight
                mass = moments[..., 0].sum(-1)
                after = after._replace(log_weights=self.background.maximize(after.log_weights, mass, outside))
            return after if origins is None else after._replace(means=after.means + origins), found

        after, found = with_all_digits(step, cloud, state, theta, structure)
        if not likelihood:
            return after, None
        with torch.no_grad():
            if found is None:
                return after, self._objective(cloud, state)
            return after, found if counts is None else found + self._log_prior(cloud, state)

    def _safeguarded(self, cloud: Cloud, plain: State, corrected: State) -> State:
        """Return the corrected state, but for clouds whose own points it makes less likely by more than tolerated."""
        with torch.no_grad():
            least = self._objective(cloud, plain) - _TOLERATED_LOSS * cloud.mass
            keep = self._objective(cloud, corrected) >= least
        return _where(keep, corrected, plain)

    def _moments(
        self,
        cloud: Cloud,
        state: State,
        theta: Tensor,
        progress: float,
        manner: Manner,
        likelihood: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Return moments under the responsibilities, and what else a pass comes by.

        That is the sums of a robust kernel's pulls, the log-likelihood, which a pass at another temperature does not
        find and one that is not asked for it may, and the mass of a background.
        """
        structure, level = self.structure, self._level(cloud, state)
        radial = radial_of(self.kernel, self.num_features)
        first, last = self.temperature
        temperature = first ** (1.0 - progress) * last**progress
        precision, apart, origins = manner
        if isinstance(self.competition, Softmin) and radial is None and origins is None:
            temperature = self.competition.temperature * temperature
            plain = isinstance(temperature, float) and temperature == 1.0
            theta = theta if level is None else background_row(theta, level)
            theta = theta if plain else theta / temperature
            moments, found = accumulate(cloud, theta, structure, precision, likelihood and plain)
            moments, outside = moments.split([self.num_components, moments.shape[1] - self.num_components], 1)
            return moments, None, found, outside[..., 0].sum(-1)

        def respond(joint: Tensor) -> Tensor:
            return self.competition(-joint / temperature, dim=1).responsibilities

        whole = not isinstance(self.competition, Softmin)
        return general_moments(cloud, state, structure, radial, level, respond, whole, apart, origins)

    def _begin(
        self, x: Tensor, mask: Tensor | None, weights: Tensor | None, init: Mixture | None, choose: bool
    ) -> tuple[Cloud, State, Tensor]:
        """Return points, start and floor as the loop holds them; ``choose`` among several starts, or take one."""
        cloud = prepare(x, mask, weights)
        floor = effective_floor(cloud, self.covariance_floor, self.relative_floor)
        if init is not None:
            return cloud, self._enter(cloud, init), floor

        def judge(state: State) -> Tensor:
            state = self._with_room(state)
            for _ in range(min(max(self.num_iters, 1), _TRIAL)):
                state, _ = self._exact_iteration(cloud, state, floor, 1.0)
            return self._objective(cloud, state)

        return cloud, self._with_room(self.start(cloud, self.structure, floor, judge if choose else None)), floor

    def _readied(self, cloud: Cloud, floor: Tensor) -> Cloud:
        """Return clouds with what all iterations have in common."""
        cloud = cloud._replace(ready=get_ready(cloud, self.structure, cloud.mass))
        return cloud._replace(narrow=may_lose_all_digits(cloud, floor))

    def _checked(self, x: Tensor, mask: Tensor | None, weights: Tensor | None, init: Mixture | None) -> Tensor:
        """Return x in at least float32, or say what is wrong with the input."""
        x = check_sets(x, mask, weights, self.num_features, squared=True)
        if init is not None:
            check_init(init, self.covariance, (x.shape[0], self.num_components, self.num_features))
        return x

    def extra_repr(self) -> str:
        """Return what distinguishes this operator."""
        return (
            f"{self.num_components}, {self.num_features}, num_iters={self.num_iters}, covariance={self.covariance!r}, "
            f"init={self.init!r}, num_starts={self.num_starts}, covariance_floor={self.covariance_floor:g}, "
            f"relative_floor={self.relative_floor}, gradient={self.gradient!r}"
        )


def _where(condition: Tensor, one: State, other: State) -> State:
    """Return one state for the clouds where a condition (B,) holds and the other elsewhere."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    factors = choose(condition, one.factors, other.factors)
    return State(pick(one.log_weights, other.log_weights), pick(one.means, other.means), factors)
