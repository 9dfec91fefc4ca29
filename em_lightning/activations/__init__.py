"""Activations, drop-in modules that keep the shape: each is a kernel, hypotheses, a competition and a statistic."""

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
