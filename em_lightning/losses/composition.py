"""The sum of weighted terms that trains a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from em_lightning.distributed import batch_moments, units_last
from em_lightning.losses.fused import published_terms
from em_lightning.losses.terms import LOSSES, FreeEnergyLoss, MomentLoss, WeightRedundancyLoss

__all__ = ["EMLoss"]


class EMLoss(nn.Module):
    r"""Free energy with volume control: a weighted sum of terms, each returned under its name.

    .. math:: \mathcal{L} = \lambda_F \sum_n F_n - \lambda_V \sum_j \log(\mathrm{Var}(d_j) + 10^{-6})
              + \lambda_C \sum_{i \ne j} \mathrm{Corr}(d_i, d_j)^2 + \dots

    The default is the published objective. A term is given by its weight, or by a mapping of its weight and its own
    arguments: ``variance=0.0, bounded_variance={"weight": 1.0, "target": 4.0}``. ``weights`` maps names to weights and
    may be changed between steps; a term of weight 0 is not computed.

    Args:
        free_energy: weight of the free energy, summed over the items of the global batch (``reduction``).
        variance: weight of the published term against dead units.
        decorrelation: weight of the term against redundant units.
        reduction: "sum" or "mean" of the free energy over the items. These are different experiments: at a batch of
            128, "mean" weakens the free energy 128-fold against volume control.
        dim: the axis of the units, 1 for the channels of a feature map.
        **terms: further terms by their keys in ``LOSSES`` (``log_det``, ``balance``, ``bounded_variance``,
            ``weight_redundancy``, or a plug-in's), each as above.

    Raises:
        ValueError: a term is unknown, a weight is negative or not finite, all weights are 0, or ``reduction`` is
            neither "sum" nor "mean".
        TypeError: a term is given by something else than a number or a mapping.

    Example:
        >>> loss = EMLoss(balance=0.1)
        >>> terms = loss(torch.rand(32, 8))
        >>> list(terms)
        ['free_energy', 'variance', 'decorrelation', 'balance']
        >>> total = sum(terms.values())

    Oursland, arXiv 2601.06478.
    """

    def __init__(
        self,
        free_energy: float | Mapping[str, Any] = 1.0,
        variance: float | Mapping[str, Any] = 1.0,
        decorrelation: float | Mapping[str, Any] = 1.0,
        *,
        reduction: str = "sum",
        dim: int = -1,
        **terms: float | Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.dim = dim
        self.weights: dict[str, float] = {}
        self.terms = nn.ModuleDict()
        given = {"free_energy": free_energy, "variance": variance, "decorrelation": decorrelation, **terms}
        for name, spec in given.items():
            arguments: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"weight": spec}
            self.weights[name] = _valid_weight(name, arguments.pop("weight", 1.0))
            if name == "free_energy":
                arguments.setdefault("reduction", reduction)
            self.terms[name] = LOSSES.build(name, **arguments)
        if not any(self.weights.values()):
            raise ValueError(f"every weight is 0 ({', '.join(self.weights)}); give at least one term a positive weight")

    def forward(
        self,
        energies: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        weight_matrix: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return each term times its weight, by name: their sum is the loss.

        Args:
            energies: any shape with D units along ``dim``; every other axis counts items.
            mask: booleans of that shape without ``dim``; items that are False do not count.
            weights: non-negative numbers of the same shape; a weight w counts an item w times.
            weight_matrix: the weight (D, ...) of the layer that made the energies, for ``weight_redundancy`` alone.

        Raises:
            ValueError: ``weight_redundancy`` has a weight and ``weight_matrix`` is not given.
        """
        energies = units_last(energies, self.dim)
        active = {name: weight for name, weight in self.weights.items() if weight}
        at_once = {} if mask is not None or weights is not None else published_terms(energies, self.terms, active)
        values: dict[str, Tensor] = {}
        moments = None
        left = [self.terms[name] for name in active if name not in at_once]
        of_moments = [term for term in left if isinstance(term, MomentLoss)]
        if of_moments:
            free_energy = self.terms["free_energy"]
            assert isinstance(free_energy, FreeEnergyLoss)
            # The free energy joins in: one pass over the energies forward, one backward.
            moments = batch_moments(
                energies,
                mask=mask,
                weights=weights,
                products=any(term.products for term in of_moments),
                temperature=free_energy.temperature if free_energy in left else None,
            )
        for name, weight in active.items():
            term = self.terms[name]
            if name in at_once:
                values[name] = at_once[name] if weight == 1 else weight * at_once[name]
                continue
            if isinstance(term, WeightRedundancyLoss):
                if weight_matrix is None:
                    raise ValueError(f"{name} acts on a weight: call the loss with weight_matrix=layer.weight")
                value = term(weight_matrix)
            elif moments is not None and isinstance(term, MomentLoss):
                value = term.from_moments(moments)
            elif isinstance(term, FreeEnergyLoss) and moments is not None and moments.free_energy is not None:
                value = term.reduce(moments.free_energy, moments.weights)
            else:
                value = term(energies, mask, weights)
            values[name] = weight * value
        return values

    def total(self, *args: Tensor | None, **kwargs: Tensor | None) -> Tensor:
        """Return the loss, a scalar: the sum of the terms that ``forward`` returns for these arguments."""
        return torch.stack(list(self(*args, **kwargs).values())).sum()

    def extra_repr(self) -> str:
        """Show the weights."""
        return ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())


def _valid_weight(name: str, weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TypeError(
            f"{name}={weight!r} is no weight; give a number, or {{'weight': number, ...}} with the term's own arguments"
        )
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name}={weight} is out of range; a weight is finite and at least 0 (0 leaves the term out)")
    return float(weight)
