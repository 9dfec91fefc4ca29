"""Figures of a layer of energies: prototypes as images, gradients, metrics over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from em_lightning.plots.style import DIVERGING, NEUTRAL, PALETTE, figure_style, new_figure, new_grid


@figure_style()
def prototype_grid(prototypes: Tensor, shape: tuple[int, int]) -> Figure:
    """Draw the weights (K, H * W) of each unit as an image (H, W), all on one symmetric colour scale.

    Example:
        >>> figure = prototype_grid(torch.randn(20, 64), (8, 8))
    """
    images = prototypes.detach().float().cpu().unflatten(1, shape)
    figure, axes = new_grid(len(images), 16, width=0.45, height=0.45)
    limit = float(images.abs().max()) or 1.0
    for ax, image in zip(axes, images, strict=True):
        ax.axis("off")
        ax.imshow(image.numpy(), cmap=DIVERGING, vmin=-limit, vmax=limit)
    return figure


@figure_style()
def gradient_scatter(gradients: Tensor, responsibilities: Tensor, max_points: int = 5000) -> Figure:
    """Draw the gradient of a loss by the energies against the responsibilities, and the line on which they are equal.

    Example:
        >>> r = torch.rand(10, 4)
        >>> figure = gradient_scatter(r, r)
    """
    x, y = (values.detach().float().cpu().flatten() for values in (responsibilities, gradients))
    step = max(1, len(x) // max_points)
    figure, axes = new_figure(width=3.6, height=3.2)
    ax = axes[0, 0]
    top = float(x.max())
    ax.plot([0, top], [0, top], color=NEUTRAL, linestyle="--", linewidth=1.2, label="gradient = responsibility")
    ax.plot(x[::step].numpy(), y[::step].numpy(), ".", color=PALETTE[0], markersize=2)
    error = float((x - y).abs().max())
    correlation = float(torch.corrcoef(torch.stack([x, y]).double())[0, 1])
    ax.set(
        xlabel="responsibility softmax(-d)",
        ylabel="gradient of the free energy by d",
        title=f"correlation {correlation:.6f},\nlargest difference {error:.1e}",
    )
    ax.legend(loc="upper left")
    return figure


@figure_style()
def panels(x: Sequence[float], series: Mapping[str, Sequence[float]], xlabel: str) -> Figure:
    """Draw several series, by title, over the same x, each in its own panel.

    Example:
        >>> figure = panels([1, 2], {"loss": [3.0, 1.0], "accuracy": [0.5, 0.9]}, "epoch")
    """
    figure, axes = new_grid(len(series), 3, width=2.6, height=2.0, sharex=True)
    for ax, (title, y) in zip(axes, series.items(), strict=True):
        ax.plot(x, y, marker="o" if len(x) <= 20 else None, markersize=3)
        ax.set(title=title, xlabel=xlabel)
    return figure
