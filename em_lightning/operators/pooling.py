"""Set pooling by EM: mixture parameters and responsibility-weighted statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from em_lightning.mixture.points import accumulation_dtype
from em_lightning.operators.checks import check_sets
from em_lightning.operators.em import EMOperator

SUMMARIES = ("weights", "means", "scales", "values", "value_scales", "log_prob")


class EMPooling(nn.Module):
    r"""Summarize each set by the mixture that EM fits to it: permutation-invariant, for sets of any size.

    In each of H heads, a mixture of K components is fitted to d coordinates of the items: a linear map of their
    features, the features themselves, or separately given coordinates. The output concatenates, component by component,
    the parts named in ``summary``:

    ============== ======= ==================================================================
    weights        1       :math:`\pi_k`
    means          d       :math:`\mu_k`
    scales         d       :math:`\log \sigma_{kd}`, from the diagonal of the covariance
    values         F       :math:`\bar v_k = \sum_n r_{nk} v_n / \sum_n r_{nk}`, mean features of the items
    value_scales   F       the logarithm of the standard deviation of the features about this mean
    log_prob       1       mean log-density of the set, once per head
    ============== ======= ==================================================================

    Components are in the order of their start: only with ``init="learned"`` a component has the same role in all sets.

    Args:
        num_components: K.
        num_features: F, of the items.
        heads: H; more than one requires ``head_features``.
        head_features: d, the outputs of the linear map of each head; ``None`` fits to the features themselves.
        num_coordinates: d, for coordinates that are given to :meth:`forward`, such as those of a point cloud.
        summary: names of the parts, in the order of the output.
        out_features: size of a final linear layer; ``None`` omits the layer.
        num_iters, covariance, init, **operator: arguments of :class:`EMOperator`, such as ``residual=False``, or
            ``prior={"covariance_strength": 1.0}`` against singular components of few items.

    Shape:
        - x: (B, N, F); mask and weights: (B, N).
        - output: (B, ``out_features``).

    Raises:
        ValueError: an argument is out of range or contradicts another one, or a shape does not fit.

    Example:
        >>> pooling = EMPooling(4, 3, summary=("weights", "means"))
        >>> pooling(torch.randn(2, 50, 3)).shape, pooling.out_features
        (torch.Size([2, 16]), 16)

    Source: Kim, Differentiable Expectation-Maximization for Set Representation Learning, 2022.
    """

    def __init__(
        self,
        num_components: int,
        num_features: int,
        *,
        heads: int = 1,
        head_features: int | None = None,
        num_coordinates: int | None = None,
        summary: Sequence[str] = ("weights", "means", "scales"),
        num_iters: int = 3,
        covariance: str = "diag",
        init: str = "learned",
        out_features: int | None = None,
        **operator: Any,
    ) -> None:
        super().__init__()
        if not summary or not set(summary) <= set(SUMMARIES) or len(set(summary)) < len(summary):
            raise ValueError(f"summary={tuple(summary)!r} must be different names out of {', '.join(SUMMARIES)}")
        if heads < 1 or (heads > 1 and head_features is None):
            raise ValueError(f"heads={heads} with head_features={head_features}: several heads need head_features")
        if num_coordinates is not None and head_features is not None:
            raise ValueError(f"num_coordinates={num_coordinates} excludes head_features={head_features}")
        coordinates = next(size for size in (num_coordinates, head_features, num_features) if size is not None)
        self.num_coordinates = num_coordinates
        self.num_features = num_features
        self.heads = heads
        self.summary = tuple(summary)
        self.project = None if head_features is None else nn.Linear(num_features, heads * coordinates)
        self.operators = nn.ModuleList(
            EMOperator(num_components, coordinates, num_iters=num_iters, covariance=covariance, init=init, **operator)
            for _ in range(heads)
        )
        sizes = {"weights": 1, "means": coordinates, "scales": coordinates, "log_prob": 0}
        parts = sum(sizes.get(name, num_features) for name in summary)
        size = heads * (num_components * parts + ("log_prob" in summary))
        self.output = None if out_features is None else nn.Linear(size, out_features)
        self.out_features = size if out_features is None else out_features

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        coordinates: Tensor | None = None,
    ) -> Tensor:
        """Return one vector (B, ``out_features``) per set, finite also for a set without items.

        Args:
            x: items (B, N, F).
            mask: (B, N), false where a row is padding.
            weights: (B, N), relative to their mean.
            coordinates: (B, N, d), required with ``num_coordinates``.
        """
        given = None if coordinates is None else coordinates.shape[-1]
        if given != self.num_coordinates:
            raise ValueError(f"coordinates have {given} columns, but num_coordinates={self.num_coordinates}")
        with torch.autocast(x.device.type, enabled=False):
            items = check_sets(x, mask, weights, self.num_features)
            places = items if coordinates is None else coordinates.to(items.dtype)
            if mask is not None:
                items, places = (torch.where(mask.unsqueeze(-1), part, 0.0) for part in (items, places))
            heads = [places] if self.project is None else _linear(self.project, items).chunk(self.heads, -1)
            pairs = zip(self.operators, heads, strict=True)
            vector = torch.cat([self._summary(operator, z, items, mask, weights) for operator, z in pairs], -1)
            vector = vector if self.output is None else _linear(self.output, vector)
        return vector.to(x.dtype)

    def _summary(self, operator: Any, z: Tensor, values: Tensor, mask: Tensor | None, weights: Tensor | None) -> Tensor:
        mixture, dtype = operator(z, mask, weights), z.dtype
        parts = {
            "weights": mixture.weights.unsqueeze(-1),
            "means": mixture.means,
            "scales": 0.5 * mixture.variances().log(),
        }
        if not set(self.summary) <= set(parts):
            eps = torch.finfo(dtype).eps
            if "value_scales" in self.summary:
                # In float64, since the gradient divides by the mass and the variance.
                z, values = z.to(accumulation_dtype(z)), values.to(accumulation_dtype(z))
                mixture = mixture.to(z.dtype)
            counts = torch.ones_like(z[..., 0]) if weights is None else weights.to(z.dtype)
            counts = counts if mask is None else counts * mask
            shares = operator.posterior(z, mixture, mask).responsibilities[..., : mixture.components]
            shares = shares * counts.unsqueeze(-1)
            mass = shares.sum(1).clamp(min=eps).unsqueeze(-1)
            parts["values"] = shares.mT @ values / mass
            if "value_scales" in self.summary:
                square = (values.unsqueeze(1) - parts["values"].unsqueeze(2)).square()
                variance = (shares.mT.unsqueeze(-1) * square).sum(2) / mass
                parts["value_scales"] = 0.5 * (variance + eps).log()
            if "log_prob" in self.summary:
                total = counts.sum(1, keepdim=True).clamp(min=1.0)
                log_prob = (operator.log_prob(z, mixture, mask) * counts).sum(1, keepdim=True) / total
        chosen = [parts[name].to(dtype) for name in self.summary if name != "log_prob"]
        vector = torch.cat([mixture.means[..., :0].to(dtype), *chosen], -1).flatten(1)
        return torch.cat([vector, log_prob.to(dtype)], -1) if "log_prob" in self.summary else vector


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return the linear map of x in the wider dtype of x and the layer, which may be of half precision."""
    dtype = torch.promote_types(x.dtype, layer.weight.dtype)
    return functional.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
