"""Maximum of <p, z> + H(p) over the simplex and the maximizing p: softmax, sparsemax and 1.5-entmax."""

from __future__ import annotations

import torch
from torch import Tensor


def logsumexp_and_softmax(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return logsumexp and softmax; -inf and 0, with gradient 0, where every logit is -inf."""
    top = logits.detach().amax(dim, keepdim=True)  # subtracted to avoid overflow; results do not depend on it
    exponentials = (logits - top.clamp_min(torch.finfo(logits.dtype).min)).exp()
    # The sum is 0 or at least 1. The bound lies between, as versions of PyTorch differ in the gradient at the bound.
    total = exponentials.sum(dim, keepdim=True).clamp_min(0.5)
    return (top + total.log()).squeeze(dim), exponentials * total.reciprocal()


def sparsemax(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    r"""Return max_p <p, z> + H(p) and the maximizing p = relu(z - tau), for H(p) = 1/2 sum(p - p^2).

    Sorting finds the support exactly; autograd differentiates the closed form on that support. Where every logit is
    -inf, the results are -inf and 0, with gradient 0.
    """
    z, top = _shifted(logits, dim)
    ranked, rank = _ranked(z, dim)
    thresholds = (cumulative_sum(ranked, dim) - 1) / rank
    support, count, centered = _support(z, ranked, thresholds, dim)
    p = (centered + 1 / count) * support
    return _result((p * z).sum(dim) + (1 - p.square().sum(dim)) / 2, p, top, dim)


def entmax15(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return max_p <p, z> + H(p) and the maximizing p = relu(z / 2 - tau)^2, for H(p) = 4/3 sum(p - p^1.5)."""
    half, top = _shifted(logits / 2, dim)
    ranked, rank = _ranked(half, dim)
    mean = cumulative_sum(ranked, dim) / rank
    variance = cumulative_sum(ranked.square(), dim) / rank - mean.square()
    thresholds = mean - (1 / rank - variance).clamp_min(0.0).sqrt()
    support, count, centered = _support(half, ranked, thresholds, dim)
    squared_gap = (1 - centered.square().sum(dim, keepdim=True)) / count  # (mean - tau)^2, solved from sum(p) = 1
    root_p = (centered + squared_gap.sqrt()) * support
    p = root_p.square()
    return _result(2 * (p * half).sum(dim) + (1 - (p * root_p).sum(dim)) * (4 / 3), p, 2 * top, dim)


def _shifted(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the logits minus their maximum, clamped to at least -1 (p = 0 below -1), and the maximum."""
    top = logits.detach().amax(dim, keepdim=True)
    return (logits - top.clamp_min(torch.finfo(logits.dtype).min)).clamp_min(-1.0), top


def _ranked(z: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the logits in descending order, and their ranks 1 to K along ``dim``."""
    return z.sort(dim, descending=True).values.detach(), cumulative_sum(torch.ones_like(z), dim)


def cumulative_sum(z: Tensor, dim: int) -> Tensor:
    """Return the sums of the first 1 to K elements along ``dim``."""
    if not torch.are_deterministic_algorithms_enabled():
        return z.cumsum(dim)
    z, size = z.movedim(dim, -1), 1  # PyTorch refuses cumsum on GPUs; sums of 2, 4, 8, ... elements instead
    while size < z.shape[-1]:
        z, size = z + torch.nn.functional.pad(z[..., :-size], (size, 0)), 2 * size
    return z.movedim(-1, dim)


def _support(z: Tensor, ranked: Tensor, thresholds: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mask p > 0, its size, and the logits minus their mean in it; thresholds are tau for sizes 1 to K."""
    smallest = ranked.masked_fill(thresholds >= ranked, torch.inf).amin(dim, keepdim=True)
    # Exclude logits of -1 even if round-off puts the threshold below them.
    support = (z >= smallest) & (z > -1.0)
    count = support.sum(dim, keepdim=True).to(z.dtype)
    return support, count, (z - (z * support).sum(dim, keepdim=True) / count) * support


def _result(value: Tensor, p: Tensor, top: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the value plus the maximum, and p; -inf and 0 where every logit is -inf."""
    empty = top == -torch.inf
    value = value.masked_fill(empty.squeeze(dim), 0.0) + top.squeeze(dim)
    return value, p.masked_fill(empty, 0.0)
