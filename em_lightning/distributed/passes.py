"""What losses read from the energies of a layer, taken in blocks by one node of the graph.

A layer's energies are large beside everything made of them, and fresh memory of their size costs more than the
arithmetic. So no copy of them is saved, blocks of rows stay in a processor's cache, and the gradient is written once,
whatever number of losses reads the statistics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from em_lightning.distributed.sums import row_blocks

__all__ = ["Reading", "free_energy_from", "free_energy_of", "read", "total_of"]


class Reading(NamedTuple):
    """Statistics of items (N, D) on this rank; empty tensors stand for those not asked for.

    Attributes:
        squares: sums over the items of squared deviations from the mean (D,).
        products: sums over the items of products of deviations (D, D).
        sums: sums over the units of exp((lowest - d) / T) for each item (N,).
        lowest: the lowest energy of each item (N, 1), 0 where there is none; without a gradient.
    """

    squares: Tensor
    products: Tensor
    sums: Tensor
    lowest: Tensor


class _Read(torch.autograd.Function):
    """Gives a reading, and one gradient for all of it.

    The gradient in the mean is left out, as that of sums about the mean is 0 over all ranks. The mean comes as a number
    and its rounding error, or that of a mean of 1,000 would be a part of each item's gradient. The gradient in the
    lowest energies is left out, as no free energy depends on them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        items: Tensor, mean: Tensor | None, error: Tensor | None, temperature: float | None, products: bool
    ) -> tuple[Tensor, ...]:
        squares: list[Tensor] = []
        sums: list[Tensor] = []
        lowest: list[Tensor] = []
        gram = items.new_empty(0)
        for block in row_blocks(items):
            if temperature is not None:
                least = _lowest(block)
                lowest.append(least)
                sums.append(_exponentials(block, least, temperature).sum(1))
            if mean is not None:
                centred = block - mean
                if products:
                    gram = gram.addmm_(centred.T, centred) if squares else centred.T @ centred
                squares.append(centred.mul_(centred).sum(0))
        empty = items.new_empty(0)
        return (
            torch.stack(squares).sum(0) if squares else empty,
            gram,
            torch.cat(sums) if sums else empty.clone(),
            torch.cat(lowest) if lowest else empty.clone(),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        items, mean, error, ctx.temperature, ctx.products = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[3])
        ctx.save_for_backward(items, mean, error, output[3])
        ctx.save_for_forward(items, mean, error, output[3])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        items, mean, error, lowest = ctx.saved_tensors
        of_squares, of_products, of_sums, _ = gradients
        # The slope at an item is linear in its deviation: by a matrix where there are products, whose diagonal takes
        # the squares in, and else by a factor for each unit.
        factor = None if of_squares is None else 2 * of_squares
        matrix = None
        if of_products is not None:
            matrix = of_products + of_products.T
            matrix, factor = matrix if factor is None else matrix + torch.diag(factor), None
        inputs = (items, lowest, of_sums, mean, factor, matrix)
        if torch.is_grad_enabled() or not all(one is None or _plain_memory(one) for one in inputs):
            return _slope(*inputs, error, ctx.temperature), None, None, None, None
        result = torch.empty_like(items, memory_format=torch.contiguous_format)
        start = 0
        for block, slope in zip(row_blocks(items), row_blocks(result), strict=True):
            rows = slice(start, start + len(block))
            start = rows.stop
            if of_sums is None:
                slope.zero_()
            else:
                below = torch.sub(lowest[rows], block, out=slope)
                below = below if ctx.temperature == 1 else below.div_(ctx.temperature)
                below.exp_().mul_((of_sums[rows] / -ctx.temperature)[:, None])
            if matrix is not None:
                slope.addmm_((block - mean).sub_(error), matrix)
            elif factor is not None:
                slope.addcmul_((block - mean).sub_(error), factor)
        return result, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        items, mean, error, lowest = ctx.saved_tensors
        squares = products = sums = tangent.new_empty(0)
        if mean is not None:
            centred = items - mean - error
            squares = 2 * (centred * tangent).sum(0)
            if ctx.products:
                half = centred.T @ tangent
                products = half + half.T
        if ctx.temperature is not None:
            sums = (_exponentials(items, lowest, ctx.temperature) * tangent).sum(1) / -ctx.temperature
        return squares, products, sums, None


def _slope(
    items: Tensor,
    lowest: Tensor,
    of_sums: Tensor | None,
    mean: Tensor | None,
    factor: Tensor | None,
    matrix: Tensor | None,
    error: Tensor | None,
    temperature: float | None,
) -> Tensor:
    """The gradient by plain formulas, which may be differentiated and batched."""
    slope = torch.zeros_like(items)
    if of_sums is not None and temperature is not None:
        slope = slope - _exponentials(items, lowest, temperature) * of_sums[:, None] / temperature
    if mean is not None and error is not None:
        deviations = items - mean - error
        if matrix is not None:
            slope = slope + deviations @ matrix
        elif factor is not None:
            slope = slope + deviations * factor
    return slope


def _lowest(items: Tensor) -> Tensor:
    lowest = items.amin(1, keepdim=True)
    return lowest.masked_fill_(lowest == torch.inf, 0.0)


def _exponentials(items: Tensor, lowest: Tensor, temperature: float) -> Tensor:
    below = lowest - items
    return (below if temperature == 1 else below.div_(temperature)).exp_()


def _plain_memory(tensor: Tensor) -> bool:
    """Tell whether a tensor may be written to another's memory: under transforms and in forward mode it is more."""
    return not (
        torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or torch._C._functorch.is_legacy_batchedtensor(tensor)
        or forward_ad.unpack_dual(tensor).tangent is not None
    )


def total_of(items: Tensor, wide: torch.dtype) -> Tensor:
    """Return the sum over items (N, D) in a wide dtype (D,)."""
    # A block at a time is converted and then summed, which is twice as fast as a sum that converts.
    return torch.stack([block.to(wide).sum(0) for block in row_blocks(items)]).sum(0)


def read(
    items: Tensor, mean: Tensor | None, error: Tensor | None, temperature: float | None, products: bool
) -> Reading:
    """Return what is asked for of items (N, D) on this rank.

    Args:
        items: energies.
        mean: mean of each unit over all ranks (D,), ``None`` where no moments are wanted.
        error: what rounding took from it (D,).
        temperature: T, ``None`` where no free energy is wanted.
        products: whether products of units are wanted.
    """
    if not torch.compiler.is_compiling():
        return Reading(*_Read.apply(items, mean, error, temperature, products))
    empty = items.new_empty(0)
    squares = gram = sums = lowest = empty
    if mean is not None:
        centred = items - mean
        squares, gram = centred.square().sum(0), centred.T @ centred if products else empty
    if temperature is not None:
        lowest = _lowest(items.detach())
        sums = ((lowest - items) / temperature).exp().sum(1)
    return Reading(squares, gram, sums, lowest)


def free_energy_from(reading: Reading, temperature: float) -> Tensor:
    """Return the free energies (N,) of a reading, +inf without a gradient where every energy is."""
    # The lowest energy adds 1 to the sum, unless all are infinite, and then the sum is 0.
    free_energy = reading.lowest[:, 0] - temperature * reading.sums.clamp_min(1.0).log()
    return free_energy.masked_fill(reading.sums == 0, torch.inf)


def free_energy_of(items: Tensor, temperature: float) -> Tensor:
    r"""Return :math:`-T \log \sum_j \exp(-d_{nj} / T)` of energies (N, D): shape (N,).

    It is the free energy of :func:`em_lightning.competition.softmin`, +inf without a gradient where every energy is.

    Example:
        >>> free_energy_of(torch.zeros(1, 4), 1.0)
        tensor([-1.3863])
    """
    return free_energy_from(read(items, None, None, temperature, products=False), temperature)
