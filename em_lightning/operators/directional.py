"""The EM operator on the unit sphere: sets of directions in, mixtures of von Mises-Fisher distributions out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from em_lightning.mixture import starts
from em_lightning.mixture.cloud import Cloud, prepare
from em_lightning.mixture.directional import VON_MISES_FISHER, DirectionalMixture, directions, enter_directions
from em_lightning.mixture.factors import State
from em_lightning.mixture.moments import accumulate
from em_lightning.operators import gradients
from em_lightning.operators.checks import check_choice, check_sets


class DirectionalEM(nn.Module):
    r"""Fit a mixture of von Mises-Fisher distributions to the directions of each set by T iterations of EM.

    ``r_nk`` is proportional to ``pi_k C_D(kappa_k) exp(kappa_k mu_k . x_n / |x_n|)``: the cosine kernel's energy over a
    temperature ``1 / kappa_k``, with the normalizer that makes a density of it. No iteration lowers the likelihood.

    Args:
        num_components: K.
        num_features: D, at least 2.
        num_iters: T, iterations a call.
        init: where the loop starts: ``"farthest"``, ``"kmeans++"`` or ``"random"`` points.
        concentration_floor: the least ``1 / kappa``, about the variance in an angle.
        gradient: ``"unrolled"``, ``"checkpoint"``, ``"last"`` or ``"implicit"``, as :class:`EMOperator` has them.

    Shape:
        - x: (B, N, D); mask: (B, N), true for points that count; weights: (B, N), how often each counts.
        - output: a :class:`~em_lightning.mixture.DirectionalMixture` of B mixtures.

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
        concentration_floor: float = 1e-6,
        gradient: str = "unrolled",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_components", num_components, 1),
            ("num_features", num_features, 2),
            ("num_iters", num_iters, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        check_choice("init", init, ("farthest", "kmeans++", "random"))
        check_choice("gradient", gradient, gradients.GRADIENTS)
        if not concentration_floor > 0:
            raise ValueError(f"concentration_floor={concentration_floor} must be positive; 1e-6 is a thousandth radian")
        self.num_components = num_components
        self.num_features = num_features
        self.num_iters = num_iters
        self.init = init
        self.concentration_floor = concentration_floor
        self.gradient = gradient

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        init: DirectionalMixture | None = None,
        num_iters: int | None = None,
    ) -> DirectionalMixture:
        """Return the mixtures after the last iteration.

        Args:
            x: points (B, N, D), of which only the directions count.
            mask: (B, N), false where a row is padding.
            weights: (B, N), not negative.
            init: mixtures to start from.
            num_iters: T for this call.
        """
        x = check_sets(x, mask, weights, self.num_features)
        steps = self.num_iters if num_iters is None else num_iters
        with torch.autocast(x.device.type, enabled=False):
            cloud = directions(x, mask, weights)
            floor = torch.full_like(cloud.mass, self.concentration_floor)
            state = self._start(cloud, floor) if init is None else enter_directions(init, cloud.mass.dtype)

            def step(state: State, progress: float) -> State:
                moments, _ = accumulate(cloud, VON_MISES_FISHER.natural(state), VON_MISES_FISHER)
                return VON_MISES_FISHER.maximize(moments, floor)

            *_, state = (state, *gradients.iterate(step, state, steps, self.gradient))
        parts = (state.log_weights, state.means, state.factors.inverse.square().squeeze(-1))
        return DirectionalMixture(*(part.to(x.dtype) for part in parts))

    @torch.no_grad()
    def _start(self, cloud: Cloud, floor: Tensor) -> State:
        """Return what an M-step makes of the points nearest to drawn centers, all of one concentration."""
        centred = prepare(cloud.points.mT, weights=cloud.weights)
        drawn = starts.draw_centers(self.init, centred, self.num_components) + centred.center.unsqueeze(1)
        cosines = torch.bmm(drawn.to(cloud.points.dtype), cloud.points)
        members = torch.zeros_like(cosines).scatter_(1, cosines.argmax(1, keepdim=True), 1.0)
        members = members if cloud.weights is None else members * cloud.weights.unsqueeze(1)
        features = VON_MISES_FISHER.features(cloud.points, floor.dtype)
        return VON_MISES_FISHER.maximize(torch.bmm(members.to(floor.dtype), features.mT), floor)

    def extra_repr(self) -> str:
        """Return what distinguishes this operator."""
        return (
            f"{self.num_components}, {self.num_features}, num_iters={self.num_iters}, init={self.init!r}, "
            f"gradient={self.gradient!r}"
        )
