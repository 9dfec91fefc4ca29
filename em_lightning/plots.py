"""Figures of mixtures, without pyplot's global state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from em_lightning.mixture import Mixture


def mixture_grid(
    points: Tensor, mixture: Mixture, mask: Tensor | None = None, titles: Sequence[str] | None = None
) -> Figure:
    """Draw point clouds, coloured by responsibilities, and two-sigma ellipsoids of components of weight above 1e-3.

    Args:
        points: (B, N, D); at most the first three features are drawn.
        mixture: B mixtures.
        mask: (B, N), false where a row is padding.
        titles: one per cloud.

    Example:
        >>> mixture = Mixture(torch.zeros(1, 1), torch.zeros(1, 1, 2), torch.ones(1, 1, 2))
        >>> figure = mixture_grid(torch.randn(1, 50, 2), mixture)
    """
    points = points.detach().cpu().float()
    mixture = mixture.map(Tensor.detach).to("cpu").to(torch.float32).full()
    palette = torch.tensor(matplotlib.colormaps["tab20"].colors)  # type: ignore[attr-defined]
    colors = palette[torch.arange(mixture.means.shape[1]) % len(palette)]
    point_colors = (mixture.posterior(points).responsibilities @ colors).clamp(0, 1)
    projection = {} if points.shape[-1] == 2 else {"projection": "3d", "box_aspect": (1, 1, 1)}
    columns = min(len(points), 4)
    rows = -(-len(points) // columns)  # rounded up
    figure = Figure(figsize=(2.4 * columns, 2.4 * rows), layout="constrained")
    ax: Any
    for i in range(len(points)):
        ax = figure.add_subplot(rows, columns, i + 1, **projection)
        keep = slice(None) if mask is None else mask[i].cpu()
        cloud = points[i][keep][:, :3]
        ax.scatter(*cloud.T.numpy(), c=point_colors[i][keep].numpy(), s=3, linewidths=0, alpha=0.8)
        for k in (mixture.log_weights[i].exp() > 1e-3).nonzero().flatten():  # others: under 1 point of 1,000
            _draw_ellipsoid(ax, mixture.means[i, k, :3], mixture.covariances[i, k, :3, :3], colors[k].numpy())
        if titles is not None:
            ax.set_title(titles[i], fontsize=9, fontweight="bold")
        _frame(ax, cloud)
    return figure


def _frame(ax: Any, cloud: Tensor) -> None:
    """Centre the cloud in a square or cube without axes."""
    center = cloud.mean(0).nan_to_num()  # an empty cloud has no mean
    half_width = float((cloud - center).abs().max()) if len(cloud) else 1.0
    for axis, middle in zip("xyz", center.tolist(), strict=False):
        ax.set(**{f"{axis}lim": (middle - half_width, middle + half_width)})
    ax.set_axis_off()
    if len(center) == 2:
        ax.set_aspect("equal")
    else:
        ax.set_box_aspect((1, 1, 1), zoom=1.3)  # fills the margins of hidden axes


def _draw_ellipsoid(ax: Any, mean: Tensor, covariance: Tensor, color: Any) -> None:
    """Draw the points at two standard deviations from the mean: an ellipse or an ellipsoid."""
    values, vectors = torch.linalg.eigh(covariance)
    axes = 2.0 * vectors * values.clamp(min=0).sqrt()
    angle = torch.linspace(0, 2 * torch.pi, 25)  # steps of 15 degrees, as below
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    if len(mean) == 2:
        ax.plot(*(mean + circle @ axes.T).T.numpy(), color=color, linewidth=1.2)
        return
    polar = torch.linspace(0, torch.pi, 13).unsqueeze(-1)
    sphere = torch.cat([circle[:, None] * polar.sin(), polar.cos().expand(len(angle), -1, -1)], -1)
    surface = mean + sphere @ axes.T
    ax.plot_surface(*surface.permute(2, 0, 1).numpy(), color=color, alpha=0.12, linewidth=0, shade=False)
