"""Annealing: the temperature of every competition as a function of the step."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning.pytorch import Callback

from em_lightning.surgery.tempering import set_temperature


class TemperatureSchedule(Callback):
    r"""Moves the temperature of competitions and activations from one value to another.

    With s = min(step / steps, 1): "exponential" :math:`T_0 (T_1 / T_0)^s`, "linear" :math:`T_0 + (T_1 - T_0) s`,
    "cosine" :math:`T_1 + (T_0 - T_1) (1 + \cos \pi s) / 2`. It is logged as ``em/temperature`` and is in the model's
    checkpoints. A model under ``torch.compile`` is compiled anew for each value.

    Without a Trainer: :func:`em_lightning.surgery.tempering.set_temperature`.

    Args:
        start: T at step 0.
        end: T from step ``steps`` on.
        steps: how many optimizer steps it takes.
        shape: of the curve.
        where: names or a predicate of the modules; all that have a temperature, unless it is given.

    Raises:
        ValueError: an argument is out of range; or, when the fit starts, a temperature is learned.
        NoMatchError: when the fit starts, if no module has a temperature; the message lists what is there.

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
        for name, value in (("start", start), ("end", end)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value!r} is no temperature: give a positive number")
        if not (isinstance(steps, int) and steps >= 1):
            raise ValueError(f"steps={steps!r} is no number of steps: give an int of at least 1")
        if shape not in ("exponential", "linear", "cosine"):
            raise ValueError(f"shape={shape!r} is unknown: use 'exponential', 'linear' or 'cosine'")
        self.start, self.end, self.steps, self.shape, self.where = start, end, steps, shape, where

    @property
    def state_key(self) -> str:
        """Tell two such callbacks apart."""
        return self._generate_state_key(where=str(self.where))

    def value(self, step: int) -> float:
        """Return T at a step."""
        share = min(step / self.steps, 1.0)
        if self.shape == "exponential":
            return self.start ** (1.0 - share) * self.end**share  # a ratio may lie outside the range of floats
        if self.shape == "linear":
            left = 1.0 - share
        else:
            left = (1 + math.cos(math.pi * share)) / 2
        return left * self.start + (1.0 - left) * self.end

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that there is something to schedule, and that nothing else moves it."""
        for path, module in set_temperature(pl_module, self.value(trainer.global_step), self.where).items():
            if module.log_temperature_ratio is not None:
                raise ValueError(
                    f"the temperature of {path!r} is learned, so a schedule would fight its optimizer: "
                    f"build it with learnable=False, or leave it out through where="
                )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the temperature of this step."""
        value = self.value(trainer.global_step)
        set_temperature(pl_module, value, self.where)
        pl_module.log("em/temperature", value, batch_size=1)
