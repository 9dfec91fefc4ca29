"""Set pooling by EM: mixture parameters and responsibility-weighted statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from em_lightning.operators.base import check_sets
from em_lightning.operators.em import EMOperator

SUMMARIES = ("weights", "means", "scales", "values")


class EMPooling(nn.Module):
    r"""Summarize each set by the mixture that EM fits to it: permutation-invariant, for sets of any size.

    A mixture of K components is fitted to d coordinates of the items: their features, a linear map of them, or
    separately given coordinates. The output concatenates, component by component, the parts named in ``summary``:

    ============== ======= ==================================================================
    weights        1       :math:`\pi_k`
    means          d       :math:`\mu_k`
    scales         d       :math:`\log \sigma_{ki}`, from the diagonal of the covariance
    values         F       :math:`\bar v_k = \sum_n r_{nk} v_n / \sum_n r_{nk}`, means of the features v_n of items n
    ============== ======= ==================================================================

    Components keep their initial order. They have the same role in all sets only with ``init="learned"``.

    Args:
        num_components: K.
        num_features: F, features per item.
        head_features: d, output size of a linear map of the features; ``None`` omits the map.
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
        if num_coordinates is not None and head_features is not None:
            raise ValueError(f"num_coordinates={num_coordinates} excludes head_features={head_features}")
        d = next(size for size in (num_coordinates, head_features, num_features) if size is not None)
        self.num_coordinates = num_coordinates
        self.num_features = num_features
        self.summary = tuple(summary)
        self.project = None if head_features is None else nn.Linear(num_features, d)
        self.operator = EMOperator(num_components, d, num_iters=num_iters, covariance=covariance, init=init, **operator)
        sizes = {"weights": 1, "means": d, "scales": d, "values": num_features}
        size = num_components * sum(sizes[name] for name in summary)
        self.output = None if out_features is None else nn.Linear(size, out_features)
        self.out_features = size if out_features is None else out_features

    def forward(
        self, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None, coordinates: Tensor | None = None
    ) -> Tensor:
        """Return one vector per set, finite also for a set without items; coordinates are (B, N, d)."""
        columns = None if coordinates is None else coordinates.shape[-1]
        if columns != self.num_coordinates:
            raise ValueError(f"coordinates have {columns} columns, but num_coordinates={self.num_coordinates}")
        with torch.autocast(x.device.type, enabled=False):
            items = check_sets(x, mask, weights, self.num_features)
            coordinates = items if coordinates is None else coordinates.to(items.dtype)
            if mask is not None:
                items, coordinates = (torch.where(mask.unsqueeze(-1), part, 0.0) for part in (items, coordinates))
            if self.project is not None:
                coordinates = _linear(self.project, items)
            mixture = self.operator(coordinates, mask, weights)
            parts = {
                "weights": mixture.weights.unsqueeze(-1),
                "means": mixture.means,
                "scales": 0.5 * mixture.variances().log(),
            }
            if "values" in self.summary:
                background = self.operator.background
                energies = None if background is None else background.energies(coordinates, mask, weights)
                r = self.operator.posterior(coordinates, mixture, mask, energies).responsibilities
                r = r[..., : mixture.components]  # without the background, the last hypothesis
                r = r if weights is None else r * weights.to(r.dtype).unsqueeze(-1)
                r = r if mask is None else r * mask.unsqueeze(-1)
                parts["values"] = r.mT @ items / r.sum(1).clamp(min=torch.finfo(r.dtype).eps).unsqueeze(-1)
            vector = torch.cat([parts[name] for name in self.summary], -1).flatten(1)
            vector = vector if self.output is None else _linear(self.output, vector)
        return vector.to(x.dtype)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return the linear map of x in the wider dtype of x and the layer, which may be of half precision."""
    dtype = torch.promote_types(x.dtype, layer.weight.dtype)
    return functional.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
