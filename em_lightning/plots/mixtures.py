"""Figures of point clouds and the mixtures fitted to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from em_lightning.mixture import Mixture
from em_lightning.plots.style import NEUTRAL, figure_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def component_colors(num_components: int) -> Tensor:
    """Return one colour (K, 3) a component, evenly round the colour circle and alternately light and dark."""
    from matplotlib.colors import hsv_to_rgb

    hue = torch.arange(num_components) / num_components
    dark = torch.arange(num_components) % 2
    return torch.from_numpy(hsv_to_rgb(torch.stack([hue, 0.85 - 0.2 * dark, 0.95 - 0.3 * dark], -1).numpy())).float()


def mixture_grid(
    points: Tensor,
    mixture: Mixture,
    mask: Tensor | None = None,
    titles: Sequence[str] | None = None,
    columns: int = 4,
    radius: float = 2.0,
) -> Figure:
    """Draw clouds, each point in the colours of its responsibilities, with an ellipsoid around each component.

    Args:
        points: (B, N, D) with D = 2 or 3; of more features the first three are drawn.
        mixture: B mixtures.
        mask: (B, N), false where a row is padding.
        titles: one a cloud.
        columns: clouds in a row.
        radius: of the ellipsoids, in standard deviations.

    Example:
        >>> mixture = Mixture(torch.zeros(1, 1), torch.zeros(1, 1, 2), torch.ones(1, 1, 2))
        >>> figure = mixture_grid(torch.randn(1, 50, 2), mixture)
    """
    points, mixture = points.detach().cpu().float(), Mixture(*(part.detach().cpu().float() for part in mixture))
    flat = points.shape[-1] == 2
    rows = -(-len(points) // columns)
    columns = min(columns, len(points))
    figure, axes = new_figure(
        rows, columns, width=2.4, height=2.4, subplot_kw={} if flat else {"projection": "3d", "box_aspect": (1, 1, 1)}
    )
    colors = component_colors(mixture.means.shape[1])
    shades = mixture.posterior(points).responsibilities @ colors
    covariances = _full(mixture)
    with figure_style():
        for i, ax in enumerate(axes.flat):
            if i >= len(points):
                ax.set_axis_off()
                continue
            keep = slice(None) if mask is None else mask[i].cpu()
            cloud = points[i][keep][:, :3]
            ax.scatter(*cloud.T.numpy(), c=shades[i][keep].clamp(0, 1).numpy(), s=3, linewidths=0, alpha=0.8)
            visible = mixture.log_weights[i].exp() > 1e-3
            for mean, covariance, color in zip(
                mixture.means[i][visible], covariances[i][visible], colors[visible], strict=True
            ):
                _ellipsoid(ax, mean[:3], covariance[:3, :3], color.numpy(), radius)
            if titles is not None:
                ax.set_title(titles[i])
            middle, reach = cloud.mean(0), (cloud - cloud.mean(0)).abs().max() if len(cloud) else torch.tensor(1.0)
            for axis, centre in zip("xyz", middle.nan_to_num().tolist(), strict=False):
                getattr(ax, f"set_{axis}lim")(centre - float(reach), centre + float(reach))
            ax.set_axis_off()
            if flat:
                ax.set_aspect("equal")
            else:
                ax.set_box_aspect((1, 1, 1), zoom=1.3)
    return figure


def _full(mixture: Mixture) -> Tensor:
    """Return the covariances as (B, K, D, D) whatever their structure."""
    kind = mixture.covariance_type
    if kind in ("full", "tied"):
        return mixture.covariances.expand(*mixture.means.shape, -1)
    variances = mixture.covariances if kind == "diag" else mixture.covariances.unsqueeze(-1)
    return variances.expand_as(mixture.means).diag_embed()


def _ellipsoid(ax: Any, mean: Tensor, covariance: Tensor, color: Any, radius: float) -> None:
    values, vectors = torch.linalg.eigh(covariance)
    frame = radius * vectors * values.clamp(min=0).sqrt()
    turn = torch.linspace(0, 2 * torch.pi, 25)
    if len(mean) == 2:
        line = mean + torch.stack([turn.cos(), turn.sin()], -1) @ frame.T
        ax.plot(*line.T.numpy(), color=color, linewidth=1.2)
        return
    lift = torch.linspace(0, torch.pi, 13)
    sphere = torch.stack(
        [turn.cos()[:, None] * lift.sin(), turn.sin()[:, None] * lift.sin(), lift.cos().expand(len(turn), -1)], -1
    )
    surface = mean + sphere @ frame.T
    ax.plot_surface(*surface.permute(2, 0, 1).numpy(), color=color, alpha=0.12, linewidth=0, shade=False)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str = "",
    levels: Mapping[str, float] | None = None,
) -> Figure:
    """Draw named lines, and dashed levels to compare them with.

    Args:
        series: x and y of each line.
        xlabel: what is on the horizontal axis, with its unit.
        ylabel: what is on the vertical axis, with its unit.
        title: of the figure.
        levels: heights of the dashed lines.

    Example:
        >>> figure = curves({"trained": ([0, 1], [-1.0, 0.5])}, "EM iteration", "log-likelihood a point (nats)")
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(width=4.6, height=3.0)
    ax = axes[0, 0]
    if all(value == int(value) for x, _ in series.values() for value in x):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    with figure_style():
        for name, (x, y) in series.items():
            ax.plot(x, y, label=name, marker="o" if len(x) <= 20 else None, markersize=3)
        for name, height in (levels or {}).items():
            ax.axhline(height, color=NEUTRAL, linestyle="--", linewidth=1.2, label=name)
        ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
        ax.legend(loc="best")
    return figure
