"""LightningModules to subclass."""

from em_lightning.modules.base import EMModule
from em_lightning.modules.gaussian_mixture import GaussianMixtureModule
from em_lightning.modules.point_cloud_gmm import PointCloudGMM

__all__ = ["EMModule", "GaussianMixtureModule", "PointCloudGMM"]
