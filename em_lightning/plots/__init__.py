"""Figures in one palette and one style."""

from em_lightning.plots.activations import activation_gallery
from em_lightning.plots.kernels import kernel_gallery
from em_lightning.plots.mixtures import component_colors, curves, mixture_grid
from em_lightning.plots.style import figure_style, new_figure, new_grid, save_figure

__all__ = [
    "activation_gallery",
    "component_colors",
    "curves",
    "figure_style",
    "kernel_gallery",
    "mixture_grid",
    "new_figure",
    "new_grid",
    "save_figure",
]
