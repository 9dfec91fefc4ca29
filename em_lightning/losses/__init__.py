"""Losses: the free energy of a layer, volume control, and their weighted sum ``EMLoss``."""

from em_lightning.losses.composition import EMLoss
from em_lightning.losses.terms import (
    LOSSES,
    BalanceLoss,
    BoundedVarianceLoss,
    DecorrelationLoss,
    EnergyLoss,
    FreeEnergyLoss,
    LogDetLoss,
    MomentLoss,
    VarianceLoss,
    WeightRedundancyLoss,
)

__all__ = [
    "LOSSES",
    "BalanceLoss",
    "BoundedVarianceLoss",
    "DecorrelationLoss",
    "EMLoss",
    "EnergyLoss",
    "FreeEnergyLoss",
    "LogDetLoss",
    "MomentLoss",
    "VarianceLoss",
    "WeightRedundancyLoss",
]
