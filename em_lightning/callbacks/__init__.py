"""Lightning callbacks that put EM into a model, schedule it, watch it and audit it."""

from em_lightning.callbacks.layerwise import LayerwiseEMLoss
from em_lightning.callbacks.surgical import InsertEMOperator, RestoreSurgery, SurgicalCallback, SwapActivations

__all__ = [
    "InsertEMOperator",
    "LayerwiseEMLoss",
    "RestoreSurgery",
    "SurgicalCallback",
    "SwapActivations",
]
