"""Sums over the ranks of a process group that are right forward and backward, and batch statistics made of them."""

from em_lightning.distributed.moments import Moments, batch_moments
from em_lightning.distributed.passes import free_energy_of
from em_lightning.distributed.sums import batch_mean, flatten_units, global_sum, is_spread, row_blocks, units_last

__all__ = [
    "Moments",
    "batch_mean",
    "batch_moments",
    "flatten_units",
    "free_energy_of",
    "global_sum",
    "is_spread",
    "row_blocks",
    "units_last",
]
