"""Figures, in one palette and one style."""

from em_lightning.plots.activations import activation_gallery
from em_lightning.plots.kernels import kernel_gallery
from em_lightning.plots.style import figure_style, new_figure, save_figure

__all__ = ["activation_gallery", "figure_style", "kernel_gallery", "new_figure", "save_figure"]
