"""Figures of a layer of energies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from em_lightning.plots.style import DIVERGING, NEUTRAL, PALETTE, figure_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@figure_style()
def prototype_grid(prototypes: Tensor, shape: tuple[int, int], columns: int = 16) -> Figure:
    """Draw the weights of each unit as an image, in one symmetric scale of colours.

    Args:
        prototypes: (K, H * W).
        shape: (H, W).
        columns: images a row.

    Example:
        >>> figure = prototype_grid(torch.randn(20, 64), (8, 8))
    """
    images = prototypes.detach().float().cpu().unflatten(1, shape)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure, axes = new_figure(rows, columns, width=0.45, height=0.45)
    limit = float(images.abs().max()) or 1.0
    for ax in axes.flat:
        ax.axis("off")
    for ax, image in zip(axes.flat, images, strict=False):
        ax.imshow(image.numpy(), cmap=DIVERGING, vmin=-limit, vmax=limit)
    return figure


@figure_style()
def gradient_scatter(gradients: Tensor, responsibilities: Tensor, most: int = 5000) -> Figure:
    """Draw the loss gradient at the energies against the responsibilities, with the diagonal that theory draws.

    Args:
        gradients: of any shape.
        responsibilities: of the same.
        most: so many points are drawn, evenly spread over all.

    Example:
        >>> r = torch.rand(10, 4)
        >>> figure = gradient_scatter(r, r)
    """
    x, y = (values.detach().float().cpu().flatten() for values in (responsibilities, gradients))
    step = max(1, len(x) // most)
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
        title=f"correlation {correlation:.6f}, largest difference {error:.1e}",
    )
    ax.legend(loc="upper left")
    return figure


@figure_style()
def panels(x: Sequence[float], series: Mapping[str, Sequence[float]], xlabel: str, columns: int = 3) -> Figure:
    """Draw each series over the same x in a panel of its own.

    Args:
        x: the horizontal coordinates.
        series: the vertical ones by title.
        xlabel: what x is.
        columns: panels a row.

    Example:
        >>> figure = panels([1, 2], {"loss": [3.0, 1.0], "accuracy": [0.5, 0.9]}, "epoch")
    """
    columns = min(columns, len(series))
    figure, axes = new_figure(-(-len(series) // columns), columns, width=2.6, height=2.0, sharex=True)
    for ax in axes.flat[len(series) :]:
        ax.axis("off")
    for ax, (title, values) in zip(axes.flat, series.items(), strict=False):
        ax.plot(x, values, marker="o" if len(x) <= 20 else None, markersize=3)
        ax.set(title=title, xlabel=xlabel)
    return figure
