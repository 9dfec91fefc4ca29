"""torchmetrics of mixtures and layers: exact over batches and ranks, with states in float64.

Letters: B sets, N items, D units (or features), K components. Constructors also take the keyword arguments of
:class:`torchmetrics.Metric`.
"""

from em_lightning.metrics.base import Float64Metric, MeanOfItems, UnitMoments
from em_lightning.metrics.layers import L0, DeadUnits, EffectiveRank, MinVariance, Redundancy, layer_metrics
from em_lightning.metrics.mixtures import MaxResponsibility, MixtureLogLikelihood, ResponsibilityEntropy

__all__ = [
    "L0",
    "DeadUnits",
    "EffectiveRank",
    "Float64Metric",
    "MaxResponsibility",
    "MeanOfItems",
    "MinVariance",
    "MixtureLogLikelihood",
    "Redundancy",
    "ResponsibilityEntropy",
    "UnitMoments",
    "layer_metrics",
]
