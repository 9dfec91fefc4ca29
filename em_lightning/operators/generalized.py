"""EM operator for mixtures under any kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from em_lightning.checks import check_choice
from em_lightning.competition import Posterior, softmin
from em_lightning.kernels import CosineKernel, LearnedEnergyKernel, NoDensityError, density_kernel
from em_lightning.mixture import initialization
from em_lightning.mixture.generalized import KernelMixture, PointSets, energies_of, generalized_step, point_sets
from em_lightning.mixture.parameters import Parameters
from em_lightning.operators.base import SetOperator


class _Sets(NamedTuple):
    """Inputs of the EM loop."""

    points: PointSets


class GeneralizedEM(SetOperator):
    r"""Fit a mixture under any kernel to each set by T iterations of generalized EM.

    E-step: ``r_nk`` proportional to ``pi_k exp(-d(x_n, mu_k))``. M-step: weights as in EM; centers take IRLS steps
    that lower the expected energy ``sum_n r_nk d(x_n, mu_k)`` (:mod:`em_lightning.mixture.generalized`), so that no
    iteration lowers the objective

    .. math:: \sum_n w_n \log \sum_k \pi_k \, e^{-d(x_n, \mu_k) - \log Z}

    It is a log-likelihood if the kernel is a density (Gaussian, Student-t, Laplace, Huber, pseudo-Huber, exponential,
    Mahalanobis; the cosine on the unit sphere). Otherwise Z is omitted: objectives of different kernels are then not
    comparable, and centers, which are restricted to the bounding box, may end on its border. Centers of an energy with
    a kink (Laplace, exponential) may stop before the optimum, at a coordinate of a point.

    :class:`EMOperator` is faster for kernels of the Mahalanobis distance; :class:`DirectionalEM` estimates
    concentrations.

    Args:
        num_components: K.
        num_features: D.
        kernel: a key of ``KERNELS`` or an instance of a kernel (``"student_t"`` is the density). EM does not change its
            shape parameters; learnable ones have gradients. Memory is proportional to N x K x D.
        num_iters, gradient: as in :class:`EMOperator`; ``"implicit"`` is not available.
        num_steps: steps per M-step.
        estimate_scale: estimate a scale per component, ``d(x / s_k, mu_k / s_k) + D log s_k``, alternating with the
            centers. It requires a density on the whole space.
        scale_floor: lower bound of ``s_k^2``.
        init: how the initial centers are drawn: ``"farthest"``, ``"kmeans++"`` or ``"random"`` points.

    Shape:
        - x: (B, N, D); mask: (B, N), true for points that count; weights: (B, N), relative to their mean.
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

    gradients_known = ("unrolled", "checkpoint", "last")
    shown = ("num_iters", "num_steps", "estimate_scale", "init", "gradient")

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
        super().__init__(num_components, num_features, num_iters, gradient)
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} must be at least 1")
        check_choice("init", init, ("farthest", "kmeans++", "random"))
        if not scale_floor > 0:
            raise ValueError(f"scale_floor={scale_floor} must be positive")
        self.num_steps = num_steps
        self.estimate_scale = estimate_scale
        self.scale_floor = scale_floor
        self.init = init
        self.kernel = density_kernel(kernel)
        if isinstance(self.kernel, LearnedEnergyKernel):
            raise ValueError("kernel=LearnedEnergyKernel has no centers; train it with FreeEnergyLoss")
        if estimate_scale and isinstance(self.kernel, CosineKernel):
            raise ValueError("kernel='cosine' has no scale; set estimate_scale=False or use DirectionalEM")
        if estimate_scale:
            try:
                self.kernel.log_normalizer(num_features)
            except NoDensityError as error:
                raise ValueError(f"estimate_scale=True needs a kernel that is a density: {error}") from error

    def log_prob(self, x: Tensor, mixture: KernelMixture, mask: Tensor | None = None) -> Tensor:
        """Return ``log p(x)`` of points (B, N, D), as (B, N); zero where masked.

        Raises:
            NoDensityError: the kernel is not a density; use :meth:`objective`.
        """
        density = -self.posterior(x, mixture, mask).free_energy - self.kernel.log_normalizer(self.num_features).to(x)
        return density if mask is None else torch.where(mask, density, 0.0)

    def posterior(self, x: Tensor, mixture: KernelMixture, mask: Tensor | None = None) -> Posterior:
        """Return the posterior over components of points (B, N, D); energies contain ``-log pi_k``."""
        x = x if mask is None else torch.where(mask.unsqueeze(-1), x, 0.0)
        scales = mixture.scales if self.estimate_scale else None
        return softmin(energies_of(self.kernel, x, mixture.centers, scales) - mixture.log_weights.unsqueeze(1))

    # The loop. Its state holds centers as means and scales as covariances.

    def _prepare(self, x: Tensor, mask: Tensor | None, weights: Tensor | None) -> _Sets:
        return _Sets(point_sets(x, mask, weights))

    @torch.no_grad()
    def _start(self, sets: _Sets, choose: bool) -> Parameters:
        """Return equal weights, drawn centers, and the root mean square distance to the nearest center as scales."""
        x, counts = sets.points.x, sets.points.counts
        centers = initialization.draw_centers(self.init, x, self.num_components, weights=counts)
        log_weights = torch.zeros_like(centers[..., 0]).log_softmax(-1)
        scales = torch.ones_like(log_weights)
        if self.estimate_scale:
            nearest = torch.cdist(x, centers).amin(-1).square()
            mean = (nearest * counts).sum(-1) / (self.num_features * counts.sum(-1).clamp(min=1.0))
            scales = scales * mean.clamp(min=self.scale_floor).sqrt().unsqueeze(-1)
        return Parameters(log_weights, centers, scales)

    def _enter(self, sets: _Sets, mixture: KernelMixture) -> Parameters:
        shape = (len(sets.points.x), self.num_components, self.num_features)
        if tuple(mixture.centers.shape) != shape:
            raise ValueError(f"init.centers has shape {tuple(mixture.centers.shape)}; it must be {shape}")
        return Parameters(*(part.to(sets.points.x.dtype) for part in mixture.tensors()))

    def _step(
        self, sets: _Sets, state: Parameters, progress: float, with_objective: bool = False
    ) -> tuple[Parameters, Tensor]:
        # The M-step differentiates energies; record its graph only if an input requires gradients.
        inputs = (*sets.points, *state, *self.kernel.parameters())
        recorded = torch.is_grad_enabled() and any(part.requires_grad for part in inputs)
        with torch.inference_mode(False), torch.set_grad_enabled(recorded):
            after = generalized_step(
                self.kernel,
                PointSets(*(part.clone() for part in sets.points)),  # autograd accepts no inference tensors
                Parameters(*(part.clone() for part in state)),
                estimate_scale=self.estimate_scale,
                floor=self.scale_floor,
                num_steps=self.num_steps,
            )
        return after, self._objective(sets, state) if with_objective else sets.points.mass

    def _objective(self, sets: _Sets, state: Parameters) -> Tensor:
        """Return the log-likelihood; without the normalizer if the kernel has none."""
        try:
            constant: Tensor | float = self.kernel.log_normalizer(self.num_features).to(sets.points.x)
        except NoDensityError:
            constant = 0.0
        free_energy = self.posterior(sets.points.x, KernelMixture(*state)).free_energy
        return -((free_energy + constant) * sets.points.counts).sum(-1)

    def _mixture(self, sets: _Sets, state: Parameters) -> KernelMixture:
        return KernelMixture(*state)
