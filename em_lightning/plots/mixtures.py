"""Figures of point clouds with their mixtures, and of curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from em_lightning.files import write_whole
from em_lightning.mixture import Mixture
from em_lightning.mixture.covariance import covariance_of
from em_lightning.plots.style import NEUTRAL, figure_style, new_figure, new_grid


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
    figure, axes = new_grid(len(points), 4, width=2.4, height=2.4, subplot_kw=projection)
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


@figure_style()
def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str = "",
    levels: Mapping[str, float] | None = None,
    log_x: bool = False,
) -> Figure:
    """Draw named lines in one panel, and dashed horizontal lines for comparison.

    Args:
        series: x and y of each line.
        xlabel: label of the x axis, with its unit.
        ylabel: label of the y axis, with its unit.
        title: title of the figure.
        levels: y of the dashed lines.
        log_x: whether the x axis is logarithmic.

    Example:
        >>> figure = curves({"trained": ([0, 1], [-1.0, 0.5])}, "EM iteration", "log-likelihood per point (nats)")
    """
    figure, axes = new_figure(width=4.6, height=3.0)
    ax = axes[0, 0]
    if all(value == int(value) for x, _ in series.values() for value in x):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name, (x, y) in series.items():
        ax.plot(x, y, label=name, marker="o" if len(x) <= 20 else None, markersize=3)
    for name, level in (levels or {}).items():
        ax.axhline(level, color=NEUTRAL, linestyle="--", linewidth=1.2, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if log_x:
        ax.set_xscale("log")
        ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter())
    ax.legend(loc="best")
    return figure


def mixture_page(path: Path, clouds: Sequence[tuple[str, Tensor, Tensor, Mapping[str, Sequence[Mixture]]]]) -> None:
    """Write an HTML page that needs no network: clouds to turn, ellipsoids, and a slider over iterations.

    Args:
        path: of the page.
        clouds: for each the title, fitted points (1, N, 3), held-out points (1, M, 3), and for each method the
            mixtures of one set after each iteration.
    """

    def numbers(values: Tensor) -> Any:
        return [numbers(part) for part in values] if values.ndim else round(float(values), 4)

    def step(mixture: Mixture, points: Tensor, held_out: Tensor) -> dict[str, Any]:
        values, vectors = torch.linalg.eigh(
            covariance_of(mixture.covariances, mixture.means).to_full(mixture.covariances, mixture.means)[0].double()
        )
        axes = (2.0 * vectors * values.clamp(min=0.0).sqrt().unsqueeze(-2)).mT
        scores = (float(mixture.log_prob(x.to(mixture.means)).mean()) for x in (points, held_out))
        named = {"means": mixture.means[0], "axes": axes, "weights": mixture.weights[0]}
        shapes = {name: numbers(value.detach().cpu()) for name, value in named.items()}
        return {**shapes, **dict(zip(("fitted", "held_out"), scores, strict=True))}

    content = [
        {
            "title": title,
            "points": numbers(points[0].cpu()),
            "held_out": numbers(held_out[0].cpu()),
            "methods": [
                {"name": name, "steps": [step(mixture, points, held_out) for mixture in mixtures]}
                for name, mixtures in methods.items()
            ],
        }
        for title, points, held_out, methods in clouds
    ]
    page = Path(__file__).with_name("scene.html").read_text(encoding="utf-8")
    write_whole(path, page.replace("/*DATA*/", json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")))
