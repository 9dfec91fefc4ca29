"""Where EM lives in a model, and where it does not: looked up in one forward pass and checked numerically."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from em_lightning.activations.base import Activation
from em_lightning.activations.competitive import SparseminActivation
from em_lightning.competition import Entmin, Hardmin, Sparsemin
from em_lightning.competition.base import Competition
from em_lightning.mixture import Mixture
from em_lightning.operators import EMOperator
from em_lightning.surgery.find import walk

aten = torch.ops.aten
_SOFTMAX = {
    aten._softmax.default: "softmax",
    aten._safe_softmax.default: "softmax",
    aten._log_softmax.default: "log-softmax",
}
_LIKELIHOOD = (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
_HARD = {
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
    aten.topk.default: "topk",
    aten.argmax.default: "argmax",
}
_MEANING = {
    "E-step": "responsibilities of the components of a mixture",
    "attention": "posterior mean of the values over the keys",
    "cross-entropy": "dL/dz = r - onehot: the weights are prototypes of the classes",
}
_RELU = "elementwise, no normalization, hard zeros"
_AFFINE = "affine: scores, neither exponentiated nor normalized"
_SMOOTH = "elementwise: no normalization across units"
_SPARSE = (Sparsemin, Entmin, Hardmin, SparseminActivation)
_REASONS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardtanh, nn.Hardsigmoid, nn.Hardshrink), _RELU),
    ((nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus), _SMOOTH),
    ((nn.Sigmoid, nn.Tanh, nn.LogSigmoid, nn.Softsign, nn.Hardswish, nn.Softshrink, nn.Tanhshrink), _SMOOTH),
    (
        (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding),
        _AFFINE,
    ),
    ((nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), "normalizes moments, not hypotheses"),
    ((nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd), "hard maximum: the winner takes all"),
    ((nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd), "an average with fixed weights"),
    ((nn.modules.dropout._DropoutNd, nn.Identity, nn.Flatten, nn.Unflatten), "no hypotheses"),
)


@dataclass
class Finding:
    """What was found at one place of a model.

    Attributes:
        path: the module, or the one that made the logits of a loss.
        module: its class.
        operation: what happens there.
        hypotheses: the axis that holds the competing hypotheses, and how many they are; empty where there are none.
        exponentiated: whether energies are exponentiated.
        normalized: whether the result sums to one over the hypotheses.
        soft: mean perplexity of the responsibilities: 1 where one takes all.
        error: the largest deviation between the gradient of the free energy and the responsibilities that were used;
            None where there is nothing to check.
        reason: why EM lives there or does not.
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
        """Whether EM lives here: a discrete set, exponentiated, normalized, not hard, and the identity holds."""
        return self.exponentiated and self.normalized and self.error is not None and self.error < 1e-3


class Audit(list[Finding]):
    """The findings, in the order of the forward pass; ``print`` shows the table."""

    def __str__(self) -> str:
        header = ("layer", "module", "operation", "hypotheses", "exp", "norm", "soft", "dF/dd - r", "EM", "why")
        rows = [header]
        for one in self:
            seen = bool(one.hypotheses)
            rows.append(
                (
                    one.path or "(root)",
                    one.module,
                    one.operation,
                    one.hypotheses or "-",
                    ("yes" if one.exponentiated else "no") if seen else "-",
                    ("yes" if one.normalized else "no") if seen else "-",
                    "-" if one.soft is None else f"{one.soft:.2f}",
                    "-" if one.error is None else f"{one.error:.0e}",
                    "yes" if one.em else "no",
                    one.reason,
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def at(self, path: str) -> list[Finding]:
        """Return the findings at a path."""
        return [finding for finding in self if finding.path == path]


def audit(model: nn.Module, batch: Any, run: Callable[[], Any] | None = None) -> Audit:
    r"""Tell, layer by layer, where energies over competing hypotheses are exponentiated and normalized.

    Each softmax, log-softmax, cross-entropy and attention that the pass computes is checked on its own numbers: with
    energies d = -logits, the gradient of :math:`F = -\log \sum_k e^{-d_k}` has to be the responsibilities that the
    model used. Competitions and activations of this library are checked on their own posterior, with its free energy.
    Every other layer is named with the assumption that it breaks. The model runs in eval mode, its state and the random
    stream are left as they were.

    Args:
        model: any module. Of a LightningModule the ``training_step`` is run, so that its loss is seen; in manual
            optimization only its forward, on the first part of the batch.
        batch: what the ``training_step`` takes, or the input of the forward (a tuple is unpacked).
        run: runs the model in another way; then ``batch`` is not used.

    Returns:
        One finding per place.

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
    modes = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_silent_logs(model))
            stack.enter_context(recorder.watching(model))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(recorder)
            if run is not None:
                run()
            elif hasattr(model, "training_step") and getattr(model, "automatic_optimization", True):
                step: Any = type(model).training_step  # type: ignore[attr-defined]  # without what callbacks have put around it
                step(model, batch, *([0] if len(inspect.signature(step).parameters) > 2 else []))
            elif hasattr(model, "training_step"):
                model(batch[0] if isinstance(batch, (tuple, list)) else batch)
            else:
                model(*batch) if isinstance(batch, tuple) else model(batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
    return recorder.findings()


@contextlib.contextmanager
def _silent_logs(model: nn.Module) -> Iterator[None]:
    names = [name for name in ("log", "log_dict") if hasattr(model, name)]
    before = {name: vars(model)[name] for name in names if name in vars(model)}
    for name in names:
        vars(model)[name] = lambda *_, **__: None
    try:
        yield
    finally:
        for name in names:
            del vars(model)[name]
        vars(model).update(before)


class _Recorder(TorchDispatchMode):
    """Sees every operation below autograd, and which module is computing it."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[tuple[str, nn.Module]] = []
        self.found: dict[tuple[str, str], Finding] = {}
        self.owners: list[tuple[str, nn.Module]] = []  # of what was called, in order
        self.makers: dict[tuple[int, int], tuple[str, nn.Module, Tensor]] = {}
        self.events: list[list[Any]] = []
        self.log_softmax: tuple[Tensor, list[Any]] | None = None

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for path, module in [("", model), *((site.path, site.module) for site in walk(model) if not site.function)]:
            handles.append(module.register_forward_pre_hook(lambda m, _, path=path: self._enter(path, m)))
            handles.append(module.register_forward_hook(self._leaver(path), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str, module: nn.Module) -> None:
        inside = any(isinstance(outer, Activation) for _, outer in self.stack)  # its kernel is a part of it
        if not inside and not any(known is module for _, known in self.owners):
            self.owners.append((path, module))
        self.stack.append((path, module))

    def _leaver(self, path: str) -> Callable[..., None]:
        return lambda module, inputs, kwargs, output: self._leave(path, module, inputs, kwargs, output)

    def _leave(self, path: str, module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> None:
        inside = any(isinstance(outer, Activation) for _, outer in self.stack[:-1])
        if isinstance(module, (Competition, Activation)) and not inside and inputs and isinstance(inputs[0], Tensor):
            with torch.utils._python_dispatch._disable_current_modes():
                self._contract(path, module, inputs[0].detach(), inputs[1:], kwargs)
        if isinstance(module, EMOperator) and isinstance(output, Mixture):
            with torch.utils._python_dispatch._disable_current_modes():
                self._e_step(path, module, inputs, kwargs, output)
        while self.stack and self.stack.pop()[1] is not module:
            pass
        if isinstance(output, Tensor):
            # The innermost module that returned it; outputs are kept, so that no address comes back.
            self.makers.setdefault((output.data_ptr(), output.numel()), (path, module, output))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if any(isinstance(module, (Competition, Activation, EMOperator)) for _, module in self.stack):
            return output  # checked as a whole, by its contract
        if func in _SOFTMAX:
            self._softmax(_SOFTMAX[func], args[0], args[1], output)
        elif func is aten.logsumexp.default and len(args[1]) == 1:
            self._softmax("logsumexp", args[0], args[1][0], output)
        elif func in _LIKELIHOOD and self.log_softmax is not None:
            logs, event = self.log_softmax
            if args[0].data_ptr() == logs.data_ptr():
                event[2] = "cross-entropy"
        elif func in _HARD:
            path, module = self.stack[-1] if self.stack else ("", nn.Module())
            reason = _RELU if _HARD[func] == "relu" else "hard selection: one takes all, the others cannot recover"
            finding = Finding(path, type(module).__name__, _HARD[func], reason=reason)
            self.found.setdefault((path, finding.operation), finding)
        return output

    def _softmax(self, operation: str, logits: Tensor, dim: int, output: Tensor) -> None:
        path, module = self.stack[-1] if self.stack else ("", nn.Module())
        maker = self.makers.get((logits.data_ptr(), logits.numel()))
        if maker is not None and len(self.stack) <= 1:  # a loss, outside of any layer: its place is the output layer
            path, module = maker[0], maker[1]
        if isinstance(module, nn.MultiheadAttention):
            operation = "attention"
        # Below autograd nothing can be differentiated: the check waits for the end of the pass.
        event = [path, module, operation, logits.clone().movedim(dim, -1), output.clone(), dim % logits.ndim]
        self.events.append(event)
        if operation == "log-softmax":
            self.log_softmax = (output, event)

    def _check(self, path: str, module: nn.Module, operation: str, logits: Tensor, output: Tensor, axis: int) -> None:
        energies = -logits.detach().double()
        energies.requires_grad_()
        free = -torch.logsumexp(-energies, -1)
        (gradient,) = torch.autograd.grad(free.sum(), energies)
        values = output.detach().double()
        if operation == "logsumexp":
            used = torch.exp(-energies.detach() - values.reshape(free.shape)[..., None])
        else:
            used = values.movedim(axis, -1)
            used = used.exp() if operation in ("log-softmax", "cross-entropy") else used
        finding = _measured(
            path, module, operation, used, gradient, "keys" if operation == "attention" else f"axis {axis}"
        )
        finding.reason = _MEANING.get(operation, "responsibilities of the hypotheses")
        known = self.found.setdefault((path, operation), finding)
        if known is not finding and finding.error is not None:
            known.error = max(known.error or 0.0, finding.error)

    def _e_step(self, path: str, module: EMOperator, inputs: Any, kwargs: Any, mixture: Mixture) -> None:
        x = inputs[0] if inputs else kwargs["x"]
        mask = inputs[1] if len(inputs) > 1 else kwargs.get("mask")
        with torch.enable_grad():
            energies = module.posterior(
                x.detach(), Mixture(*(part.detach() for part in mixture)), mask
            ).energies.double()
            posterior = module.competition(energies.detach().requires_grad_())
            (gradient,) = torch.autograd.grad(posterior.free_energy.sum(), posterior.energies)
        used = posterior.responsibilities.detach()
        finding = _measured(path, module, "E-step", used, gradient, "components")
        finding.reason = _MEANING["E-step"]
        self.found.setdefault((path, "E-step"), finding)

    def _contract(self, path: str, module: Any, value: Tensor, others: Any, kwargs: Any) -> None:
        name = type(module).__name__
        with torch.enable_grad():
            value = value.float().requires_grad_()
            see = module.posterior if isinstance(module, Activation) else module.forward
            posterior = see(value, *others, **kwargs)
            energies = posterior.energies
            gradient = torch.autograd.grad(posterior.free_energy.sum(), energies, allow_unused=True)[0]
        axis = kwargs.get("dim") or module.dim
        per_unit = isinstance(module, Activation) and not module.competes
        used = posterior.responsibilities.detach().double()
        gradient = torch.full_like(used, math.nan) if gradient is None else gradient.double()
        axis = -1 if per_unit else axis
        where = "each unit" if per_unit else f"axis {axis % used.ndim}"
        finding = _measured(path, module, name, used.movedim(axis, -1), gradient.movedim(axis, -1), where)
        finding.reason = (
            "hypotheses of each unit by itself: units do not compete" if per_unit else "competition of the units"
        )
        if isinstance(module, _SPARSE):
            finding.exponentiated = False
            finding.reason = "normalized, but not exponentiated: hypotheses drop to exactly zero"
        self.found.setdefault((path, name), finding)

    def findings(self) -> Audit:
        result = Audit()
        for event in self.events:
            self._check(*event)
        rest = dict(self.found)
        for path, module in self.owners:
            own = [rest.pop(key) for key in list(rest) if key[0] == path]
            inner = any(child is not None for child in module._modules.values())
            if own:
                result.extend(own)
            elif not inner:
                result.append(_outside(path, module))
        result.extend(rest.values())
        return result


def _measured(path: str, module: nn.Module, operation: str, used: Tensor, gradient: Tensor, axis: str) -> Finding:
    rows = used.sum(-1).isfinite() & (used.sum(-1) > 0) & gradient.sum(-1).isfinite()  # where anything is allowed
    used, gradient = used[rows], gradient[rows]
    groups = max(1, round(used.sum(-1).mean().item())) if len(used) else 1  # several competitions side by side
    if not len(used):
        return Finding(path, type(module).__name__, operation, f"{axis}: {used.shape[-1]}")
    return Finding(
        path,
        type(module).__name__,
        operation,
        f"{axis}: {used.shape[-1]}" + (f" in {groups} groups" if groups > 1 else ""),
        exponentiated=True,
        normalized=bool(((used.sum(-1) - groups).abs() < 1e-3).all()),
        soft=(torch.special.entr(used).sum(-1) / groups).exp().mean().item(),
        error=(used - gradient).abs().max().item(),
    )


def _outside(path: str, module: nn.Module) -> Finding:
    reason = next((why for kinds, why in _REASONS if isinstance(module, kinds)), None)
    if reason is None and type(module).__name__ == "Linear":  # PyG's
        reason = _AFFINE
    reason = reason or "no exponentiated and normalized competition seen in its forward"
    name = type(module).__name__
    return Finding(path, name, name.lower(), reason=reason)
