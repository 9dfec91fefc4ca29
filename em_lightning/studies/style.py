"""The palette and style of all figures, without pyplot's global state."""

from __future__ import annotations

from functools import partial
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours (jfly.uni-koeln.de/color), distinguishable under all common types of colour blindness. Yellow
# is last, as it is too faint for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
NEUTRAL = "#7F7F7F"  # grey, for reference lines and points

_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "image.cmap": "viridis",
    "savefig.dpi": 150,
}

# Sets matplotlib's parameters to the library's style for a ``with`` block or a decorated function. matplotlib reads the
# style when it creates titles and legends, so decorate the whole function that draws.
figure_style = partial(matplotlib.rc_context, _STYLE)


@figure_style()
def new_figure(
    count: int = 1, columns: int = 1, *, width: float = 3.0, height: float = 2.4, **subplots: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure and the list of its ``count`` axes, in rows of ``columns``.

    The figure is not registered with pyplot, so it need not be closed. ``width`` and ``height`` are those of each axes,
    in inches; further arguments are for :meth:`matplotlib.figure.Figure.subplots`, such as ``sharex=True``.

    Example:
        >>> figure, axes = new_figure(5, 3)
        >>> len(axes), len(figure.axes)
        (5, 5)
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **subplots).flat
    for unused in axes[count:]:
        unused.remove()
    return figure, list(axes[:count])
