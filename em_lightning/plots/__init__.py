"""Figures in one palette and one style."""

from em_lightning.plots.mixtures import component_colors, curves, mixture_grid, mixture_page
from em_lightning.plots.style import figure_style, new_figure, new_grid, save_figure
from em_lightning.plots.tensorboard import tensorboard_writers

__all__ = [
    "component_colors",
    "curves",
    "figure_style",
    "mixture_grid",
    "mixture_page",
    "new_figure",
    "new_grid",
    "save_figure",
    "tensorboard_writers",
]
