"""The gallery of activations: value and derivative of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from em_lightning.plots.style import NEUTRAL, PALETTE, figure_style, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from em_lightning.activations import Activation

# What the other unit holds while the first is swept: not 0, where a gated rival would be blind to the competition.
_RIVAL = 0.5


def activation_gallery(reach: float = 4.0, columns: int = 4) -> Figure:
    """Draw value and derivative of every registered activation, and of signed activations under every scalar kernel.

    A unit's value y is drawn over its own pre-activation z, with its derivative dy/dz. Where units compete, a rival
    stands at 0.5, and its derivative by z is drawn as well: zero would be no competition.

    Args:
        reach: z runs from -reach to reach.
        columns: panels a row.

    Raises:
        ValueError: ``reach`` is not positive, or there is no column.

    Example:
        >>> len(activation_gallery().axes) >= 10
        True
    """
    if not reach > 0:
        raise ValueError(f"reach={reach!r} must be positive, the largest pre-activation drawn")
    if columns < 1:
        raise ValueError(f"columns={columns!r} must be at least 1")
    from em_lightning.activations import ACTIVATIONS, SignedActivation

    scalar = ("gaussian", "laplace", "student_t", "logistic", "huber", "pseudo_huber", "exponential")
    panels: list[tuple[str, Activation]] = [(f"signed, {key}", SignedActivation(key)) for key in scalar]
    panels += [(key, ACTIVATIONS.build(key)) for key in ACTIVATIONS if key != "signed"]
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(rows, columns, width=2.2, height=1.9, sharex=True)
    with figure_style():
        for panel, (title, activation) in zip(axes.flat, panels, strict=False):
            _draw(panel, title, activation, reach)
        for panel in axes[-1]:
            panel.set_xlabel("pre-activation z")
        for empty in list(axes.flat)[len(panels) :]:
            empty.remove()
        handles = {label: line for panel in figure.axes for line, label in zip(*_legend(panel), strict=True)}
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3)
    return figure


def _draw(panel: Axes, title: str, activation: Activation, reach: float) -> None:
    z = torch.linspace(-reach, reach, 401, dtype=torch.float64)
    rival = torch.tensor([_RIVAL] if activation.competes else [], dtype=torch.float64)

    def values(first: torch.Tensor) -> torch.Tensor:
        return activation(torch.cat([first.reshape(1), rival]))

    y = torch.func.vmap(values)(z)[:, 0]
    slopes = torch.func.vmap(torch.func.jacrev(values))(z)
    panel.axhline(0, color=NEUTRAL, linewidth=0.6)
    panel.axvline(0, color=NEUTRAL, linewidth=0.6)
    panel.plot(z, y, color=PALETTE[0], label="value y")
    panel.plot(z, slopes[:, 0], color=PALETTE[1], linestyle="--", label="derivative dy/dz")
    if activation.competes:
        panel.plot(z, slopes[:, 1], color=PALETTE[2], linestyle=":", label="a rival's derivative by z")
    panel.set_title(title)


def _legend(panel: Axes) -> tuple[list[Any], list[str]]:
    return panel.get_legend_handles_labels()
