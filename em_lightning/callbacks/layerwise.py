"""EM losses on the layers of any LightningModule, with no edit to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import Callback
from torch import Tensor, nn

from em_lightning.surgery.chain import Handle, wrap
from em_lightning.surgery.layerwise import LayerwiseLoss


class LayerwiseEMLoss(Callback):
    """Adds an EM loss of chosen layers to whatever ``training_step`` returns.

    In manual optimization the loss of a layer joins the first ``manual_backward`` of a loss that depends on the layer.
    The model's own logs lack it: it is logged as ``em/<layer>/<term>``, with the weight. ``global_step`` is the step of
    schedules, and the state of ``weight="auto"`` is in the checkpoint.

    Without a Trainer: :class:`em_lightning.surgery.layerwise.LayerwiseLoss`.

    Args:
        where: the layers: a class, a name pattern such as ``"encoder.*"``, a predicate, or a list.
        loss: "em", a part of ``LOSSES``, or a function of energies (..., K).
        weight: a number, "auto", or a mapping from name patterns to either.
        tap: "output" of the layer, or its "input".
        target: a second selection that has to hold as well.
        schedule: a factor of the step, on all weights.
        warmup: number of steps over which the factor rises from 0.
        dim: the axis of the units; "auto" takes 1 at convolutions and what follows them, else the last.
        every: charge the loss at each ``every``-th step, times ``every``.
        ratio: the share of the main loss's gradient that ``weight="auto"`` aims at.
        auto_every: steps between two measurements for ``weight="auto"``.
        momentum: of the averages for ``weight="auto"``.

    Raises:
        NoMatchError: when the fit starts, if nothing is selected; the message lists what is there.
        RuntimeError: in the first step, if a layer's loss would be lost.

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
        momentum: float = 0.9,
    ) -> None:
        self.where = where
        self.options: dict[str, Any] = {
            "loss": loss,
            "weight": weight,
            "tap": tap,
            "schedule": schedule,
            "target": target,
            "warmup": warmup,
            "dim": dim,
            "every": every,
            "ratio": ratio,
            "auto_every": auto_every,
            "momentum": momentum,
        }
        probe = {**self.options, "target": None, "weight": 1.0 if isinstance(weight, dict) else weight}
        LayerwiseLoss(nn.Sequential(nn.Identity()), "*", **probe).remove()  # refuses bad arguments here and now
        self.losses: LayerwiseLoss | None = None
        self._handles: list[Handle] = []
        self._state: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """Tell two such callbacks apart."""
        return self._generate_state_key(where=str(self.where), tap=self.options["tap"], loss=str(self.options["loss"]))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the hooks: earlier ones would not survive the conversion of batch norms."""
        self.losses = LayerwiseLoss(pl_module, self.where, **self.options)
        self.losses.taps.recording = False
        if self._state:
            self.losses.load_state_dict(self._state)

        def step(proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self._training_step(trainer, pl_module, proceed, args, kwargs)

        def backward(proceed: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            loss = self._charge(trainer, pl_module, loss)
            return self._without_recording(proceed, loss, *args, **kwargs)

        self._handles = [wrap(pl_module, "training_step", step)]
        if not pl_module.automatic_optimization:
            self._handles.append(wrap(pl_module, "manual_backward", backward))

    def _training_step(
        self, trainer: Any, pl_module: Any, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        assert self.losses is not None
        taps = self.losses.taps
        self.losses.reset()
        taps.recording = True  # not in validation, nor while checkpointed activations are computed again
        try:
            result = proceed(*args, **kwargs)
        finally:
            taps.recording = False
        if not pl_module.automatic_optimization:
            self.losses.check_charged()
            return result
        if result is None:  # Lightning's way to skip a step
            return result
        if isinstance(result, Tensor):
            return self._charge(trainer, pl_module, result)
        return {**result, "loss": self._charge(trainer, pl_module, result["loss"])}

    def _without_recording(self, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self.losses is not None
        self.losses.taps.recording = False
        try:
            return proceed(*args, **kwargs)
        finally:
            self.losses.taps.recording = True

    def _charge(self, trainer: Any, pl_module: Any, loss: Tensor) -> Tensor:
        assert self.losses is not None
        self.losses.step = trainer.global_step
        total = self.losses.add_to(loss, all_layers=pl_module.automatic_optimization)
        values = {f"em/{name}": value for name, value in self.losses.values.items()}
        pl_module.log_dict(values, batch_size=self.losses.num_items)
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return the state of automatic weights."""
        return self._state if self.losses is None else self.losses.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the start of the fit, or take it up if that has been."""
        self._state = dict(state_dict)
        if self.losses is not None:
            self.losses.load_state_dict(self._state)

    def _remove(self) -> None:
        if self.losses is not None:
            self._state = self.losses.state_dict()
            self.losses.remove()
            self.losses = None
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take hooks and wrapped methods off."""
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take hooks and wrapped methods off: Lightning calls no teardown after an exception."""
        self._remove()
