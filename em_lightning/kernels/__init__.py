"""Energies between items and centers: the first step of every posterior."""

from em_lightning.kernels.base import KERNELS, Kernel, NoDensityError
from em_lightning.kernels.radial import GaussianKernel, MahalanobisKernel, StudentTKernel

__all__ = [
    "KERNELS",
    "GaussianKernel",
    "Kernel",
    "MahalanobisKernel",
    "NoDensityError",
    "StudentTKernel",
]
