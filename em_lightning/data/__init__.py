"""LightningDataModules of point clouds, images, mixture samples and large tables; readers of point cloud files."""

from em_lightning.data.clouds import (
    Cloud,
    EpochSampler,
    PointCloudBatch,
    RandomDataset,
    Shape,
    collate_clouds,
    draw_cloud,
)
from em_lightning.data.image_points import ImagePointSets, PointSetBatch, PointSetBatches, bright_pixels
from em_lightning.data.images import MNIST, Digits, read_idx
from em_lightning.data.meshes import GeometricShapes, ModelNet
from em_lightning.data.mixture_sets import MixtureSetBatch, MixtureSets
from em_lightning.data.point_clouds import PointCloudDataModule, PointCloudFolder, ProceduralSurfaces
from em_lightning.data.readers import parse_points, read_points
from em_lightning.data.sampling import Normalization, Surface, random_rotation
from em_lightning.data.surfaces import FAMILIES, random_surface
from em_lightning.data.tables import Table, TableBatch, TableBlocks
from em_lightning.data.tabular import GaussianBlobs, TabularDataModule
from em_lightning.data.tensors import TensorBatches, TensorDataModule, Tensors

__all__ = [
    "FAMILIES",
    "MNIST",
    "Cloud",
    "Digits",
    "EpochSampler",
    "GaussianBlobs",
    "GeometricShapes",
    "ImagePointSets",
    "MixtureSetBatch",
    "MixtureSets",
    "ModelNet",
    "Normalization",
    "PointCloudBatch",
    "PointCloudDataModule",
    "PointCloudFolder",
    "PointSetBatch",
    "PointSetBatches",
    "ProceduralSurfaces",
    "RandomDataset",
    "Shape",
    "Surface",
    "Table",
    "TableBatch",
    "TableBlocks",
    "TabularDataModule",
    "TensorBatches",
    "TensorDataModule",
    "Tensors",
    "bright_pixels",
    "collate_clouds",
    "draw_cloud",
    "parse_points",
    "random_rotation",
    "random_surface",
    "read_idx",
    "read_points",
]
