"""Gaussian mixtures over batches of point sets, and the EM step that fits them."""

from em_lightning.mixture.background import UniformBackground
from em_lightning.mixture.covariance import COVARIANCES
from em_lightning.mixture.directional import DirectionalMixture
from em_lightning.mixture.generalized import KernelMixture
from em_lightning.mixture.lowrank import LowRankCovariance
from em_lightning.mixture.prior import MixturePrior
from em_lightning.mixture.state import Mixture
from em_lightning.mixture.step import em_step
from em_lightning.mixture.stream import Statistics, collect, maximize, no_statistics

__all__ = [
    "COVARIANCES",
    "DirectionalMixture",
    "KernelMixture",
    "LowRankCovariance",
    "Mixture",
    "MixturePrior",
    "Statistics",
    "UniformBackground",
    "collect",
    "em_step",
    "maximize",
    "no_statistics",
]
