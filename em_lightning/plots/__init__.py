"""Figures in one palette and one style."""

from em_lightning.plots.mixtures import component_colors, mixture_grid
from em_lightning.plots.style import figure_style, new_figure, save_figure
from em_lightning.plots.tensorboard import tensorboard_writers

__all__ = [
    "component_colors",
    "figure_style",
    "mixture_grid",
    "new_figure",
    "save_figure",
    "tensorboard_writers",
]
