"""Contract tests for new kernels, competition operators, activations and losses; subclass them in a test file."""

import importlib
from typing import Any

_MODULE_OF = {
    "ActivationContract": "activations",
    "CompetitionContract": "competition",
    "KernelContract": "kernels",
    "LossContract": "losses",
    "ModuleContract": "modules",
    "assert_ranks_agree": "losses",
    "run_ranks": "distributed",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"em_lightning.testing has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f"em_lightning.testing.{module}"), name)
