"""Backends: sums over points in blocks of torch operations, C++ or Triton; M-steps and Cholesky factors in C++."""

from em_lightning.mixture.backends.native import use_backend
from em_lightning.mixture.backends.reference import map_blocks, sum_blocks

__all__ = ["map_blocks", "sum_blocks", "use_backend"]
