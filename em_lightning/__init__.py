"""Expectation-maximization inside neural networks, for PyTorch Lightning.

Names are imported on first use: ``import em_lightning`` loads neither Lightning, PyG nor scikit-learn.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from em_lightning._version import __version__

if TYPE_CHECKING:
    from em_lightning.activations import ACTIVATIONS as ACTIVATIONS
    from em_lightning.competition import COMPETITIONS as COMPETITIONS
    from em_lightning.competition import Posterior as Posterior
    from em_lightning.competition import softmin as softmin
    from em_lightning.estimator import GaussianMixture as GaussianMixture
    from em_lightning.kernels import KERNELS as KERNELS
    from em_lightning.kernels import Kernel as Kernel
    from em_lightning.losses import LOSSES as LOSSES
    from em_lightning.losses import EMLoss as EMLoss
    from em_lightning.mixture import Mixture as Mixture
    from em_lightning.operators import EMOperator as EMOperator
    from em_lightning.scope import audit as audit
    from em_lightning.statistics import STATISTICS as STATISTICS

_MODULE_OF = {
    "ACTIVATIONS": "activations",
    "COMPETITIONS": "competition",
    "KERNELS": "kernels",
    "LOSSES": "losses",
    "STATISTICS": "statistics",
    "EMLoss": "losses",
    "EMOperator": "operators",
    "GaussianMixture": "estimator",
    "Kernel": "kernels",
    "Mixture": "mixture",
    "Posterior": "competition",
    "audit": "scope",
    "softmin": "competition",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'em_lightning' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"em_lightning.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
