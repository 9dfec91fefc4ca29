"""Base classes of the metrics: states in float64, means over items, moments of units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from em_lightning.distributed import flatten_units


class Float64Metric(Metric):
    """A metric whose states stay in float64 when its module is cast to another dtype (in float32 on MPS)."""

    is_differentiable = False
    full_state_update = False
    _accumulate: Callable[..., None]  # adds the states of another metric

    def _apply(self, fn: Callable, exclude_state: Any = "") -> Any:
        # torchmetrics overrides _apply too: there is no public hook, and `.to("mps")` of a float64 state raises.
        device = fn(torch.empty(0, device=self.device)).device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return super()._apply(lambda state: state.to(device, dtype), exclude_state)

    def merge_state(self, incoming_state: Any) -> None:
        """Add the items of another metric of this class, or of its ``metric_state``; TypeError for anything else."""
        if not isinstance(incoming_state, (dict, type(self))):
            kind = type(incoming_state).__name__
            raise TypeError(f"incoming_state must be a {type(self).__name__} or its metric_state, got {kind}")
        state = incoming_state if isinstance(incoming_state, dict) else incoming_state.metric_state
        self._accumulate(**state)
        self._computed = None  # torchmetrics would return the cached result
        self._update_count = max(self._update_count, 1)  # or compute() would warn


class MeanOfItems(Float64Metric):
    """Weighted mean over all items; a subclass calls ``_add`` in ``update``."""

    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Weighted sum, sum of weights, and a NaN, which keeps MetricCollection from merging metrics of equal states.
        self.add_state("sums", torch.tensor([0.0, 0.0, torch.nan], dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, values: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> None:
        items, weights = flatten_units(values[..., None], mask=mask, weights=weights)
        items = items[:, 0].to(self.sums.dtype)
        weights = torch.ones_like(items) if weights is None else weights.to(items.dtype)
        self._accumulate(torch.stack([weights @ items, weights.sum(), torch.zeros_like(weights.sum())]))

    def _accumulate(self, sums: Tensor) -> None:
        self.sums = self.sums + sums

    def compute(self) -> Tensor:
        return self.sums[0] / self.sums[1]


class UnitMoments(Float64Metric):
    """Moments of the units over all n items; a subclass defines a ``_statistic`` of their covariance.

    The moments (D + 1, D + 1) are [[n, mean^T], [mean, sum of (x - mean)(x - mean)^T]]. The value is NaN for n < 2.
    """

    moments: Tensor
    # The size of the state is unknown before the first update, so torchmetrics cannot add an empty state to a full one.
    full_state_update = True

    def __init__(self, dim: int = -1, **kwargs: Any) -> None:
        super().__init__(**{"dist_sync_fn": _gather_padded, **kwargs})
        self.dim = dim
        self.add_state("moments", torch.zeros(1, 1, dtype=torch.float64), dist_reduce_fx=_merge)

    def update(self, activations: Tensor, mask: Tensor | None = None) -> None:
        """Add items: activations with D units along ``dim``, and a mask of the shape of the other axes.

        Raises:
            ValueError: the number of units differs from that of earlier updates.
        """
        items, weights = flatten_units(activations, self.dim, mask)
        items = items.to(self.moments.dtype)
        num_units = items.shape[1]
        weights = items.new_ones(len(items)) if weights is None else weights.to(items.dtype)  # 1, or 0 where masked
        moments = items.new_zeros(num_units + 1, num_units + 1)
        moments[0, 0] = weights.sum()
        moments[0, 1:] = moments[1:, 0] = weights @ items / weights.sum().clamp_min(1.0)
        centred = (items - moments[0, 1:]) * weights[:, None]
        moments[1:, 1:] = centred.T @ centred
        self._accumulate(moments)

    def _accumulate(self, moments: Tensor) -> None:
        num_units, earlier = len(moments) - 1, len(self.moments) - 1
        if not num_units:  # of a metric without items
            return
        if earlier and num_units != earlier:
            raise ValueError(f"activations have {num_units} units, earlier ones had {earlier}: reset() the metric")
        moments = moments.to(self.moments)
        self.moments = _merge(torch.stack([self.moments, moments])) if earlier else moments

    def compute(self) -> Tensor:
        count = self.moments[0, 0]
        if count <= 1 or self.moments.isnan().any():
            return torch.full_like(count, torch.nan)
        return self._statistic(self.moments[1:, 1:] / (count - 1))

    def _statistic(self, covariance: Tensor) -> Tensor:
        """Return the value of the metric for the unbiased covariance (D, D) of the units."""
        raise NotImplementedError


def _merge(stack: Tensor) -> Tensor:
    """Merge moments (R, D + 1, D + 1) of R disjoint samples by the updates of Chan, Golub and LeVeque (1983)."""
    counts, means = stack[:, 0, 0], stack[:, 0, 1:]
    mean = counts @ means / counts.sum().clamp_min(torch.finfo(stack.dtype).tiny)
    centred = (means - mean) * counts[:, None].sqrt()
    merged = stack.sum(0)
    merged[0, 1:] = merged[1:, 0] = mean
    merged[1:, 1:] += centred.T @ centred
    return merged


def _gather_padded(moments: Tensor, group: Any = None) -> list[Tensor]:
    """Gather moments, padded with zeros to the size of the largest; only those of ranks without items are smaller."""
    gathered = gather_all_tensors(moments, group)
    size = max(map(len, gathered))
    return [torch.nn.functional.pad(each, (0, size - len(each)) * 2) for each in gathered]
