"""The EM operator: point sets in, mixtures out, differentiable all the way."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from em_lightning.competition import COMPETITIONS, Softmin
from em_lightning.kernels import KERNELS, GaussianKernel
from em_lightning.mixture import starts
from em_lightning.mixture.covariance import COVARIANCES, Factors, State
from em_lightning.mixture.moments import accumulate, get_ready
from em_lightning.mixture.state import Mixture, structure_of
from em_lightning.mixture.step import Cloud, effective_floor, enter, leave, prepare, with_all_digits
from em_lightning.operators import gradients
from em_lightning.operators.residual import ResidualCorrection

STARTS = ("farthest", "kmeans++", "random", "learned")


class EMOperator(nn.Module):
    r"""Fit a Gaussian mixture to each point set by T unrolled EM iterations with learned corrections.

    E-step ``r_nk = pi_k N(x_n | mu_k, Sigma_k) / p(x_n)``; M-step: weights, means and covariances are the moments
    of the points under ``r``; then ``mu <- mu + MLP_mu(.)`` and ``Sigma <- Sigma + MLP_Sigma(.)``, taken so that
    ``Sigma`` stays positive definite. Both MLPs start at zero: **an untrained operator is exactly classical EM**.
    The result is invariant to the order of the points, and components permute with their start.

    Args:
        num_components: K.
        num_features: D.
        num_iters: T, iterations a call.
        covariance: ``"full"``, ``"diag"``, ``"spherical"`` or ``"tied"``.
        kernel: the energy of a point under a component; Gaussian.
        competition: how components share points, a key or an instance of ``COMPETITIONS``.
        init: where a loop starts: ``"farthest"`` (deterministic), ``"kmeans++"``, ``"random"`` or ``"learned"``
            (trained centers and scales, in units of the cloud). Random starts draw from torch's global generator.
        residual: whether there are corrections to learn.
        covariance_floor: added to every variance, in squared units of the points, as scikit-learn's ``reg_covar``.
        gradient: ``"unrolled"`` or ``"checkpoint"``, exact differentiation through all iterations; ``"last"``, of the
            last iteration alone; ``"implicit"``, of the converged mixture, refused where the loop has not converged
            (:func:`~em_lightning.operators.gradients.iterate` has what each means).

    Shape:
        - x: (B, N, D); mask: (B, N), true for points that count; weights: (B, N), how often each counts.
        - output: a :class:`~em_lightning.mixture.Mixture` of B mixtures, in float32 where x is of half precision.

    Raises:
        ValueError: an argument is out of range, a shape does not fit, or points are NaN or infinite.
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
        kernel: object = "gaussian",
        competition: object = "softmin",
        init: str = "farthest",
        residual: bool = True,
        covariance_floor: float = 1e-6,
        gradient: str = "unrolled",
    ) -> None:
        super().__init__()
        for name, value in (("num_components", num_components), ("num_features", num_features)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if num_iters < 0:
            raise ValueError(f"num_iters={num_iters} must be at least 0, where 0 returns the start")
        _check_choice("covariance", covariance, COVARIANCES)
        _check_choice("init", init, STARTS)
        _check_choice("gradient", gradient, gradients.GRADIENTS)
        if not covariance_floor >= 0:
            raise ValueError(f"covariance_floor={covariance_floor} must not be negative; 1e-6 suits data of unit scale")
        if not isinstance(KERNELS.build(kernel), GaussianKernel):
            raise ValueError(f"kernel={kernel!r} has no M-step here; use 'gaussian'")
        self.num_components = num_components
        self.num_features = num_features
        self.num_iters = num_iters
        self.covariance = covariance
        self.init = init
        self.gradient = gradient
        self.covariance_floor = covariance_floor
        self.competition = COMPETITIONS.build(competition)
        self.correction = ResidualCorrection(num_features, covariance) if residual else None
        if init == "learned":
            self.start_means = nn.Parameter(torch.randn(num_components, num_features))
            self.start_log_scale = nn.Parameter(torch.zeros(num_components, 1) - 0.5)
            self.start_logits = nn.Parameter(torch.zeros(num_components))

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
        return leave(cloud, state, COVARIANCES[self.covariance])

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
            yield leave(cloud, state, COVARIANCES[self.covariance])

    def _loop(
        self, x: Tensor, mask: Tensor | None, weights: Tensor | None, init: Mixture | None, num_iters: int | None
    ) -> Iterator[tuple[Cloud, State]]:
        x = self._checked(x, mask, weights, init)
        steps = self.num_iters if num_iters is None else num_iters
        if steps < 0:
            raise ValueError(f"num_iters={steps} must be at least 0, where 0 returns the start")
        with torch.autocast(x.device.type, enabled=False):
            cloud = prepare(x, mask, weights)
            floor = effective_floor(cloud, self.covariance_floor)
            structure = COVARIANCES[self.covariance]
            state = self._start(cloud, floor) if init is None else enter(cloud, init)
            cloud = cloud._replace(ready=get_ready(cloud.points, structure) if steps > 1 else None)
            yield cloud, state

            def step(state: State, progress: float) -> State:
                return self._iteration(cloud, state, floor, progress)

            for after in gradients.iterate(step, state, steps, self.gradient):
                yield cloud, after

    def classical(self) -> EMOperator:
        """Return the same operator without its corrections: classical EM from the same start."""
        plain = copy.copy(self)
        plain._modules = {**self._modules, "correction": None}
        return plain

    def _iteration(self, cloud: Cloud, state: State, floor: Tensor, progress: float) -> State:
        structure = COVARIANCES[self.covariance]
        theta = structure.natural(state)

        def step(precision: torch.dtype | None) -> State:
            return structure.maximize(self._moments(cloud, theta, precision), floor)

        after = with_all_digits(step, cloud, theta, structure)
        if self.correction is None:
            return after
        return self.correction(cloud, state, after, floor, progress)

    def _moments(self, cloud: Cloud, theta: Tensor, precision: torch.dtype | None) -> Tensor:
        structure, wide = COVARIANCES[self.covariance], theta.dtype
        if isinstance(self.competition, Softmin):
            theta = theta / self.competition.temperature
            return accumulate(cloud.points, cloud.weights, theta, structure, precision, cloud.ready)
        features = structure.features(cloud.points, wide)
        energies = -torch.bmm(theta, features).to(cloud.points.dtype)
        responsibilities = self.competition(energies, dim=1).responsibilities
        if cloud.weights is not None:
            responsibilities = responsibilities * cloud.weights.unsqueeze(1)
        return torch.bmm(responsibilities.to(wide), features.mT)

    def _start(self, cloud: Cloud, floor: Tensor) -> State:
        structure = COVARIANCES[self.covariance]
        if self.init == "learned":
            unit = cloud.variance.mean(-1).clamp(min=torch.finfo(cloud.points.dtype).tiny).sqrt()[:, None, None]
            factors = structure.expand(torch.ones_like(cloud.center), self.num_components, self.num_features)
            spread = unit * self.start_log_scale.exp() + floor.sqrt()[:, None, None]
            spread = spread if self.covariance != "tied" else spread.mean(1, keepdim=True)
            spread = spread if factors.scale.ndim == 3 else spread.unsqueeze(-1)
            return State(
                self.start_logits.log_softmax(-1).to(unit.dtype).expand(len(unit), -1),
                self.start_means * unit,
                Factors(factors.scale * spread, factors.inverse / spread),
            )
        with torch.no_grad():
            if self.init == "farthest":
                centers = starts.farthest_points(cloud, self.num_components)
            elif self.init == "kmeans++":
                centers = starts.kmeans_plus_plus(cloud, self.num_components)
            else:
                centers = starts.random_points(cloud, self.num_components)
        return starts.from_centers(cloud, centers, structure, floor)

    def _checked(self, x: Tensor, mask: Tensor | None, weights: Tensor | None, init: Mixture | None) -> Tensor:
        """Return x in at least float32, or say what is wrong with the input."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x is of type {given}; give a floating-point tensor, for instance x.float()")
        if x.ndim != 3 or x.shape[-1] != self.num_features or x.shape[1] == 0:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; give (B, N, {self.num_features}) with at least one point, "
                f"padded and masked where a set has fewer"
            )
        for name, value in (("mask", mask), ("weights", weights)):
            if value is not None and value.shape != x.shape[:2]:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; give {tuple(x.shape[:2])}, one value a point")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask is of type {mask.dtype}; give a boolean tensor, for instance mask.bool()")
        if not torch.compiler.is_compiling():
            _check_values(x, mask, weights)
        if init is not None:
            if structure_of(init).name not in (self.covariance, "full" if self.num_components == 1 else ""):
                raise ValueError(
                    f"init has {structure_of(init).name} covariances and the operator {self.covariance}; convert one"
                )
            if init.means.shape != (x.shape[0], self.num_components, self.num_features):
                raise ValueError(
                    f"init.means has shape {tuple(init.means.shape)}; "
                    f"give {(x.shape[0], self.num_components, self.num_features)}"
                )
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    def extra_repr(self) -> str:
        """Return what distinguishes this operator."""
        return (
            f"{self.num_components}, {self.num_features}, num_iters={self.num_iters}, covariance={self.covariance!r}, "
            f"init={self.init!r}, covariance_floor={self.covariance_floor:g}, gradient={self.gradient!r}"
        )


def _check_choice(name: str, value: object, choices: object) -> None:
    known = list(choices)  # type: ignore[call-overload]
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, known))}")


def _check_values(x: Tensor, mask: Tensor | None, weights: Tensor | None) -> None:
    if mask is None and weights is None and x.detach().sum().isfinite():
        return  # one pass and no temporary of the size of x; a sum may overflow, and then each point is looked at
    finite = x.isfinite().all(-1)
    if mask is not None:
        finite = finite | ~mask
    if not finite.all():
        cloud, row = (int(i) for i in (~finite).nonzero()[0])
        bad = x[cloud, row].tolist()
        raise ValueError(f"x has a point that is not finite: cloud {cloud}, row {row} is {bad}; drop it or mask it")
    if weights is not None and not ((weights >= 0) & weights.isfinite()).all():
        cloud, row = (int(i) for i in (~((weights >= 0) & weights.isfinite())).nonzero()[0])
        raise ValueError(
            f"weights must be finite and not negative: cloud {cloud}, row {row} is {weights[cloud, row].item()}"
        )
