"""EM pooling as a PyG aggregation."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch_geometric.nn.aggr
from torch import Tensor, nn
from torch_geometric.index import ptr2index
from torch_geometric.nn.aggr import Aggregation
from torch_geometric.utils import to_dense_batch

from em_lightning.operators.em import EMOperator
from em_lightning.operators.pooling import EMPooling


class EMAggregation(Aggregation):
    r"""Aggregate each group of rows by the mixture that EM fits to it; an ``Aggregation`` of PyG.

    Without ``out_channels`` the number of features is kept, as ``aggr="em"`` in a convolution requires:

    .. math:: y = \sum_k s_k \mu_k, \qquad s = \operatorname{softmax}_k(a \log \pi_k - b \log \sigma_k)

    with learned a and b, at first :math:`a = 1, b = 0`: the mean of the group. A large a selects the largest cluster of
    a neighbourhood and a large b the tightest one, both without outliers. With ``out_channels`` it is an
    :class:`EMPooling` with a linear layer on top, for the readout of a graph.

    Groups may come in any order; empty groups give zeros.

    Args:
        num_components: K.
        num_iters: EM iterations per call.
        in_channels: features per row; required with ``out_channels``.
        out_channels: features of the result.
        **pooling: with ``out_channels``, further arguments of :class:`EMPooling`.

    Raises:
        ValueError: ``out_channels`` is given without ``in_channels``, or other arguments without ``out_channels``.
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
            raise ValueError(f"in_channels={in_channels} and out_channels={out_channels} must be given together")
        if pooling and out_channels is None:
            raise ValueError(f"{', '.join(pooling)} must be given with out_channels")
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
        """Draw new initial values of the parameters."""
        if self.pooling is None:
            nn.init.ones_(self.by_weight)
            nn.init.zeros_(self.by_scale)
            return
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
        """Return one row per group; ``Aggregation.__call__`` completes the arguments.

        Args:
            x: rows along ``dim``.
            index: the group of each row, in any order.
            ptr: the boundaries of the groups, instead of ``index``.
            dim_size: number of groups.
            dim: the axis of the rows; axes between rows and features, such as attention heads, are separate sets.
        """
        rows = x.movedim(dim, 0)
        groups = dim_size or 0
        index = ptr2index(ptr) if index is None else index
        # to_dense_batch requires sorted groups.
        order = torch.argsort(index, stable=True)
        sets = rows[order].unsqueeze(1).flatten(1, -2).unbind(1)
        summary = torch.stack([self._summaries(part, index[order], groups) for part in sets], 1)
        return summary.reshape(groups, *rows.shape[1:-1], summary.shape[-1]).movedim(0, dim)

    def _summaries(self, rows: Tensor, index: Tensor, groups: int) -> Tensor:
        if groups == 0 or len(rows) == 0:
            return rows.new_zeros(groups, rows.shape[-1] if self.pooling is None else self.pooling.out_features)
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
        mixture = self._operators[features](sets, mask)
        with torch.autocast(sets.device.type, enabled=False):
            score = self.by_weight * mixture.log_weights - self.by_scale * 0.5 * mixture.covariances.log()
            return (score.softmax(-1).unsqueeze(1) @ mixture.means).squeeze(1).to(sets.dtype)

    def __repr__(self) -> str:
        """Return the class with K and the number of output features."""
        more = "" if self.pooling is None else f", out_channels={self.pooling.out_features}"
        return f"{type(self).__name__}({self.num_components}{more})"


def register_aggregation() -> None:
    """Register ``aggr="em"`` for all convolutions and resolvers of PyG in this process.

    Example:
        >>> from torch_geometric.nn import SAGEConv
        >>> register_aggregation()
        >>> SAGEConv(8, 16, aggr="em").aggr_module
        EMAggregation(2)
    """
    torch_geometric.nn.aggr.EMAggregation = EMAggregation
