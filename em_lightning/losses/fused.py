"""The published objective in one autograd node, for batches so small that calls cost more than arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from em_lightning.distributed import is_spread
from em_lightning.losses.terms import DecorrelationLoss, FreeEnergyLoss, VarianceLoss

_LARGEST = 2**17


_PUBLISHED = {"free_energy": FreeEnergyLoss, "variance": VarianceLoss, "decorrelation": DecorrelationLoss}


def published_terms(energies: Tensor, terms: nn.ModuleDict) -> dict[str, Tensor]:
    """Return the three terms of the published objective by name; none where the batch is large or out of the ordinary.

    Args:
        energies: (N, D).
        terms: the terms of an :class:`~em_lightning.EMLoss`.
    """
    if (
        energies.dim() != 2
        or energies.dtype not in (torch.float32, torch.float64)
        or energies.shape[0] < 2
        or not 0 < energies.numel() <= _LARGEST
        or energies.device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or is_spread()
        # Neither vmap nor forward derivatives are written for the node.
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or any(type(terms[name]) is not kind for name, kind in _PUBLISHED.items())
    ):
        return {}
    return dict(zip(_PUBLISHED, _Published.apply(energies, *(terms[name] for name in _PUBLISHED)), strict=True))


class _Published(torch.autograd.Function):
    r"""With c the centred energies, G = c^T c, and :math:`s_i = 1 / ((\sigma_i + \epsilon) \sqrt{N - 1})`.

    The correlation off its diagonal is :math:`C_{ij} = s_i s_j G_{ij}`. Every term but the free energy F depends on the
    energies through G alone, so its gradient is c times a matrix (D, D), and that of F are the responsibilities.
    """

    @staticmethod
    def forward(
        ctx: Any, energies: Tensor, free: FreeEnergyLoss, variance: VarianceLoss, decorrelation: DecorrelationLoss
    ) -> tuple[Tensor, Tensor, Tensor]:
        freedom = energies.shape[0] - 1
        scaled = energies / -free.temperature
        top = scaled.amax(1, keepdim=True)
        responsibilities = scaled.sub_(top).exp_()
        total = responsibilities.sum(1, keepdim=True)
        responsibilities /= total
        free_energy = total.log_().add_(top).sum() * -free.temperature
        if free.reduction == "mean":
            free_energy = free_energy / energies.shape[0]
        # In float64, then a constant unit has a variance of exactly 0.
        exact = energies.mean(0, dtype=torch.float64)
        mean = exact.to(energies.dtype)
        centred = (energies - mean).sub_((exact - mean).to(energies.dtype))
        gram = centred.T @ centred
        spread = gram.diagonal() / freedom
        std = spread.clamp_min(torch.finfo(spread.dtype).tiny).sqrt()
        scale = (std + decorrelation.eps).mul_(freedom**0.5).reciprocal_()
        outer = scale[:, None] * scale
        correlation = gram.mul_(outer)
        correlation.diagonal().zero_()
        flat = correlation.flatten()
        ctx.save_for_backward(energies, responsibilities, centred, spread, std, outer, correlation)
        ctx.terms = free, variance, decorrelation
        return free_energy, -(spread + variance.eps).log().sum(), flat.dot(flat)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        energies, responsibilities, centred, spread, std, outer, correlation = ctx.saved_tensors
        free, variance, decorrelation = ctx.terms
        if torch.is_grad_enabled():  # what was saved hides how it depends on the energies
            values = [term(energies) for term in ctx.terms]
            return torch.autograd.grad(values, energies, gradients, create_graph=True)[0], None, None, None
        by_free, by_variance, by_decorrelation = gradients
        freedom = energies.shape[0] - 1
        if free.reduction == "mean":
            by_free = by_free / energies.shape[0]
        slope = (correlation * outer).mul_(4 * by_decorrelation)
        squares = correlation.square().sum(1).div_((std + decorrelation.eps) * std).mul_(4 * by_decorrelation)
        slope.diagonal().copy_(squares.add_(2 * by_variance / (spread + variance.eps)).div_(-freedom))
        return torch.addmm(responsibilities.mul(by_free), centred, slope), None, None, None
