"""Differentiable sums over the ranks of a process group and moments of the global batch."""

from em_lightning.distributed.moments import Moments, batch_mean, batch_moments
from em_lightning.distributed.sums import accumulation_dtype, flatten_units, global_sum, is_distributed

__all__ = [
    "Moments",
    "accumulation_dtype",
    "batch_mean",
    "batch_moments",
    "flatten_units",
    "global_sum",
    "is_distributed",
]
