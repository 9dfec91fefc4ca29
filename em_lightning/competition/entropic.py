"""The numerical core: the maximum of <p, z> + H(p) over the simplex, and the p that reaches it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gibbs(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return logsumexp and softmax of the logits in one pass that saves nothing but the softmax.

    Where every logit is -inf, the first is -inf and the second 0, both with gradient 0.
    """
    if not torch.compiler.is_compiling():
        return _Gibbs.apply(logits, dim)
    # Dynamo traces no autograd function that has a jvp, and fuses this by itself.
    empty = logits.amax(dim, keepdim=True) == -torch.inf
    safe = logits.masked_fill(empty, 0.0)
    return (
        safe.logsumexp(dim).masked_fill(empty.squeeze(dim), -torch.inf),
        safe.softmax(dim).masked_fill(empty, 0.0),
    )


class _Gibbs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        p = logits.softmax(dim)
        top = logits.amax(dim)
        empty = top == -torch.inf
        # log p = z - logsumexp(z), read where p is at least 1 / K.
        log_sum = (top - p.amax(dim).log()).masked_fill(empty, -torch.inf)
        return log_sum, p.masked_fill(empty.unsqueeze(dim), 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
        ctx.dim = inputs[1]
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_log_sum: Tensor | None, grad_p: Tensor | None) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        grad = 0.0 if grad_log_sum is None else grad_log_sum.unsqueeze(ctx.dim)
        if grad_p is not None:
            grad = grad_p + (grad - (p * grad_p).sum(ctx.dim, keepdim=True))
        return p * grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, Tensor]:
        (p,) = ctx.saved_tensors
        weighted = p * tangent
        mean = weighted.sum(ctx.dim, keepdim=True)
        return mean.squeeze(ctx.dim), weighted - p * mean


def entmax(logits: Tensor, dim: int, alpha: float) -> tuple[Tensor, Tensor]:
    r"""Return max_p <p, z> + H(p) and the p that reaches it, for the Tsallis entropy of order 2 or 1.5.

    H_2(p) = 1/2 sum(p - p^2) gives p = relu(z - tau), H_1.5(p) = 4/3 sum(p - p^1.5) gives p = relu(z / 2 - tau)^2.
    Sorting finds the support exactly; autograd then differentiates the closed form on that support.

    Where every logit is -inf, the first is -inf and the second 0, both with gradient 0.

    Source: Martins and Astudillo, "From softmax to sparsemax", 2016; Peters, Niculae and Martins, "Sparse
    sequence-to-sequence models", 2019.
    """
    top = logits.detach().amax(dim, keepdim=True)
    empty = top == -torch.inf
    top = top.masked_fill(empty, 0.0)
    shifted = logits - top
    # p is 0 at one below the maximum (of z or z / 2), so that the floor changes nothing but an infinity.
    z = shifted.clamp_min(-1.0) if alpha == 2 else (shifted / 2).clamp_min(-1.0)
    # What stands at the floor is out whatever rounding makes of the threshold.
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
