"""Kernels: energies between items and centers, and their normalizers."""

from em_lightning.kernels.additive import (
    ExponentialKernel,
    HuberKernel,
    LaplaceKernel,
    LogisticKernel,
    PseudoHuberKernel,
)
from em_lightning.kernels.base import KERNELS, EllipticalKernel, Kernel, NoDensityError, density_kernel
from em_lightning.kernels.distance import pairwise, squared_distance, unit_vectors
from em_lightning.kernels.radial import GaussianKernel, MahalanobisKernel, StudentTKernel
from em_lightning.kernels.similarity import CosineKernel, DotProductKernel, LearnedEnergyKernel

__all__ = [
    "KERNELS",
    "CosineKernel",
    "DotProductKernel",
    "EllipticalKernel",
    "ExponentialKernel",
    "GaussianKernel",
    "HuberKernel",
    "Kernel",
    "LaplaceKernel",
    "LearnedEnergyKernel",
    "LogisticKernel",
    "MahalanobisKernel",
    "NoDensityError",
    "PseudoHuberKernel",
    "StudentTKernel",
    "density_kernel",
    "pairwise",
    "squared_distance",
    "unit_vectors",
]
