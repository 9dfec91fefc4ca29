"""Findings of an audit, and the check behind them: responsibilities must be the gradient of the free energy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from em_lightning.activations import Activation
from em_lightning.activations.competitive import SparseminActivation
from em_lightning.competition import Entmin, Hardmin, Posterior, Sparsemin
from em_lightning.mixture import Mixture
from em_lightning.operators import EMOperator
from em_lightning.scope.curvature import curvature

TOLERANCE = 4e-3  # of sums and gradients; bfloat16 softmaxes of 2 to 30,000 normal logits were off by .003 and .002
NOT_CHECKED = "not checked: "
UNKNOWN = f"{NOT_CHECKED}the audit cannot tell whether this is a part of a softmax"
NOT_SEEN = "no exponentiated and normalized competition seen in its forward"
_RELU = "elementwise, no normalization, hard zeros"
_MOST_CHECKED = 2**22  # chosen; groups beyond so many numbers with padding are not checked: one operation makes all
_SPARSE = (Sparsemin, Entmin, Hardmin, SparseminActivation)
_COLUMNS = "layer|module|operation|hypotheses|exp|norm|soft|curvature|dF/dd - r|EM|reason".split("|")
_SWAP = "replace it by a competition with SwapActivations (target= its class; functional=True if it is a function)"
# Reason, advice and class names, which also match classes of PyG such as its Linear.
_LAYERS = (
    (_RELU, _SWAP, "ReLU ReLU6 Threshold Hardtanh Hardsigmoid Hardshrink"),
    (
        "elementwise: no normalization across units",
        _SWAP,
        "LeakyReLU PReLU RReLU ELU SELU CELU GELU SiLU Mish Softplus Sigmoid Tanh LogSigmoid Hardswish",
    ),
    (
        "affine: scores, neither exponentiated nor normalized",
        "train its outputs as energies with LayerwiseEMLoss, or put a mixture behind it with InsertEMOperator",
        "Linear Bilinear Embedding Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d",
    ),
)
_REASONS = {name: reason for reason, _, names in _LAYERS for name in names.split()}
_ADVICE = {reason: advice for reason, advice, _ in _LAYERS} | {
    reason: "if it competes, build it from em_lightning.competition" for reason in (NOT_SEEN, UNKNOWN)
}


@dataclass
class Finding:
    """The result of the audit for one operation of a module.

    Attributes:
        path: the path of the module; for a loss, that of the module that computed its logits.
        module: the name of the module's class.
        operation: such as ``"softmax"``; the name of the class for a module that was judged as a whole.
        hypotheses: the axis of the competing hypotheses and their number; empty if there are none.
        exponentiated, normalized: whether energies are exponentiated, and responsibilities sum to 1.
        soft: mean perplexity of the responsibilities; 1 means that one hypothesis has responsibility 1.
        curvature: mean and largest :func:`~.curvature` of items; None if not checked, or for several competitions.
        error: largest difference between dF/dd and the responsibilities, those that the model used or, for modules of
            this library, those of a second call that the audit makes; None if not checked.
        reason: why this is EM or not.
        calls: how many calls over this axis the audit saw; the other fields are those of the call of largest error.
    """

    path: str
    module: str
    operation: str
    hypotheses: str = ""
    exponentiated: bool = False
    normalized: bool = False
    soft: float | None = None
    curvature: tuple[float, float] | None = None
    error: float | None = None
    reason: str = ""
    calls: int = 1

    @property
    def em(self) -> bool:
        """Whether this is EM: exponentiated, normalized, and the identity dF/dd = r holds."""
        return self.exponentiated and self.normalized and self.error is not None and self.error < TOLERANCE

    @property
    def checked(self) -> bool:
        """Whether the batch reached the operation and the audit knows it; if not, ``em`` is False without a check."""
        return not self.reason.startswith(NOT_CHECKED)

    @property
    def advice(self) -> str:
        """How to make this EM; empty if it is EM already, or if there is no advice."""
        return "" if self.em else _ADVICE.get(self.reason, "" if self.checked else "audit a batch that reaches it")


def reason_of(module: nn.Module) -> str:
    """Return why a module in which no competition was seen is not EM."""
    known = (_REASONS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _REASONS)
    return next(known, NOT_SEEN)


class Audit(list[Finding]):
    """The findings in the order of the forward pass; ``print`` shows a table, and advice for what is not EM."""

    def __str__(self) -> str:
        rows = [tuple(_COLUMNS)]
        for one in self:
            flags = ["yes" if flag else "no" for flag in (one.exponentiated, one.normalized)]
            exponentiated, normalized = flags if one.hypotheses else ("-", "-")
            soft = "-" if one.soft is None else f"{one.soft:.2f}"
            mean_and_largest = "-" if one.curvature is None else f"{one.curvature[0]:.2f}, {one.curvature[1]:.2f}"
            error = "-" if one.error is None else f"{one.error:.0e}"
            em = "yes" if one.em else "no" if one.checked else "-"
            operation = f"{one.operation} ({one.calls} calls)" if one.calls > 1 else one.operation
            place = (one.path or "(root)", one.module, operation, one.hypotheses or "-")
            rows.append((*place, exponentiated, normalized, soft, mean_and_largest, error, em, one.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        for text in dict.fromkeys(one.advice for one in self if one.advice):
            paths = list(dict.fromkeys(one.path or "(root)" for one in self if one.advice == text))
            lines.append(f"{', '.join(paths[:3])}{f' and {len(paths) - 3} more' * (len(paths) > 3)}: {text}")
        return "\n".join(lines)

    def at(self, path: str) -> list[Finding]:
        """Return the findings at a path."""
        return [finding for finding in self if finding.path == path]


@dataclass
class Softmax:
    """A call of a softmax, logsumexp, cross-entropy or attention that the audit recorded."""

    path: str
    module: nn.Module
    operation: str
    logits: Tensor
    output: Tensor  # of a cross-entropy: the log-softmax in it
    axes: tuple[int, ...]  # of the hypotheses
    from_layer: bool  # whether a module returned the logits
    index: Tensor | None = None  # the group of each hypothesis on the axis, if groups compete separately

    def check(self) -> Finding:
        """Compare the output with the gradient of F = -logsumexp(-d) at the energies d = -logits."""
        energies = self._hypotheses_last(-self.logits.detach().double(), math.inf).requires_grad_()
        free_energy = -torch.logsumexp(-energies, -1)
        output = self.output.detach().double()
        if self.operation == "logsumexp":
            responsibilities = torch.exp(-energies.detach() - output.reshape(free_energy.shape)[..., None])
        else:
            is_log = self.operation in ("log-softmax", "cross-entropy")
            responsibilities = self._hypotheses_last(output.exp() if is_log else output, 0.0)
        axes = ", ".join(str(axis % self.logits.ndim) for axis in self.axes)
        label = f"axes {axes}" if len(self.axes) > 1 else f"axis {axes}"
        label += " by index, largest group" * (self.index is not None)
        label = "keys" if self.operation == "attention" else label
        finding = Finding(self.path, type(self.module).__name__, self.operation, reason=self._reason())
        return _compared(finding, Posterior(energies, responsibilities, free_energy), label, -1)

    def _hypotheses_last(self, x: Tensor, padding: float) -> Tensor:
        if self.index is None:
            return x.movedim(self.axes, tuple(range(-len(self.axes), 0))).flatten(-len(self.axes))
        _, counts = self.index.unique(return_counts=True)
        groups = x.movedim(self.axes[0], 0)[self.index.argsort()].split(counts.tolist())
        per_group = int(counts.max()) * x.numel() // len(self.index)  # numbers with padding
        some = groups[: max(1, _MOST_CHECKED // per_group)]
        return pad_sequence(some, batch_first=True, padding_value=padding).movedim(1, -1)

    def _reason(self) -> str:
        if self.operation == "attention":
            return "posterior mean of the values over the keys"
        if self.operation != "cross-entropy":
            return "responsibilities of the hypotheses"
        identity = "dL/dz = r - onehot"
        if not self.from_layer:
            return f"{identity}; the logits are computed outside of the layers"
        weight = getattr(self.module, "weight", None)
        classes = self.logits.shape[self.axes[0]]
        one_per_class = isinstance(weight, Tensor) and weight.ndim > 1 and len(weight) == classes
        return f"{identity}: the weights are prototypes of the classes" if one_per_class else identity


def check_call(path: str, module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Finding | None:
    """Check a call of a competition, activation or operator of this library; None if it has no responsibilities."""
    name = type(module).__name__
    if isinstance(module, EMOperator):
        if not isinstance(output, Mixture):
            return None
        x, mask = inputs[0].detach(), inputs[1] if len(inputs) > 1 else kwargs.get("mask")
        background = None if module.background is None else module.background.energies(x, mask)
        energies = module.posterior(x, output, mask, background).energies.detach().double().requires_grad_()
        finding = Finding(path, name, "E-step", reason="responsibilities of the components of a mixture")
        return _compared(finding, module.competition(energies), "components", -1)
    competition = module.posterior if isinstance(module, Activation) else module
    posterior = competition(inputs[0].detach().float().requires_grad_(), *inputs[1:], **kwargs)
    if isinstance(module, Activation) and not module.competes:
        axis, label, reason = -1, "each unit", "hypotheses of each unit by itself: units do not compete"
    else:
        dim = inputs[2] if len(inputs) > 2 else kwargs.get("dim")  # forward(energies, log_prior, dim) of a Competition
        axis = module.dim if dim is None else dim
        label, reason = f"axis {axis % posterior.energies.ndim}", "competition of the units"
    finding = _compared(Finding(path, name, name, reason=reason), posterior, label, axis)
    if isinstance(module, _SPARSE) and finding.checked:
        finding.exponentiated = False
        finding.reason = "normalized, but not exponentiated: hypotheses drop to exactly zero"
    return finding


def _compared(finding: Finding, posterior: Posterior, label: str, axis: int) -> Finding:
    """Complete a finding: compare responsibilities with dF / d energies, both with the hypotheses on ``axis``."""
    (gradient,) = torch.autograd.grad(posterior.free_energy.sum(), posterior.energies, materialize_grads=True)
    gradient = gradient.movedim(axis, -1).double()
    responsibilities = posterior.responsibilities.detach().movedim(axis, -1).double()
    total = responsibilities.sum(-1)
    unmasked = total.isfinite() & (total > 0)
    if not unmasked.any():
        finding.reason = f"{NOT_CHECKED}it got no items"
        return finding
    used, gradient = responsibilities[unmasked], gradient[unmasked]
    num_groups = max(1, round(used.sum(-1).mean().item()))  # competitions along the axis: each has the sum 1
    finding.hypotheses = f"{label}: {used.shape[-1]}" + f" in {num_groups} groups" * (num_groups > 1)
    finding.exponentiated = True
    finding.normalized = bool(((used.sum(-1) - num_groups).abs() < TOLERANCE).all())
    finding.soft = (torch.special.entr(used).sum(-1) / num_groups).exp().mean().item()
    if num_groups == 1:
        curvatures = curvature(used)
        finding.curvature = curvatures.mean().item(), curvatures.max().item()
    finding.error = (used - gradient).abs().max().item()
    return finding
