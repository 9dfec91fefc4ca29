"""Energies between items and centers: the first step of every posterior."""

from em_lightning.kernels.additive import (
    ExponentialKernel,
    HuberKernel,
    LaplaceKernel,
    LogisticKernel,
    PseudoHuberKernel,
)
from em_lightning.kernels.base import KERNELS, Kernel, NoDensityError
from em_lightning.kernels.distance import pairwise, squared_distance
from em_lightning.kernels.elliptical import EllipticalKernel
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
    "pairwise",
    "squared_distance",
]
