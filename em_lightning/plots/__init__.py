"""Figures in one palette and one style."""

from em_lightning.plots.figures import (
    figure_style,
    mixture_grid,
    new_figure,
)

__all__ = [
    "figure_style",
    "mixture_grid",
    "new_figure",
]
