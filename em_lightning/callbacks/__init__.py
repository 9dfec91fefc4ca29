"""Lightning callbacks: EM put into a model, scheduled, watched and audited; reports of runs."""

from em_lightning.callbacks.clustering_report import ClusteringReport
from em_lightning.callbacks.layer_report import LayerReport
from em_lightning.callbacks.layerwise import LayerwiseEMLoss
from em_lightning.callbacks.mixture_report import MixtureReport
from em_lightning.callbacks.selection_report import SelectionReport
from em_lightning.callbacks.step_seeds import StepSeeds
from em_lightning.callbacks.surgical import InsertEMOperator, RestoreSurgery, SurgicalCallback, SwapActivations
from em_lightning.callbacks.temperature import TemperatureSchedule
from em_lightning.callbacks.time_left import TimeLeft
from em_lightning.callbacks.watch import EMAudit, PosteriorMonitor, responsibilities_figure

__all__ = [
    "ClusteringReport",
    "EMAudit",
    "InsertEMOperator",
    "LayerReport",
    "LayerwiseEMLoss",
    "MixtureReport",
    "PosteriorMonitor",
    "RestoreSurgery",
    "SelectionReport",
    "StepSeeds",
    "SurgicalCallback",
    "SwapActivations",
    "TemperatureSchedule",
    "TimeLeft",
    "responsibilities_figure",
]
