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
# The least that an estimated weight may become, and the least that it leaves: from zero EM would not come back.
_LEAST = 1e-5


class Level(NamedTuple):
    """A background beside one batch of clouds.

    background: (B,), ``log(w_0 p_0)``.
    weight: (B,) or (), ``log w_0``.
    rest: (), what is to be added to the log-weights of the components: ``log(1 - w_0)``, or 0 where they contain it.
    """

    background: Tensor
    weight: Tensor
    rest: Tensor


class UniformBackground(nn.Module):
    r"""A component that is uniform over the bounding box of each cloud: outliers are its points.

    .. math:: p(x) = w_0 \frac{1}{V} + (1 - w_0) \sum_k \pi_k \, p_k(x)

    with :math:`V` the volume of the box of the points that count (no side of a flat cloud below a thousandth of its
    longest), or with :math:`1 / V = e^{-\mathrm{energy}}` where an energy is given. The likelihood never falls from one
    iteration of EM to the next, whichever way the weight comes by its value:

    - fixed, where the share of outliers is known. The weights :math:`\pi_k` of a mixture sum to 1.
    - ``estimate=True``, where it is not, or differs from set to set: each set has its own, of which the M-step makes
      the mean responsibility of the background, :math:`w_0 = \sum_n w_n r_{n0} / \sum_n w_n`, not below 1e-5 nor
      above 1 - 1e-5. **The weights of a mixture then sum to** :math:`1 - w_0`, and its own ``log_prob`` is the
      components' part of the density. A Dirichlet prior is one of all K + 1 weights. The start matters more
      than beside a fixed weight: a wide component and a uniform one explain much the same points.
    - ``learnable=True``, one weight for all sets that the loss of a network decides, by gradient.

    Args:
        weight: :math:`w_0` between 0 and 1, the expected share of outliers; of an estimated one the start, which also
            stands beside mixtures whose weights sum to 1.
        energy: minus the logarithm of the constant density, in place of the box's.
        learnable: learn the weight, as a logistic sigmoid whose parameter (1,) starts at zero.
        estimate: estimate the weight of each set by EM.

    Raises:
        ValueError: the weight does not lie between 0 and 1, the energy is not finite, or the weight is to be both
            learned and estimated.

    Example:
        >>> UniformBackground(weight=0.2).weight
        tensor(0.2000, dtype=torch.float64)

    Source: Banfield and Raftery, Model-Based Gaussian and Non-Gaussian Clustering, 1993.
    """

    def __init__(
        self, weight: float = 0.1, *, energy: float | None = None, learnable: bool = False, estimate: bool = False
    ) -> None:
        super().__init__()
        if learnable and estimate:
            raise ValueError(
                "learnable=True has one weight trained by gradient and estimate=True one a set that EM finds; give one"
            )
        if not 0.0 < weight < 1.0:
            raise ValueError(f"weight={weight} is the share of the background; give a number between 0 and 1")
        if energy is not None and not math.isfinite(energy):
            raise ValueError(f"energy={energy} must be finite; None takes the cloud's bounding box")
        self._logit = math.log(weight) - math.log1p(-weight)
        self.energy = energy
        self.estimate = estimate
        self.logit_shift = nn.Parameter(torch.zeros(1)) if learnable else None

    @property
    def weight(self) -> Tensor:
        """The weight, of an estimated one the start: () in double precision, where learned in the parameter's."""
        return self._logits().sigmoid()

    def _logits(self) -> Tensor:
        if self.logit_shift is None:
            return torch.tensor(self._logit, dtype=torch.float64)
        return (self.logit_shift + self._logit).reshape(())

    def leave_room(self, log_weights: Tensor) -> Tensor:
        """Return log-weights (B, K) that sum to what an estimated background leaves, its start where they sum to 1."""
        if not self.estimate:
            return log_weights
        rest = functional.logsigmoid(-self._logits().to(log_weights))
        normalized = log_weights.logsumexp(-1, keepdim=True) > math.log1p(-0.5 * _LEAST)
        return torch.where(normalized, log_weights + rest, log_weights)

    def maximize(self, log_weights: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
        """Return log-weights (B, K) of largest expected log-likelihood beside the background.

        Args:
            log_weights: (B, K), of the components among themselves.
            inside: (B,), the mass of the components.
            outside: (B,), the mass of the background.
        """
        if not self.estimate:
            return log_weights
        total = inside + outside
        own = torch.where(total > 0, outside / torch.where(total > 0, total, 1.0), self.weight.to(total))
        return log_weights + torch.log1p(-own.clamp(_LEAST, 1.0 - _LEAST)).unsqueeze(-1)

    def beside(self, cloud: Cloud, log_weights: Tensor) -> Level:
        """Return the background beside components of log-weights (B, K), for clouds in the frame of the loop."""
        if self.estimate:
            own = (-torch.expm1(log_weights.logsumexp(-1))).clamp(_LEAST, 1.0 - _LEAST).log()
            rest = own.new_zeros(())
        else:
            logit = self._logits().to(cloud.center)
            own, rest = functional.logsigmoid(logit), functional.logsigmoid(-logit)
        return Level(self._log_density(cloud) + own, own, rest)

    def _log_density(self, cloud: Cloud) -> Tensor:
        """Return ``log p_0`` (B,)."""
        if self.energy is not None:
            return torch.full_like(cloud.center[:, 0], -self.energy)
        # Points that do not count lie at the centre, inside the box.
        sides = (cloud.points.amax(-1) - cloud.points.amin(-1)).to(cloud.center.dtype)
        least = (_THINNEST * sides.amax(-1, keepdim=True)).clamp(min=torch.finfo(cloud.points.dtype).eps)
        return -torch.maximum(sides, least).log().sum(-1)

    def extra_repr(self) -> str:
        """Return the weight, what becomes of it, and the energy."""
        learnable = " (learnable)" if self.logit_shift is not None else " (estimated)" if self.estimate else ""
        return f"weight={float(self.weight.detach()):g}{learnable}, energy={self.energy}"
