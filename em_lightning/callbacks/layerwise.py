"""EM losses on the layers of any LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import Callback
from torch import Tensor, nn

from em_lightning.surgery import LayerwiseLoss, undo_all, wrap
from em_lightning.surgery.layerwise import check_options


class LayerwiseEMLoss(Callback):
    """Adds an EM loss of chosen layers to the loss that ``training_step`` returns.

    In manual optimization the loss of a layer is added to the first ``manual_backward`` of a loss that depends on the
    layer. The model's own logs do not include it: it is logged as ``em/<layer>/<term>``, with the weight. Schedules
    count ``trainer.global_step``, and checkpoints store the state of ``weight="auto"``.

    Without a Trainer: :class:`em_lightning.surgery.LayerwiseLoss`, which explains the arguments.

    Raises:
        NoMatchError: when the fit starts, if nothing matches; the message lists the modules of the model.
        RuntimeError: in the first step, if a layer's loss was not added to any backward pass.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LayerwiseEMLoss("encoder.*", weight=0.01)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        where: Any,
        loss: Any = "em",
        weight: float | Literal["auto"] | dict[str, Any] = "auto",
        tap: Literal["output", "input"] = "output",
        schedule: Callable[[int], float] | None = None,
        *,
        target: type[nn.Module] | None = None,
        warmup: int = 0,
        dim: int | Literal["auto"] = "auto",
        every: int = 1,
        ratio: float = 0.1,
        auto_every: int = 10,
    ) -> None:
        options: dict[str, Any] = {"loss": loss, "weight": weight, "tap": tap, "warmup": warmup}
        options.update(every=every, ratio=ratio, auto_every=auto_every)
        check_options(**options)
        self.where = where
        self.options = {**options, "schedule": schedule, "target": target, "dim": dim}
        self.losses: LayerwiseLoss | None = None
        self._undos: list[Callable[[], Any]] = []
        self._state: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """A key that differs between callbacks on different layers."""
        return f"{type(self).__qualname__}(where={self.where}, tap={self.options['tap']}, loss={self.options['loss']})"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Register the hooks here, after Lightning has converted BatchNorm to SyncBatchNorm, which drops hooks."""
        losses = self.losses = LayerwiseLoss(pl_module, self.where, **self.options)
        losses.taps.recording = False
        if self._state:
            losses.load_state_dict(self._state)
        automatic = pl_module.automatic_optimization

        def add_layer_losses(loss: Tensor) -> Tensor:
            losses.step = trainer.global_step
            total = losses.add_to(loss, all_layers=automatic)
            values = {f"em/{name}": value for name, value in losses.values.items()}
            pl_module.log_dict(values, batch_size=1)
            return total

        def training_step(proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            losses.reset()
            with losses.taps.switched(on=True):
                result = proceed(*args, **kwargs)
            if not automatic:
                losses.check_all_added()
            elif isinstance(result, Tensor):
                return add_layer_losses(result)
            elif result is not None:  # None skips the step
                return {**result, "loss": add_layer_losses(result["loss"])}
            return result

        def manual_backward(proceed: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            with losses.taps.switched(on=False):  # checkpointed layers are run again
                return proceed(add_layer_losses(loss), *args, **kwargs)

        self._undos = [wrap(pl_module, "training_step", training_step)]
        if not automatic:
            self._undos.append(wrap(pl_module, "manual_backward", manual_backward))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of automatic weights."""
        return self._state if self.losses is None else self.losses.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of automatic weights until the fit starts."""
        self._state = dict(state_dict)

    def teardown(self, trainer: Any, pl_module: Any, stage: Any) -> None:
        """Remove hooks and wrappers."""
        if self.losses is not None:
            self._state = self.losses.state_dict()
            self.losses.remove()
            self.losses = None
        undo_all(self._undos)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove hooks and wrappers: Lightning calls no teardown after an exception."""
        self.teardown(trainer, pl_module, None)
