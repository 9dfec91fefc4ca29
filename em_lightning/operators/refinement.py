"""Shape-preserving EM layer: adds to each item the posterior mean under the mixture of its set."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from em_lightning.competition import Softmin
from em_lightning.operators.em import EMOperator


class EMRefinement(nn.Module):
    r"""Add to each item its posterior mean under a mixture of its set: ``x_n + gate * sum_k r_nk mu_k``.

    ``mu`` and ``r`` are the means and responsibilities of an :class:`EMOperator` that is fitted to the set, so the
    second term has rank K at most. ``gate`` starts at 0, so that a new layer is the identity.

    Args:
        num_components: K.
        num_features: D, the size of ``dim``.
        dim: the axis of the features; all axes but the first and this one index the items of a set.
        temperature: divides the log-densities. ``None`` uses the square root of D, because the differences of
            log-densities grow with D until every responsibility is 0 or 1.
        num_iters, covariance, residual, **operator: arguments of :class:`EMOperator`. ``residual=True`` learns
            corrections of the M-step, with O(D^3) cost and O(D^2) parameters.

    Shape:
        - input and output: (B, N, D), with ``dim=1`` feature maps (B, D, H, W) as sets of positions; (N, D) is one set.

    Raises:
        ValueError: the input has fewer than two axes, or its number of features is not ``num_features``.

    Example:
        >>> layer = EMRefinement(4, 16)
        >>> x = torch.randn(2, 10, 16)
        >>> torch.equal(layer(x), x)
        True

    Source: the reconstruction of Li et al., "Expectation-Maximization Attention Networks", 2019.
    """

    def __init__(
        self,
        num_components: int,
        num_features: int,
        *,
        dim: int = -1,
        num_iters: int = 3,
        covariance: str = "spherical",
        residual: bool = False,
        temperature: float | None = None,
        **operator: Any,
    ) -> None:
        super().__init__()
        self.dim = dim
        self._options = {"num_iters": num_iters, "covariance": covariance, "residual": residual, **operator}
        self._temperature = temperature
        self.operator = self._make_operator(num_components, num_features)
        self.gate = nn.Parameter(torch.zeros(1))

    def _make_operator(self, num_components: int, num_features: int) -> EMOperator:
        """Return a new operator; subclasses call this again to change the number of features."""
        temperature = math.sqrt(num_features) if self._temperature is None else self._temperature
        return EMOperator(num_components, num_features, competition=Softmin(temperature), **self._options)

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined items, of the shape and dtype of ``x``."""
        if x.ndim < 2 or x.shape[self.dim] != self.operator.num_features:
            size = self.operator.num_features
            raise ValueError(f"x {tuple(x.shape)} must have at least two axes and size {size} along dim={self.dim}")
        moved = x.movedim(self.dim, -1)
        items = moved.unsqueeze(0) if x.ndim == 2 else moved.flatten(1, -2)
        return x + self.gate.to(x.dtype) * self.reconstruct(items).reshape(moved.shape).movedim(-1, self.dim)

    def reconstruct(self, items: Tensor, mask: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
        """Return the posterior means of items (B, N, D), or of queries (B, M, D), under the mixture of each set."""
        with torch.autocast(items.device.type, enabled=False):
            points = items.to(torch.promote_types(items.dtype, torch.float32))
            mixture = self.operator(points, mask)
            background = self.operator.background  # its energy is that of the set, not of the queries
            energies = None if background is None else background.energies(points, mask)
            queries, mask = (points, mask) if queries is None else (queries.to(points.dtype), None)
            posterior = self.operator.posterior(queries, mixture, mask, background_energies=energies)
            responsibilities = posterior.responsibilities[..., : mixture.components].to(mixture.means.dtype)
            return (responsibilities @ mixture.means).to(items.dtype)
