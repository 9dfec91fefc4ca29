"""Free energy and volume control.

Letters: N items (every axis but that of the units), D units. The energies of a layer are its post-activation outputs:
low energy wins. Batch statistics are those of the global batch under any distributed strategy that averages gradients
over its ranks, and the gradients are those of a single process; every rank must make the call. All terms are computed
in float32 or better and returned so, under autocast too.
"""

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
    weight_redundancy,
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
    "weight_redundancy",
]
