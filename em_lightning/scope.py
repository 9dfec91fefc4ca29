"""Audit: find the softmax-like operations of a model and check the identity dF/dd = r of implicit EM."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode  # no public hook sees ATen operations

from em_lightning.activations import Activation
from em_lightning.activations.competitive import SparseminActivation
from em_lightning.competition import Competition, Entmin, Hardmin, Sparsemin
from em_lightning.mixture import Mixture
from em_lightning.operators import EMOperator
from em_lightning.surgery import walk

_OPERATIONS = {
    "softmax": "aten::_softmax aten::_safe_softmax",
    "log-softmax": "aten::_log_softmax",
    "logsumexp": "aten::logsumexp",
    "cross-entropy": "aten::nll_loss_forward aten::nll_loss2d_forward",
    "relu": "aten::relu aten::relu_",
    "topk": "aten::topk",
    "argmax": "aten::argmax",
}
_OPERATION_OF = {name: operation for operation, names in _OPERATIONS.items() for name in names.split()}
_MEANING = {
    "E-step": "responsibilities of the components of a mixture",
    "attention": "posterior mean of the values over the keys",
    "cross-entropy": "dL/dz = r - onehot: the weights are prototypes of the classes",
}
_RELU = "elementwise, no normalization, hard zeros"
_HARD = "hard selection: only the selected have a gradient"
_SPARSE = (Sparsemin, Entmin, Hardmin, SparseminActivation)
_SMOOTH = "elementwise: no normalization across units"
_OTHERS = {
    "ReLU ReLU6 Threshold Hardtanh Hardsigmoid Hardshrink": _RELU,
    "LeakyReLU PReLU RReLU ELU SELU CELU GELU SiLU Mish Softplus Sigmoid Tanh LogSigmoid": _SMOOTH,
    "Softsign Hardswish Softshrink Tanhshrink": _SMOOTH,
    "Linear Bilinear Embedding Conv* ConvTranspose*": "affine: scores, neither exponentiated nor normalized",
    "BatchNorm* SyncBatchNorm InstanceNorm* LayerNorm GroupNorm RMSNorm": "normalizes moments, not hypotheses",
    "MaxPool* AdaptiveMaxPool*": "hard maximum: only the maximum has a gradient",
    "AvgPool* AdaptiveAvgPool*": "an average with fixed weights",
    "Dropout Dropout* AlphaDropout Identity Flatten Unflatten": "no hypotheses",
}
# By the names of classes, as PyG has a Linear too; * is 1d, 2d or 3d.
_REASONS = {
    name.replace("*", f"{n}d"): why for names, why in _OTHERS.items() for name in names.split() for n in (1, 2, 3)
}


@dataclass
class Finding:
    """The result of the audit for one operation of a module.

    Attributes:
        path: the module, or for a loss the module that computed its logits.
        hypotheses: the axis of the competing hypotheses and their number; empty if there are none.
        exponentiated: whether energies are exponentiated.
        normalized: whether the result sums to one over the hypotheses.
        soft: mean perplexity of the responsibilities; 1 means that one hypothesis takes all.
        error: largest difference between dF/dd and the responsibilities that the model used; None if not checked.
        reason: why this is EM or not.
    """

    path: str
    module: str
    operation: str
    hypotheses: str = ""
    exponentiated: bool = False
    normalized: bool = False
    soft: float | None = None
    error: float | None = None
    reason: str = ""

    @property
    def em(self) -> bool:
        """Whether this is EM: exponentiated, normalized, and the identity dF/dd = r holds."""
        return self.exponentiated and self.normalized and self.error is not None and self.error < 1e-3


class Audit(list[Finding]):
    """The findings in the order of the forward pass; ``print`` shows a table."""

    def __str__(self) -> str:
        header = ("layer", "module", "operation", "hypotheses", "exp", "norm", "soft", "dF/dd - r", "EM", "reason")
        rows: list[tuple[str, ...]] = [header]
        for one in self:
            flags = ["yes" if flag else "no" for flag in (one.exponentiated, one.normalized)]
            numbers = (one.hypotheses, *flags) if one.hypotheses else ("-", "-", "-")
            soft = "-" if one.soft is None else f"{one.soft:.2f}"
            error = "-" if one.error is None else f"{one.error:.0e}"
            place = (one.path or "(root)", one.module, one.operation)
            rows.append((*place, *numbers, soft, error, "yes" if one.em else "no", one.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def at(self, path: str) -> list[Finding]:
        """Return the findings at a path."""
        return [finding for finding in self if finding.path == path]


def audit(model: nn.Module, batch: Any, run: Callable[[], Any] | None = None) -> Audit:
    r"""Find the layers of a model in which energies over competing hypotheses are exponentiated and normalized.

    Each softmax, log-softmax, cross-entropy and attention of one forward pass is checked on its own numbers: with
    energies d = -logits, the gradient of :math:`F = -\log \sum_k e^{-d_k}` must equal the responsibilities that the
    model used. Competitions and activations of this library are checked on their own posterior and free energy. For
    every other layer the table names the assumption that it violates. The model runs in eval mode; its state and the
    random stream are restored.

    Args:
        model: any module. For a LightningModule ``training_step`` is run, so that the loss is included; with manual
            optimization ``forward(batch[0])``.
        batch: the argument of ``training_step``, or the input of the forward (a tuple is unpacked).
        run: runs the model in another way; ``batch`` is then ignored.

    Returns:
        One finding per operation.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(-1))
        >>> for finding in audit(net, torch.randn(5, 4)):
        ...     print(finding.path, finding.operation, finding.em, finding.reason)
        0 linear False affine: scores, neither exponentiated nor normalized
        1 relu False elementwise, no normalization, hard zeros
        2 linear False affine: scores, neither exponentiated nor normalized
        3 softmax True responsibilities of the hypotheses

    Source: the scope of the implicit-EM identity, Oursland, arXiv 2512.24780.
    """
    recorder = _Recorder()
    with _on_a_copy(model), recorder, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        model.eval()
        recorder.watch(model)
        (run or _runner(model, batch))()
    return recorder.findings()


def _runner(model: Any, batch: Any) -> Callable[[], Any]:
    if hasattr(model, "training_step") and getattr(model, "automatic_optimization", True):
        step: Any = type(model).training_step  # not the instance's, which callbacks may have wrapped
        takes_index = len(inspect.signature(step).parameters) > 2
        return lambda: step(model, batch, 0) if takes_index else step(model, batch)
    if hasattr(model, "training_step"):
        return lambda: model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    return lambda: model(*batch) if isinstance(batch, tuple) else model(batch)


@contextlib.contextmanager
def _on_a_copy(model: nn.Module) -> Iterator[None]:
    """Let a model and its submodules work on a copy of their state without logs, and restore state and random stream.

    The state is exchanged, not the model, so that functions which hold the model or a part of it use the copy too.
    """
    modules = list(model.modules())
    states = [vars(module) for module in modules]
    copied = [vars(module) for module in copy.deepcopy(model).modules()]
    fast_path = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        for module, state in zip(modules, copied, strict=True):
            object.__setattr__(module, "__dict__", state)
        vars(model).update(log=_nothing, log_dict=_nothing)
        with torch.random.fork_rng():
            yield
    finally:
        mha.set_fastpath_enabled(fast_path)
        for module, state in zip(modules, states, strict=True):
            object.__setattr__(module, "__dict__", state)


def _nothing(*_: Any, **__: Any) -> None:
    """Stand for a method of Lightning that acts on the outside."""


@dataclass
class _Event:
    """A softmax that is checked after the forward pass, because a dispatch mode runs below autograd."""

    path: str
    module: nn.Module
    operation: str
    logits: Tensor  # hypotheses on the last axis
    output: Tensor
    axis: int


class _Recorder(TorchDispatchMode):
    """Records every operation below autograd and the module that computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[tuple[str, nn.Module]] = []
        self.paused = False
        self.found: dict[tuple[str, str], Finding] = {}
        self.called: list[tuple[str, nn.Module]] = []
        self.makers: dict[tuple[int, int], tuple[str, nn.Module, Tensor]] = {}
        self.events: list[_Event] = []
        self.log_softmax: tuple[Tensor, _Event] | None = None

    def watch(self, model: nn.Module) -> None:
        """Register hooks on all modules."""
        for path, module in [("", model), *((site.path, site.module) for site in walk(model) if not site.function)]:
            module.register_forward_pre_hook(functools.partial(self._enter, path))
            module.register_forward_hook(functools.partial(self._leave, path), with_kwargs=True)

    def _inside(self, *kinds: type[nn.Module]) -> bool:
        return any(isinstance(module, kinds) for _, module in self.stack)

    def _enter(self, path: str, module: nn.Module, _: Any) -> None:
        if self.paused:
            return
        # The kernel of an activation is a part of it.
        if not self._inside(Activation) and not any(known is module for _, known in self.called):
            self.called.append((path, module))
        self.stack.append((path, module))

    def _leave(self, path: str, module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> None:
        if self.paused:
            return
        while self.stack and self.stack.pop()[1] is not module:
            pass
        self.paused = True
        if isinstance(module, (Competition, Activation)) and inputs and not self._inside(Activation):
            self._check_posterior(path, module, inputs[0].detach(), inputs[1:], kwargs)
        if isinstance(module, EMOperator) and isinstance(output, Mixture):
            self._check_e_step(path, module, inputs, kwargs, output)
        self.paused = False
        if isinstance(output, Tensor):
            # The innermost module that returned it. The output is kept: a freed address could be used again.
            self.makers.setdefault((output.data_ptr(), output.numel()), (path, module, output))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.paused or self._inside(Competition, Activation, EMOperator):  # these are checked as a whole
            return output
        operation = _OPERATION_OF.get(func.name())
        if operation == "cross-entropy":
            if self.log_softmax is not None and args[0].data_ptr() == self.log_softmax[0].data_ptr():
                self.log_softmax[1].operation = operation
        elif operation in ("relu", "topk", "argmax"):
            path, module = self.stack[-1] if self.stack else ("", nn.Module())
            self._add(Finding(path, type(module).__name__, operation, reason=_RELU if operation == "relu" else _HARD))
        elif operation is not None:
            dims = args[1] if operation == "logsumexp" else [args[1]]
            if len(dims) == 1:
                self._record_softmax(operation, args[0], dims[0], output)
        return output

    def _add(self, finding: Finding) -> None:
        known = self.found.setdefault((finding.path, finding.operation), finding)
        if finding.error is not None:
            known.error = max(known.error or 0.0, finding.error)

    def _record_softmax(self, operation: str, logits: Tensor, dim: int, output: Tensor) -> None:
        path, module = self.stack[-1] if self.stack else ("", nn.Module())
        maker = self.makers.get((logits.data_ptr(), logits.numel()))
        if maker is not None and len(self.stack) <= 1:  # a loss outside all layers belongs to the output layer
            path, module = maker[:2]
        if isinstance(module, nn.MultiheadAttention):
            operation = "attention"
        event = _Event(path, module, operation, logits.clone().movedim(dim, -1), output.clone(), dim % logits.ndim)
        self.events.append(event)
        if operation == "log-softmax":
            self.log_softmax = (output, event)

    def _check_softmax(self, event: _Event) -> None:
        energies = (-event.logits.detach().double()).requires_grad_()
        free = -torch.logsumexp(-energies, -1)
        (gradient,) = torch.autograd.grad(free.sum(), energies)
        values = event.output.detach().double()
        if event.operation == "logsumexp":
            used = torch.exp(-energies.detach() - values.reshape(free.shape)[..., None])
        else:
            used = values.movedim(event.axis, -1)
            used = used.exp() if event.operation in ("log-softmax", "cross-entropy") else used
        axis = "keys" if event.operation == "attention" else f"axis {event.axis}"
        reason = _MEANING.get(event.operation, "responsibilities of the hypotheses")
        self._add(_measured(event.path, event.module, event.operation, used, gradient, axis, reason))

    def _check_e_step(self, path: str, module: EMOperator, inputs: Any, kwargs: Any, mixture: Mixture) -> None:
        x = inputs[0] if inputs else kwargs["x"]
        mask = inputs[1] if len(inputs) > 1 else kwargs.get("mask")
        with torch.enable_grad():
            energies = module.posterior(x.detach(), mixture, mask).energies.detach().double()
            posterior = module.competition(energies.requires_grad_())
            (gradient,) = torch.autograd.grad(posterior.free_energy.sum(), posterior.energies)
        used = posterior.responsibilities.detach()
        self._add(_measured(path, module, "E-step", used, gradient, "components", _MEANING["E-step"]))

    def _check_posterior(self, path: str, module: Any, value: Tensor, others: Any, kwargs: Any) -> None:
        with torch.enable_grad():
            value = value.float().requires_grad_()
            see = module.posterior if isinstance(module, Activation) else module.forward  # which fires no hooks
            posterior = see(value, *others, **kwargs)
            energies = posterior.energies
            gradient = torch.autograd.grad(posterior.free_energy.sum(), energies, allow_unused=True)[0]
        used = posterior.responsibilities.detach().double()
        gradient = torch.full_like(used, math.nan) if gradient is None else gradient.double()
        axis = kwargs.get("dim")
        axis = module.dim if axis is None else axis
        where, reason = f"axis {axis % used.ndim}", "competition of the units"
        if isinstance(module, Activation) and not module.competes:
            axis, where, reason = -1, "each unit", "hypotheses of each unit by itself: units do not compete"
        used, gradient = used.movedim(axis, -1), gradient.movedim(axis, -1)
        finding = _measured(path, module, type(module).__name__, used, gradient, where, reason)
        if isinstance(module, _SPARSE):
            finding.exponentiated = False
            finding.reason = "normalized, but not exponentiated: hypotheses drop to exactly zero"
        self._add(finding)

    def findings(self) -> Audit:
        """Return all findings in the order in which the modules were called."""
        for event in self.events:
            self._check_softmax(event)
        result, rest = Audit(), dict(self.found)
        for path, module in self.called:
            own = [rest.pop(key) for key in list(rest) if key[0] == path]
            result.extend(own)
            if not own and not any(True for _ in module.children()):
                name = type(module).__name__
                known = (_REASONS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _REASONS)
                reason = next(known, "no exponentiated and normalized competition seen in its forward")
                result.append(Finding(path, name, name.lower(), reason=reason))
        result.extend(rest.values())
        return result


def _measured(
    path: str, module: nn.Module, operation: str, used: Tensor, gradient: Tensor, axis: str, reason: str
) -> Finding:
    """Compare responsibilities with the gradient of the free energy, over the last axis."""
    finding = Finding(path, type(module).__name__, operation, f"{axis}: {used.shape[-1]}", reason=reason)
    rows = used.sum(-1).isfinite() & (used.sum(-1) > 0) & gradient.sum(-1).isfinite()  # not those masked entirely
    used, gradient = used[rows], gradient[rows]
    if not len(used):
        return finding
    groups = max(1, round(used.sum(-1).mean().item()))  # competitions side by side
    if groups > 1:
        finding.hypotheses += f" in {groups} groups"
    finding.exponentiated = True
    finding.normalized = bool(((used.sum(-1) - groups).abs() < 1e-3).all())
    finding.soft = (torch.special.entr(used).sum(-1) / groups).exp().mean().item()
    finding.error = (used - gradient).abs().max().item()
    return finding
