"""LightningDataModules of point clouds, images and large tables; readers of point cloud files."""

from em_lightning.data.base import EpochSampler, RandomDataset, ResumableLoader
from em_lightning.data.folders import PointCloudFolder
from em_lightning.data.images import MNIST, Digits, TensorBatches, TensorDataModule, Tensors, read_idx
from em_lightning.data.point_clouds import (
    PointCloudBatch,
    PointCloudDataModule,
    Shape,
    collate_clouds,
    draw_cloud,
    random_rotation,
    unit_ball,
)
from em_lightning.data.readers import parse_points, read_points
from em_lightning.data.tables import GaussianBlobs, Table, TableBatch, TableBlocks, TabularDataModule

__all__ = [
    "MNIST",
    "Digits",
    "EpochSampler",
    "GaussianBlobs",
    "PointCloudBatch",
    "PointCloudDataModule",
    "PointCloudFolder",
    "RandomDataset",
    "ResumableLoader",
    "Shape",
    "Table",
    "TableBatch",
    "TableBlocks",
    "TabularDataModule",
    "TensorBatches",
    "TensorDataModule",
    "Tensors",
    "collate_clouds",
    "draw_cloud",
    "parse_points",
    "random_rotation",
    "read_idx",
    "read_points",
    "unit_ball",
]
