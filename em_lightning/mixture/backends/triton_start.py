"""The start of EM in Triton, for float32 points: centers by one launch each, and the mixture of their cells.

A program that chooses centers has a chunk of ``size`` points, and reduces the results of all chunks of the launch
before. Indices are those of ``triton.py``, and j is a candidate.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from em_lightning.mixture.backends.triton import Launch, read_points

# Fewest points per chunk, and most chunks per set, because each program reduces all of them.
_CHUNK, _MOST_CHUNKS = 1024, 1024


@triton.jit
def _lowered(distances, points, centers):
    """Return the minima (J, n) of distances (1, n) and squared distances of points (D, n) from centers (D, J)."""
    difference = points[:, None, :] - centers[:, :, None]
    return tl.minimum(distances, tl.sum(difference * difference, 0))


@triton.jit
def _merit(distances, weights, bn, inside, DRAWN: tl.constexpr):
    """Return, in float64, distances; for draws, numbers proportional to the probabilities of points."""
    if DRAWN:
        distances = tl.maximum(distances, 1.1754944e-38)  # the smallest normal number, for sets of equal points
        return tl.load(weights + bn, mask=inside, other=0.0).to(tl.float64) * distances
    else:
        return tl.where(inside, distances, -2.0).to(tl.float64)


@triton.jit(do_not_specialize=["step"])
def _write_candidates(
    x, weights, uniform, distances, scores, rows, step, features, size, sets, candidates,
    D: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr, J: tl.constexpr, DRAWN: tl.constexpr,
):  # fmt: skip
    """Lower distances by the best candidate of the last step, find new ones, and write sums or maxima of merits."""
    items, chunks = x[4], tl.cdiv(x[4], size)
    b, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    d, c, j, t = tl.arange(0, D), tl.arange(0, CHUNKS), tl.arange(0, J), tl.arange(0, TILE)
    # Distances are read from one buffer and written to the other, so that all programs find the same candidates.
    old, new = (step % 2 * sets + b) * items, ((step + 1) % 2 * sets + b) * items
    slot, center = (step * sets + b) * candidates + j, tl.full((D, 1), float("inf"), tl.float32)
    row = tl.load(rows + slot, mask=j < candidates, other=0)  # of the first center; replaced in other steps
    if step > 0:
        before, valid = slot - sets * candidates, (j < candidates)[:, None] & (c < chunks)[None, :]
        column = tl.load(scores + before[:, None] * chunks + c[None, :], mask=valid, other=0.0 if DRAWN else -2.0)
        if DRAWN:
            best = tl.argmin(tl.where(j < candidates, tl.sum(column, 1), float("inf")), 0)
            total = tl.cumsum(tl.sum(tl.where((j == best)[:, None], column, 0.0), 0), 0)
            left = tl.load(uniform + slot, mask=j < candidates, other=0.0) * tl.max(total, 0)
            found = tl.minimum(tl.sum((total[None, :] <= left[:, None]).to(tl.int32), 1), chunks - 1)
            left -= tl.max(tl.where(c[None, :] < found[:, None], total[None, :], 0.0), 1)
        else:
            best, found = 0, tl.argmax(column, 1)
        chosen = tl.load(rows + ((step - 1) * sets + b) * candidates + best)
        center = read_points(x, chosen + tl.arange(0, 1), d, b, features)
        highest = tl.full((J,), -3.0, tl.float64)
        for start in range(0, size, TILE):  # find the point in the chunk
            n = tl.reshape((found * size + start)[:, None] + t[None, :], (J * TILE,))
            lowered = tl.load(distances + old + n, mask=n < items, other=0.0)[None, :]
            lowered = tl.sum(_lowered(lowered, read_points(x, n, d, b, features), center), 0)
            merit = tl.reshape(_merit(lowered, weights, b * items + n, n < items, DRAWN), (J, TILE))
            if DRAWN:  # the last point of positive merit before which the sum is at most what is left
                running = tl.cumsum(merit, 1)
                is_before = (merit > 0.0) & (running - merit <= left[:, None])
                merit = tl.where(is_before, (start + t)[None, :], -1).to(tl.float64)
                left -= tl.max(running, 1)
            largest = tl.max(merit, 1)
            row = tl.where(largest > highest, found * size + start + tl.argmax(merit, 1), row)
            highest = tl.maximum(largest, highest)
        tl.store(rows + slot, row, mask=j < candidates)
    candidate, score = read_points(x, row, d, b, features), tl.full((J,), 0.0 if DRAWN else -2.0, tl.float64)
    for start in range(chunk * size, tl.minimum((chunk + 1) * size, items), TILE):
        n = start + t
        inside, points = (n < items)[None, :], read_points(x, n, d, b, features)
        lowered = _lowered(tl.load(distances + old + n[None, :], mask=inside, other=0.0), points, center)
        tl.store(distances + new + n[None, :], lowered, mask=inside)
        merit = _merit(_lowered(lowered, points, candidate), weights, b * items + n[None, :], inside, DRAWN)
        score = score + tl.sum(merit, 1) if DRAWN else tl.maximum(score, tl.max(merit, 1))
    tl.store(scores + slot * chunks + chunk, score, mask=j < candidates)


@triton.jit
def _write_parameters(
    sums, totals, masses, centers, frame, floor, parameters, size, components, features, entries,
    ENTRIES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Write the parameters of a cell from its sums and those of its core; see ``initialization.parameters_around``."""
    bk, core, e = tl.program_id(0).to(tl.int64), tl.arange(0, 2)[:, None], tl.arange(0, ENTRIES)
    b, j, valid = bk // components, e % features, e < entries
    i = e // features if FULL else j
    sums += (core * size + bk) * (1 + features + entries)
    mass, total, least = tl.load(sums), tl.load(masses + b), tl.load(floor + b)
    eps = 2.220446049250313e-15  # as in ``m_step``
    means = tl.load(sums + 1 + j, mask=valid, other=0.0) / (mass + eps)
    covariances = tl.load(sums + 1 + features + e, mask=valid, other=0.0) / (mass + eps)
    covariances -= means * tl.load(sums + 1 + i, mask=valid, other=0.0) / (mass + eps)
    covariances += tl.where(i == j, least, 0.0)
    traces = tl.sum(tl.where(valid & (i == j), covariances, 0.0), 1)[:, None]
    cell_mass, trace = tl.sum(tl.where(core == 0, mass, 0.0)), tl.sum(tl.where(core == 0, traces, 0.0))
    chosen = core == (tl.sum(tl.where(core == 1, mass, 0.0)) > 2 * features)
    mean = tl.sum(tl.where(chosen, means, 0.0), 0)
    covariance = tl.sum(tl.where(chosen, covariances * (trace / traces), 0.0), 0)
    pooled = tl.load(totals + b) / (features * tl.maximum(total, 1.0)) + least
    covariance = tl.where(cell_mass > features, covariance, tl.where(i == j, pooled, 0.0))
    center = tl.load(centers + bk * features + j, mask=valid, other=0.0)
    center = (center - tl.load(frame[0] + b * features + j, mask=valid, other=0.0)) / tl.load(frame[1] + b)
    tl.store(parameters[0] + bk, tl.log((cell_mass + eps) / (total + components * eps)))
    tl.store(parameters[1] + bk * features + j, center + mean, mask=valid)
    tl.store(parameters[2] + bk * entries + e, covariance, mask=valid)


def choose_centers(points: Tensor, no_center: Tensor, first: Tensor, count: int, *draws: Tensor) -> Tensor:
    """Return rows (B, K): the first (B, 1), then the farthest; with weights and uniform (K, B, J), the best draws."""
    weights, uniform = draws or (None, None)
    sets, features, items = points.shape
    size = max(_CHUNK, triton.next_power_of_2(triton.cdiv(items, _MOST_CHUNKS)))
    candidates, chunks = 1 if uniform is None else uniform.shape[2], triton.cdiv(items, size)
    d, j, c = map(triton.next_power_of_2, (features, candidates, chunks))
    constants = {"D": d, "J": j, "TILE": min(4096 // (d * j), _CHUNK), "CHUNKS": c, "DRAWN": uniform is not None}
    scores = points.new_empty(count, sets, candidates, chunks, dtype=torch.float64)
    rows, buffers = first.repeat(count, 1, candidates), torch.stack([no_center, no_center])
    tensors = (points, *points.stride(), items), weights, uniform, buffers, scores, rows
    for step in range(count):
        _write_candidates[(sets * chunks,)](*tensors, step, features, size, sets, candidates, **constants)
    best = None if uniform is None else scores.sum(-1).argmin(-1, keepdim=True)
    return (rows if best is None else rows.gather(-1, best)).squeeze(-1).mT


def parameters_of_cells(points: Any, centers: Tensor, floor: Tensor, core: float, kind: str) -> tuple[Tensor, ...]:
    """Return log-weights, means and covariances as ``initialization.parameters_around`` does; ``core`` is ``_CORE``."""
    centers, peak = centers.contiguous(), centers.new_zeros(centers.shape[:2])
    launch = Launch(points.x, points.weights, centers, centers, peak, centers, *points.frame, kind, hard=True)
    cell, _ = launch.log_density()
    launch.peak = torch.full_like(peak, torch.inf)  # all points count
    cells, mass, first, second = launch.sums(cell, cell, cell)
    totals = (second.diagonal(dim1=-2, dim2=-1) if launch.full else second).sum(-1)  # of |y|^2
    launch.peak = 0.5 * core * totals / mass.clamp(min=1.0)
    sums = torch.stack([cells, launch.sums(cell, cell, cell)[0]])
    found = tuple(map(torch.empty_like, (mass, first, second)))
    arguments = sums, totals.sum(-1), mass.sum(-1), centers, tuple(points.frame), floor, found
    numbers = mass.numel(), *centers.shape[1:], second[0, 0].numel()
    sizes = {"ENTRIES": triton.next_power_of_2(numbers[-1]), "FULL": launch.full}
    _write_parameters[(mass.numel(),)](*arguments, *numbers, **sizes)
    return *found[:2], found[2].mean(-1) if kind == "spherical" else found[2]
