"""Functions of points evaluated block by block and recomputed in the backward pass, in plain torch.

Nothing of the size (N, K) is kept for the backward pass: it evaluates the function on each block again. Memory
therefore does not grow with the number of EM iterations, and the intermediate results of a block stay in a processor's
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Numbers per intermediate result of a block: 1 MiB in float64, about the second-level cache of a core.
_BLOCK_SIZE = 2**17
# A GPU is filled by larger blocks.
_DEVICE_BLOCK_SIZE = 2**22
# Functions of fewer numbers are differentiated by autograd itself, which is faster for them and knows every order.
_SMALL = 2**13

Tensors = Sequence[Tensor | None]
Block = tuple[slice, slice]
# Called as function(sets, *rows, *parameters) with the slice of the sets and the block's part of each tensor; returns
# tensors (b, ...) that are sums over the points of the block, or (b, ..., n) where the points are mapped.
BlockFunction = Callable[..., tuple[Tensor, ...]]


def sum_blocks(
    function: BlockFunction,
    rows: Tensors,
    parameters: Tensors,
    width: int,
    shared: Sequence[Tensor] = (),
    block_size: int | None = None,
) -> tuple[Tensor, ...]:
    """Return the sums over all points of a function of blocks of points.

    Args:
        function: see ``BlockFunction``.
        rows: tensors (B, ..., N) that are cut along sets and points; ``None`` is passed on.
        parameters: tensors (B, ...) that are cut along sets.
        width: numbers per point of an intermediate result, such as K.
        shared: tensors that the function uses besides, such as the parameters of a kernel; not cut.
        block_size: numbers per intermediate result of a block.
    """
    return _over_blocks(function, rows, parameters, width, shared, block_size, adds=True)


def map_blocks(
    function: BlockFunction,
    rows: Tensors,
    parameters: Tensors,
    width: int,
    shared: Sequence[Tensor] = (),
    block_size: int | None = None,
) -> tuple[Tensor, ...]:
    """Return a function of points (B, ..., N), evaluated block by block; arguments are those of :func:`sum_blocks`."""
    return _over_blocks(function, rows, parameters, width, shared, block_size, adds=False)


def blocks_of(rows: Tensor, width: int, block_size: int | None = None) -> list[Block]:
    """Return the blocks, slices of sets and of points, of rows (B, ..., N): one where a compiler fuses anyway."""
    sets, items = rows.shape[0], rows.shape[-1]
    if torch.compiler.is_compiling():
        return [(slice(0, sets), slice(0, items))]
    if block_size is None:
        block_size = _BLOCK_SIZE if rows.device.type == "cpu" else _DEVICE_BLOCK_SIZE
    n = max(min(items, block_size // width), 1)
    b = max(block_size // (width * n), 1)
    return [
        (slice(first, min(first + b, sets)), slice(row, min(row + n, items)))
        for first in range(0, max(sets, 1), b)
        for row in range(0, max(items, 1), n)
    ]


def _over_blocks(
    function: BlockFunction,
    rows: Tensors,
    parameters: Tensors,
    width: int,
    shared: Sequence[Tensor],
    block_size: int | None,
    adds: bool,
) -> tuple[Tensor, ...]:
    first = next(tensor for tensor in rows if tensor is not None)
    tensors = (*rows, *parameters)
    differentiated = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (*tensors, *shared)
    )
    blocks = blocks_of(first, width, block_size)
    if not differentiated:
        return _evaluate(function, blocks, len(rows), adds, tensors)
    if torch.compiler.is_compiling() or first.shape[0] * first.shape[-1] * width <= _SMALL:
        return function(slice(None), *tensors)
    return _Recomputed.apply(function, blocks, len(rows), adds, tuple(shared), *tensors, *shared)


def _cut(tensors: Tensors, block: Block, num_rows: int) -> list[Tensor | None]:
    sets, items = block
    return [
        None if tensor is None else tensor[sets, ..., items] if place < num_rows else tensor[sets]
        for place, tensor in enumerate(tensors)
    ]


def _evaluate(
    function: BlockFunction, blocks: Sequence[Block], num_rows: int, adds: bool, tensors: Tensors
) -> tuple[Tensor, ...]:
    """Return the results of all blocks, added up over points or put side by side."""
    if len(blocks) == 1:
        return function(slice(None), *tensors)
    num_sets, num_items = blocks[-1][0].stop, blocks[-1][1].stop
    results: list[Tensor] = []
    for sets, items in blocks:
        found = function(sets, *_cut(tensors, (sets, items), num_rows))
        if not results:
            ends = [part.shape[1:] if adds else (*part.shape[1:-1], num_items) for part in found]
            results = [part.new_zeros(num_sets, *end) for part, end in zip(found, ends, strict=True)]
        for result, part in zip(results, found, strict=True):
            if adds:
                result[sets] += part
            else:
                result[sets, ..., items] = part
    return tuple(results)


class _Recomputed(torch.autograd.Function):
    """The results of all blocks, whose gradient evaluates the function again."""

    @staticmethod
    def forward(
        ctx: Any,
        function: BlockFunction,
        blocks: Sequence[Block],
        num_rows: int,
        adds: bool,
        shared: Sequence[Tensor],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        cut = tensors[: len(tensors) - len(shared)]
        ctx.function, ctx.blocks, ctx.num_rows, ctx.adds, ctx.shared = function, blocks, num_rows, adds, shared
        ctx.save_for_backward(*cut)
        ctx.set_materialize_grads(False)
        return _evaluate(function, blocks, num_rows, adds, cut)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[5:]
        if torch.is_grad_enabled():  # a second derivative is taken of all blocks at once
            found = _gradients(ctx, slice(None), tensors, grads, wanted, create_graph=True)
            return None, None, None, None, None, *found
        wholes = (*tensors, *ctx.shared)
        totals = [torch.zeros_like(w) if needed else None for w, needed in zip(wholes, wanted, strict=True)]
        for block in ctx.blocks:
            sets, items = block
            outer = [None if g is None else g[sets] if ctx.adds else g[sets, ..., items] for g in grads]
            found = _gradients(ctx, sets, _cut(tensors, block, ctx.num_rows), outer, wanted, create_graph=False)
            for place, (part, total) in enumerate(zip(found, totals, strict=True)):
                if part is None or total is None:
                    continue
                if place >= len(tensors):
                    total += part
                elif place >= ctx.num_rows:
                    total[sets] += part
                else:
                    total[sets, ..., items] = part
        return None, None, None, None, None, *totals


def _gradients(
    ctx: Any, sets: slice, tensors: Tensors, grads: Tensors, wanted: Sequence[bool], create_graph: bool
) -> Tensors:
    """Return the gradients of one block in its tensors and in what all blocks share."""
    with torch.enable_grad():
        if not create_graph:
            tensors = [
                tensor if tensor is None else tensor.detach().requires_grad_(needed)
                for tensor, needed in zip(tensors, wanted, strict=False)
            ]
        results = ctx.function(sets, *tensors)
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
        if not pairs:
            return [None] * len(wanted)
        inputs = [tensor for tensor, needed in zip((*tensors, *ctx.shared), wanted, strict=True) if needed]
        outputs, outer = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, inputs, outer, create_graph=create_graph, allow_unused=True))
    return [next(found) if needed else None for needed in wanted]
