"""Contract tests of kernels, competition operators, activations, losses and modules, to subclass in test files."""

from em_lightning.testing.contracts import (
    ActivationContract,
    CompetitionContract,
    KernelContract,
    LossContract,
    ModuleContract,
)

__all__ = ["ActivationContract", "CompetitionContract", "KernelContract", "LossContract", "ModuleContract"]
