"""EM as a layer."""

from em_lightning.operators.directional import DirectionalEM
from em_lightning.operators.em import EMOperator
from em_lightning.operators.refinement import EMRefinement
from em_lightning.operators.residual import ResidualCorrection

__all__ = ["DirectionalEM", "EMOperator", "EMRefinement", "ResidualCorrection"]
