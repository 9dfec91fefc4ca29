"""Point clouds for training: LightningDataModules, file readers, surfaces and how they are sampled."""

from em_lightning.data.base import PointCloudDataModule
from em_lightning.data.clouds import Cloud, CloudDataset, EpochSampler, PointCloudBatch, Shape, collate_clouds, from_pyg
from em_lightning.data.folder import PointCloudFolder
from em_lightning.data.mixture_sets import MixtureSetBatch, MixtureSets
from em_lightning.data.point_clouds import GeometricShapes, ModelNet, ProceduralSurfaces
from em_lightning.data.readers import parse_points, read_points
from em_lightning.data.sampling import Normalization, Surface, random_rotation, sample_surface
from em_lightning.data.surfaces import FAMILIES, random_surface

__all__ = [
    "FAMILIES",
    "Cloud",
    "CloudDataset",
    "EpochSampler",
    "GeometricShapes",
    "MixtureSetBatch",
    "MixtureSets",
    "ModelNet",
    "Normalization",
    "PointCloudBatch",
    "PointCloudDataModule",
    "PointCloudFolder",
    "ProceduralSurfaces",
    "Shape",
    "Surface",
    "collate_clouds",
    "from_pyg",
    "parse_points",
    "random_rotation",
    "random_surface",
    "read_points",
    "sample_surface",
]
