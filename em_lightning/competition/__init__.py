"""Competition operators: free energy F of the energies d and its gradient, the responsibilities r = dF/dd."""

from em_lightning.competition.base import COMPETITIONS, Competition, Tempered
from em_lightning.competition.posterior import Posterior
from em_lightning.competition.soft import (
    Background,
    Grouped,
    Softmin,
    TopK,
    background,
    grouped,
    none_of_the_above,
    softmin,
    topk,
)
from em_lightning.competition.sparse import Entmin, Hardmin, ScopeWarning, Sparsemin, entmin, hardmin, sparsemin
from em_lightning.competition.transport import Balanced, balanced

__all__ = [
    "COMPETITIONS",
    "Background",
    "Balanced",
    "Competition",
    "Entmin",
    "Grouped",
    "Hardmin",
    "Posterior",
    "ScopeWarning",
    "Softmin",
    "Sparsemin",
    "Tempered",
    "TopK",
    "background",
    "balanced",
    "entmin",
    "grouped",
    "hardmin",
    "none_of_the_above",
    "softmin",
    "sparsemin",
    "topk",
]
