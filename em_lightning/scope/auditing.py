"""Run a model once on a copy of its state, and check each softmax-like operation."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset

from em_lightning.scope.findings import Audit
from em_lightning.scope.recorder import Recorder


def audit(model: nn.Module, batch: Any, run: Callable[[], Any] | None = None) -> Audit:
    r"""Find the layers of a model in which energies over competing hypotheses are exponentiated and normalized.

    Each softmax, log-softmax, cross-entropy and attention of one forward pass is checked on its own numbers: with
    energies d = -logits, the gradient of :math:`F = -\log \sum_k e^{-d_k}` must equal the responsibilities that the
    model used. Competitions and activations of this library are checked on their own posterior and free energy. For
    every other layer the table names the assumption that it violates, and what could replace it.

    The model runs in eval mode on deep copies of its state and of the batch. Parameters, buffers, metrics, teachers,
    environments and other attributes stay as they are, and so do the random streams of Python, NumPy and torch. Data
    sets and data loaders are not copied.

    Args:
        model: any module. Of a LightningModule the ``training_step`` is run without its logs, to include its loss; in
            manual optimization it steps optimizers of the copy.
        batch: the argument of ``training_step``. For other modules the input of the forward: a tuple is unpacked, a
            dictionary becomes keyword arguments if the forward has these names.
        run: runs the model in another way; ``batch`` is then ignored.

    Returns:
        One finding per operation.

    Raises:
        TypeError: an attribute of the model cannot be copied.

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
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    fast_path = mha.get_fastpath_enabled()
    with _on_a_copy(model, None if run else batch) as batch, isolate_rng(include_cuda=False):
        with torch.random.fork_rng(devices), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            mha.set_fastpath_enabled(False)
            model.eval()
            try:
                with Recorder(model) as recorder:
                    run() if run else _run(model, batch)
                return recorder.findings()
            finally:
                mha.set_fastpath_enabled(fast_path)


def _run(model: Any, batch: Any) -> None:
    if hasattr(model, "training_step"):
        vars(model).update(log=_nothing, log_dict=_nothing)
        if not getattr(model, "automatic_optimization", True):
            _optimize_the_copy(model)
        step: Any = type(model).training_step  # not the instance's, which callbacks may have wrapped
        step(model, batch, 0) if len(inspect.signature(step).parameters) > 2 else step(model, batch)
    else:
        call(model, batch)


def call(model: nn.Module, batch: Any) -> Any:
    """Call the forward: with the items of a tuple, the keywords of a dictionary if it has these names, or the batch."""
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters
        if set(batch) <= set(parameters) or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _optimize_the_copy(model: Any) -> None:
    """Give a model in manual optimization new optimizers of its present state, without the Trainer's."""
    made = model.configure_optimizers()
    methods = {"optimizers": _found(made, Optimizer), "lr_schedulers": _found(made, LRScheduler)}
    for name, found in methods.items():
        vars(model)[name] = lambda *_, found=found, **__: found[0] if len(found) == 1 else found
    vars(model).update(dict.fromkeys(["toggle_optimizer", "untoggle_optimizer", "clip_gradients"], _nothing))
    vars(model)["manual_backward"] = lambda loss, *args, **kwargs: loss.backward(*args, **kwargs)


def _found(made: Any, kind: type) -> list[Any]:
    """Return the instances of a class in what ``configure_optimizers`` returned."""
    if isinstance(made, kind):
        return [made]
    parts = made.values() if isinstance(made, Mapping) else made if isinstance(made, (list, tuple)) else ()
    return [one for part in parts for one in _found(part, kind)]


def _nothing(*_: Any, **__: Any) -> None:
    """Replace a method that would act outside of the model."""


@contextlib.contextmanager
def _on_a_copy(model: Any, batch: Any) -> Iterator[Any]:
    """Let a model and its submodules work on a deep copy of their state, and yield a copy of the batch.

    The state is exchanged, not the model, so that functions which hold the model or a part of it use the copy too.
    """
    attributes = [value for module in model.modules() for value in vars(module).values()]
    shared: list[Any] = [value for value in attributes if isinstance(value, (Dataset, DataLoader))]
    trainer = None
    with contextlib.suppress(AttributeError, RuntimeError):  # not a LightningModule, or not attached
        trainer = model.trainer
    try:
        with _CopyGraphs():
            copied, batch = copy.deepcopy((model, batch), {id(value): value for value in (trainer, *shared)})
    except Exception as error:  # objects of other libraries raise any kind
        raise TypeError(
            f"{type(model).__name__} cannot be copied ({error}), and the audit runs on a copy: audit a part of the "
            f"model, such as audit(model.encoder, x)"
        ) from error
    modules = list(model.modules())
    states = [vars(module) for module in modules]
    try:
        for module, other in zip(modules, copied.modules(), strict=True):
            object.__setattr__(module, "__dict__", vars(other))
        if trainer is not None:
            model.trainer = trainer  # which LightningModule does not copy
        yield batch
    finally:
        for module, state in zip(modules, states, strict=True):
            object.__setattr__(module, "__dict__", state)


class _CopyGraphs(TorchFunctionMode):
    """Lets ``copy.deepcopy`` copy tensors that are not leaves, such as attention weights that a layer keeps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))
