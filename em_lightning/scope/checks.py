"""Check recorded competitions: are the responsibilities that a model used the gradient of the free energy?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from em_lightning.activations import Activation
from em_lightning.activations.competitive import SparseminActivation
from em_lightning.competition import Entmin, Hardmin, Posterior, Sparsemin
from em_lightning.mixture import Mixture
from em_lightning.operators import EMOperator
from em_lightning.scope import findings as reasons
from em_lightning.scope.findings import TOLERANCE, Finding

_SPARSE = (Sparsemin, Entmin, Hardmin, SparseminActivation)


@dataclass
class Softmax:
    """A softmax, checked after the run, because a dispatch mode runs below autograd.

    Attributes:
        path: the module in which it takes place, or for a loss the one that computed the logits.
        axis: the axis of the hypotheses.
        from_layer: whether a module returned the logits.
    """

    path: str
    module: nn.Module
    operation: str
    logits: Tensor
    output: Tensor
    axis: int
    from_layer: bool


class Call(NamedTuple):
    """A call of a competition, activation or operator of this library."""

    path: str
    module: Any
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def check_softmax(softmax: Softmax) -> Finding:
    """Compare the output of a softmax with the gradient of F = -logsumexp(-d) at the energies d = -logits."""
    energies = (-softmax.logits.detach().double()).movedim(softmax.axis, -1).requires_grad_()
    free_energy = -torch.logsumexp(-energies, -1)
    gradient = torch.autograd.grad(free_energy.sum(), energies)[0]
    output = softmax.output.detach().double()
    if softmax.operation == "logsumexp":
        responsibilities = torch.exp(-energies.detach() - output.reshape(free_energy.shape)[..., None])
    elif softmax.operation in ("log-softmax", "cross-entropy"):
        responsibilities = output.exp().movedim(softmax.axis, -1)
    else:
        responsibilities = output.movedim(softmax.axis, -1)
    axis = "keys" if softmax.operation == "attention" else f"axis {softmax.axis % output.ndim}"
    finding = Finding(softmax.path, type(softmax.module).__name__, softmax.operation, reason=_reason(softmax))
    return _compared(finding, responsibilities, gradient, axis)


def _reason(softmax: Softmax) -> str:
    if softmax.operation == "attention":
        return reasons.KEYS
    if softmax.operation != "cross-entropy":
        return reasons.HYPOTHESES
    if not softmax.from_layer:
        return reasons.BETWEEN_LAYERS
    weight = getattr(softmax.module, "weight", None)
    one_per_class = isinstance(weight, Tensor) and weight.ndim > 1 and len(weight) == softmax.logits.shape[softmax.axis]
    return reasons.CLASSES if one_per_class else reasons.TARGETS


def check_call(call: Call) -> Finding | None:
    """Compare the responsibilities of a competition with the gradient of its free energy; None if it has neither."""
    module, kwargs, name = call.module, call.kwargs, type(call.module).__name__
    with torch.enable_grad():
        if isinstance(module, EMOperator):
            if not isinstance(call.output, Mixture):
                return None
            x = call.inputs[0] if call.inputs else kwargs["x"]
            mask = call.inputs[1] if len(call.inputs) > 1 else kwargs.get("mask")
            energies = module.posterior(x.detach(), call.output, mask).energies.detach().double()
            posterior = module.competition(energies.requires_grad_())
            finding = Finding(call.path, name, "E-step", reason=reasons.COMPONENTS)
            return _compared(finding, posterior.responsibilities, _gradient(posterior), "components")
        value, *others = call.inputs
        value = value.detach().float().requires_grad_()
        posterior = (
            module.posterior(value, **kwargs) if isinstance(module, Activation) else module(value, *others, **kwargs)
        )
        gradient = _gradient(posterior)
    axis = kwargs.get("dim")
    axis = module.dim if axis is None else axis
    label, reason = f"axis {axis % gradient.ndim}", reasons.UNITS
    if isinstance(module, Activation) and not module.competes:
        axis, label, reason = -1, "each unit", reasons.EACH_UNIT
    responsibilities = posterior.responsibilities.movedim(axis, -1)
    finding = _compared(
        Finding(call.path, name, name, reason=reason), responsibilities, gradient.movedim(axis, -1), label
    )
    if isinstance(module, _SPARSE) and finding.checked:
        finding.exponentiated = False
        finding.reason = reasons.SPARSE
    return finding


def _gradient(posterior: Posterior) -> Tensor:
    """Return dF/dd, zero if the free energy does not depend on the energies."""
    return torch.autograd.grad(posterior.free_energy.sum(), posterior.energies, materialize_grads=True)[0]


def _compared(finding: Finding, responsibilities: Tensor, gradient: Tensor, axis: str) -> Finding:
    """Complete a finding: compare responsibilities with the gradient of the free energy, over the last axis."""
    responsibilities, gradient = responsibilities.detach().double(), gradient.double()
    total = responsibilities.sum(-1)
    unmasked = total.isfinite() & (total > 0)
    if not unmasked.any():
        finding.reason = reasons.NO_ITEMS
        return finding
    used, gradient = responsibilities[unmasked], gradient[unmasked]
    groups = max(1, round(used.sum(-1).mean().item()))  # competitions side by side
    finding.hypotheses = f"{axis}: {used.shape[-1]}" + f" in {groups} groups" * (groups > 1)
    finding.exponentiated = True
    finding.normalized = bool(((used.sum(-1) - groups).abs() < TOLERANCE).all())
    finding.soft = (torch.special.entr(used).sum(-1) / groups).exp().mean().item()
    finding.error = (used - gradient).abs().max().item()
    return finding
