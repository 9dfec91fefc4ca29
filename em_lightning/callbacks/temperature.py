"""Temperature annealing: the temperature of every competition as a function of the step."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning.pytorch import Callback

from em_lightning.checks import check_choice, check_counts, positive_number
from em_lightning.surgery import set_temperature
from em_lightning.surgery.select import described


class TemperatureSchedule(Callback):
    r"""Changes the temperature of competitions and activations from one value to another.

    With s = min(step / steps, 1) the value is :math:`T_0^{1-s} T_1^s` ("exponential"), :math:`(1-s) T_0 + s T_1`
    ("linear") or :math:`c T_0 + (1-c) T_1` with :math:`c = (1 + \cos \pi s) / 2` ("cosine"). It is logged as
    ``em/temperature`` and stored in the model's checkpoints. A compiled model is recompiled once, at the first change.
    Without a Trainer use :func:`em_lightning.surgery.set_temperature`.

    Args:
        start, end, shape: T_0, T_1 and the name of the formula.
        steps: number of steps from T_0 to T_1, of all optimizers together (``trainer.global_step``).
        where: the modules, by name pattern or predicate; by default all that have a temperature.

    Raises:
        ValueError: an argument is out of range; or, when the fit starts, a temperature is learned.
        NoMatchError: when the fit starts, if no module has a temperature; the message lists the modules of the model.

    Example:
        >>> schedule = TemperatureSchedule(4.0, 1.0, steps=100)
        >>> [round(schedule.value(step), 3) for step in (0, 50, 100, 200)]
        [4.0, 2.0, 1.0, 1.0]
    """

    def __init__(
        self,
        start: float,
        end: float,
        steps: int,
        shape: Literal["exponential", "linear", "cosine"] = "exponential",
        where: Any = "*",
    ) -> None:
        positive_number("start", start)
        positive_number("end", end)
        check_counts(1, steps=steps)
        check_choice("shape", shape, ("exponential", "linear", "cosine"))
        self.start, self.end, self.steps, self.shape, self.where = start, end, steps, shape, where

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}(where={described(self.where)})"

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "end": self.end}  # a state, so that Lightning warns of a resume without it

    def value(self, step: int) -> float:
        """Return T at a step."""
        share = min(step / self.steps, 1.0)
        if self.shape == "exponential":
            return self.start ** (1.0 - share) * self.end**share  # not (end / start)**share, which may overflow
        start_weight = 1.0 - share if self.shape == "linear" else (1.0 + math.cos(math.pi * share)) / 2.0
        return start_weight * self.start + (1.0 - start_weight) * self.end

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for path, module in set_temperature(pl_module, self.value(trainer.global_step), self.where).items():
            if module.log_temperature_ratio is not None:
                raise ValueError(
                    f"the temperature of {path!r} is learned, and a schedule would overwrite it: build it with "
                    f"learnable=False, or exclude it through where="
                )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        value = self.value(trainer.global_step)
        set_temperature(pl_module, value, self.where)
        pl_module.log("em/temperature", value, batch_size=1)
