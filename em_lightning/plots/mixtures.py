"""Figures of point clouds with their mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from em_lightning.mixture import Mixture
from em_lightning.plots.style import figure_style, new_figure


def component_colors(num_components: int) -> Tensor:
    """Return one colour (K, 3) per component: hues evenly spaced, alternately light and dark.

    Example:
        >>> component_colors(4).shape
        torch.Size([4, 3])
    """
    hue = torch.arange(num_components) / num_components
    dark = torch.arange(num_components) % 2
    return torch.from_numpy(hsv_to_rgb(torch.stack([hue, 0.85 - 0.2 * dark, 0.95 - 0.3 * dark], -1).numpy())).float()


@figure_style()
def mixture_grid(
    points: Tensor,
    mixture: Mixture,
    mask: Tensor | None = None,
    titles: Sequence[str] | None = None,
    radius: float = 2.0,
) -> Figure:
    """Draw clouds with points coloured by their responsibilities and an ellipsoid per component of weight above 1e-3.

    Args:
        points: (B, N, D); of more than three features the first three are drawn.
        mixture: B mixtures.
        mask: (B, N), false where a row is padding.
        titles: one per cloud.
        radius: of the ellipsoids, in standard deviations.

    Example:
        >>> mixture = Mixture(torch.zeros(1, 1), torch.zeros(1, 1, 2), torch.ones(1, 1, 2))
        >>> figure = mixture_grid(torch.randn(1, 50, 2), mixture)
    """
    points = points.detach().cpu().float()
    mixture = mixture.detach().to("cpu").to(torch.float32).full()
    colors = component_colors(mixture.means.shape[1])
    shades = mixture.posterior(points).responsibilities @ colors
    flat = points.shape[-1] == 2
    projection = {} if flat else {"projection": "3d", "box_aspect": (1, 1, 1)}
    figure, axes = new_figure(len(points), 4, width=2.4, height=2.4, subplot_kw=projection)
    ax: Any
    for i, ax in enumerate(axes):
        keep = slice(None) if mask is None else mask[i].cpu()
        cloud = points[i][keep][:, :3]
        ax.scatter(*cloud.T.numpy(), c=shades[i][keep].clamp(0, 1).numpy(), s=3, linewidths=0, alpha=0.8)
        for k in (mixture.log_weights[i].exp() > 1e-3).nonzero().flatten():
            _draw_ellipsoid(ax, mixture.means[i, k, :3], mixture.covariances[i, k, :3, :3], colors[k].numpy(), radius)
        if titles is not None:
            ax.set_title(titles[i])
        _frame(ax, cloud)
    return figure


def _frame(ax: Any, cloud: Tensor) -> None:
    """Centre the cloud in a square or cube without axes."""
    center = cloud.mean(0).nan_to_num()
    reach = float((cloud - center).abs().max()) if len(cloud) else 1.0
    for axis, middle in zip("xyz", center.tolist(), strict=False):
        ax.set(**{f"{axis}lim": (middle - reach, middle + reach)})
    ax.set_axis_off()
    if len(center) == 2:
        ax.set_aspect("equal")
    else:
        ax.set_box_aspect((1, 1, 1), zoom=1.3)


def _draw_ellipsoid(ax: Any, mean: Tensor, covariance: Tensor, color: Any, radius: float) -> None:
    values, vectors = torch.linalg.eigh(covariance)
    axes = radius * vectors * values.clamp(min=0).sqrt()
    angle = torch.linspace(0, 2 * torch.pi, 25)
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    if len(mean) == 2:
        ax.plot(*(mean + circle @ axes.T).T.numpy(), color=color, linewidth=1.2)
        return
    polar = torch.linspace(0, torch.pi, 13).unsqueeze(-1)
    sphere = torch.cat([circle[:, None] * polar.sin(), polar.cos().expand(len(angle), -1, -1)], -1)
    surface = mean + sphere @ axes.T
    ax.plot_surface(*surface.permute(2, 0, 1).numpy(), color=color, alpha=0.12, linewidth=0, shade=False)
