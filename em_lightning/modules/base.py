"""EMModule, the base class of the LightningModules: optimizer, schedule, logging and metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from em_lightning.checkpoints import RankAgreement, check_archive, read_checkpoint
from em_lightning.checks import check_at_least, check_choice, check_positive

_WARM_UP_FRACTION, _INITIAL_FACTOR = 0.3, 0.04  # the defaults of OneCycleLR: pct_start, and 1 / div_factor


class EMModule(lightning.LightningModule):
    """Base class with optimizer, schedule, logging and metrics; a subclass defines ``forward`` and ``step``.

    ``step(batch, stage)`` returns the loss, or a dictionary of named terms whose entry ``"loss"`` is minimized. Every
    term is logged as ``<stage>/<name>``. In the stages ``val`` and ``test`` the mean over the epoch and all ranks
    is logged; in ``train`` the value at every ``log_every_n_steps``-th optimizer step, or batch in manual optimization;
    callbacks also get the value of the last batch. ``step`` also updates the metrics given to :meth:`add_metrics`,
    which are logged under the same prefix, over whole epochs and all ranks.

    Args:
        lr: learning rate; with a schedule, its largest value.
        schedule: ``"one_cycle"`` warms up and anneals to zero over the run; ``"constant"`` keeps the rate.
        weight_decay: decoupled weight decay.
        skip_gradients_above: largest norm of the gradient; optimizer steps with a larger or non-finite norm are
            skipped. ``None`` skips no step. Skipping limits the effect of single sets with a very large loss.
        optimizer: ``"adam"``, or ``"sgd"`` without momentum; for another one, override ``configure_optimizers``.

    Example:
        >>> class Regression(EMModule):
        ...     def __init__(self, **options):
        ...         super().__init__(**options)
        ...         self.layer = torch.nn.Linear(1, 1)
        ...     def step(self, batch, stage):
        ...         return (self.layer(batch[0]) - batch[1]).square().mean()
        >>> Regression(lr=0.1).step((torch.zeros(4, 1), torch.ones(4, 1)), "val").shape
        torch.Size([])
    """

    def __init__(
        self,
        lr: float = 1e-3,
        schedule: Literal["one_cycle", "constant"] = "constant",
        weight_decay: float = 0.0,
        skip_gradients_above: float | None = None,
        optimizer: Literal["adam", "sgd"] = "adam",
    ) -> None:
        super().__init__()
        check_positive(lr=lr)
        check_choice("schedule", schedule, ("one_cycle", "constant"))
        check_at_least(0, weight_decay=weight_decay)
        check_choice("optimizer", optimizer, ("adam", "sgd"))
        if skip_gradients_above is not None:
            check_positive(skip_gradients_above=skip_gradients_above)
        self.lr = lr
        self.optimizer = optimizer
        self.schedule = schedule
        self.weight_decay = weight_decay
        self.skip_gradients_above = skip_gradients_above

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint with ``weights_only=True`` unless given; errors are those of :func:`read_checkpoint`."""
        if isinstance(checkpoint_path, (str, PathLike)) and Path(checkpoint_path).is_file():
            check = check_archive if kwargs.get("weights_only") is False else read_checkpoint
            check(checkpoint_path)  # for its errors
        return super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **kwargs})

    def step(self, batch: Any, stage: str) -> Tensor | dict[str, Tensor]:
        """Return the loss of a batch, or a dictionary of terms with the entry ``"loss"``."""
        raise NotImplementedError(f"{type(self).__name__} must define step(batch, stage)")

    def add_metrics(
        self, stages: Sequence[str] = ("train", "val", "test"), **metrics: Metric | MetricCollection
    ) -> None:
        """Add a copy of each metric for each stage, to be logged at the end of its epochs.

        A metric is logged as ``<stage>/<name>``, a collection as ``<stage>/<prefix><name in the collection>``.
        """
        for stage in stages:
            copies: dict[str, Any] = dict(self.metrics_of(stage))
            for name, metric in metrics.items():
                copies[name] = metric.clone()
                if isinstance(metric, MetricCollection):
                    copies[name].prefix = f"{stage}/{metric.prefix or ''}"
            self.add_module(f"_{stage}_metrics", nn.ModuleDict(copies))

    def metrics_of(self, stage: str) -> Any:
        """Return the metrics of a stage, a mapping from their names."""
        return getattr(self, f"_{stage}_metrics", {})

    def batch_size(self, batch: Any) -> int:
        """Return the number of items in a batch, its weight in logged means: the length of the first tensor in it."""
        if isinstance(batch, Tensor):
            return len(batch)
        parts = batch.values() if isinstance(batch, Mapping) else batch
        for part in parts if isinstance(batch, (Mapping, Sequence)) else ():
            if isinstance(part, (Tensor, Mapping, Sequence)) and not isinstance(part, str):
                return self.batch_size(part)
        raise TypeError(f"{type(self).__name__} must define batch_size(batch) for batches of {type(batch).__name__}")

    def _run_and_log(self, batch: Any, stage: str) -> Tensor:
        terms = self.step(batch, stage)
        terms = terms if isinstance(terms, dict) else {"loss": terms}
        loss = terms.get("loss")
        if loss is None:
            raise ValueError(f"step must return a tensor or a dictionary with the key 'loss', got {sorted(terms)}")
        training, size = stage == "train", self.batch_size(batch)
        for name, metric in self.metrics_of(stage).items():
            named = metric if isinstance(metric, MetricCollection) else {f"{stage}/{name}": metric}
            self.log_dict(named, on_step=False, on_epoch=True, batch_size=size)
        if not training or self._logs_this_step():
            options: Any = {"on_step": training, "on_epoch": not training, "sync_dist": not training}
            for name, value in terms.items():
                self.log(f"{stage}/{name}", value.detach(), prog_bar=name == "loss", batch_size=size, **options)
        return loss

    def _logs_this_step(self) -> bool:
        """Return whether loggers or callbacks get this step's values; logging costs as much as a small step."""
        try:
            trainer = self.trainer
        except RuntimeError:  # no Trainer is attached
            return True
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        # As in Lightning's loggers. In manual optimization global_step counts the steps of all optimizers.
        steps = trainer.global_step if self.automatic_optimization else trainer.fit_loop.total_batch_idx
        return trainer.is_last_batch or (every > 0 and (steps + 1) % every == 0)

    def configure_callbacks(self) -> list[lightning.Callback]:
        has_one = any(isinstance(callback, RankAgreement) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if has_one else [RankAgreement()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._run_and_log(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._run_and_log(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._run_and_log(batch, "test")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log the norm of the gradient, and drop the gradient if the norm is above ``skip_gradients_above``."""
        if self.skip_gradients_above is None:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self.log("train/gradient_norm", norm)
        if not norm.isfinite() or norm > self.skip_gradients_above:
            optimizer.zero_grad(set_to_none=True)

    def _one_cycle(self, step: int) -> float:
        """Return the factor of the learning rate: a cosine up over 30 % of the run, then a cosine down to 0."""
        # At step 0 estimated_stepping_batches would create the data loader before the checkpoint is restored.
        progress = step / max(self.trainer.estimated_stepping_batches, 1) if step else 0.0  # fraction of the run
        if progress < _WARM_UP_FRACTION:
            return _INITIAL_FACTOR + (1 - _INITIAL_FACTOR) * (1 - math.cos(math.pi * progress / _WARM_UP_FRACTION)) / 2
        return (1 + math.cos(math.pi * min((progress - _WARM_UP_FRACTION) / (1 - _WARM_UP_FRACTION), 1.0))) / 2

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimizer; override it for several learning rates."""
        return [{"params": list(self.parameters())}]

    def configure_optimizers(self) -> Any:
        # The fused implementation is the fastest on CPUs. On GPUs it forbids gradient clipping under mixed precision:
        # fused=None lets PyTorch choose another one there, while False would also turn off the foreach implementation.
        options: Any = {"lr": self.lr, "weight_decay": self.weight_decay, "fused": self.device.type == "cpu" or None}
        kind = torch.optim.SGD if self.optimizer == "sgd" else torch.optim.AdamW  # Adam, with decoupled decay
        optimizer = kind(self.parameter_groups(), **options)
        if self.schedule == "constant":
            return optimizer
        # OneCycleLR would store the length of the run in its checkpoint, so that a longer resumed run would fail.
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._one_cycle)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
