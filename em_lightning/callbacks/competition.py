"""Callback that logs how sharply the units of layers compete, and how strong the EM loss is beside the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor

from em_lightning.checks import check_at_least
from em_lightning.competition import softmin
from em_lightning.distributed import global_sum
from em_lightning.losses import EMLoss
from em_lightning.scope import curvature
from em_lightning.surgery import Taps, undo_all, wrap
from em_lightning.surgery.owners import graph_of

_MAX_ITEMS = 64  # of a batch, whose curvature is computed


class CompetitionMonitor(Callback):
    r"""Logs the curvature of the competition in layers, and the dominance of the task's gradient over the EM loss's.

    The output d of a layer is read as energies. Every ``every`` batches it logs, as ``em/<layer>/<name>``:

    - ``curvature_mean`` and ``curvature_max``, see :func:`em_lightning.scope.curvature`, at T = 1 over 64 items of
      this rank's batch, and ``curvature_gap``, 1/2 minus the maximum;
    - ``dominance``, :math:`\|\partial L_\text{task} / \partial d\| / \|\partial L_\text{EM} / \partial d\|` over the
      global batch, and ``cosine`` of the two gradients.

    The task's loss is that which the model returns from ``training_step`` or passes to ``manual_backward``, without the
    losses of :class:`LayerwiseEMLoss`. Parameters are the same with and without the monitor; hooks on gradients of
    activations run once more. In manual optimization a layer is measured at the first backward pass that depends on it.

    Args:
        where: the layers: a class, a name pattern, a predicate, or a list of these.
        every: batches between two measurements.
        tap: "output" or "input" of the layer.
        dim: the axis of the units; "auto" decides as in :class:`LayerwiseEMLoss`.
        loss: the EM loss; ``None`` stands for ``EMLoss()``.
        verbose: whether to print a line per layer at the first batch.

    Raises:
        NoMatchError: when the fit starts, if nothing matches.
        ValueError: ``every`` is less than 1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CompetitionMonitor("encoder.*")], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        where: Any,
        every: int = 50,
        *,
        tap: Literal["output", "input"] = "output",
        dim: int | Literal["auto"] = "auto",
        loss: EMLoss | None = None,
        verbose: bool = True,
    ) -> None:
        check_at_least(1, every=every)
        self.where, self.every, self.tap, self.dim, self.verbose = where, every, tap, dim, verbose
        self.loss = EMLoss() if loss is None else loss
        self._batch = 0
        self._taps: Taps | None = None
        self._undos: list[Callable[[], Any]] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wrap ``training_step`` before :class:`LayerwiseEMLoss` does, to see the loss of the task alone."""
        if stage != "fit":
            return

        def training_step(proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            taps = self._taps
            if taps is None or self._batch % self.every:
                return proceed(*args, **kwargs)
            with taps.switched(on=True):
                result = proceed(*args, **kwargs)
            if pl_module.automatic_optimization and result is not None:
                self._measure(pl_module, result if isinstance(result, Tensor) else result["loss"], taps.take())
            taps.clear()
            return result

        self._undos.append(wrap(pl_module, "training_step", training_step))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Register the hooks, after Lightning has converted BatchNorm to SyncBatchNorm, which drops hooks."""
        self._taps = Taps(pl_module, self.where, self.tap, dim=self.dim, verbose=self.verbose)
        self._taps.recording = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Wrap ``manual_backward`` after :class:`LayerwiseEMLoss` did, to see the loss of the task alone."""

        def manual_backward(proceed: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._taps is None or not self._taps.captured:
                return proceed(loss, *args, **kwargs)
            graph = graph_of(loss)
            self._measure(pl_module, loss, self._taps.take(lambda tensor: tensor.grad_fn in graph))
            with self._taps.switched(on=False):  # checkpointed layers are run again
                return proceed(loss, *args, **kwargs)

        if not pl_module.automatic_optimization:
            self._undos.append(wrap(pl_module, "manual_backward", manual_backward))

    def _measure(self, pl_module: Any, loss: Tensor, captured: dict[str, list[Tensor]]) -> None:
        trained = [tensor for tensors in captured.values() for tensor in tensors if tensor.requires_grad]
        of_task = {}
        if trained and loss.requires_grad:
            gradients = torch.autograd.grad(loss, trained, retain_graph=True, materialize_grads=True)
            of_task = dict(zip(map(id, trained), gradients, strict=True))
        for path, tensors in captured.items():
            dim = self._taps.axes[path](tensors[0].shape)  # type: ignore[union-attr]
            tensors = [tensor for tensor in tensors if id(tensor) in of_task] or tensors
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            with torch.enable_grad(), torch.autocast(leaves[0].device.type, enabled=False):
                energies = torch.cat([leaf.float().movedim(dim, -1).flatten(0, -2) for leaf in leaves])
                of_em = torch.autograd.grad(self.loss.total(energies), leaves)
            some = energies.detach()[:: -(-len(energies) // _MAX_ITEMS) or 1]
            values = curvature(softmin(some).responsibilities)
            log = {
                "curvature_mean": values.mean(),
                "curvature_max": values.amax(),
                "curvature_gap": 0.5 - values.amax(),
            }
            if id(tensors[0]) in of_task:
                pairs = [
                    (of_task[id(t)].float().flatten(), e.float().flatten()) for t, e in zip(tensors, of_em, strict=True)
                ]
                task, em, product = global_sum(
                    torch.stack([torch.stack([t.dot(t), e.dot(e), t.dot(e)]) for t, e in pairs]).sum(0)
                )
                log["dominance"] = (task / em).sqrt()
                log["cosine"] = product / (task.sqrt() * em.sqrt()).clamp_min(torch.finfo(em.dtype).tiny)
            pl_module.log_dict({f"em/{path}/{name}": value for name, value in log.items()}, batch_size=1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch."""
        self._batch += 1

    def teardown(self, trainer: Any, pl_module: Any, stage: Any) -> None:
        """Remove hooks and wrappers."""
        if self._taps is not None:
            self._taps.remove()
        self._taps = None
        undo_all(self._undos)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove hooks and wrappers: Lightning calls no teardown after an exception."""
        self.teardown(trainer, pl_module, None)
