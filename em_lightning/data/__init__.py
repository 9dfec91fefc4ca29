"""LightningDataModules: point clouds with their readers and samplers, sets of mixtures, and large tables."""

from em_lightning.data.base import PointCloudDataModule
from em_lightning.data.clouds import Cloud, CloudDataset, EpochSampler, PointCloudBatch, Shape, collate_clouds, from_pyg
from em_lightning.data.folder import PointCloudFolder
from em_lightning.data.mixture_sets import MixtureSetBatch, MixtureSets
from em_lightning.data.point_clouds import GeometricShapes, ModelNet, ProceduralSurfaces
from em_lightning.data.readers import parse_points, read_points
from em_lightning.data.sampling import Normalization, Surface, random_rotation, sample_surface
from em_lightning.data.surfaces import FAMILIES, random_surface
from em_lightning.data.tables import Table, TableBatch, TableBlocks
from em_lightning.data.tabular import GaussianBlobs, TabularDataModule

__all__ = [
    "FAMILIES",
    "Cloud",
    "CloudDataset",
    "EpochSampler",
    "GaussianBlobs",
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
    "Table",
    "TableBatch",
    "TableBlocks",
    "TabularDataModule",
    "collate_clouds",
    "from_pyg",
    "parse_points",
    "random_rotation",
    "random_surface",
    "read_points",
    "sample_surface",
]
