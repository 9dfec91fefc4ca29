"""Evaluation of functions of points in blocks, recomputed in the backward pass, in plain torch.

In eager mode no tensor of size (N, K) is stored for the backward pass, which evaluates the function on each block
again. Memory therefore does not grow with the number of EM iterations, and the intermediate results of a block stay in
a processor's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Numbers per intermediate result of a block on a CPU (1 MiB in float64, about the second-level cache of a core), and on
# GPUs, which need larger blocks to use all cores.
_BLOCK_SIZES = 2**17, 2**22
# Up to this many numbers, one block without recomputation is faster.
_SMALL = 2**13

Tensors = Sequence[Tensor | None]
# Called as function(sets, *rows, *parameters) with the slice of the sets and the block's part of each tensor.
BlockFunction = Callable[..., tuple[Tensor, ...]]


def _over_blocks(
    join: Callable[[Iterator[tuple[Tensor, ...]]], tuple[Tensor, ...]],
    function: BlockFunction,
    rows: Tensors,
    parameters: Tensors,
    numbers_per_point: int,
    block_sizes: tuple[int, int] | None = None,
) -> tuple[Tensor, ...]:
    """Return the joined results of a function of ``rows`` (B, ..., N) and ``parameters`` (B, ...), evaluated in blocks.

    ``numbers_per_point`` is the size of an intermediate result divided by the number of points, such as K.
    """
    first = next(tensor for tensor in rows if tensor is not None)
    num_sets, num_items = first.shape[0], first.shape[-1]
    # A compiler would unroll the loop over blocks, and compile again for each number of blocks.
    if torch.compiler.is_compiling() or num_sets * num_items * numbers_per_point <= _SMALL:
        return function(slice(None), *rows, *parameters)
    block_size = (block_sizes or _BLOCK_SIZES)[first.device.type != "cpu"]
    items = max(min(num_items, block_size // numbers_per_point), 1)
    sets = max(block_size // (numbers_per_point * items), 1)
    set_blocks, item_blocks = -(-num_sets // sets), -(-num_items // items)
    by_sets = []
    # The gradient of a split is one concatenation, that of a slice a tensor of full size per block.
    for block, (own_rows, own) in enumerate(
        zip(_split(rows, sets, 0, set_blocks), _split(parameters, sets, 0, set_blocks), strict=True)
    ):
        which = slice(block * sets, min((block + 1) * sets, num_sets))
        results = (_recomputed(function, which, *cut, *own) for cut in _split(own_rows, items, -1, item_blocks))
        by_sets.append(join(results))
    return tuple(_cat(parts, 0) for parts in zip(*by_sets, strict=True))


def _cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


# sum_blocks is for functions that return sums over points (b, ...), map_blocks for values per point (b, ..., n).
# Sums are added one by one, because small tensors of all blocks would fragment the memory between the large ones.
sum_blocks = functools.partial(
    _over_blocks, functools.partial(functools.reduce, lambda a, b: tuple(map(torch.add, a, b)))
)
map_blocks = functools.partial(_over_blocks, lambda results: tuple(_cat(p, -1) for p in zip(*results, strict=True)))


def _split(tensors: Tensors, size: int, dim: int, count: int) -> list[tuple[Tensor | None, ...]]:
    """Return the parts of all tensors, one tuple per block."""
    parts = [[None] * count if tensor is None else tensor.split(size, dim) for tensor in tensors]
    return list(zip(*parts, strict=True)) if parts else [()] * count


def _recomputed(function: BlockFunction, *arguments: slice | Tensor | None) -> tuple[Tensor, ...]:
    tensors = [part for part in arguments if isinstance(part, Tensor)]
    if not torch.is_grad_enabled() or not have_memory(*tensors):  # torch.func does not support checkpoints
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def have_memory(*tensors: Tensor) -> bool:
    """Return whether all tensors have memory of their own, unlike those of torch.func's transforms and of tracers."""
    try:
        for tensor in tensors:
            tensor.data_ptr()
    except RuntimeError:
        return False
    return True
