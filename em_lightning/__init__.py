"""Expectation-maximization inside neural networks, for PyTorch Lightning.

Names are imported on first use: ``import em_lightning`` loads neither Lightning, PyG nor scikit-learn.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from em_lightning._version import __version__
from em_lightning.extras import ExtraChecker

sys.meta_path.insert(0, ExtraChecker)

# The same names stand in __init__.pyi for type checkers and editors.
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
