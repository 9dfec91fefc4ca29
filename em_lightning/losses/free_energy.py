"""The free energy of energies where no responsibilities are wanted, in as few passes over them as that takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from em_lightning.distributed import row_blocks

__all__ = ["free_energy_of"]


class _ExpSum(torch.autograd.Function):
    """The sum over units of exp((lowest - d) / T), which saves no copy of the energies d.

    The gradient in ``lowest`` is left out: the free energy does not depend on it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(items: Tensor, lowest: Tensor, temperature: float) -> Tensor:
        parts = zip(row_blocks(items), row_blocks(lowest, items.shape[1]), strict=True)
        return torch.cat([_exponentials(block, low, temperature).sum(1) for block, low in parts])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])
        ctx.temperature = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        slope = (gradient / -ctx.temperature)[:, None]
        return _exponentials(*ctx.saved_tensors, ctx.temperature) * slope, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return (_exponentials(*ctx.saved_tensors, ctx.temperature) * tangent).sum(1) / -ctx.temperature


def _exponentials(items: Tensor, lowest: Tensor, temperature: float) -> Tensor:
    below = lowest - items
    return (below if temperature == 1 else below.div_(temperature)).exp_()


def free_energy_of(items: Tensor, temperature: float) -> Tensor:
    r"""Return :math:`-T \log \sum_j \exp(-d_{nj} / T)` of energies (N, D): shape (N,).

    It is the free energy of :func:`em_lightning.competition.softmin`, +inf without a gradient where every energy is.

    Example:
        >>> free_energy_of(torch.zeros(1, 4), 1.0)
        tensor([-1.3863])
    """
    lowest = items.detach().amin(1, keepdim=True)
    start = lowest.masked_fill(lowest == torch.inf, 0.0)
    if torch.compiler.is_compiling():  # dynamo traces no autograd function that has a jvp, and fuses this by itself
        total = ((start - items) / temperature).exp().sum(1)
    else:
        total = _ExpSum.apply(items, start, temperature)
    # The lowest energy adds 1 to the sum, unless it is infinite.
    return lowest[:, 0] - temperature * total.clamp_min(1.0).log()
