"""Callbacks that monitor the posteriors of layers during training, and audit the whole model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import MetricCollection

from em_lightning.checks import check_counts
from em_lightning.competition import softmin
from em_lightning.distributed import global_sum
from em_lightning.losses import EMLoss
from em_lightning.metrics import layer_metrics
from em_lightning.scope import Audit, audit, curvature
from em_lightning.surgery import Taps, UnitAxis, undo_all, wrap
from em_lightning.surgery.owners import graph_of
from em_lightning.surgery.select import described

_MAX_ITEMS = 64  # of a batch whose curvature is computed, as each position of a feature map is an item; chosen
# Hessian-vector products per layer. With ten eigenvalues at 0.7 times the largest, 10 products give a spectral norm
_POWER_STEPS = 10  # that is 0.9 % too low (median over starts); with 1000 such eigenvalues, 23 %.


def tensorboard_writers(trainer: Any) -> list[Any]:
    """Return the ``SummaryWriter`` of each TensorBoard logger of a Trainer; on ranks above 0, dummies."""
    return [logger.experiment for logger in trainer.loggers if hasattr(logger.experiment, "add_histogram")]


def _hessian_norm(loss: Tensor, tensors: list[Tensor]) -> Tensor:
    """Return the spectral norm of the Hessian of a loss with respect to tensors, by power iteration: a lower bound."""
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)
    vectors: Any = [torch.randn(t.shape, generator=torch.Generator().manual_seed(0)).to(t) for t in tensors]
    norm = torch.cat([vector.flatten() for vector in vectors]).norm()
    graph = set().union(*map(graph_of, gradients))
    if not graph:
        return torch.zeros_like(norm)  # the loss is linear in the tensors
    if any(type(node).__name__ == "Error" for node in graph):  # once_differentiable adds it; products would be 0
        raise RuntimeError("an operation behind the layer has no second derivative")
    for _ in range(_POWER_STEPS):
        units = [vector / norm.clamp_min(torch.finfo(norm.dtype).tiny) for vector in vectors]
        vectors = torch.autograd.grad(gradients, tensors, units, retain_graph=True, materialize_grads=True)
        norm = torch.cat([vector.flatten() for vector in vectors]).norm()
    return norm.detach()


class PosteriorMonitor(Callback):
    r"""Logs metrics and a histogram of the responsibilities of layers.

    The output or input d of a layer (``tap``) is read as energies; the responsibilities are their softmin. In training
    the metrics of every ``every_n_steps``-th batch are logged as ``em/<layer>/<metric>``; in validation and test those
    of the whole set over all ranks are logged as ``em_val/...`` and ``em_test/...``. TensorBoard also gets a
    histogram of the last batch. A layer that cannot be measured is skipped with a warning.

    In training it also logs ``curvature_mean`` and ``curvature_max``, see :func:`em_lightning.scope.curvature`, at
    temperature 1 for up to 64 items of this rank's batch. With ``loss`` it logs, for the global batch, ``dominance``,
    :math:`\|\partial L_\text{task} / \partial d\| / \|\partial L_\text{EM} / \partial d\|`, and the ``cosine`` of the
    two gradients, the EM loss with weight 1. The task's loss is the result of ``training_step`` or the loss of the
    first ``manual_backward`` that depends on the layer, without the losses of :class:`LayerwiseEMLoss`.
    With ``task_curvature`` it logs N times the spectral norm of the Hessian of the task's loss with respect to the d of
    this rank's N items, by power iteration: if that loss is a mean over items, the largest norm of an item's Hessian.

    Args:
        where: the layers, see :func:`~em_lightning.surgery.find_modules`.
        dim: the axis of the units, or "auto", see :class:`~em_lightning.surgery.UnitAxis`.
        every_n_steps: training batches between two measurements.
        loss: the EM loss whose gradient is compared with that of the task.
        task_curvature: whether to log the curvature of the task's loss, which takes about 20 backward passes per layer.
        verbose: whether to print a line per layer at the first batch.

    Raises:
        NoMatchError: at the start, if nothing matches; the message lists the modules of the model.

    Example:
        >>> callbacks = [PosteriorMonitor("encoder.*")]
    """

    def __init__(
        self,
        where: Any,
        *,
        tap: Literal["output", "input"] = "output",
        dim: int | Literal["auto"] = "auto",
        every_n_steps: int = 50,
        loss: EMLoss | None = None,
        task_curvature: bool = False,
        verbose: bool = True,
    ) -> None:
        check_counts(1, every_n_steps=every_n_steps)
        if not isinstance(loss, EMLoss | None):
            raise TypeError(f"loss={loss!r} must be an EMLoss or None")
        self.where, self.tap, self.dim = where, tap, dim
        self.every_n_steps, self.loss, self.task_curvature = every_n_steps, loss, task_curvature
        self.verbose = verbose
        self._taps: Taps | None = None
        self._axes: dict[str, UnitAxis] = {}
        self._metrics: dict[str, MetricCollection] = {}
        self._last: dict[str, Tensor | None] = {}  # energies of the last call since _start, units last; None: skipped
        self._compared: dict[str, dict[str, Tensor]] = {}  # by layer: values of the first loss that depends on it
        self._warned: set[str] = set()  # layers, or the selection, of which a warning was given
        self._undos: list[Callable[[], Any]] = []

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}(where={described(self.where)}, tap={self.tap})"

    def _start(self, pl_module: Any) -> None:
        self._stop()
        verbose = self.verbose and not self._axes
        self._taps = Taps(pl_module, self.where, self.tap, self.dim, verbose=verbose, skip=self._skip)
        self._taps.axes.update(self._axes)  # keep the axes that the first batch decided
        self._axes = self._taps.axes

    def _stop(self) -> None:
        if self._taps is not None:
            self._taps.remove()
        self._taps, self._last, self._compared = None, {}, {}

    def _skip(self, path: str, error: Exception) -> None:
        self._last[path] = None  # otherwise the metrics of its other calls would be logged as those of the layer
        self._warn_once(path, error, "skips")

    def _warn_once(self, where: Any, error: Exception, what: str) -> None:
        shown = described(where)
        if shown not in self._warned:
            self._warned.add(shown)
            rank_zero_warn(f"PosteriorMonitor {what} {shown}, and the run continues: {type(error).__name__}: {error}")

    @contextlib.contextmanager
    def _tolerating(self, where: Any, what: str | None = None) -> Iterator[None]:
        """Turn any exception of a layer or logger into a warning '<what> <where>'; without ``what`` skip the layer."""
        try:
            yield
        except Exception as error:
            self._skip(where, error) if what is None else self._warn_once(where, error, what)

    def _update(self, loss: Tensor | None = None, wanted: Callable[[Tensor], bool] = lambda _: True) -> None:
        """Measure the wanted tensors of all layers, and with a loss compare its gradients with those of the EM loss."""
        taken: dict[str, list[Tensor]] = {}
        with self._tolerating(self.where, "takes no tensors of"):  # one may be overwritten in place
            taken = self._taps.take(wanted) if self._taps else {}
        with_gradient = {path: [one for one in tensors if one.requires_grad] for path, tensors in taken.items()}
        for path, tensors in taken.items():
            with self._tolerating(path):
                for tensor in with_gradient[path] or tensors:  # without calls under no_grad, such as of a teacher
                    self._measure(path, tensor.detach())
        if loss is not None and loss.requires_grad:
            layers = {path: ts for path, ts in with_gradient.items() if ts and path not in self._compared}
            with self._tolerating(self.where, "compares no gradients of"):
                self._compare(loss, layers)

    @torch.no_grad()
    def _measure(self, path: str, tensor: Tensor) -> None:
        if not tensor.is_floating_point():
            raise TypeError(f"the {self.tap} of {path!r} has dtype {tensor.dtype}; energies must be floating-point")
        if not tensor.numel() or self._last.get(path, tensor) is None:
            return  # an expert to which no item was routed, or a layer that is skipped
        dim = self._axes[path](tensor.shape)
        if path not in self._metrics:
            self._metrics[path] = layer_metrics(dim).to(tensor.device)
        if path not in self._last:
            self._metrics[path].reset()
        self._metrics[path].update(tensor)
        self._last[path] = tensor.movedim(dim, -1)

    def _compare(self, loss: Tensor, layers: dict[str, list[Tensor]]) -> None:
        """Compare the gradients of both losses at each layer, and measure the curvature of the task's loss.

        One backward pass gives the gradients of the task's loss at all layers.
        """
        flat = [tensor for tensors in layers.values() for tensor in tensors]
        if self.loss is not None and flat:  # reentrant checkpoints raise here, as they take only loss.backward()
            task_gradients = iter(torch.autograd.grad(loss, flat, retain_graph=True, materialize_grads=True))
        for path, tensors in layers.items():
            values = self._compared[path] = {}
            if self.loss is not None:
                of_task = [next(task_gradients) for _ in tensors]
                with self._tolerating(path, "compares no gradients of"):
                    dim = self._axes[path](tensors[0].shape)
                    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
                    with torch.enable_grad(), torch.autocast(loss.device.type, enabled=False):
                        energies = torch.cat([leaf.float().movedim(dim, -1).flatten(0, -2) for leaf in leaves])
                        of_em = torch.autograd.grad(self.loss.total(energies), leaves)
                    task, em = (torch.cat([part.float().flatten() for part in parts]) for parts in (of_task, of_em))
                    task_square, em_square, product = global_sum(torch.stack([task @ task, em @ em, task @ em]))
                    values["dominance"] = (task_square / em_square).sqrt()
                    norms = task_square.sqrt() * em_square.sqrt()
                    values["cosine"] = product / norms.clamp_min(torch.finfo(norms.dtype).tiny)
            if self.task_curvature:
                with self._tolerating(path, "measures no task_curvature of"):
                    num_items = sum(t.numel() // t.shape[self._axes[path](t.shape)] for t in tensors)
                    values["task_curvature"] = num_items * _hessian_norm(loss, tensors)

    def _report(self, trainer: Any, pl_module: Any, prefix: str) -> None:
        for path, energies in self._last.items():
            if energies is not None:
                with self._tolerating(path, "could not log all of"):
                    self._log(trainer, pl_module, prefix, path, energies)
        self._stop()

    def _log(self, trainer: Any, pl_module: Any, prefix: str, path: str, energies: Tensor) -> None:
        values = self._metrics[path].compute()
        responsibilities = softmin(energies.float()).responsibilities.reshape(-1, energies.shape[-1])
        if prefix == "em":
            curvatures = curvature(responsibilities[:: math.ceil(len(responsibilities) / _MAX_ITEMS)])
            values.update(curvature_mean=curvatures.mean(), curvature_max=curvatures.amax())
        values.update(self._compared.get(path, {}))
        named = {f"{prefix}/{path}/{name}": value for name, value in values.items()}
        if prefix == "em":
            # log_dict() takes as long for the values of a layer as a training step of a small model.
            trainer.callback_metrics.update(named)
            numbers = dict(zip(named, torch.stack([value.double() for value in named.values()]).tolist(), strict=True))
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)
        else:
            pl_module.log_dict(named, batch_size=1)
        for writer in tensorboard_writers(trainer) if trainer.is_global_zero else ():
            writer.add_histogram(f"{prefix}/{path}/responsibilities", responsibilities.flatten(), trainer.global_step)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wrap ``training_step`` inside the wrapper of :class:`LayerwiseEMLoss`, which adds EM losses to its result."""

        def training_step(proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = proceed(*args, **kwargs)
            if self._taps is not None and pl_module.automatic_optimization and result is not None:
                self._update(result if isinstance(result, Tensor) else result["loss"])
                self._taps.recording = False  # the backward pass runs checkpointed layers again
            return result

        if stage == "fit" and (self.loss is not None or self.task_curvature):
            self._undos.append(wrap(pl_module, "training_step", training_step))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Wrap ``manual_backward`` around the wrapper of :class:`LayerwiseEMLoss`, which adds EM losses to its loss."""

        def manual_backward(proceed: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._taps is None:
                return proceed(loss, *args, **kwargs)
            graph = graph_of(loss)
            self._update(loss, lambda tensor: tensor.grad_fn in graph)
            with self._taps.switched(on=False):
                return proceed(loss, *args, **kwargs)

        if not tensorboard_writers(trainer):
            rank_zero_info("No histograms of responsibilities are logged: they need a TensorBoardLogger.")
        if (self.loss is not None or self.task_curvature) and not pl_module.automatic_optimization:
            self._undos.append(wrap(pl_module, "manual_backward", manual_backward))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx % self.every_n_steps == 0:
            self._start(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._update()
        self._report(trainer, pl_module, "em")

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start to collect, except in the sanity check, which runs only a few batches."""
        if not trainer.sanity_checking:
            self._start(pl_module)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._update()

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._report(trainer, pl_module, "em_test" if trainer.testing else "em_val")

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def teardown(self, trainer: Any, pl_module: Any, stage: Any) -> None:
        self._stop()
        undo_all(self._undos)

    on_exception = teardown  # type: ignore[assignment]  # Lightning calls no teardown after an exception


class EMAudit(Callback):
    """Prints :func:`em_lightning.audit` of the model at the first training batch, and logs it as text to TensorBoard.

    If the audit or a logger fails, it warns and the run continues. ``audit`` has the findings, none if the audit fails.
    """

    def __init__(self, printed: bool = True) -> None:
        self.printed = printed
        self.audit: Audit | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.audit is not None:
            return
        self.audit = Audit()
        what, advice = "has no table", "; call em_lightning.audit with run=..., or on a part of the model"
        try:
            self.audit = audit(pl_module, batch)
            what, advice = "could not log its table", ""
            if self.printed and trainer.is_global_zero:
                print(self.audit)
            table = "\n".join(f"    {line}" for line in str(self.audit).splitlines())  # indented: code in Markdown
            for writer in tensorboard_writers(trainer) if trainer.is_global_zero else ():
                writer.add_text("em/audit", table, trainer.global_step)
        except Exception as error:  # models and loggers raise exceptions of any class
            rank_zero_warn(f"EMAudit {what}: {type(error).__name__}: {error}. Training continues{advice}")
