"""EM pooling as a PyG aggregation."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch_geometric.nn.aggr
from torch import Tensor, nn
from torch_geometric.index import ptr2index
from torch_geometric.nn.aggr import Aggregation

from em_lightning.operators.pooling import EMPooling
from em_lightning.operators.ragged import fit_groups, map_groups


class EMAggregation(Aggregation):
    r"""Aggregate each group of rows by the mixture that EM fits to it; an ``Aggregation`` of PyG.

    Without ``out_channels`` the number of features is kept, as ``aggr="em"`` in a convolution requires:

    .. math:: y = \sum_k s_k \mu_k, \qquad s = \operatorname{softmax}_k(a \log \pi_k - b \log \sigma_k)

    The mixture is spherical, with weights :math:`\pi_k`, means :math:`\mu_k` and standard deviations :math:`\sigma_k`
    (MAP-EM, ``covariance_strength=1``). a and b are learned; at first, :math:`a = 1, b = 0` give the group's mean.
    A large a selects the heaviest cluster, a large b the tightest; outliers have little influence on either. With
    ``out_channels``, the aggregation is an :class:`EMPooling` with a linear layer, for the readout of a graph.
    Groups may come in any order; empty groups give zeros. The cost is linear in the number of rows.

    Args:
        num_components: K.
        num_iters: EM iterations per call.
        in_channels: features per row; required with ``out_channels``.
        out_channels: features of the result.
        **options: with ``out_channels``, further arguments of :class:`EMPooling`.

    Raises:
        ValueError: a number is out of range, or one of ``in_channels`` and ``out_channels`` is missing.
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
        **options: Any,
    ) -> None:
        super().__init__()
        if (in_channels is None) != (out_channels is None):
            raise ValueError(f"in_channels={in_channels} and out_channels={out_channels} must be given together")
        if options and out_channels is None:
            raise ValueError(f"{', '.join(options)} requires out_channels")
        if num_components < 1 or num_iters < 0:
            raise ValueError(f"num_components={num_components} must be at least 1 and num_iters={num_iters} at least 0")
        self.num_components = num_components
        self.num_iters = num_iters
        self.pooling = None
        if in_channels is not None:
            self._build = functools.partial(
                EMPooling, num_components, in_channels, num_iters=num_iters, out_features=out_channels, **options
            )
            self.pooling = self._build()
        else:
            self.by_weight = nn.Parameter(torch.ones(1))  # a
            self.by_scale = nn.Parameter(torch.zeros(1))  # b

    def reset_parameters(self) -> None:
        """Draw new initial values of the parameters."""
        if self.pooling is not None:
            self.pooling.load_state_dict(self._build().state_dict())
        else:
            nn.init.ones_(self.by_weight)
            nn.init.zeros_(self.by_scale)

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
        max_num_elements: int | None = None,
    ) -> Tensor:
        """Return one row per group, from its first ``max_num_elements``; other axes are heads, fitted separately."""
        if not x.is_floating_point():
            raise TypeError(f"x of dtype {x.dtype} must be floating-point")
        index = ptr2index(ptr) if index is None else index
        if index.dtype != torch.int64:
            raise TypeError(f"index of dtype {index.dtype} must be int64")
        rows = x.movedim(dim, 0)
        shape, num_groups = tuple(rows.shape[1:]), dim_size or 0  # Aggregation.__call__ sets dim_size
        if index.shape != rows.shape[:1]:
            raise ValueError(f"index {tuple(index.shape)} must have one entry for each of the {len(rows)} rows of x")
        features, heads = (shape[-1] if shape else 1), math.prod(shape[:-1])
        rows = rows.reshape(len(rows) * heads, features)
        index = (index.unsqueeze(1) * heads + torch.arange(heads, device=index.device)).flatten()
        limit = len(rows) if max_num_elements is None else max_num_elements
        if self.pooling is not None:
            module, shape = self.pooling, (*shape[:-1], self.pooling.out_features)
            (summaries,) = map_groups(lambda x, mask: (module(x, mask),), rows, index, num_groups * heads, limit)
        else:
            fitted = fit_groups(rows, index, num_groups * heads, limit, self.num_components, self.num_iters)
            log_weights, means, log_scales = fitted
            shares = (self.by_weight * log_weights - self.by_scale * log_scales).softmax(-1)
            summaries = (shares.unsqueeze(-1) * means).sum(1)
        return summaries.to(x.dtype).reshape(num_groups, *shape).movedim(0, dim)


def register_aggregation() -> None:
    """Register ``aggr="em"`` for all convolutions and resolvers of PyG in this process.

    Example:
        >>> from torch_geometric.nn import SAGEConv
        >>> register_aggregation()
        >>> SAGEConv(8, 16, aggr="em").aggr_module
        EMAggregation()
    """
    torch_geometric.nn.aggr.EMAggregation = EMAggregation  # the resolver of PyG reads this namespace
