"""A background: one more hypothesis of constant density, which takes the points that no component explains."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from em_lightning.mixture.cloud import Cloud

# A side of the box of a flat cloud, as a share of its longest.
_THINNEST = 1e-3


class Level(NamedTuple):
    """A background beside one batch of clouds: ``log(w_0 p_0)`` (B,), and ``log(1 - w_0)`` () for what is left."""

    background: Tensor
    rest: Tensor


class UniformBackground(nn.Module):
    r"""A component that is uniform over the bounding box of each cloud: outliers are its points.

    .. math:: p(x) = w_0 \frac{1}{V} + (1 - w_0) \sum_k \pi_k \, p_k(x)

    with :math:`V` the volume of the box of the points that count (no side of a flat cloud below a thousandth of its
    longest), or with :math:`1 / V = e^{-\mathrm{energy}}` where an energy is given. The weights :math:`\pi_k` of the
    components still sum to 1, and EM with a fixed :math:`w_0` never lowers the likelihood.

    Args:
        weight: :math:`w_0` between 0 and 1, the expected share of outliers.
        energy: minus the logarithm of the constant density, in place of the box's.
        learnable: learn the weight, as a logistic sigmoid whose parameter (1,) starts at zero.

    Raises:
        ValueError: the weight does not lie between 0 and 1, or the energy is not finite.

    Example:
        >>> UniformBackground(weight=0.2).weight
        tensor(0.2000, dtype=torch.float64)

    Source: Banfield and Raftery, Model-Based Gaussian and Non-Gaussian Clustering, 1993.
    """

    def __init__(self, weight: float = 0.1, *, energy: float | None = None, learnable: bool = False) -> None:
        super().__init__()
        if not 0.0 < weight < 1.0:
            raise ValueError(f"weight={weight} is the share of the background; give a number between 0 and 1")
        if energy is not None and not math.isfinite(energy):
            raise ValueError(f"energy={energy} must be finite; None takes the cloud's bounding box")
        self._logit = math.log(weight) - math.log1p(-weight)
        self.energy = energy
        self.logit_shift = nn.Parameter(torch.zeros(1)) if learnable else None

    @property
    def weight(self) -> Tensor:
        """The weight, () in double precision where fixed, else in the parameter's."""
        return self._logits().sigmoid()

    def _logits(self) -> Tensor:
        if self.logit_shift is None:
            return torch.tensor(self._logit, dtype=torch.float64)
        return (self.logit_shift + self._logit).reshape(())

    def beside(self, cloud: Cloud) -> Level:
        """Return the background's log-density and what it leaves, for clouds in the frame of the loop."""
        logit = self._logits().to(cloud.center)
        own, rest = functional.logsigmoid(logit), functional.logsigmoid(-logit)
        if self.energy is not None:
            return Level((own - self.energy).expand(len(cloud.center)), rest)
        # Points that do not count lie at the centre, inside the box.
        sides = (cloud.points.amax(-1) - cloud.points.amin(-1)).to(cloud.center.dtype)
        least = (_THINNEST * sides.amax(-1, keepdim=True)).clamp(min=torch.finfo(cloud.points.dtype).eps)
        return Level(own - torch.maximum(sides, least).log().sum(-1), rest)

    def extra_repr(self) -> str:
        """Return the weight and the energy."""
        learnable = "" if self.logit_shift is None else " (learnable)"
        return f"weight={float(self.weight.detach()):g}{learnable}, energy={self.energy}"
