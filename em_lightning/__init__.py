"""Expectation-maximization inside neural networks, for PyTorch Lightning.

Names are imported on first use: ``import em_lightning`` loads neither Lightning, PyG nor scikit-learn.
"""

import importlib
import sys
from typing import Any

from em_lightning._version import __version__
from em_lightning.extras import ExtraChecker

sys.meta_path.insert(0, ExtraChecker)  # imports that need a missing extra raise an error that names it

# The same names stand in __init__.pyi for type checkers and editors.
_NAMES_OF_MODULE = {
    "activations": ["ACTIVATIONS"],
    "competition": ["COMPETITIONS", "Posterior", "softmin"],
    "estimator": ["GaussianMixture"],
    "kernels": ["KERNELS", "Kernel"],
    "losses": ["LOSSES", "EMLoss"],
    "mixture": ["Mixture"],
    "operators": ["EMOperator"],
    "scope": ["audit"],
    "statistics": ["STATISTICS"],
}
_MODULE_OF = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'em_lightning' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"em_lightning.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
