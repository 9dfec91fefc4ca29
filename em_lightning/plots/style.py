"""One palette and one style for every figure, without pyplot's global state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

# Okabe and Ito's colours (jfly.uni-koeln.de/color), told apart under every common colour blindness; yellow, too
# faint for lines on white, stands last.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
SEQUENTIAL = "viridis"
DIVERGING = "PuOr"
NEUTRAL = "#7F7F7F"

_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "image.cmap": SEQUENTIAL,
    "savefig.dpi": 150,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw in the library's style, as a ``with`` or a decorator, and leave matplotlib's settings as they were.

    Titles and legends take their style when they are made, so a function that draws is decorated as a whole:

    Example:
        >>> @figure_style()
        ... def draw():
        ...     figure, axes = new_figure()
        ...     return axes[0, 0].set_title("bold").get_weight()
        >>> draw()
        'bold'
    """
    import matplotlib
    from cycler import cycler

    settings: Any = {**_STYLE, "axes.prop_cycle": cycler(color=PALETTE)}
    with matplotlib.rc_context(settings):
        yield


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = 3.0, height: float = 2.4, **subplots: Any
) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes as a (rows, columns) array, in the library's style.

    The figure belongs to no pyplot state, so nothing has to be closed.

    Args:
        rows: how many rows of axes.
        columns: how many columns of axes.
        width: inches of one axes.
        height: inches of one axes.
        **subplots: passed to :meth:`matplotlib.figure.Figure.subplots`, such as ``sharex=True``.

    Example:
        >>> figure, axes = new_figure(1, 2)
        >>> axes.shape
        (1, 2)
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with figure_style():
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, **subplots)
    return figure, axes


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the figure to ``path`` (its folder is made) in the library's style and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with figure_style():
        figure.savefig(path)
    return path
