"""The kernels at a glance: energies, and the responsibilities that they give three centers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from em_lightning.kernels import KERNELS
from em_lightning.plots.style import PALETTE, figure_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALAR_KERNELS = ("gaussian", "laplace", "logistic", "student_t", "huber", "pseudo_huber", "exponential", "dot_product")


@figure_style()
def kernel_gallery(kernels: Sequence[str] = SCALAR_KERNELS, centers: Sequence[float] = (-2.0, 0.0, 2.0)) -> Figure:
    """Draw, for each kernel, the energy of every center above the responsibilities at temperature 1.

    A center and its curves share a colour.

    Args:
        kernels: keys of kernels that take items of one feature.
        centers: the centers' positions.

    Example:
        >>> figure = kernel_gallery(["gaussian", "laplace"])
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['gaussian', 'laplace']
    """
    z = torch.linspace(-6, 6, 601).unsqueeze(-1)
    positions = torch.tensor(centers).unsqueeze(-1)
    # A row of energies above a row of responsibilities, at most four kernels wide, then the next kernels below.
    columns = min(4, len(kernels))
    bands = -(-len(kernels) // columns)
    figure, axes = new_figure(2 * bands, columns, width=2.4, height=1.7, sharex=True)
    for index in range(bands * columns):
        band, column = divmod(index, columns)
        above, below = axes[2 * band, column], axes[2 * band + 1, column]
        if index >= len(kernels):
            above.set_visible(False)
            below.set_visible(False)
            continue
        with torch.no_grad():
            energies = KERNELS.build(kernels[index])(z, positions)
        responsibilities = (-energies).softmax(-1)
        for k, center in enumerate(centers):
            color = PALETTE[k % len(PALETTE)]
            above.plot(z, energies[:, k], color=color)
            below.plot(z, responsibilities[:, k], color=color)
            for panel in (above, below):
                panel.axvline(center, color=color, linewidth=0.8, linestyle=":")
        above.set_title(kernels[index])
        # Energies differ by orders of magnitude between kernels: one window shows their shapes.
        above.set_ylim(*(-13, 13) if energies.min() < -1 else (-0.4, 9))
        below.set_ylim(-0.04, 1.04)
        if column == 0:
            above.set_ylabel("energy")
            below.set_ylabel("responsibility")
    for panel in axes[-1]:
        panel.set_xlabel("z")
    return figure
