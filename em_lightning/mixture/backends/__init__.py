"""Backends of the E-step: the same sums over points, computed in different ways."""

from em_lightning.mixture.backends.native import use_backend
from em_lightning.mixture.backends.reference import map_blocks, sum_blocks

__all__ = ["map_blocks", "sum_blocks", "use_backend"]
