"""Competition operators: from energies to a free energy F and its gradient, the responsibilities r = dF/dd."""

from em_lightning.competition.base import COMPETITIONS, Competition
from em_lightning.competition.posterior import Posterior
from em_lightning.competition.soft import Softmin, softmin

__all__ = ["COMPETITIONS", "Competition", "Posterior", "Softmin", "softmin"]
