"""Activations: kernel, hypotheses, competition and statistic as drop-in modules that keep the shape."""

from em_lightning.activations.base import ACTIVATIONS, Activation
from em_lightning.activations.competitive import (
    DirectionActivation,
    GroupedActivation,
    LogSoftmaxActivation,
    NegLogSoftminActivation,
    ReLUGatedActivation,
    ResidualSoftmaxActivation,
    SoftmaxGatedActivation,
    SparseminActivation,
)
from em_lightning.activations.elementwise import GatedActivation, SignedActivation

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "DirectionActivation",
    "GatedActivation",
    "GroupedActivation",
    "LogSoftmaxActivation",
    "NegLogSoftminActivation",
    "ReLUGatedActivation",
    "ResidualSoftmaxActivation",
    "SignedActivation",
    "SoftmaxGatedActivation",
    "SparseminActivation",
]
