"""Figures in one palette and one style."""

from em_lightning.plots.figures import (
    curves,
    figure_style,
    mixture_grid,
    new_figure,
    save_figure,
)

__all__ = [
    "curves",
    "figure_style",
    "mixture_grid",
    "new_figure",
    "save_figure",
]
