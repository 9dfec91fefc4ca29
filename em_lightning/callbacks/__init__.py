"""Lightning callbacks."""

from em_lightning.callbacks.mixture_report import MixtureReport
from em_lightning.callbacks.time_left import TimeLeft

__all__ = ["MixtureReport", "TimeLeft"]
