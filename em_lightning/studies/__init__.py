"""Studies: reports of runs, tables of rows times seeds, and published numbers to compare with."""

from em_lightning.studies.clustering_report import ClusteringReport
from em_lightning.studies.grid import run_table
from em_lightning.studies.layer_report import LayerReport
from em_lightning.studies.mixture_report import MixtureReport
from em_lightning.studies.replicas import ReplicaData, Replicas
from em_lightning.studies.report import Report
from em_lightning.studies.results import combine, compare, markdown_table, paired, spread, write_results
from em_lightning.studies.seeds import run_seeds
from em_lightning.studies.selection_report import SelectionReport

__all__ = [
    "ClusteringReport",
    "LayerReport",
    "MixtureReport",
    "ReplicaData",
    "Replicas",
    "Report",
    "SelectionReport",
    "combine",
    "compare",
    "markdown_table",
    "paired",
    "run_seeds",
    "run_table",
    "spread",
    "write_results",
]
