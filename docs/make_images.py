"""Draw the figures of the documentation that need no training: python docs/make_images.py [FOLDER]."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from em_lightning.activations import ACTIVATIONS, Activation, SignedActivation
from em_lightning.competition import softmin
from em_lightning.kernels import KERNELS
from em_lightning.plots import figure_style, new_grid, save_figure
from em_lightning.plots.style import NEUTRAL, PALETTE

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
    figure, axes = new_grid(2 * len(kernels), 4, width=2.4, height=1.6, sharex=True)
    for left, right, key in zip(axes[::2], axes[1::2], kernels, strict=True):
        posterior = softmin(KERNELS.build(key)(z, torch.tensor(centers).unsqueeze(-1)).detach())
        for k, center in enumerate(centers):
            color = PALETTE[k % len(PALETTE)]
            left.plot(z, posterior.energies[:, k], color=color)
            right.plot(z, posterior.responsibilities[:, k], color=color)
            for ax in (left, right):
                ax.axvline(center, color=color, linewidth=0.8, linestyle=":")
        # The same window for all kernels shows their shapes; only dot products are negative.
        left.set(title=key, ylabel="energy", ylim=(-13, 13) if posterior.energies.min() < -1 else (-0.4, 9))
        right.set(ylabel="responsibility", ylim=(-0.04, 1.04))
    figure.supxlabel("z")
    return figure


_SIGNED_KERNELS = ("gaussian", "laplace", "student_t", "logistic", "huber", "pseudo_huber", "exponential")
# Pre-activation of the second unit. Not 0: the gradient of a gated unit at 0 does not depend on the others.
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
    figure, axes = new_grid(len(panels), columns, width=2.2, height=1.9, sharex=True)
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


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images"
    print(save_figure(activation_gallery(), folder / "activations.png"))
    print(save_figure(kernel_gallery(), folder / "kernels.png"))
