"""The softmax family on processors: rows in blocks that stay in cache, in and out of memory once.

The plain formulas move a large tensor through memory once for each of their operations, which costs more than the
arithmetic. Other devices, other axes, function transforms and ``torch.compile`` (which fuses by itself) take the plain
formulas. No more is saved for the backward pass than autograd saves; where that pass is itself differentiated, it runs
by differentiable formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.forward_ad import unpack_dual

# Elements a block: 256 KiB in float32, a few of which fit a second-level cache.
BLOCK = 65536
_aten = torch.ops.aten


def in_blocks(z: Tensor, dim: int) -> bool:
    """Return whether the block passes can serve: contiguous rows on a processor, outside of every transform."""
    return (
        not torch.compiler.is_compiling()
        and z.device.type == "cpu"
        and z.numel() > 0
        and dim % z.ndim == z.ndim - 1
        and z.is_contiguous()
        and not torch._C._functorch.is_functorch_wrapped_tensor(z)
        and unpack_dual(z).tangent is None
    )


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of all tensors, after two work spaces of their size that every block uses again."""
    size = tensors[0].shape[-1]
    rows = max(BLOCK // size, 1)
    works = tensors[0].new_empty(2, rows, size)
    for block in zip(*(tensor.reshape(-1, size).split(rows) for tensor in tensors), strict=True):
        yield *works[:, : len(block[0])], *block


class NegLogSoftmin(Function):
    """y = z + logsumexp(-z) on the last axis; dz = g - exp(-y) sum(g)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        """Return y."""
        y = torch.empty_like(z)
        for work, _, z_rows, y_rows in _blocks(z, y):
            torch.log_softmax(torch.neg(z_rows, out=work), -1, out=y_rows)
            y_rows.neg_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the gradient by z."""
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grad - (-y).exp() * grad.sum(-1, keepdim=True)
        result = torch.empty_like(y)
        for work, _, g, y_rows, out in _blocks(grad, y, result):
            _aten._log_softmax_backward_data.out(g, torch.neg(y_rows, out=work), -1, y.dtype, out=out)
        return result


class SoftmaxGate(Function):
    """y = z r, or relu(z) r where ``rectify``, with r = softmax(z) on the last axis; dz = r (g + g z - sum(r g z)).

    Where rectified, g is 0 for z <= 0. Only z is
    saved: computing r again in cache costs less than writing it to memory and reading it back.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, rectify: bool) -> Tensor:
        """Return y."""
        y = torch.empty_like(z)
        for _, _, z_rows, y_rows in _blocks(z, y):
            torch.softmax(z_rows, -1, out=y_rows)
            y_rows.mul_(z_rows)
            if rectify:
                y_rows.relu_()
        ctx.rectify = rectify
        ctx.save_for_backward(z)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient by z."""
        (z,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            r = z.softmax(-1)
            g = grad * (z > 0) if ctx.rectify else grad
            h = g * z
            return r * (g + h - (r * h).sum(-1, keepdim=True)), None
        result = torch.empty_like(z)
        for r, h, g, z_rows, out in _blocks(grad, z, result):
            torch.softmax(z_rows, -1, out=r)
            if ctx.rectify:
                g = _aten.threshold_backward(g, z_rows, 0)
            _aten._softmax_backward_data.out(torch.mul(g, z_rows, out=h), r, -1, r.dtype, grad_input=out)
            out.addcmul_(g, r)
        return result, None
