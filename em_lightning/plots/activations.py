"""The gallery: value and derivative of every activation, responsibilities under every kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from em_lightning.activations import ACTIVATIONS, Activation, SignedActivation
from em_lightning.competition import softmin
from em_lightning.kernels import KERNELS
from em_lightning.plots.kernels import SCALAR_KERNELS
from em_lightning.plots.style import NEUTRAL, PALETTE, figure_style, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What the other unit holds while the first is swept: not 0, where a gated rival would be blind to the competition.
_RIVAL = 0.5
_CENTERS = (-2.0, 0.0, 2.0)


def activation_gallery(reach: float = 4.0, columns: int = 4) -> Figure:
    """Draw value and derivative of every activation, and what every scalar kernel makes responsible for z.

    A unit's value y is drawn over its own pre-activation z, with its derivative dy/dz. Where units compete, a rival
    stands at 0.5, and its derivative by z is drawn as well: zero would be no competition. Signed activations are drawn
    under each kernel. The last panels hold the responsibilities of three centers, at -2, 0 and 2, under each kernel.

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
    scalar = ("gaussian", "laplace", "student_t", "logistic", "huber", "pseudo_huber", "exponential")
    panels: list[tuple[str, Activation]] = [(f"signed, {key}", SignedActivation(key)) for key in scalar]
    panels += [(key, ACTIVATIONS.build(key)) for key in ACTIVATIONS if key != "signed"]
    rows = -(-(len(panels) + len(SCALAR_KERNELS)) // columns)
    figure, axes = new_figure(rows, columns, width=2.2, height=1.9, sharex=True)
    with figure_style():
        places = iter(axes.flat)
        for title, activation in panels:
            _draw(next(places), title, activation, reach)
        for key in SCALAR_KERNELS:
            _draw_responsibilities(next(places), key, reach)
        for panel in axes[-1]:
            panel.set_xlabel("pre-activation z")
        for empty in places:
            empty.remove()
        lines = {str(line.get_label()): line for panel in figure.axes for line in panel.lines}
        labels = [label for label in lines if not label.startswith("_")]
        figure.legend([lines[label] for label in labels], labels, loc="outside lower center", ncols=3)
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


def _draw_responsibilities(panel: Axes, key: str, reach: float) -> None:
    z = torch.linspace(-reach, reach, 401, dtype=torch.float64)
    centers = torch.tensor(_CENTERS, dtype=torch.float64)
    posterior = softmin(KERNELS.build(key)(z.unsqueeze(-1), centers.unsqueeze(-1)))
    for center, color, r in zip(_CENTERS, PALETTE[3:], posterior.responsibilities.unbind(-1), strict=False):
        panel.axvline(center, color=color, linewidth=0.8, linestyle=":")
        panel.plot(z, r, color=color, label=f"responsibility of the center at {center:g}")
    panel.set_title(f"kernel {key}")
