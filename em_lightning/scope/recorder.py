"""Record the softmaxes, losses, hard selections and competitions of a run, and the modules in which they take place."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # no public hook sees ATen operations

from em_lightning.activations import Activation
from em_lightning.competition import Competition
from em_lightning.operators import EMOperator, SetOperator
from em_lightning.scope.checks import Call, Softmax, check_call, check_softmax
from em_lightning.scope.findings import HARD, NOT_CALLED, RELU, Audit, Finding, reason_of
from em_lightning.surgery import walk

_OPERATIONS = {
    "aten::_softmax": "softmax",
    "aten::_safe_softmax": "softmax",
    "aten::_log_softmax": "log-softmax",
    "aten::logsumexp": "logsumexp",
    "aten::nll_loss_forward": "cross-entropy",
    "aten::nll_loss2d_forward": "cross-entropy",
    "aten::relu": "relu",
    "aten::relu_": "relu",
    "aten::topk": "topk",
    "aten::argmax": "argmax",
}
# Their inner modules may go uncalled: torch and the library use the weights of some alone.
_WHOLE = (Activation, Competition, SetOperator, nn.MultiheadAttention)


class Recorder(TorchDispatchMode):
    """Records the operations of a model in a ``with`` block; hooks stay on its modules.

    Attributes:
        called: the modules that were called, by path.
        softmaxes: softmaxes and cross-entropies, except in competitions of this library.
        calls: the calls of competitions, activations and operators of this library.
        selections: findings about ReLU, topk and argmax.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.root = ("", model)
        self.called: dict[str, nn.Module] = {}
        self.softmaxes: list[Softmax] = []
        self.calls: list[Call] = []
        self.selections: list[Finding] = []
        self._stack: list[tuple[str, nn.Module]] = []
        self._makers: dict[tuple[int, int], tuple[str, nn.Module, Tensor]] = {}
        for path, module in [self.root, *((site.path, site.module) for site in walk(model) if not site.function)]:
            module.register_forward_pre_hook(functools.partial(self._enter, path))
            module.register_forward_hook(functools.partial(self._leave, path), with_kwargs=True)

    @property
    def _current(self) -> tuple[str, nn.Module]:
        return self._stack[-1] if self._stack else self.root

    def _inside(self, *kinds: type[nn.Module]) -> bool:
        return any(isinstance(module, kinds) for _, module in self._stack)

    def _enter(self, path: str, module: nn.Module, _: Any) -> None:
        if not self._inside(Activation):  # whose kernel is a part of it
            self.called.setdefault(path, module)
        self._stack.append((path, module))

    def _leave(self, path: str, module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> None:
        while self._stack and self._stack.pop()[1] is not module:
            pass  # a module that raised has left no hook call
        if isinstance(module, (Competition, Activation, EMOperator)) and not self._inside(Activation):
            self.calls.append(Call(path, module, inputs, kwargs, output))
        if isinstance(output, Tensor):
            # The innermost module that returned it. The output is kept: a freed address could be used again.
            self._makers.setdefault(_key(output), (path, module, output))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        operation = _OPERATIONS.get(func.name())
        if operation is None or self._inside(Competition, Activation, EMOperator):  # these are checked as a whole
            return output
        if operation == "cross-entropy":
            last = self.softmaxes[-1] if self.softmaxes else None
            if last and last.operation == "log-softmax" and _key(last.output) == _key(args[0]):
                last.operation = operation
        elif operation in ("relu", "topk", "argmax"):
            path, module = self._current
            reason = RELU if operation == "relu" else HARD
            self.selections.append(Finding(path, type(module).__name__, operation, reason=reason))
        else:
            dims = args[1] if operation == "logsumexp" else [args[1]]
            if len(dims) == 1:
                self._record(operation, args[0], dims[0], output)
        return output

    def _record(self, operation: str, logits: Tensor, dim: int, output: Tensor) -> None:
        path, module = self._current
        maker = self._makers.get(_key(logits))
        outside = len(self._stack) <= 1 or type(module).__name__.endswith("Loss")
        if maker is not None and outside:  # a loss outside of the layers belongs to the output layer
            path, module, _ = maker
        if isinstance(module, nn.MultiheadAttention):
            operation = "attention"
        self.softmaxes.append(Softmax(path, module, operation, logits.clone(), output, dim, maker is not None))

    def findings(self) -> Audit:
        """Return all findings in the order in which the modules were called; those that were not called come last."""
        sites = [site for site in walk(self.root[1]) if not site.function]
        whole = {site.path for site in sites if any(isinstance(module, _WHOLE) for module in site.ancestors)}
        modules = {**self.called, **{site.path: site.module for site in sites if site.path not in whole}}
        called, calls = set(self.called), list(self.calls)  # the checks call modules, whose hooks add to both
        found: dict[tuple[str, str], Finding] = {}
        checks = [*map(check_call, calls), *map(check_softmax, self.softmaxes)]
        for finding in (*self.selections, *filter(None, checks)):
            key = (finding.path, finding.operation)
            found[key] = found[key].merged(finding) if key in found else finding
        result = Audit()
        for path, module in modules.items():
            own = [found.pop(key) for key in list(found) if key[0] == path]
            result.extend(own)
            if not own and not any(True for _ in module.children()):
                name, reason = type(module).__name__, reason_of(module) if path in called else NOT_CALLED
                result.append(Finding(path, name, name.lower(), reason=reason))
        result.extend(found.values())
        return result


def _key(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()
