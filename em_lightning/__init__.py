"""Expectation-maximization inside neural networks, for PyTorch Lightning.

Names are imported on first use: ``import em_lightning`` loads neither Lightning, PyG nor scikit-learn.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from em_lightning._version import __version__

if TYPE_CHECKING:
    from em_lightning.activations import ACTIVATIONS
    from em_lightning.competition import COMPETITIONS, Posterior, softmin
    from em_lightning.estimator import GaussianMixture
    from em_lightning.kernels import KERNELS, Kernel
    from em_lightning.losses import LOSSES, EMLoss
    from em_lightning.mixture import Mixture
    from em_lightning.operators import EMOperator
    from em_lightning.scope import audit
    from em_lightning.statistics import STATISTICS

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

__all__ = [
    "ACTIVATIONS",
    "COMPETITIONS",
    "KERNELS",
    "LOSSES",
    "STATISTICS",
    "EMLoss",
    "EMOperator",
    "GaussianMixture",
    "Kernel",
    "Mixture",
    "Posterior",
    "__version__",
    "audit",
    "softmin",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'em_lightning' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"em_lightning.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
