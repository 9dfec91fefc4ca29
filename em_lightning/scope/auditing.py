"""Run a model once on a copy of its state, and record and check each softmax-like operation."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # no public hook sees ATen operations
from torch.utils.data import DataLoader, Dataset

from em_lightning.activations import Activation
from em_lightning.competition import Competition
from em_lightning.operators import EMOperator, SetOperator
from em_lightning.scope.findings import NOT_CHECKED, UNKNOWN, Audit, Finding, Softmax, check_call, reason_of
from em_lightning.surgery import walk
from em_lightning.surgery.axes import Observation
from em_lightning.surgery.select import FUNCTIONS, uncompiled

_OPERATIONS = {
    "aten::_softmax": "softmax",
    "aten::_safe_softmax": "softmax",
    "aten::_log_softmax": "log-softmax",
    "aten::logsumexp": "logsumexp",
    "aten::nll_loss_forward": "cross-entropy",
    "aten::nll_loss2d_forward": "cross-entropy",
    "aten::topk": "topk",
    "aten::argmax": "argmax",
}
_FUNCTIONS = {f"aten::{function.__name__}": kind for function, kind in FUNCTIONS.items()}
_NOT_SEARCHED = (*FUNCTIONS.values(), nn.RNNBase, nn.RNNCellBase)  # for functions: activations, and gates of RNNs
_NAMESPACES = "aten prim prims profiler c10d _c10d_functional fsdp torch_scatter torch_sparse em_lightning".split()
_SUMS = "sum mean cumsum scatter_add scatter_reduce index_add segment_reduce mm bmm mv dot linalg_vector_norm".split()
_MASKS_AND_COPIES = ("mul", "masked_fill", "where", "clone", "to_copy")
_CHECKED_AS_A_WHOLE = (Competition, Activation, EMOperator)
# Uncalled modules inside these are not reported, because their weights may be read without calling them.
_REPORTED_AS_A_WHOLE = (Activation, Competition, SetOperator, nn.MultiheadAttention)


def audit(model: nn.Module, batch: Any, run: Callable[[], Any] | None = None) -> Audit:
    r"""Find the layers of a model in which energies over competing hypotheses are exponentiated and normalized.

    Each softmax, log-softmax, logsumexp, cross-entropy and attention of one forward pass is checked numerically: with
    energies d = -logits, the gradient of :math:`F = -\log \sum_k e^{-d_k}` must equal the responsibilities that the
    model used. Competitions, activations and EM operators of this library are checked on their own posterior and free
    energy. For every other layer the table names the assumption that it violates.

    The model runs in eval mode on deep copies of its state and of the batch. Parameters, buffers, metrics, teachers,
    environments and the random states of Python, NumPy and torch stay unchanged. Data sets and loaders are not copied.

    Args:
        model: any module. For a LightningModule, ``training_step`` is run without logging, to include the loss; in
            manual optimization new optimizers update the copy.
        batch: the argument of ``training_step``. For other modules the input of the forward: a tuple is unpacked, a
            dictionary becomes keyword arguments if the forward has these names.
        run: a function that runs the model instead; ``batch`` is then ignored.

    Raises:
        TypeError: an attribute of the model cannot be copied, or there is neither a batch nor ``run``.

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
    if batch is None and run is None:
        raise TypeError("batch=None must be a batch, () for a forward without arguments, or come with run=, a function")
    model = uncompiled(model)
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with _on_a_copy(model, None if run else batch) as batch, isolate_rng(include_cuda=False):
        with torch.random.fork_rng(devices), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            model.eval()
            # Under a function mode, nn.MultiheadAttention uses no fused kernels, whose softmax cannot be seen.
            with BaseTorchFunctionMode(), _Recorder(model) as recorder:
                run() if run else _run(model, batch)
            return recorder.findings()


def _run(model: Any, batch: Any) -> None:
    if hasattr(model, "training_step"):
        acting_outside = ("log", "log_dict", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
        vars(model).update(dict.fromkeys(acting_outside, lambda *_, **__: None))
        if not getattr(model, "automatic_optimization", True):
            made = model.configure_optimizers()  # new optimizers, of the copied state
            for name, kind in {"optimizers": Optimizer, "lr_schedulers": LRScheduler}.items():
                found: list[Any] = []
                apply_to_collection(made, kind, found.append)
                vars(model)[name] = lambda *_, found=found, **__: found[0] if len(found) == 1 else found
            vars(model)["manual_backward"] = lambda loss, *args, **kwargs: loss.backward(*args, **kwargs)
        step: Any = type(model).training_step  # not the instance's, which callbacks may have wrapped
        try:
            step(model, batch, 0) if len(inspect.signature(step).parameters) > 2 else step(model, batch)
        except RuntimeError as error:
            if "not attached to a `Trainer`" not in str(error):
                raise
            raise RuntimeError(
                f"{error} Its training_step needs one: audit it in a fit, with the callback EMAudit, or audit its "
                f"forward, with run=lambda: model(x), or with --input on the command line"
            ) from error
    else:
        call(model, batch)


def call(model: nn.Module, batch: Any) -> Any:
    """Call a module with a batch; unpack a tuple, and a dictionary if its keys are arguments of the forward."""
    if not isinstance(batch, Mapping):
        return model(*batch) if isinstance(batch, tuple) else model(batch)
    parameters = inspect.signature(model.forward).parameters
    unknown = batch.keys() - parameters.keys()
    if not unknown or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return model(**batch)
    try:
        return model(batch)
    except Exception as error:  # models raise exceptions of any class
        rule = f"of the arguments {', '.join(parameters)} of {type(model).__name__}.forward, or entries of its only one"
        raise TypeError(f"{', '.join(sorted(map(str, unknown)))} must be {rule}: {error}") from error


@contextlib.contextmanager
def _on_a_copy(model: Any, batch: Any) -> Iterator[Any]:
    """Give a model and its submodules a deep copy of their state, and yield a copy of the batch.

    The state is replaced, not the model, so that functions which hold the model or a part of it use the copy too.
    """
    states = {module: vars(module) for module in model.modules()}
    attributes = [value for state in states.values() for value in state.values()]
    shared: list[Any] = [value for value in attributes if isinstance(value, (Dataset, DataLoader))]
    trainer = None
    with contextlib.suppress(AttributeError, RuntimeError):  # not a LightningModule, or not attached
        trainer = model.trainer
    try:
        with _CopyGraphs():
            copied, batch = copy.deepcopy((model, batch), {id(value): value for value in (trainer, *shared)})
    except Exception as error:  # objects of other libraries raise exceptions of any class
        raise TypeError(
            f"{type(model).__name__} cannot be copied ({error}), and the audit runs on a copy: audit a part of the "
            f"model, such as audit(model.encoder, x)"
        ) from error
    try:
        for module, other in zip(states, copied.modules(), strict=True):
            object.__setattr__(module, "__dict__", vars(other))
        if trainer is not None:
            model.trainer = trainer  # LightningModule does not copy it
        Observation.enabled = False  # taps record nothing, and first calls print nothing
        yield batch
    finally:
        Observation.enabled = True
        for module, state in states.items():
            object.__setattr__(module, "__dict__", state)


class _CopyGraphs(TorchFunctionMode):
    """Lets ``copy.deepcopy`` copy tensors that are not leaves, such as attention weights that a layer keeps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Records the operations of a model in a ``with`` block; its hooks are not removed, as the model is a copy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sites = [site for site in walk(model) if not site.function]
        self.called: dict[str, nn.Module] = {}
        self.softmaxes: list[Softmax] = []
        # By _key(tensor). The tensor itself is the last entry of each value, so that no other gets its address.
        self._exponentials: dict[Any, tuple[Finding, Tensor, Tensor]] = {}  # row if it is no softmax; values of exp
        self._gathered: dict[Any, tuple[Any, Any, Any]] = {}  # axes and index of the gathering
        self._makers: dict[Any, tuple[str, nn.Module, Tensor]] = {}  # path and module that returned the tensor
        self._summed: dict[int, tuple[Finding, Tensor]] = {}  # exponentials with a sum, by the id of the finding
        self._quotients: list[tuple[Tensor, Softmax]] = []  # values of exp, and the softmax that they may be
        self.checked_calls: list[tuple[Any, ...]] = []  # arguments of check_call
        self.found: list[Finding] = []
        self._stack: list[tuple[str, nn.Module]] = [("", model)]
        for path, module in [("", model), *((site.path, site.module) for site in self.sites)]:
            module.register_forward_pre_hook(functools.partial(self._enter, path))
            module.register_forward_hook(functools.partial(self._leave, path), with_kwargs=True)

    def _inside(self, *kinds: type[nn.Module]) -> bool:
        return any(isinstance(module, kinds) for _, module in self._stack[1:])

    def _enter(self, path: str, module: nn.Module, _: Any) -> None:
        if not self._inside(Activation):  # the kernel of an activation is a part of it
            self.called.setdefault(path, module)
        self._stack.append((path, module))

    def _leave(self, path: str, module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> None:
        while len(self._stack) > 1 and self._stack.pop()[1] is not module:
            pass  # the forward hook of a module that raised was not called
        if isinstance(module, _CHECKED_AS_A_WHOLE) and not self._inside(Activation):
            given = inspect.signature(module.forward).bind(*inputs, **kwargs)  # by position: check_call reads inputs[0]
            self.checked_calls.append((path, module, given.args, given.kwargs, output))
        if isinstance(output, Tensor):
            self._makers.setdefault(_key(output), (path, module, output))  # the innermost module returns it first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._inside(*_CHECKED_AS_A_WHOLE):
            return output
        operation = _OPERATIONS.get(func.name())
        path, module = self._stack[-1]
        if kind := _FUNCTIONS.get(func.name()):
            if not isinstance(module, _NOT_SEARCHED):
                self.found.append(Finding(path, type(module).__name__, kind.__name__.lower(), reason=reason_of(kind())))
        elif operation is None:
            if func.namespace not in _NAMESPACES:
                self.found.append(Finding(path, type(module).__name__, func.name(), reason=UNKNOWN))
            elif not (func.name() == "aten::exp" and any(_key(args[0]) == _key(s.output) for s in self.softmaxes)):
                name = func.name().removeprefix("aten::").partition(".")[0].strip("_")
                self._follow(name, path, module, args, output)
        elif operation == "cross-entropy":
            last = self.softmaxes[-1] if self.softmaxes else None
            if last and last.operation == "log-softmax" and _key(last.output) == _key(args[0]):
                last.operation = operation
        elif operation in ("topk", "argmax"):
            reason = "hard selection: what is not selected has no gradient"
            self.found.append(Finding(path, type(module).__name__, operation, reason=reason))
        else:
            maker = self._makers.get(_key(args[0]))
            # A softmax belongs to the layer that returned its logits if it runs in no layer, or in a loss. The stack
            # begins with the model, and its forward adds it again: with at most two entries, no layer is running.
            in_no_layer = len(self._stack) <= 2 or type(module).__name__.endswith("Loss")
            if maker is not None and in_no_layer:
                path, module, _ = maker
            if isinstance(module, nn.MultiheadAttention):
                operation = "attention"
            axes = tuple(args[1]) if operation == "logsumexp" else (args[1],)
            logits = args[0].clone()
            softmax = Softmax(path, module, operation, logits, output, axes, from_layer=maker is not None)
            self.softmaxes.append(softmax)
        return output

    def _follow(self, name: str, path: str, module: nn.Module, args: Any, output: Any) -> None:
        """Follow exponentials to sums and to quotients; a model may compute them once for the sum, and once again."""
        if name == "exp" and output.is_floating_point() and output.numel() > 1:
            row = Finding(path, type(module).__name__, "exp", reason=UNKNOWN)
            self._exponentials[_key(output)] = row, output.clone(), output
        elif name in ("index_select", "gather", "index"):
            axis, index = args[1:3] if len(args) > 2 else (0, args[1][0])  # the last is index(x, [i])
            index = index.movedim(axis, 0).flatten(1)[:, 0] if isinstance(index, Tensor) and index.ndim > 1 else index
            self._gathered[_key(output)] = (axis,), index, output
        found = [self._exponentials[_key(x)] for x in args if isinstance(x, Tensor) and _key(x) in self._exponentials]
        for row, values, _ in found[:1]:
            is_dense = torch.empty_like(output).stride() == output.stride()  # without gaps, as the values are
            if name in _SUMS:
                self._summed[id(row)] = row, values
            elif name in _MASKS_AND_COPIES:
                self._exponentials[_key(output)] = row, values, output
            elif name == "div" and isinstance(args[1], Tensor) and is_dense and output.numel() == values.numel():
                logits = values.as_strided(output.shape, output.stride()).log().masked_fill(output == 0, -math.inf)
                strides = args[1].expand(output.shape).stride()
                # The axes over which the divisor is the same sum; if there are none, it may be gathered by group.
                axes = tuple(axis for axis, size in enumerate(output.shape) if size > 1 and strides[axis] == 0)
                axes, index, _ = (axes, None, None) if axes else self._gathered.get(_key(args[1]), ((), None, None))
                softmax = Softmax(path, module, "exp / sum", logits, output, axes, from_layer=False, index=index)
                fits = index is None or index.shape == output.shape[axes[0] :][:1]  # one group per hypothesis
                self._quotients += [(values, softmax)] if axes and fits else []

    def findings(self) -> Audit:
        """Return all findings in the order in which the modules were called; those that were not called come last."""
        inner = {site.path for site in self.sites if any(isinstance(m, _REPORTED_AS_A_WHOLE) for m in site.ancestors)}
        modules = {**self.called, **{site.path: site.module for site in self.sites if site.path not in inner}}
        called, whole = set(self.called), list(self.checked_calls)  # the checks call modules, whose hooks add to both
        checks = [*(check_call(*one) for one in whole), *(softmax.check() for softmax in self.softmaxes)]
        quotients = [(values, softmax.check()) for values, softmax in self._quotients]
        quotients = [(values, one) for values, one in quotients if one.em or not one.checked]
        found = [*self.found, *filter(None, checks), *(one for _, one in quotients)]
        divided = [values for values, _ in quotients]
        found += [row for row, x in self._summed.values() if not any(torch.equal(x, values) for values in divided)]
        reached = {(one.path, one.operation) for one in found if one.checked}
        calls: dict[tuple[str, str, str], list[Finding]] = {}  # of an operation over an axis
        for one in found:
            if one.checked or (one.path, one.operation) not in reached:
                calls.setdefault((one.path, one.operation, one.hypotheses.partition(":")[0]), []).append(one)
        rows = [replace(max(each, key=lambda one: one.error or 0.0), calls=len(each)) for each in calls.values()]
        result = Audit()
        for path, module in modules.items():
            of_module = [row for row in rows if row.path == path]
            result.extend(of_module)
            if not of_module and not list(module.children()):
                name = type(module).__name__
                reason = reason_of(module) if path in called else f"{NOT_CHECKED}its forward was not called"
                result.append(Finding(path, name, name.lower(), reason=reason))
        result.extend(row for row in rows if row.path not in modules)
        return result


def _key(tensor: Tensor) -> tuple[int, int]:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided  # others may have no address
    return tensor.data_ptr() if plain else id(tensor), tensor.numel()
