"""What the metrics share: wide states, means over items, moments of units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from em_lightning.distributed import flatten_units

__all__ = ["MeanOfItems", "UnitMoments", "WideMetric"]


class WideMetric(Metric):
    """A metric whose states stay in float64 whatever its module is cast to (in float32 on MPS, which has no other)."""

    is_differentiable = False
    full_state_update = False

    def _apply(self, fn: Callable, exclude_state: Any = "") -> Any:
        device = fn(torch.empty(0, device=self.device)).device
        wide = torch.float32 if device.type == "mps" else torch.float64
        return super()._apply(lambda state: state.to(device, wide), exclude_state)


class MeanOfItems(WideMetric):
    """The weighted mean of all values that were given."""

    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Total, count, and a NaN: a MetricCollection takes metrics whose states agree after the first batch for one
        # metric from then on, and two means may agree by chance.
        self.add_state("sums", torch.tensor([0.0, 0.0, torch.nan], dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, values: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> None:
        flat, counts = flatten_units(values[..., None], -1, mask, weights)
        items = flat[:, 0].to(self.sums.dtype)
        counts = torch.ones_like(items) if counts is None else counts.to(items.dtype)
        self.sums = self.sums + torch.stack([counts @ items, counts.sum(), torch.zeros_like(counts.sum())])

    def compute(self) -> Tensor:
        """Return the mean, NaN where nothing was counted."""
        return self.sums[0] / self.sums[1]


def _merge_moments(stack: Tensor) -> Tensor:
    """Merge moments (R, D + 1, D + 1) of R disjoint samples, by the pairwise update of Chan, Golub and LeVeque (1983).

    Each is [[n, mean], [mean, sum of (x - mean)(x - mean)^T]].
    """
    counts, means = stack[:, 0, 0], stack[:, 0, 1:]
    total = counts.sum()
    mean = counts @ means / total.clamp_min(torch.finfo(stack.dtype).tiny)
    centred = (means - mean) * counts[:, None].sqrt()
    merged = stack.sum(0)
    merged[0, 1:] = merged[1:, 0] = mean
    merged[1:, 1:] += centred.T @ centred
    return merged


def _pad_to_largest(moments: list[Tensor]) -> list[Tensor]:
    size = max(each.shape[0] for each in moments)
    return [torch.nn.functional.pad(each, (0, size - each.shape[0]) * 2) for each in moments]


class UnitMoments(WideMetric):
    """Count, mean and co-moment of the units over everything that was given; subclasses read numbers from them.

    Args:
        dim: the axis of the units.
        **kwargs: for :class:`torchmetrics.Metric`.
    """

    moments: Tensor
    # The number of units is known at the first update, so an empty state cannot be merged with a full one.
    full_state_update = True

    def __init__(self, dim: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim = dim
        self.add_state("moments", torch.zeros(1, 1, dtype=torch.float64), dist_reduce_fx=_merge_moments)

    def update(self, activations: Tensor, mask: Tensor | None = None) -> None:
        """Add items: activations with D units along ``dim``, and booleans of the other axes.

        Raises:
            ValueError: the number of units is not that of the earlier updates.
        """
        items, counts = flatten_units(activations, self.dim, mask)
        items = items.to(self.moments.dtype)
        units, known = items.shape[1], self.moments.shape[0] - 1
        if known not in (0, units):
            raise ValueError(f"activations have {units} units but earlier ones had {known}; reset() the metric between")
        counts = items.new_ones(items.shape[0]) if counts is None else counts.to(items.dtype)
        batch = items.new_zeros(units + 1, units + 1)
        batch[0, 0] = counts.sum()
        batch[0, 1:] = counts @ items / batch[0, 0].clamp_min(1.0)
        centred = (items - batch[0, 1:]) * counts[:, None]
        batch[1:, 1:] = centred.T @ centred
        batch[1:, 0] = batch[0, 1:]
        self.moments = _merge_moments(torch.stack(_pad_to_largest([self.moments, batch])))

    def _sync_dist(self, dist_sync_fn: Callable = gather_all_tensors, process_group: Any = None) -> None:
        # A rank that saw no batch knows no number of units; zeros of the right size are its moments.
        super()._sync_dist(lambda state, group: _pad_to_largest(dist_sync_fn(state, group)), process_group)

    def covariance(self) -> Tensor:
        """Return the unbiased covariance (D, D) of the units, NaN where fewer than two items were counted."""
        count = self.moments[0, 0]
        return self.moments[1:, 1:] / torch.where(count > 1, count - 1, torch.nan)
