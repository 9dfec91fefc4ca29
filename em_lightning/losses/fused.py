"""The published objective in one autograd node, for batches so small that calls cost more than arithmetic."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from em_lightning.distributed import is_spread
from em_lightning.losses.terms import DecorrelationLoss, FreeEnergyLoss, VarianceLoss

_LARGEST = 2**17


_PUBLISHED = {"free_energy": FreeEnergyLoss, "variance": VarianceLoss, "decorrelation": DecorrelationLoss}


def published_terms(energies: Tensor, terms: nn.ModuleDict, active: Collection[str]) -> dict[str, Tensor]:
    """Return the terms of the published objective by name; none where the batch is large or out of the ordinary.

    Args:
        energies: (N, D).
        terms: the terms of an :class:`~em_lightning.EMLoss`.
        active: names of those that have a weight; without the free energy it is not computed.
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
        or not _only_vmapped()
        or forward_ad._current_level >= 0
        or any(type(terms[name]) is not kind for name, kind in _PUBLISHED.items())
    ):
        return {}
    free = terms["free_energy"] if "free_energy" in active else None
    node = _Published if torch._C._functorch.peek_interpreter_stack() is None else _Mapped
    return dict(zip(_PUBLISHED, node.apply(energies, free, terms["variance"], terms["decorrelation"]), strict=True))


def _only_vmapped() -> bool:
    """Return whether one vmap is all that transforms this call, or nothing: the node has no rule for others."""
    outermost = torch._C._functorch.peek_interpreter_stack()
    return outermost is None or (outermost.key() == torch._C._functorch.TransformType.Vmap and outermost.level() == 1)


def _free_energy(energies: Tensor, free: FreeEnergyLoss) -> tuple[Tensor, Tensor]:
    """Return the free energy of items (..., N, D), reduced, and the responsibilities."""
    scaled = energies / -free.temperature
    top = scaled.amax(-1, keepdim=True)
    responsibilities = scaled.sub_(top).exp_()
    total = responsibilities.sum(-1, keepdim=True)
    responsibilities /= total
    free_energy = total.log_().add_(top).sum((-2, -1)) * -free.temperature
    return free_energy / energies.shape[-2] if free.reduction == "mean" else free_energy, responsibilities


class _Published(torch.autograd.Function):
    r"""With c the centred energies (..., N, D), G = c^T c, and :math:`s_i = 1 / ((\sigma_i + \epsilon) \sqrt{N - 1})`.

    The correlation off its diagonal is :math:`C_{ij} = s_i s_j G_{ij}`. Every term but the free energy F depends on the
    energies through G alone, so its gradient is c times a matrix (D, D), and that of F are the responsibilities.
    """

    @staticmethod
    def forward(
        ctx: Any,
        energies: Tensor,
        free: FreeEnergyLoss | None,
        variance: VarianceLoss,
        decorrelation: DecorrelationLoss,
    ) -> tuple[Tensor, ...]:
        freedom = energies.shape[-2] - 1
        if free is None:
            free_energy, responsibilities = energies.new_zeros(energies.shape[:-2]), energies.new_empty(0)
        else:
            free_energy, responsibilities = _free_energy(energies, free)
        # In float64, then a constant unit has a variance of exactly 0.
        exact = energies.mean(-2, keepdim=True, dtype=torch.float64)
        mean = exact.to(energies.dtype)
        centred = (energies - mean).sub_((exact - mean).to(energies.dtype))
        gram = centred.mT @ centred
        spread = gram.diagonal(dim1=-2, dim2=-1) / freedom
        std = spread.clamp_min(torch.finfo(spread.dtype).tiny).sqrt()
        scale = (std + decorrelation.eps).mul_(freedom**0.5).reciprocal_()
        outer = scale[..., None] * scale[..., None, :]
        correlation = gram.mul_(outer)
        correlation.diagonal(dim1=-2, dim2=-1).zero_()
        volume = -(spread + variance.eps).log().sum(-1)
        squares = correlation.square().sum(-1)
        ctx.save_for_backward(energies, responsibilities, centred, spread, std, outer, correlation, squares)
        ctx.set_materialize_grads(False)
        ctx.terms = free, variance, decorrelation
        return free_energy, volume, squares.sum(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        energies, responsibilities, centred, spread, std, outer, correlation, squares = ctx.saved_tensors
        free, variance, decorrelation = ctx.terms
        zero = energies.new_zeros(energies.shape[:-2])
        by_free, by_variance, by_decorrelation = (zero if each is None else each for each in gradients)
        if torch.is_grad_enabled():  # what was saved hides how it depends on the energies
            weighted = zip(ctx.terms, (by_free, by_variance, by_decorrelation), strict=True)
            given = [(term, by) for term, by in weighted if term is not None]
            values = [(term if energies.dim() == 2 else torch.vmap(term))(energies) for term, _ in given]
            found = torch.autograd.grad(values, energies, [by for _, by in given], create_graph=True)
            return found[0], None, None, None
        freedom = energies.shape[-2] - 1
        # Out of place, as the gradients may come in batches.
        pull = 4 * by_decorrelation[..., None] * squares / ((std + decorrelation.eps) * std)
        diagonal = (pull + 2 * by_variance[..., None] / (spread + variance.eps)) / -freedom
        slope = 4 * by_decorrelation[..., None, None] * (correlation * outer) + torch.diag_embed(diagonal)
        gradient = centred @ slope
        if free is not None:
            by_item = by_free / energies.shape[-2] if free.reduction == "mean" else by_free
            gradient = gradient + responsibilities * by_item[..., None, None]
        return gradient, None, None, None


class _Mapped(torch.autograd.Function):
    """The same under vmap: the node above takes the mapped axis as a leading one."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        raise NotImplementedError("the node is made for vmap alone")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing: that vmap finds this method is what makes it call the next one."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], energies: Tensor, *terms: Any) -> tuple[Any, Any]:
        return _Published.apply(energies.movedim(in_dims[0], 0), *terms), (0, 0, 0)  # type: ignore[arg-type]
