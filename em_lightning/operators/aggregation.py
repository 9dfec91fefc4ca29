"""EM pooling in PyG: groups of rows to one row each."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch_geometric.nn.aggr
from torch import Tensor, nn
from torch_geometric.nn.aggr import Aggregation
from torch_geometric.utils import to_dense_batch

from em_lightning.operators.em import EMOperator
from em_lightning.operators.pooling import EMPooling


class EMAggregation(Aggregation):
    r"""Aggregate each group of rows by the mixture that EM fits to it; an ``Aggregation`` of PyG.

    Without ``out_channels`` the shape of rows is kept, as ``aggr="em"`` in a convolution wants it:

    .. math:: y = \sum_k s_k \mu_k, \qquad s = \operatorname{softmax}_k(a \log \pi_k - b \log \sigma_k)

    with :math:`a = 1, b = 0` learned from there on. At the start it is the mean; a large a picks the largest cluster of
    a neighbourhood and b prefers tight ones, which leaves outliers out. With ``out_channels`` it is an
    :class:`EMPooling` with a linear layer on top, for the readout of a graph.

    Groups may come in any order, and empty groups give zeros. Rows are laid out as (groups, largest group, features),
    as PyG's own set aggregations do.

    Args:
        num_components: K.
        num_iters: EM iterations a call.
        in_channels: features of a row, wanted beside ``out_channels`` alone.
        out_channels: features of the result.
        **pooling: further arguments of :class:`EMPooling` beside ``out_channels``.

    Raises:
        ValueError: one of ``in_channels`` and ``out_channels`` is given without the other.
        TypeError: an argument is unknown.

    Example:
        >>> from torch_geometric.nn import SAGEConv
        >>> conv = SAGEConv(8, 16, aggr=EMAggregation(2))
        >>> conv(torch.randn(5, 8), torch.tensor([[0, 1, 2, 3], [4, 4, 4, 0]])).shape
        torch.Size([5, 16])
    """

    def __init__(
        self,
        num_components: int = 2,
        num_iters: int = 3,
        in_channels: int | None = None,
        out_channels: int | None = None,
        **pooling: Any,
    ) -> None:
        super().__init__()
        if (in_channels is None) != (out_channels is None):
            raise ValueError(
                f"in_channels={in_channels} and out_channels={out_channels} go together: give both or none"
            )
        own = {"num_features": "in_channels", "out_features": "out_channels"}
        known = [own.get(name, name) for name in inspect.signature(EMPooling).parameters]
        for name in pooling:
            if name not in known:
                raise TypeError(f"EMAggregation takes no {name!r}; give {', '.join(known[:-1])} or {known[-1]}")
        if pooling and out_channels is None:
            raise ValueError(f"{', '.join(pooling)} go with out_channels, which is not given")
        self.num_components = num_components
        self.num_iters = num_iters
        self.pooling = None
        if in_channels is not None:
            self._build = functools.partial(
                EMPooling, num_components, in_channels, num_iters=num_iters, out_features=out_channels, **pooling
            )
            self.pooling = self._build()
        else:
            self.by_weight = nn.Parameter(torch.ones(1))
            self.by_scale = nn.Parameter(torch.zeros(1))
        self._operators: dict[int, EMOperator] = {}

    def reset_parameters(self) -> None:
        """Draw what is learned afresh."""
        if self.pooling is None:
            nn.init.ones_(self.by_weight)
            nn.init.zeros_(self.by_scale)
            return
        # Built anew, since much of it starts at other values than its layers do by themselves.
        with torch.no_grad():
            for parameter, fresh in zip(self.pooling.parameters(), self._build().parameters(), strict=True):
                parameter.copy_(fresh)

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
    ) -> Tensor:
        """Return one row for each group.

        Args:
            x: rows along ``dim``.
            index: the group of each row, in any order.
            ptr: where groups begin and end, instead of ``index``.
            dim_size: number of groups.
            dim: the axis of the rows.
        """
        rows = x.movedim(dim, 0)
        flat = rows.flatten(1)
        if index is None:
            index = torch.zeros(len(flat), dtype=torch.long, device=x.device)
            if ptr is not None:
                index = torch.arange(len(ptr) - 1, device=x.device).repeat_interleave(ptr.diff())
        groups = int(index.max()) + 1 if dim_size is None and len(index) else (dim_size or 0)
        # PyG's layout scrambles groups that do not come in order, in silence.
        order = torch.argsort(index, stable=True)
        if rows.ndim == 2:
            summary = self._summaries(flat[order], index[order], groups)
            return summary.movedim(0, dim) if x.ndim == 2 and dim in (-2, 0) else summary
        # Further axes are sets of their own, as heads are in attention.
        others = rows.reshape(len(rows), -1, rows.shape[-1]).unbind(1)
        summary = torch.stack([self._summaries(other[order], index[order], groups) for other in others], 1)
        return summary.reshape(groups, *rows.shape[1:-1], -1).movedim(0, dim)

    def _summaries(self, rows: Tensor, index: Tensor, groups: int) -> Tensor:
        width = rows.shape[-1] if self.pooling is None else self.pooling.out_features
        if groups == 0 or len(rows) == 0:
            return rows.new_zeros(groups, width)
        sets, mask = to_dense_batch(rows, index, batch_size=groups)
        summary = self._shape_preserving(sets, mask) if self.pooling is None else self.pooling(sets, mask)
        return torch.where(mask.any(1, keepdim=True), summary, 0.0)

    def _shape_preserving(self, sets: Tensor, mask: Tensor) -> Tensor:
        features = sets.shape[-1]
        if features not in self._operators:
            self._operators[features] = EMOperator(
                self.num_components,
                features,
                num_iters=self.num_iters,
                covariance="spherical",
                residual=False,
                prior={"mean_strength": 0.0, "covariance_strength": 1.0},
            )
        with torch.autocast(sets.device.type, enabled=False):
            items = sets.to(torch.promote_types(sets.dtype, torch.float32))
            mixture = self._operators[features](items, mask)
            score = self.by_weight * mixture.log_weights - self.by_scale * 0.5 * mixture.covariances.log()
            return (score.softmax(-1).unsqueeze(1) @ mixture.means).squeeze(1).to(sets.dtype)

    def __repr__(self) -> str:
        """Show K, and what it maps to."""
        more = "" if self.pooling is None else f", out_channels={self.pooling.out_features}"
        return f"{type(self).__name__}({self.num_components}{more})"


def register_aggregation() -> None:
    """Make ``aggr="em"`` known to every convolution and resolver of PyG, in this process.

    Example:
        >>> from torch_geometric.nn import SAGEConv
        >>> register_aggregation()
        >>> SAGEConv(8, 16, aggr="em").aggr_module
        EMAggregation(2)
    """
    torch_geometric.nn.aggr.EMAggregation = EMAggregation
