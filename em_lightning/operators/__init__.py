"""EM operators: EMOperator, GeneralizedEM, DirectionalEM, and layers built on them."""

import importlib
from typing import TYPE_CHECKING, Any

from em_lightning.operators.abstraction import EMAbstraction
from em_lightning.operators.base import SetOperator
from em_lightning.operators.directional import DirectionalEM, DirectionalMixture
from em_lightning.operators.em import EMOperator
from em_lightning.operators.generalized import GeneralizedEM, KernelMixture
from em_lightning.operators.pooling import EMPooling
from em_lightning.operators.refinement import EMRefinement
from em_lightning.operators.residual import ResidualCorrection

if TYPE_CHECKING:
    from em_lightning.operators.aggregation import EMAggregation, register_aggregation

__all__ = [
    "DirectionalEM",
    "DirectionalMixture",
    "EMAbstraction",
    "EMAggregation",
    "EMOperator",
    "EMPooling",
    "EMRefinement",
    "GeneralizedEM",
    "KernelMixture",
    "ResidualCorrection",
    "SetOperator",
    "register_aggregation",
]


def __getattr__(name: str) -> Any:
    if name in ("EMAggregation", "register_aggregation"):  # they load PyG
        return getattr(importlib.import_module("em_lightning.operators.aggregation"), name)
    raise AttributeError(f"module 'em_lightning.operators' has no attribute {name!r}")
