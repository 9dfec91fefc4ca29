"""Evaluation of functions of points in blocks, recomputed in the backward pass, in plain torch.

In eager mode no tensor of size (N, K) is stored for the backward pass, which evaluates the function on each block
again. So memory does not grow with the number of EM iterations, and intermediate results of a block stay in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

# Numbers per intermediate result of a block on a CPU (1 MiB in float64, about the second-level cache of a core), and on
# other devices, which need larger blocks to use all cores. The time of an E-step on a CPU differs by at most 20 % from
# 2**17 to 2**21 numbers, and is higher below; the second number is chosen, not measured.
_BLOCK_SIZES = 2**17, 2**22
# Up to this many numbers (64 KiB in float64) use one block without recomputation, which takes about half the time.
_SMALL = 2**13

Tensors = Sequence[Tensor | None]
# Called as function(sets, *of_points, *of_sets) with the slice of the sets and the block's part of each tensor.
BlockFunction = Callable[..., tuple[Tensor, ...]]


def _over_blocks(
    join: Callable[[Iterator[tuple[Tensor, ...]]], tuple[Tensor, ...]],
    function: BlockFunction,
    of_points: Tensors,
    of_sets: Tensors,
    numbers_per_point: int,
    block_sizes: tuple[int, int] | None = None,
) -> tuple[Tensor, ...]:
    """Return joined results of a function of tensors (B, ..., N) and (B, ...), evaluated on blocks of sets and points.

    ``numbers_per_point`` is the size of an intermediate result divided by the number of points, such as K.
    """
    first = next(tensor for tensor in of_points if tensor is not None)
    num_sets, num_points = first.shape[0], first.shape[-1]
    # A compiler would unroll the loop over blocks, and compile again for each number of blocks.
    if torch.compiler.is_compiling() or num_sets * num_points * numbers_per_point <= _SMALL:
        return function(slice(None), *of_points, *of_sets)
    on_cpu, elsewhere = block_sizes or _BLOCK_SIZES
    block_size = on_cpu if first.device.type == "cpu" else elsewhere
    n = max(min(num_points, block_size // numbers_per_point), 1)  # points per block
    b = max(block_size // (numbers_per_point * n), 1)  # sets per block
    set_blocks, point_blocks = -(-num_sets // b), -(-num_points // n)  # rounded up
    tensors = [tensor for tensor in (*of_points, *of_sets) if tensor is not None]
    if torch.is_grad_enabled() and have_memory(*tensors):  # torch.func: no own memory, and no checkpoints
        function = functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    joined = []
    # The gradient of a split is one concatenation, that of a slice a tensor of full size per block.
    parts = zip(_split(of_points, b, 0, set_blocks), _split(of_sets, b, 0, set_blocks), strict=True)
    for i, (own_points, own_sets) in enumerate(parts):
        sets = slice(i * b, min((i + 1) * b, num_sets))
        blocks = _split(own_points, n, -1, point_blocks)
        joined.append(join(function(sets, *block, *own_sets) for block in blocks))
    return tuple(_cat(results, 0) for results in zip(*joined, strict=True))


def _cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _add(results: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    # One by one, because small tensors of all blocks would fragment the memory between the large ones.
    return functools.reduce(lambda total, result: tuple(map(torch.add, total, result)), results)


def _concatenate(results: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(_cat(parts, -1) for parts in zip(*results, strict=True))


sum_blocks = functools.partial(_over_blocks, _add)  # for functions that return sums over points (b, ...)
map_blocks = functools.partial(_over_blocks, _concatenate)  # for functions that return values per point (b, ..., n)


def _split(tensors: Tensors, size: int, dim: int, count: int) -> list[tuple[Tensor | None, ...]]:
    """Return the parts of all tensors, one tuple for each of ``count`` blocks of ``size`` entries along an axis."""
    parts = [[None] * count if tensor is None else tensor.split(size, dim) for tensor in tensors]
    return list(zip(*parts, strict=True)) if parts else [()] * count


def have_memory(*tensors: Tensor) -> bool:
    """Return whether all tensors have memory of their own, unlike those of torch.func's transforms and of tracers."""
    try:
        for tensor in tensors:
            tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def has_values(tensor: Tensor) -> bool:
    """Return whether values can be read: not under a compiler or torch.func, nor while a CUDA graph is captured."""
    capturing = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return not torch.compiler.is_compiling() and not capturing and have_memory(tensor)


def are_plain(*tensors: Tensor | None) -> bool:
    """Return whether all tensors that are not None have memory, and no tangent of forward-mode derivatives."""
    given = [tensor for tensor in tensors if tensor is not None]
    return have_memory(*given) and all(forward_ad.unpack_dual(tensor).tangent is None for tensor in given)
