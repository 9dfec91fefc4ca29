"""Figures in one palette and one style."""

from em_lightning.plots.figures import (
    component_colors,
    curves,
    figure_style,
    mixture_grid,
    new_figure,
    save_figure,
    tensorboard_writers,
)

__all__ = [
    "component_colors",
    "curves",
    "figure_style",
    "mixture_grid",
    "new_figure",
    "save_figure",
    "tensorboard_writers",
]
