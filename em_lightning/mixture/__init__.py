"""Gaussian mixtures over batches of point sets, and the EM step that fits them."""

from em_lightning.mixture.background import UniformBackground
from em_lightning.mixture.covariance import COVARIANCES, Covariance, LowRankCovariance
from em_lightning.mixture.e_step import SufficientStatistics, e_step
from em_lightning.mixture.em import BlockFit, StreamedEM, em_step, fit_blocks
from em_lightning.mixture.initialization import farthest_points, kmeans_plus_plus, random_points
from em_lightning.mixture.m_step import m_step
from em_lightning.mixture.mixture import Mixture, information_criteria
from em_lightning.mixture.points import Parameters, Points, prepare
from em_lightning.mixture.prior import MixturePrior

__all__ = [
    "COVARIANCES",
    "BlockFit",
    "Covariance",
    "LowRankCovariance",
    "Mixture",
    "MixturePrior",
    "Parameters",
    "Points",
    "StreamedEM",
    "SufficientStatistics",
    "UniformBackground",
    "e_step",
    "em_step",
    "farthest_points",
    "fit_blocks",
    "information_criteria",
    "kmeans_plus_plus",
    "m_step",
    "prepare",
    "random_points",
]
