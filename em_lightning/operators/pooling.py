"""Set pooling: a vector of the mixture of each set, and of moments of its items under the responsibilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from em_lightning.mixture.points import accumulation_dtype
from em_lightning.operators.em import EMOperator

SUMMARIES = ("weights", "means", "scales", "values", "value_scales", "log_prob")


class EMPooling(nn.Module):
    r"""Summarize each set by the mixture that EM fits to it: permutation-invariant, for sets of any size.

    In each of H heads the items are projected to ``head_features`` coordinates z, or have coordinates of their own
    beside their features, and a mixture of K components is fitted to these. The output is, component by component, the
    parts asked for in ``summary``:

    ============== ======= ==================================================================
    weights        1       :math:`\pi_k`
    means          d       :math:`\mu_k`
    scales         d       :math:`\log \sigma_{kd}`, from the diagonal of the covariance
    values         F       :math:`\sum_n r_{nk} v_n / \sum_n r_{nk}`, the items' own features
    value_scales   F       the logarithm of their standard deviation about that
    log_prob       1       the mean log-density of the set (once a head)
    ============== ======= ==================================================================

    Components are in the order of their start. With ``init="learned"`` each has an identity of its own, so that a layer
    behind can tell them apart; farthest points and k-means++ find better fits, in an order that only the set decides.

    Args:
        num_components: K.
        num_features: F, of the items.
        heads: H.
        head_features: d, coordinates of a head; ``None`` fits to the features themselves, for one head.
        num_coordinates: d, where coordinates are given to :meth:`forward` beside the features, as the points of a
            cloud are.
        summary: which parts, in which order.
        num_iters: EM iterations a call.
        covariance: ``"diag"``, ``"spherical"``, ``"full"`` or ``"tied"``.
        init: where EM starts.
        out_features: of a linear layer on top; ``None`` returns the summary as it is.
        **operator: further arguments of :class:`EMOperator`: ``prior={"covariance_strength": 1.0}`` keeps components of
            few items regular, ``residual=False`` leaves out what is learned.

    Shape:
        - x: (B, N, F); mask and weights: (B, N).
        - output: (B, ``out_features``).

    Raises:
        ValueError: a part is unknown or named twice, or several heads have no coordinates of their own.

    Example:
        >>> pooling = EMPooling(4, 3, summary=("weights", "means"))
        >>> pooling(torch.randn(2, 50, 3)).shape, pooling.out_features
        (torch.Size([2, 16]), 16)

    Source: the mixture as the representation of a set, as in Kim, Differentiable Expectation-Maximization for Set
    Representation Learning, 2022.
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
        unknown = [name for name in summary if name not in SUMMARIES]
        if unknown or not summary or len(set(summary)) < len(summary):
            raise ValueError(f"summary={tuple(summary)!r} must name parts once, out of {', '.join(SUMMARIES)}")
        if heads < 1 or (heads > 1 and head_features is None):
            raise ValueError(
                f"heads={heads} with head_features={head_features}: several heads need coordinates, e.g. 4"
            )
        if num_coordinates is not None and (heads > 1 or head_features is not None):
            raise ValueError(
                f"num_coordinates={num_coordinates} are given and not projected: leave out heads and head_features"
            )
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
        """Return one vector for each set.

        Args:
            x: items (B, N, F).
            mask: (B, N), false where a row is padding; a set without items gives a finite vector.
            weights: (B, N), how often each item counts.
            coordinates: (B, N, d), what mixtures are fitted to, where ``num_coordinates`` is given.

        Raises:
            ValueError: the items have another number of features or coordinates.
        """
        given = None if coordinates is None else coordinates.shape[-1]
        if given != self.num_coordinates:
            raise ValueError(f"coordinates have {given} columns; the pooling was made for {self.num_coordinates}")
        if x.ndim != 3 or x.shape[-1] != self.num_features:
            raise ValueError(f"x has shape {tuple(x.shape)}; give (B, N, {self.num_features})")
        for name, value in {"mask": mask, "weights": weights}.items():
            if value is not None and value.shape != x.shape[:2]:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; give {tuple(x.shape[:2])}, one value an item")
        with torch.autocast(x.device.type, enabled=False):
            items = x.to(torch.promote_types(x.dtype, torch.float32))
            places = items if coordinates is None else coordinates.to(items.dtype)
            if mask is not None:
                items, places = (torch.where(mask.unsqueeze(-1), part, 0.0) for part in (items, places))
            heads = [places] if self.project is None else self.project(items).chunk(self.heads, -1)
            vectors = [
                self._summary(operator, z, items, mask, weights)
                for operator, z in zip(self.operators, heads, strict=True)
            ]
            vector = torch.cat(vectors, -1)
            vector = vector if self.output is None else self.output(vector)
        return vector.to(x.dtype)

    def _summary(
        self, operator: nn.Module, z: Tensor, values: Tensor, mask: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        assert isinstance(operator, EMOperator)
        mixture, dtype = operator(z, mask, weights), z.dtype
        parts: dict[str, Tensor] = {"weights": mixture.weights.unsqueeze(-1), "means": mixture.means}
        if "scales" in self.summary:
            parts["scales"] = 0.5 * mixture.variances().log()
        once, eps = [], torch.finfo(z.dtype).eps
        if {"values", "value_scales", "log_prob"} & set(self.summary):
            if "value_scales" in self.summary:
                # In float64: gradients are ratios of squares to masses and variances that may be tiny.
                z, values = z.to(accumulation_dtype(z)), values.to(accumulation_dtype(z))
                mixture = mixture.to(z.dtype)
            posterior = mixture.posterior(z)
            counts = torch.ones_like(z[..., 0]) if weights is None else weights.to(z.dtype)
            counts = counts if mask is None else counts * mask
            shares = posterior.responsibilities * counts.unsqueeze(-1)
            mass = shares.sum(1).clamp(min=eps).unsqueeze(-1)
            parts["values"] = shares.mT @ values / mass
            if "value_scales" in self.summary:
                square = (values.unsqueeze(1) - parts["values"].unsqueeze(2)).square()
                variance = (shares.mT.unsqueeze(-1) * square).sum(2) / mass
                parts["value_scales"] = 0.5 * (variance + eps).log()
            if "log_prob" in self.summary:
                total = counts.sum(1, keepdim=True).clamp(min=1.0)
                once.append(-(posterior.free_energy * counts).sum(1, keepdim=True) / total)
        chosen = [parts[name].to(dtype) for name in self.summary if name != "log_prob"]
        vectors = [torch.cat(chosen, -1).flatten(1)] if chosen else []
        return torch.cat([*vectors, *(part.to(dtype) for part in once)], -1)
