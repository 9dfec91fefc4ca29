"""Maximum of <p, z> + H(p) over the simplex and the maximizing p: softmax, sparsemax and 1.5-entmax."""

from __future__ import annotations

import torch
from torch import Tensor


def gibbs(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return logsumexp and softmax of the logits; -inf and 0, with gradient 0, where every logit is -inf.

    Faster than the two calls of torch, because both share the exponentials.
    """
    top = logits.detach().amax(dim, keepdim=True)  # both results are constant in it
    exponentials = (logits - top.clamp_min(torch.finfo(logits.dtype).min)).exp()
    total = exponentials.sum(dim, keepdim=True).clamp_min(1.0)  # below 1 only where every logit is -inf
    return (top + total.log()).squeeze(dim), exponentials * total.reciprocal()


def entmax(logits: Tensor, dim: int, alpha: float) -> tuple[Tensor, Tensor]:
    r"""Return max_p <p, z> + H(p) and the maximizing p, for the Tsallis entropy of order 2 or 1.5.

    H_2(p) = 1/2 sum(p - p^2) gives p = relu(z - tau), H_1.5(p) = 4/3 sum(p - p^1.5) gives p = relu(z / 2 - tau)^2.
    Sorting finds the support exactly; autograd differentiates the closed form on that support. Where every logit is
    -inf, the results are -inf and 0, with gradient 0.

    Source: Martins and Astudillo, "From softmax to sparsemax", 2016; Peters, Niculae and Martins, "Sparse
    sequence-to-sequence models", 2019.
    """
    top = logits.detach().amax(dim, keepdim=True)
    empty = top == -torch.inf
    top = top.masked_fill(empty, 0.0)
    shifted = logits - top
    # p is 0 where z (or z / 2) is 1 below its maximum, so the bound changes only infinite values.
    z = shifted.clamp_min(-1.0) if alpha == 2 else (shifted / 2).clamp_min(-1.0)
    # Values at the bound are outside the support, whatever the rounding of the threshold.
    support = _support(z.detach(), dim, alpha) & (z.detach() > -1.0)
    count = support.sum(dim, keepdim=True).to(z.dtype)
    mean = (z * support).sum(dim, keepdim=True) / count
    centered = (z - mean) * support
    if alpha == 2:
        p = (centered + 1 / count) * support
        entropy = (1 - p.square().sum(dim)) / 2
        product = (p * z).sum(dim)
    else:
        slack = (1 - centered.square().sum(dim, keepdim=True)) / count
        root = (centered + slack.sqrt()) * support
        p = root.square()
        entropy = (1 - (p * root).sum(dim)) * (4 / 3)
        product = 2 * (p * z).sum(dim)
    value = product + entropy + top.squeeze(dim)
    return value.masked_fill(empty.squeeze(dim), -torch.inf), p.masked_fill(empty, 0.0)


def _support(z: Tensor, dim: int, alpha: float) -> Tensor:
    """Return where p > 0, for logits whose maximum is 0."""
    ranked = z.sort(dim, descending=True).values
    rank = torch.arange(1, z.shape[dim] + 1, dtype=z.dtype, device=z.device)
    rank = rank.reshape([-1] + [1] * (z.ndim - 1 - dim % z.ndim))
    mean = ranked.cumsum(dim) / rank
    if alpha == 2:
        threshold = mean - 1 / rank
    else:
        spread = ranked.square().cumsum(dim) / rank - mean.square()
        threshold = mean - (1 / rank - spread).clamp_min(0.0).sqrt()
    inside = threshold <= ranked if alpha == 1.5 else threshold < ranked
    return z >= ranked.masked_fill(~inside, torch.inf).amin(dim, keepdim=True)
