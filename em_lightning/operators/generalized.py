"""Generalized EM: a mixture under any kernel, whose M-step follows the slope of the energy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from em_lightning.competition import Posterior, softmin
from em_lightning.kernels import KERNELS, CosineKernel, LearnedEnergyKernel, NoDensityError
from em_lightning.mixture import starts
from em_lightning.mixture.cloud import prepare
from em_lightning.mixture.factors import Factors, State
from em_lightning.mixture.generalized import KernelMixture, Points, energies_of, generalized_step, points_of
from em_lightning.operators import gradients
from em_lightning.operators.checks import check_choice, check_sets

_GRADIENTS = ("unrolled", "checkpoint", "last")


class GeneralizedEM(nn.Module):
    r"""Fit a mixture under any kernel to each set by T iterations of generalized EM.

    E-step: ``r_nk`` proportional to ``pi_k exp(-d(x_n, mu_k))``. M-step: weights as in EM; centers take steps down
    the expected energy ``sum_n r_nk d(x_n, mu_k)`` that reweight the points by the slope of the kernel and are halved
    until it falls (:mod:`em_lightning.mixture.generalized`). So no iteration lowers the objective

    .. math:: \sum_n w_n \log \sum_k \pi_k \, e^{-d(x_n, \mu_k) - \log Z}

    **A log-likelihood where the kernel is a density** (Gaussian, Student-t, Laplace, Huber, pseudo-Huber, exponential,
    Mahalanobis; the cosine on the unit sphere). A logistic or dot-product energy has no :math:`Z`: the objective is
    then a score that still never falls, but compares no two kernels, and its best centers lie where energies are low,
    which may be a corner of the data. Centers never leave the bounding box of their set. Where an energy has a corner
    at its center (Laplace, exponential) they may stop short of the best place, level with a point in one feature.

    :class:`EMOperator` is faster, has full covariances, and is what to take for a Gaussian, Student-t, Laplace, Huber
    or pseudo-Huber kernel of the Mahalanobis distance; :class:`DirectionalEM` fits concentrations.

    Args:
        num_components: K.
        num_features: D.
        kernel: a key or an instance of ``KERNELS`` (``"student_t"`` is the density), or a kernel of your own. Its shape
            parameters stay as they are, or are trained by gradient where they are learnable. Work spaces are of size
            N x K x D.
        num_iters: T, iterations a call.
        num_steps: steps of the centers in an M-step.
        estimate_scale: whether each component has a scale of its own, ``d(x / s_k, mu_k / s_k) + D log s_k``, fitted
            in turn with the centers; only for a density over space. A Gaussian kernel is then a spherical mixture.
        scale_floor: the least ``s_k^2``.
        init: where the loop starts: ``"farthest"``, ``"kmeans++"`` or ``"random"`` points.
        gradient: ``"unrolled"``, ``"checkpoint"`` or ``"last"``, as :class:`EMOperator` has them. There is no
            implicit gradient: at its fixed point a line search takes no steps.

    Shape:
        - x: (B, N, D); mask: (B, N), true for points that count; weights: (B, N), how often each counts.
        - output: a :class:`~em_lightning.mixture.KernelMixture` of B mixtures.

    Raises:
        ValueError: an argument is out of range, the kernel has no centers, a scale is to be estimated without a density
            over space, or a shape does not fit.

    Example:
        >>> x = torch.tensor([[[-2.0], [-1.9], [-2.1], [3.0], [3.1], [2.9], [40.0]]])
        >>> GeneralizedEM(2, 1, kernel="laplace", init="random", num_iters=20)(x).centers.shape
        torch.Size([1, 2, 1])
        >>> GeneralizedEM(2, 1, kernel="gaussian")(x[:, :6]).centers.sort(1).values.flatten().round(decimals=3)
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
        num_steps: int = 1,
        estimate_scale: bool = False,
        scale_floor: float = 1e-6,
        init: str = "farthest",
        gradient: str = "unrolled",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_components", num_components, 1),
            ("num_features", num_features, 1),
            ("num_iters", num_iters, 0),
            ("num_steps", num_steps, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        check_choice("init", init, ("farthest", "kmeans++", "random"))
        if gradient == "implicit":
            raise ValueError(
                "gradient='implicit' is not exact here: at its fixed point the line search of a generalized M-step "
                "takes no steps; use 'unrolled' or 'checkpoint'"
            )
        check_choice("gradient", gradient, _GRADIENTS)
        if not scale_floor > 0:
            raise ValueError(f"scale_floor={scale_floor} must be positive; 1e-6 suits data of unit scale")
        self.num_components = num_components
        self.num_features = num_features
        self.num_iters = num_iters
        self.num_steps = num_steps
        self.estimate_scale = estimate_scale
        self.scale_floor = scale_floor
        self.init = init
        self.gradient = gradient
        self.kernel = KERNELS.build({"name": kernel, "density": True} if kernel == "student_t" else kernel)
        if isinstance(self.kernel, LearnedEnergyKernel):
            raise ValueError(
                "kernel=LearnedEnergyKernel has no centers that an M-step could move: its hypotheses live in the "
                "network, whose generalized M-step is a training step on em_lightning.losses.FreeEnergyLoss; for "
                "centers give a Kernel whose energy(x, centers) calls the network"
            )
        if estimate_scale:
            self._check_scale()

    def _check_scale(self) -> None:
        if isinstance(self.kernel, CosineKernel):
            raise ValueError(
                "estimate_scale=True with kernel='cosine', which does not see scales; "
                "em_lightning.operators.DirectionalEM estimates concentrations"
            )
        try:
            self.kernel.log_normalizer(self.num_features)
        except NoDensityError as error:
            raise ValueError(
                f"estimate_scale=True needs a density: the energy could shrink with s alone. {error}"
            ) from error

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        init: KernelMixture | None = None,
        num_iters: int | None = None,
    ) -> KernelMixture:
        """Return the mixtures after the last iteration.

        Args:
            x: points (B, N, D).
            mask: (B, N), false where a row is padding, whatever it holds.
            weights: (B, N), not negative.
            init: mixtures to start from.
            num_iters: T for this call.
        """
        *_, mixture = self.iterate(x, mask, weights, init, num_iters)
        return mixture

    def iterate(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        init: KernelMixture | None = None,
        num_iters: int | None = None,
    ) -> Iterator[KernelMixture]:
        """Yield the start and the mixtures after each iteration; arguments are those of :meth:`forward`."""
        x = check_sets(x, mask, weights, self.num_features)
        steps = self.num_iters if num_iters is None else num_iters
        if steps < 0:
            raise ValueError(f"num_iters={steps} must be at least 0, where 0 returns the start")
        with torch.autocast(x.device.type, enabled=False):
            points = points_of(x, mask, weights)
            start = self._start(points) if init is None else self._given(init, points)
            yield start
            # Slopes are taken by autograd, which would otherwise record what nothing asks for.
            inputs = (points.x, points.counts, *start, *self.kernel.parameters())
            wanted = any(part.requires_grad for part in inputs)

            def step(state: State, progress: float) -> State:
                recorded = wanted and torch.is_grad_enabled()
                with torch.inference_mode(False), torch.set_grad_enabled(recorded):
                    after = generalized_step(
                        self.kernel,
                        Points(*map(_normal, points)),
                        KernelMixture(*map(_normal, _leave(state))),
                        estimate_scale=self.estimate_scale,
                        floor=self.scale_floor,
                        num_steps=self.num_steps,
                    )
                    return _enter(after)

            for state in gradients.iterate(step, _enter(start), steps, self.gradient):
                yield KernelMixture(*(part.to(x.dtype) for part in _leave(state)))

    def log_prob(self, x: Tensor, mixture: KernelMixture, mask: Tensor | None = None) -> Tensor:
        """Return ``log p(x)`` of points (B, N, D), as (B, N); zero where masked.

        Raises:
            NoDensityError: the kernel is no density; :meth:`objective` is what its iterations climb.
        """
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), x, 0.0)
        constant = self.kernel.log_normalizer(self.num_features).to(x.dtype)
        density = -self.posterior(x, mixture).free_energy - constant
        return density if mask is None else torch.where(mask, density, 0.0)

    def objective(
        self, x: Tensor, mixture: KernelMixture, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Return what the iterations climb, (B,): the log-likelihood, for a kernel without a density less its own."""
        points = points_of(check_sets(x, mask, weights, self.num_features), mask, weights)
        try:
            constant: Tensor | float = self.kernel.log_normalizer(self.num_features).to(x.dtype)
        except NoDensityError:
            constant = 0.0
        return -((self.posterior(points.x, mixture).free_energy + constant) * points.counts).sum(-1)

    def posterior(self, x: Tensor, mixture: KernelMixture) -> Posterior:
        """Return the posterior over components of points (B, N, D); energies contain ``-log pi_k``."""
        scales = mixture.scales if self.estimate_scale else None
        return softmin(energies_of(self.kernel, x, mixture.centers, scales) - mixture.log_weights.unsqueeze(1))

    @torch.no_grad()
    def _start(self, points: Points) -> KernelMixture:
        """Return equal weights, drawn centers, and the root mean square distance to the nearest of them as scales."""
        cloud = prepare(points.x, weights=points.counts)
        centers = starts.draw_centers(self.init, cloud, self.num_components) + cloud.center.unsqueeze(1)
        centers = centers.to(points.x.dtype)
        log_weights = torch.zeros_like(centers[..., 0]).log_softmax(-1)
        scales = torch.ones_like(log_weights)
        if self.estimate_scale:
            nearest = torch.cdist(points.x, centers).amin(-1).square()
            mean = (nearest * points.counts).sum(-1) / (self.num_features * cloud.mass.clamp(min=1e-12))
            scales = scales * mean.to(scales).clamp(min=self.scale_floor).sqrt().unsqueeze(-1)
        return KernelMixture(log_weights, centers, scales)

    def _given(self, init: KernelMixture, points: Points) -> KernelMixture:
        shape = (len(points.x), self.num_components, self.num_features)
        if init.centers.shape != shape:
            raise ValueError(f"init.centers has shape {tuple(init.centers.shape)}; give {shape}")
        return KernelMixture(*(part.to(points.x.dtype) for part in init))

    def extra_repr(self) -> str:
        """Return what distinguishes this operator."""
        return (
            f"{self.num_components}, {self.num_features}, num_iters={self.num_iters}, num_steps={self.num_steps}, "
            f"estimate_scale={self.estimate_scale}, init={self.init!r}, gradient={self.gradient!r}"
        )


def _normal(part: Tensor) -> Tensor:
    """Return a tensor that autograd takes, also in inference mode."""
    return part.clone() if part.is_inference() else part


def _enter(mixture: KernelMixture) -> State:
    scale = mixture.scales.unsqueeze(-1)
    return State(mixture.log_weights, mixture.centers, Factors(scale, scale.reciprocal()))


def _leave(state: State) -> KernelMixture:
    return KernelMixture(state.log_weights, state.means, state.factors.scale.squeeze(-1))
