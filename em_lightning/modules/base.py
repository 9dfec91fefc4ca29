"""The LightningModule that the others, and a user's own, stand on."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from torch import Tensor
from torchmetrics import Metric

from em_lightning.checkpoints import check_archive

_WARM_UP = 0.3
_OPTIMIZERS = ("adam", "sgd")
_STAGES = ("train", "val", "test")


class EMModule(lightning.LightningModule):
    """Do the bookkeeping of a training run: a subclass writes ``forward`` and ``step``.

    ``step(batch, stage)`` returns the loss, or a dictionary of named terms whose entry ``"loss"`` is minimized. Every
    term is logged as ``<stage>/<name>``: in the stages ``val`` and ``test`` averaged over the epoch and over ranks, in
    ``train`` as it is at every ``log_every_n_steps`` and at an epoch's last step. Terms with an auxiliary weight are
    added to the loss, and the sum is logged as ``<stage>/total``. Metrics given to :meth:`add_metrics` are logged under
    the same prefix, over whole epochs and all ranks; ``step`` updates those of its stage.

    Args:
        lr: learning rate, its largest under a schedule.
        schedule: ``"one_cycle"`` warms up and anneals to zero over the run; ``"constant"`` keeps the rate.
        weight_decay: decoupled weight decay.
        skip_gradients_above: a step whose gradient has a larger norm, or is not finite, is left out: a single set on
            which the model fails badly would else decide where it goes.
        optimizer: ``"adam"``, or ``"sgd"`` without momentum; for another override ``configure_optimizers``.
        auxiliary: weights of the terms of ``step`` that are minimized beside its loss; others are only logged.

    Raises:
        ValueError: an argument is out of range.

    Example:
        A regression with an EM loss of its hidden layer, whose weight is the user's, and a metric:

        >>> from torchmetrics import MeanAbsoluteError
        >>> from em_lightning import EMLoss
        >>> class Regression(EMModule):
        ...     def __init__(self, **options):
        ...         super().__init__(**options)
        ...         self.hidden, self.head = torch.nn.Linear(1, 8), torch.nn.Linear(8, 1)
        ...         self.em = EMLoss()
        ...         self.add_metrics(error=MeanAbsoluteError())
        ...
        ...     def forward(self, x):
        ...         return self.head(self.hidden(x).relu())
        ...
        ...     def step(self, batch, stage):
        ...         x, y = batch
        ...         guess = self(x)
        ...         self.metrics_of(stage)["error"].update(guess, y)
        ...         return {"loss": (guess - y).square().mean(), **self.em(self.hidden(x))}
        >>> module = Regression(lr=0.1, auxiliary={"free_energy": 1e-3, "variance": 1e-2})
        >>> x = torch.linspace(-1, 1, 64).unsqueeze(1)
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, 3 * x), batch_size=16)
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = lightning.Trainer(max_epochs=9, accelerator="cpu", enable_model_summary=False, **quiet)
        >>> trainer.fit(module, loader, loader)
        >>> sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        ['val/decorrelation', 'val/error', 'val/free_energy', 'val/loss', 'val/total', 'val/variance']
    """

    def __init__(
        self,
        lr: float = 1e-3,
        schedule: Literal["one_cycle", "constant"] = "constant",
        weight_decay: float = 0.0,
        skip_gradients_above: float | None = None,
        optimizer: Literal["adam", "sgd"] = "adam",
        auxiliary: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr={lr} must be positive; 1e-3 is a usual start")
        if schedule not in ("one_cycle", "constant"):
            raise ValueError(f"schedule={schedule!r} is unknown; choose 'one_cycle' or 'constant'")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay={weight_decay} must not be negative; 0 switches it off")
        if skip_gradients_above is not None and not skip_gradients_above > 0:
            raise ValueError(f"skip_gradients_above={skip_gradients_above} must be positive; None keeps every step")
        if optimizer not in _OPTIMIZERS:
            raise ValueError(f"optimizer={optimizer!r} is unknown; choose from {', '.join(_OPTIMIZERS)}")
        self.auxiliary = {name: float(weight) for name, weight in (auxiliary or {}).items()}
        if "loss" in self.auxiliary or not all(math.isfinite(weight) for weight in self.auxiliary.values()):
            raise ValueError(f"auxiliary={self.auxiliary} must weigh terms beside 'loss' by finite numbers")
        self.lr = lr
        self.optimizer = optimizer
        self.schedule = schedule
        self.weight_decay = weight_decay
        self.skip_gradients_above = skip_gradients_above

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Return a model of a checkpoint as Lightning does, of tensors and plain values alone and by its sums.

        Raises:
            ValueError: a local file is truncated or altered, or no checkpoint.
        """
        if isinstance(checkpoint_path, (str, PathLike)) and Path(checkpoint_path).is_file():
            check_archive(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **kwargs})

    def step(self, batch: Any, stage: str) -> Tensor | dict[str, Tensor]:
        """Return the loss of a batch, or a dictionary of terms with the entry ``"loss"``."""
        raise NotImplementedError(f"{type(self).__name__} must define step(batch, stage)")

    def add_metrics(self, **metrics: Metric) -> None:
        """Keep a copy of each metric for each of the stages ``train``, ``val`` and ``test``, and log it there."""
        for stage in _STAGES:
            copies = {name: copy.deepcopy(metric) for name, metric in metrics.items()}
            self.add_module(f"{stage}_metrics", torch.nn.ModuleDict(copies))

    def metrics_of(self, stage: str) -> Any:
        """Return the metrics of a stage, a mapping from their names."""
        found: Any = self._modules.get(f"{stage}_metrics")
        return dict(found.items()) if isinstance(found, torch.nn.ModuleDict) else {}

    def batch_size(self, batch: Any) -> int:
        """Return the number of items that a logged average counts a batch with."""
        while not isinstance(batch, Tensor):
            batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
        return len(batch)

    def _step(self, batch: Any, stage: str) -> Tensor:
        terms = self.step(batch, stage)
        terms = terms if isinstance(terms, dict) else {"loss": terms}
        if "loss" not in terms:
            raise ValueError(f"step returned the terms {sorted(terms)}; add 'loss', which is minimized")
        loss = terms["loss"]
        if self.auxiliary:
            missing = sorted(set(self.auxiliary) - set(terms))
            if missing:
                raise ValueError(f"auxiliary weighs {missing}, and step returned {sorted(terms)}; mend one of them")
            loss = loss + sum(weight * terms[name] for name, weight in self.auxiliary.items())
            terms = {**terms, "total": loss}
        training = stage == "train"
        for name, metric in self.metrics_of(stage).items():
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, batch_size=self.batch_size(batch))
        if not training or self._is_logged():
            self.log_dict(
                {f"{stage}/{name}": value.detach() for name, value in terms.items()},
                batch_size=self.batch_size(batch),
                on_step=training,
                on_epoch=not training,
                sync_dist=not training,
            )
        return loss

    def _is_logged(self) -> bool:
        """Return whether anybody reads what this training step logs: logging costs as much as a small step."""
        trainer: Any = self._trainer
        if trainer is None:
            return True
        every = trainer.log_every_n_steps
        return trainer.is_last_batch or (every > 0 and (trainer.global_step + 1) % every == 0)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets this name some forty times a step, which takes PyTorch's way for modules too long.
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a training batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the terms of a validation batch."""
        self._step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the terms of a test batch."""
        self._step(batch, "test")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log the norm of the gradient, and drop a gradient that is too large."""
        if self.skip_gradients_above is None:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.log("train/gradient_norm", norm)
        if not norm <= self.skip_gradients_above:
            optimizer.zero_grad(set_to_none=True)

    def _one_cycle(self, step: int) -> float:
        """Return the share of the learning rate: a cosine up over three tenths of the run, then one down to zero."""
        # At step 0 not even the length of the run is asked for: Lightning would set up the loader to tell it, and then
        # leave it where it is when a run is resumed within an epoch.
        done = step / max(self.trainer.estimated_stepping_batches, 1) if step else 0.0
        if done < _WARM_UP:
            return 0.04 + 0.96 * (1 - math.cos(math.pi * done / _WARM_UP)) / 2
        return (1 + math.cos(math.pi * min((done - _WARM_UP) / (1 - _WARM_UP), 1.0))) / 2

    def make_optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Return the optimizer of some parameters."""
        # One kernel for a whole step; on a GPU it would forbid clipping under mixed precision.
        fused = all(p.device.type == "cpu" for p in parameters)
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay, "fused": fused}
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, **options)
        # Without decay they are the same, and Adam is the faster one.
        return (torch.optim.AdamW if self.weight_decay else torch.optim.Adam)(parameters, **options)

    def configure_optimizers(self) -> Any:
        """Return the optimizer with the schedule asked for."""
        optimizer = self.make_optimizer(list(self.parameters()))
        if self.schedule == "constant":
            return optimizer
        # Not OneCycleLR: its checkpoint holds the length of the run, so a longer resumed one would fail.
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._one_cycle)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
