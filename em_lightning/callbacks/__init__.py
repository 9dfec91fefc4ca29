"""Lightning callbacks: modify the layers of a model, add EM losses, anneal temperatures, monitor, audit, seed steps."""

from em_lightning.callbacks.layerwise import LayerwiseEMLoss
from em_lightning.callbacks.step_seeds import StepSeeds
from em_lightning.callbacks.surgical import InsertEMOperator, RestoreSurgery, SurgicalCallback, SwapActivations
from em_lightning.callbacks.temperature import TemperatureSchedule
from em_lightning.callbacks.watch import EMAudit, PosteriorMonitor, tensorboard_writers

__all__ = [
    "EMAudit",
    "InsertEMOperator",
    "LayerwiseEMLoss",
    "PosteriorMonitor",
    "RestoreSurgery",
    "StepSeeds",
    "SurgicalCallback",
    "SwapActivations",
    "TemperatureSchedule",
    "tensorboard_writers",
]
