"""Callbacks that monitor the posteriors of layers during training, and audit the whole model."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MetricCollection

from em_lightning.competition import softmin
from em_lightning.metrics import layer_metrics
from em_lightning.plots.figures import tensorboard_writers
from em_lightning.scope import Audit, audit
from em_lightning.surgery import Taps, UnitAxis
from em_lightning.surgery.select import described


def responsibilities_figure(energies: Tensor, max_items: int = 64) -> Any:
    """Draw the responsibilities (columns) of the first items (rows) of energies (..., K), and the mean of each column.

    Example:
        >>> len(responsibilities_figure(torch.rand(100, 8)).axes)
        3
    """
    from em_lightning.plots.figures import figure_style, new_figure

    responsibilities = softmin(energies.detach().float().flatten(0, -2)).responsibilities.cpu().numpy()
    with figure_style():
        figure, axes = new_figure(2, 2, width=4.0, height=3.0)
        image = axes[0].imshow(responsibilities[:max_items], aspect="auto", vmin=0.0, interpolation="nearest")
        axes[0].set(title="responsibilities", xlabel="hypothesis", ylabel="item")
        axes[0].grid(False)
        figure.colorbar(image, ax=axes[0])
        axes[1].bar(range(responsibilities.shape[-1]), responsibilities.mean(0))
        axes[1].set(title="mean responsibility", xlabel="hypothesis")
    return figure


class PosteriorMonitor(Callback):
    """Logs how the units of layers compete: metrics, a histogram and a figure of responsibilities.

    The output of a layer is read as energies, and the responsibilities are their softmin. In training the metrics are
    those of one batch in ``every_n_steps``, logged as ``em/<layer>/<metric>``; in validation and test those of the
    whole set over all ranks, as ``em_val/...`` and ``em_test/...``. Loggers like TensorBoard's also get a histogram
    and a figure of the last batch.

    Without a Trainer: :func:`em_lightning.metrics.layer_metrics` and :func:`responsibilities_figure`.

    Args:
        where: the layers: a class, a name pattern, a predicate, or a list of these.
        target: a second selection, which must match as well.
        tap: "output" or "input" of the layer.
        dim: the axis of the units; "auto" takes that which the layer's type defines, and otherwise decides at the
            first batch: the one of axes 1 and -1 that has the width of the layer.
        every_n_steps: training steps between two measurements.
        figures: whether to draw figures.
        verbose: whether to print a line per layer at the first batch: path, shape, axis of units, units, items.

    Raises:
        NoMatchError: at the start, if nothing matches; the message lists the modules of the model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PosteriorMonitor("encoder.*")], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        where: Any,
        *,
        target: type[nn.Module] | None = None,
        tap: Literal["output", "input"] = "output",
        dim: int | Literal["auto"] = "auto",
        every_n_steps: int = 50,
        figures: bool = True,
        verbose: bool = True,
    ) -> None:
        if not (isinstance(every_n_steps, int) and every_n_steps >= 1):
            raise ValueError(f"every_n_steps={every_n_steps!r} must be an int of at least 1")
        self.where = where
        self.target = target
        self.tap = tap
        self.dim = dim
        self.every_n_steps = every_n_steps
        self.figures = figures
        self.verbose = verbose
        self._taps: Taps | None = None
        self._axes: dict[str, UnitAxis] = {}
        self._metrics: dict[str, MetricCollection] = {}
        self._last: dict[str, Tensor] = {}
        self._skipped: set[str] = set()

    @property
    def state_key(self) -> str:
        """A key that differs between callbacks on different layers."""
        return f"{type(self).__qualname__}(where={described(self.where)}, tap={self.tap})"

    def _start(self, pl_module: Any) -> None:
        self._stop()
        verbose = self.verbose and not self._axes
        self._taps = Taps(pl_module, self.where, self.tap, self.target, self.dim, verbose=verbose, skip=self._skip)
        self._taps.axes.update(self._axes)  # as decided at the first batch
        self._axes = self._taps.axes
        self._taps.attach()

    def _stop(self) -> None:
        if self._taps is not None:
            self._taps.remove()
        self._taps, self._metrics, self._last = None, {}, {}

    def _skip(self, path: str, error: Exception) -> None:
        if path not in self._skipped:
            self._skipped.add(path)
            rank_zero_warn(f"PosteriorMonitor skips {path!r}, and the run continues: {type(error).__name__}: {error}")

    @torch.no_grad()
    def _update(self) -> None:
        try:
            taken = self._taps.take() if self._taps else {}
        except RuntimeError as error:  # a tensor was overwritten in place
            taken = {}
            self._skip(described(self.where), error)
        for path, tensors in taken.items():
            try:
                for tensor in tensors:
                    self._measure(path, tensor.detach())
            except Exception as error:  # a layer may return a tensor of any dtype and shape
                self._skip(path, error)

    def _measure(self, path: str, tensor: Tensor) -> None:
        if not tensor.is_floating_point():
            raise TypeError(f"the {self.tap} of {path!r} has dtype {tensor.dtype}; energies must be floating-point")
        dim = self._axes[path](tensor.shape)
        if path not in self._metrics:
            self._metrics[path] = layer_metrics(dim).to(tensor.device)
        self._metrics[path].update(tensor)
        self._last[path] = tensor.movedim(dim, -1)

    def _report(self, trainer: Any, pl_module: Any, prefix: str) -> None:
        for path, energies in self._last.items():
            values = self._metrics[path].compute()
            pl_module.log_dict({f"{prefix}/{path}/{name}": value for name, value in values.items()}, batch_size=1)
            for writer in tensorboard_writers(trainer, "responsibilities") if trainer.is_global_zero else ():
                tag = f"{prefix}/{path}/responsibilities"
                writer.add_histogram(tag, softmin(energies.float()).responsibilities.flatten(), trainer.global_step)
                if self.figures:
                    writer.add_figure(tag, responsibilities_figure(energies), trainer.global_step)
        self._stop()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start to collect at every n-th step."""
        if trainer.global_step % self.every_n_steps == 0:
            self._start(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the batch."""
        self._update()
        self._report(trainer, pl_module, "em")

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start to collect, but not in the sanity check, whose few batches are no set to report."""
        if not trainer.sanity_checking:
            self._start(pl_module)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Collect a batch."""
        self._update()

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the set."""
        self._report(trainer, pl_module, "em_test" if trainer.testing else "em_val")

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks: Lightning calls no teardown after an exception."""
        self._stop()


class EMAudit(Callback):
    """Prints, at the first training batch, where EM is found in the model; TensorBoard gets the table as text.

    Without a Trainer: :func:`em_lightning.audit`. It runs ``training_step`` once more, on a copy of the model's state,
    in eval mode and without its logs. If the audit fails, the callback warns and the run continues.

    Args:
        printed: whether to print the table.

    Attributes:
        audit: the findings, after the first batch; empty if the audit failed.
    """

    def __init__(self, printed: bool = True) -> None:
        self.printed = printed
        self.audit: Audit | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Audit at the first batch."""
        if self.audit is not None:
            return
        try:
            self.audit = audit(pl_module, batch)
        except Exception as error:  # a model may raise any kind outside of the Trainer's loop
            self.audit = Audit()
            rank_zero_warn(
                f"EMAudit has no table: the audit raised {type(error).__name__}: {error}. Training continues; "
                f"call em_lightning.audit with run=..., or on a part of the model"
            )
            return
        if not trainer.is_global_zero:
            return
        if self.printed:
            print(self.audit)
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_text"):
                table = "\n".join(f"    {line}" for line in str(self.audit).splitlines())  # indented: code in Markdown
                logger.experiment.add_text("em/audit", table, trainer.global_step)
