"""The free energy of energies where no responsibilities are wanted, in as few passes over them as that takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from em_lightning.distributed import row_blocks, times

__all__ = ["free_energy_of"]


class _ExpSum(torch.autograd.Function):
    """The sum over units of exp((lowest - d) / T), which saves no copy of the energies d.

    Returns the lowest energies too (0 where there is none), whose gradient is left out: no free energy depends on them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(items: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        blocks = row_blocks(items)
        lowest = [_lowest(block) for block in blocks]
        sums = [_exponentials(block, low, temperature).sum(1) for block, low in zip(blocks, lowest, strict=True)]
        return torch.cat(sums), torch.cat(lowest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])
        ctx.save_for_forward(inputs[0], output[1])
        ctx.temperature = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None]:
        slope = (gradient / -ctx.temperature)[:, None]
        items, lowest = ctx.saved_tensors
        return times(_exponentials(items, lowest, ctx.temperature), slope), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, None]:
        items, lowest = ctx.saved_tensors
        return (_exponentials(items, lowest, ctx.temperature) * tangent).sum(1) / -ctx.temperature, None


def _lowest(items: Tensor) -> Tensor:
    lowest = items.amin(1, keepdim=True)
    return lowest.masked_fill_(lowest == torch.inf, 0.0)


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
    if torch.compiler.is_compiling():  # dynamo traces no autograd function that has a jvp, and fuses this by itself
        lowest = _lowest(items.detach())
        total = ((lowest - items) / temperature).exp().sum(1)
    else:
        total, lowest = _ExpSum.apply(items, temperature)
    # The lowest energy adds 1 to the sum, unless all are infinite, and then the sum is 0.
    free_energy = lowest[:, 0] - temperature * total.clamp_min(1.0).log()
    return free_energy.masked_fill(total == 0, torch.inf)
