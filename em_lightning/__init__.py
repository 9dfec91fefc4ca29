"""Expectation-maximization inside neural networks, for PyTorch Lightning.

The names below are resolved when they are first used: importing the package loads neither Lightning nor PyG.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from em_lightning._version import __version__

if TYPE_CHECKING:
    from em_lightning.activations import ACTIVATIONS
    from em_lightning.competition import COMPETITIONS, Posterior, softmin
    from em_lightning.kernels import KERNELS, Kernel
    from em_lightning.losses import LOSSES, EMLoss
    from em_lightning.mixture import Mixture
    from em_lightning.operators import EMOperator
    from em_lightning.scope import audit
    from em_lightning.statistics import STATISTICS

_ROOM_OF = {
    "ACTIVATIONS": "activations",
    "COMPETITIONS": "competition",
    "KERNELS": "kernels",
    "LOSSES": "losses",
    "STATISTICS": "statistics",
    "EMLoss": "losses",
    "EMOperator": "operators",
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
    "Kernel",
    "Mixture",
    "Posterior",
    "__version__",
    "audit",
    "softmin",
]


def __getattr__(name: str) -> Any:
    room = _ROOM_OF.get(name)
    if room is None:
        raise AttributeError(f"module 'em_lightning' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f"em_lightning.{room}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
