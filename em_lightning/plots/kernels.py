"""Figure of the kernels: energies, and responsibilities of three centers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from em_lightning.competition import softmin
from em_lightning.kernels import KERNELS
from em_lightning.plots.style import PALETTE, figure_style, new_grid

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
