"""EM losses on the layers of any LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from em_lightning.surgery import LayerwiseLoss, undo_all, wrap
from em_lightning.surgery.layerwise import check_options
from em_lightning.surgery.owners import owners_of
from em_lightning.surgery.select import described


class LayerwiseEMLoss(Callback):
    """Adds an EM loss of chosen layers to the loss that ``training_step`` returns.

    In manual optimization the EM loss of a layer is added to the loss of the first ``manual_backward`` that depends on
    the layer. With several optimizers it trains only the parameters of the optimizer that owns the layer, or of the one
    with index ``optimizer``, and is added only to losses that depend on them. The model's own logs do not include the
    EM loss; its terms and weight are logged as ``em/<layer>/<term>``. Schedules and ``every`` count batches.
    Checkpoints store the number of batches and the state of ``weight="auto"``.

    Without a Trainer: :class:`em_lightning.surgery.LayerwiseLoss`, which explains all arguments but ``optimizer``.

    Raises:
        NoMatchError: when the fit starts, if nothing matches; the message lists the modules of the model.
        RuntimeError: in a step, or with several optimizers after an epoch, if the EM loss of a layer was added to no
            loss. In automatic optimization, a step may omit layers that were called in an earlier step.
        ValueError: an argument is out of range; at the start, several optimizers or none own the parameters of a layer.

    Example:
        >>> callbacks = [LayerwiseEMLoss("encoder.*", weight=0.01)]
    """

    def __init__(
        self,
        where: Any,
        loss: Any = "em",
        weight: float | Literal["auto"] = "auto",
        tap: Literal["output", "input"] = "output",
        schedule: Callable[[int], float] | None = None,
        *,
        dim: int | Literal["auto"] = "auto",
        every: int = 1,
        ratio: float = 0.1,
        detach: bool = False,
        optimizer: int | None = None,
        verbose: bool = True,
    ) -> None:
        options = dict(loss=loss, weight=weight, tap=tap, every=every, ratio=ratio, schedule=schedule)
        check_options(**options)
        self.where = where
        self.options: dict[str, Any] = {**options, "dim": dim, "detach": detach, "verbose": verbose}
        self.optimizer = optimizer
        self._batch = 0
        self._had_loss = False  # whether this training step had a loss
        self.losses: LayerwiseLoss | None = None
        self._undos: list[Callable[[], Any]] = []
        self._state: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        tap, loss = self.options["tap"], self.options["loss"]
        return f"{type(self).__qualname__}(where={described(self.where)}, tap={tap}, loss={described(loss)})"

    def _suffix(self, trainer: Any) -> str:
        """Return "", or "_2", "_3", ... for further callbacks of this state_key, for names in logs and checkpoints."""
        index = [callback for callback in trainer.callbacks if callback.state_key == self.state_key].index(self)
        return f"_{index + 1}" if index else ""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Register the hooks here, after Lightning has converted BatchNorm to SyncBatchNorm, which drops hooks."""
        losses = self.losses = LayerwiseLoss(pl_module, self.where, **self.options)
        losses.taps.recording = False  # only training steps record
        if self._state:
            losses.load_state_dict(self._state)
        self._batch = losses.step
        automatic, several = pl_module.automatic_optimization, len(trainer.optimizers) > 1
        suffix = self._suffix(trainer)
        if several:
            owners_of(losses.taps.sites, trainer.optimizers, self.optimizer)  # raises before the first step

        def add_layer_losses(loss: Tensor) -> Tensor:
            self._had_loss = True
            losses.step = self._batch
            # Found anew in each step, as finetuning callbacks add parameters to optimizers.
            owners = owners_of(losses.taps.sites, trainer.optimizers, self.optimizer) if several else None
            total = losses.add_to(loss, automatic, owners)
            pl_module.log_dict({f"em/{name}{suffix}": value for name, value in losses.values.items()}, batch_size=1)
            return total

        def training_step(proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._had_loss = False
            if several:  # a step may run one optimizer only: until the epoch ends, keep which EM losses were added
                losses.taps.captured = []
            else:
                losses.reset()
            with losses.taps.switched(on=True):
                result = proceed(*args, **kwargs)
            if not automatic:
                with_gradient = any(tensor.requires_grad for _, tensor, _ in losses.taps.captured)
                if not several and (self._had_loss or with_gradient):  # a step may only collect data, without a loss
                    losses.check_all_added()
            elif isinstance(result, Tensor):
                return add_layer_losses(result)
            elif result is not None:  # None skips the step
                return {**result, "loss": add_layer_losses(result["loss"])}
            return result

        def manual_backward(proceed: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            with losses.taps.switched(on=False):  # the backward pass runs checkpointed layers again
                return proceed(add_layer_losses(loss), *args, **kwargs)

        self._undos = [wrap(pl_module, "training_step", training_step)]
        if not automatic:
            self._undos.append(wrap(pl_module, "manual_backward", manual_backward))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batch += 1

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """With several optimizers, check that the EM loss of every layer was added in the epoch."""
        if self.losses is not None and len(trainer.optimizers) > 1:
            self.losses.check_all_added()
            self.losses.reset()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # Not in state_dict(), which Lightning refuses for two callbacks of one key. Here it warns of a resume without.
        checkpoint["callbacks"].setdefault(self.state_key, {})[self._suffix(trainer)] = self._current_state()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        states, suffix = checkpoint["callbacks"].get(self.state_key, {}), self._suffix(trainer)
        if states and suffix not in states:
            rank_zero_warn(f"the checkpoint has no state of {self.state_key}{suffix}, which starts anew")
        self._state = states.get(suffix, {})

    def _current_state(self) -> dict[str, Any]:
        # Save the number of batches: losses.step counts backward passes, of which a batch may have several.
        return self._state if self.losses is None else {**self.losses.state_dict(), "step": self._batch}

    def teardown(self, trainer: Any, pl_module: Any, stage: Any) -> None:
        if self.losses is not None:
            self._state = self._current_state()
            self.losses.remove()
            self.losses = None
        undo_all(self._undos)

    on_exception = teardown  # type: ignore[assignment]  # Lightning calls no teardown after an exception
