"""Studies: generated data, modules, reports, tables of rows and seeds, and comparison with published numbers."""

from em_lightning.studies.amortized_clustering import AmortizedClustering
from em_lightning.studies.clustering_report import ClusteringReport
from em_lightning.studies.energy_layers import DecoderFreeEncoder, EMClassifier, EnergyLayer, SparseAutoencoder
from em_lightning.studies.gaussian_blobs import GaussianBlobs
from em_lightning.studies.grid import run_seeds, run_table
from em_lightning.studies.image_points import ImagePointSets, PointSetBatch, bright_pixels
from em_lightning.studies.layer_report import LayerReport, linear_probe
from em_lightning.studies.mixture_report import MixtureReport
from em_lightning.studies.mixture_sets import MixtureSetBatch, MixtureSets
from em_lightning.studies.mnist1d import MNIST1D
from em_lightning.studies.point_cloud_classifier import PointCloudClassifier
from em_lightning.studies.report import Findings, Report
from em_lightning.studies.results import combine, compare, markdown_table, paired, spread, write_results
from em_lightning.studies.selection_report import SelectionReport
from em_lightning.studies.surfaces import FAMILIES, ProceduralSurfaces, random_surface

__all__ = [
    "GaussianBlobs",
    "ImagePointSets",
    "PointSetBatch",
    "bright_pixels",
    "AmortizedClustering",
    "MNIST1D",
    "FAMILIES",
    "MixtureSetBatch",
    "MixtureSets",
    "PointCloudClassifier",
    "ProceduralSurfaces",
    "random_surface",
    "ClusteringReport",
    "DecoderFreeEncoder",
    "EMClassifier",
    "EnergyLayer",
    "Findings",
    "LayerReport",
    "MixtureReport",
    "Report",
    "SelectionReport",
    "SparseAutoencoder",
    "combine",
    "compare",
    "linear_probe",
    "markdown_table",
    "paired",
    "run_seeds",
    "run_table",
    "spread",
    "write_results",
]
