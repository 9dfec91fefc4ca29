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


def entmax(logits: Tensor, dim: int, power: int) -> tuple[Tensor, Tensor]:
    r"""Return max_p <p, z> + H(p) and the maximizing p = relu(y - tau)^power, with y = z / power.

    ``power`` is 1 for sparsemax and 2 for 1.5-entmax; H(p) = power^2 / (power + 1) sum(p - p^(1 + 1 / power)). Sorting
    finds the support exactly; autograd differentiates the closed form on that support. Where every logit is -inf, the
    results are -inf and 0, with gradient 0.
    """

    def gap(size: Tensor, scatter: Tensor) -> Tensor:
        """Return the mean of y minus tau, solved from sum(p) = 1; ``scatter`` is the sum of squared deviations."""
        return 1 / size if power == 1 else ((1 - scatter) / size).clamp_min(0.0).sqrt()

    top = logits.detach().amax(dim, keepdim=True)  # subtracted to avoid overflow
    y = ((logits - top.clamp_min(torch.finfo(logits.dtype).min)) / power).clamp_min(-1.0)  # p = 0 below -1
    ranked = y.detach().sort(dim, descending=True).values
    size = cumulative_sum(torch.ones_like(y), dim)  # of the candidates for the support: the 1 to K largest
    mean = cumulative_sum(ranked, dim) / size
    thresholds = mean - gap(size, cumulative_sum(ranked.square(), dim) - size * mean.square())
    smallest = ranked.masked_fill(thresholds >= ranked, torch.inf).amin(dim, keepdim=True)
    # Exclude logits of -1 even if round-off puts the threshold below them.
    support = (y >= smallest) & (y > -1.0)
    count = support.sum(dim, keepdim=True).to(y.dtype)
    centered = (y - (y * support).sum(dim, keepdim=True) / count) * support
    root = (centered + gap(count, centered.square().sum(dim, keepdim=True))) * support  # p^(1 / power)
    p = root**power
    value = power * (p * y).sum(dim) + (1 - (p * root).sum(dim)) * (power**2 / (power + 1))
    empty = top == -torch.inf
    return value.masked_fill(empty.squeeze(dim), 0.0) + top.squeeze(dim), p.masked_fill(empty, 0.0)


def cumulative_sum(z: Tensor, dim: int) -> Tensor:
    """Return the sums of the first 1 to K elements along ``dim``."""
    if not torch.are_deterministic_algorithms_enabled():
        return z.cumsum(dim)
    z, size = z.movedim(dim, -1), 1  # PyTorch refuses cumsum on GPUs; sums of 2, 4, 8, ... elements instead
    while size < z.shape[-1]:
        z, size = z + torch.nn.functional.pad(z[..., :-size], (size, 0)), 2 * size
    return z.movedim(-1, dim)
