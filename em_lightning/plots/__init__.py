"""Figures of mixtures."""

from em_lightning.plots.figures import mixture_grid

__all__ = ["mixture_grid"]
