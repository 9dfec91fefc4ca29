"""Backends: sums over points, M-steps and Cholesky factors in blocks of torch operations, in C++ or in Triton."""

from em_lightning.mixture.backends.native import use_backend
from em_lightning.mixture.backends.reference import map_blocks, sum_blocks

__all__ = ["map_blocks", "sum_blocks", "use_backend"]
