"""Draw the figures of the home page and of the theory: python docs/make_images.py [FOLDER]."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LightSource
from matplotlib.figure import Figure
from torch import Tensor

from em_lightning import EMOperator
from em_lightning.activations import ACTIVATIONS, Activation, SignedActivation
from em_lightning.competition import softmin
from em_lightning.kernels import KERNELS
from em_lightning.modules import PointCloudGMM
from em_lightning.studies import ProceduralSurfaces
from em_lightning.studies.style import NEUTRAL, PALETTE, figure_style, new_figure

SCALAR_KERNELS = ("gaussian", "laplace", "logistic", "student_t", "huber", "pseudo_huber", "exponential", "dot_product")


@figure_style()
def kernel_gallery(kernels: Sequence[str] = SCALAR_KERNELS, centers: Sequence[float] = (-2.0, 0.0, 2.0)) -> Figure:
    """Draw, for each kernel, the energies of all centers and their responsibilities at temperature 1.

    Args:
        kernels: keys of kernels for items of one feature.
        centers: positions of the centers.

    Example:
        >>> figure = kernel_gallery(["gaussian", "laplace"])
        >>> [axes.get_title() for axes in figure.axes]
        ['gaussian', '', 'laplace', '']
    """
    z = torch.linspace(-6, 6, 601).unsqueeze(-1)
    figure, axes = new_figure(2 * len(kernels), 4, width=2.4, height=1.6, sharex=True)
    for left, right, key in zip(axes[::2], axes[1::2], kernels, strict=True):
        posterior = softmin(KERNELS.build(key)(z, torch.tensor(centers).unsqueeze(-1)).detach())
        for k, center in enumerate(centers):
            color = PALETTE[k % len(PALETTE)]
            left.plot(z, posterior.energies[:, k], color=color)
            right.plot(z, posterior.responsibilities[:, k], color=color)
            for ax in (left, right):
                ax.axvline(center, color=color, linewidth=0.8, linestyle=":")
        # All kernels have the same window, so that their shapes can be compared; only dot products are negative.
        left.set(title=key, ylabel="energy", ylim=(-13, 13) if posterior.energies.min() < -1 else (-0.4, 9))
        right.set(ylabel="responsibility", ylim=(-0.04, 1.04))
    figure.supxlabel("z")
    return figure


_SIGNED_KERNELS = ("gaussian", "laplace", "student_t", "logistic", "huber", "pseudo_huber", "exponential")
# Pre-activation of the second unit. It is not 0, because the output of a gated unit with pre-activation 0 is 0 whatever
# the other units are.
_RIVAL = 0.5


@figure_style()
def activation_gallery(reach: float = 4.0, columns: int = 4) -> Figure:
    """Draw the value y and the derivative dy/dz of every activation over the pre-activation z.

    Where units compete, a second unit has pre-activation 0.5, and its derivative by z is drawn as well: it is zero
    without competition. The signed activation is drawn for each kernel.

    Args:
        reach: z runs from -reach to reach.
        columns: panels per row.

    Example:
        >>> len(activation_gallery().axes) >= 10
        True
    """
    panels: dict[str, Activation] = {f"signed, {key}": SignedActivation(key) for key in _SIGNED_KERNELS}
    panels.update({key: ACTIVATIONS.build(key) for key in ACTIVATIONS if key != "signed"})
    figure, axes = new_figure(len(panels), columns, width=2.2, height=1.9, sharex=True)
    for ax, (title, activation) in zip(axes, panels.items(), strict=True):
        _draw(ax, activation, reach)
        ax.set_title(title)
    figure.supxlabel("pre-activation z")
    lines = {
        str(line.get_label()): line for ax in axes for line in ax.lines if not str(line.get_label()).startswith("_")
    }
    figure.legend(list(lines.values()), list(lines), loc="outside upper center", ncols=3)
    return figure


def _draw(ax: Axes, activation: Activation, reach: float) -> None:
    """Draw the value and the derivatives of an activation."""
    z = torch.linspace(-reach, reach, 401, dtype=torch.float64)
    rival = torch.tensor([_RIVAL] if activation.competes else [], dtype=torch.float64)

    def values(first: torch.Tensor) -> torch.Tensor:
        return activation(torch.cat([first.reshape(1), rival]))

    slopes = torch.func.vmap(torch.func.jacrev(values))(z)
    ax.axhline(0, color=NEUTRAL, linewidth=0.6)
    ax.axvline(0, color=NEUTRAL, linewidth=0.6)
    ax.plot(z, torch.func.vmap(values)(z)[:, 0], color=PALETTE[0], label="value y")
    ax.plot(z, slopes[:, 0], color=PALETTE[1], linestyle="--", label="derivative dy/dz")
    if activation.competes:
        ax.plot(z, slopes[:, 1], color=PALETTE[2], linestyle=":", label="derivative of a rival by z")


# The classical settings that the validation clouds of docs/results/learned.md choose for 128 points with noise of 0.02.
_TUNED = {"covariance_floor": 3e-3, "num_iters": 2}
# The colours of tab20 without four that resemble others.
_COLORS = colormaps["tab20"]([k for k in range(20) if k not in (7, 9, 15, 19)])[:, :3]


@figure_style()
@torch.no_grad()
def cloud_gallery(families: Sequence[str] = ("box", "chair", "moebius"), num_points: int = 128) -> Figure:
    """Draw, for some sparse clouds, two classical fits, the pretrained fit, and points drawn from the surface.

    Ellipsoids have a radius of two standard deviations; the component of a point gives its colour.

    Args:
        families: one cloud of each.
        num_points: per fitted cloud.

    Example:
        >>> len(cloud_gallery(["torus"], 32).axes)
        4
    """
    torch.manual_seed(0)
    batches = []
    for family in families:
        data = ProceduralSurfaces(families=[family], num_points=1024, noise=0.02, seed=8, batch_size=1)
        batches.append(next(iter(data.test_dataloader())))
    clouds = torch.cat([batch.points[:, :num_points] for batch in batches])
    held_out = torch.cat([batch.held_out for batch in batches])
    start = {"init": "kmeans++", "num_starts": 8, "residual": False}
    fits = {
        "EM, 40 steps": EMOperator(16, 3, num_iters=40, covariance_floor=1e-6, **start).eval(),
        "EM, tuned": EMOperator(16, 3, **_TUNED, **start).eval(),
        "pretrained": PointCloudGMM.pretrained(),
    }
    figure, axes = new_figure(
        len(families) * (len(fits) + 1), len(fits) + 1, width=2.3, height=2.1, subplot_kw={"projection": "3d"}
    )
    panels = iter(axes)
    mixtures = {name: fit(clouds) for name, fit in fits.items()}
    for i in range(len(families)):
        for name, mixture in mixtures.items():
            ax = next(panels)
            component = mixture.posterior(clouds).responsibilities[i].argmax(-1)
            _scatter(ax, clouds[i], _COLORS[component])
            for k in component.unique().tolist():
                _ellipsoid(ax, mixture.means[i, k], mixture.covariances[i, k], _COLORS[k])
            likelihood = float(mixture.log_prob(held_out)[i].mean())
            ax.set_title(f"{name}\n{likelihood:.2f}" if i == 0 else f"{likelihood:.2f}")
        ax = next(panels)
        _scatter(ax, held_out[i], NEUTRAL)
        ax.set_title("held-out points\n" if i == 0 else "")  # two lines, like the other titles
    return figure


def _scatter(ax: Any, cloud: Tensor, color: Any) -> None:
    """Draw points (N, 3) in one colour or in N colours."""
    ax.scatter(*cloud.T.numpy(), c=color, s=7, linewidths=0, depthshade=isinstance(color, str))
    ax.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    ax.set_axis_off()
    ax.set_box_aspect((1, 1, 1), zoom=1.5)


def _ellipsoid(ax: Any, mean: Tensor, covariance: Tensor, color: Any) -> None:
    """Draw the ellipsoid of a component at two standard deviations."""
    values, vectors = torch.linalg.eigh(covariance)
    azimuth, polar = torch.meshgrid(torch.linspace(0, 2 * torch.pi, 33), torch.linspace(0, torch.pi, 17), indexing="ij")
    sphere = torch.stack([azimuth.cos() * polar.sin(), azimuth.sin() * polar.sin(), polar.cos()], -1)
    surface = mean + 2.0 * sphere * values.clamp(min=0).sqrt() @ vectors.T
    ax.plot_surface(
        *surface.permute(2, 0, 1).numpy(), color=color, alpha=0.4, linewidth=0, lightsource=LightSource(225, 45)
    )


@figure_style()
def save_figure(figure: Figure, path: Path) -> Path:
    """Write the figure to ``path``, whose folder is created, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images"
    print(save_figure(activation_gallery(), folder / "activations.png"))
    print(save_figure(kernel_gallery(), folder / "kernels.png"))
    print(save_figure(cloud_gallery(), folder / "clouds.png"))
