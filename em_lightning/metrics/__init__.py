"""Metrics of mixtures and of layers, as torchmetrics: exact over any split into batches and ranks.

Letters: B sets, N items, D units (or features), K components. Every state is kept in float64, except on devices
that have none.
"""

from em_lightning.metrics.base import MeanOfItems, UnitMoments
from em_lightning.metrics.layers import (
    L0,
    DeadUnits,
    EffectiveRank,
    MinVariance,
    Redundancy,
    WeightRedundancy,
    layer_metrics,
)
from em_lightning.metrics.mixtures import (
    DeadComponents,
    EffectiveComponents,
    MaxResponsibility,
    MixtureLogLikelihood,
    ResponsibilityEntropy,
)
from em_lightning.metrics.probe import linear_probe

__all__ = [
    "L0",
    "DeadComponents",
    "DeadUnits",
    "EffectiveComponents",
    "EffectiveRank",
    "MaxResponsibility",
    "MeanOfItems",
    "MinVariance",
    "MixtureLogLikelihood",
    "Redundancy",
    "ResponsibilityEntropy",
    "UnitMoments",
    "WeightRedundancy",
    "layer_metrics",
    "linear_probe",
]
