"""EMLoss: the weighted sum of loss terms that trains a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from em_lightning.distributed import batch_moments
from em_lightning.losses.terms import LOSSES, MomentLoss, WeightRedundancyLoss


class EMLoss(nn.Module):
    r"""Free energy with volume control: a weighted sum of terms, each returned under its name.

    .. math:: \mathcal{L} = \lambda_F \sum_n F_n - \lambda_V \sum_j \log(\mathrm{Var}(d_j) + 10^{-6})
              + \lambda_C \sum_{i \ne j} \mathrm{Corr}(d_i, d_j)^2 + \dots

    The default is the published objective. A term is given by its weight, or by a mapping of its weight and the
    arguments of its class: ``variance=0.0, bounded_variance={"weight": 1.0, "target": 4.0}``. The attribute ``weights``
    maps names to weights and may be changed between steps; terms of weight 0 are not computed.

    Args:
        free_energy, variance, decorrelation: weights of the free energy and of terms against dead and redundant units.
        reduction: "sum" or "mean" of the free energy over the items of the global batch. The two train differently:
            "mean" divides the free energy, but not volume control, by the batch size.
        dim: axis of the units, for instance 1 for the channels of a feature map.
        **terms: further terms, named by their keys in ``LOSSES`` and given as above.

    Raises:
        ValueError: a term is unknown, a weight negative or not finite, all are 0, or ``reduction`` is unknown.
        TypeError: a term is neither a number nor a mapping.

    Example:
        >>> loss = EMLoss(balance=0.1)
        >>> terms = loss(torch.rand(32, 8))
        >>> list(terms)
        ['free_energy', 'variance', 'decorrelation', 'balance']
        >>> total = sum(terms.values())

    Source: Oursland, arXiv 2601.06478.
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
        specs = {"free_energy": free_energy, "variance": variance, "decorrelation": decorrelation, **terms}
        for name, spec in specs.items():
            arguments: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"weight": spec}
            weight = arguments.pop("weight", 1.0)
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise TypeError(f"{name}={weight!r} must be a weight, or a mapping of 'weight' and other arguments")
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name}={weight} must be finite and at least 0")
            self.weights[name] = float(weight)
            if name == "free_energy":
                arguments.setdefault("reduction", reduction)
            self.terms[name] = LOSSES.build(name, **arguments)
        if not any(self.weights.values()):
            raise ValueError(f"at least one weight must be positive, got 0 for {', '.join(self.weights)}")

    def forward(
        self,
        energies: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        weight_matrix: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return each term times its weight, by name; their sum is the loss.

        ``weights`` are those of items, see :meth:`EnergyLoss.forward`. ``weight_matrix`` is the weight (D, ...) of the
        layer that computes the energies; ``weight_redundancy`` needs it.
        """
        energies = energies.movedim(self.dim, -1)
        moments = None
        values: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            if not weight:
                continue
            term = self.terms[name]
            if isinstance(term, WeightRedundancyLoss):
                if weight_matrix is None:
                    raise ValueError(f"{name} needs the weight of the layer: pass weight_matrix=layer.weight")
                value = term(weight_matrix)
            elif isinstance(term, MomentLoss):
                moments = moments or batch_moments(energies, mask=mask, weights=weights)
                value = term.from_moments(moments)
            else:
                value = term(energies, mask, weights)
            values[name] = weight * value
        return values

    def total(self, *args: Tensor | None, **kwargs: Tensor | None) -> Tensor:
        """Return the loss, a scalar: the sum of the terms that ``forward`` returns for these arguments."""
        return torch.stack(list(self(*args, **kwargs).values())).sum()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())
