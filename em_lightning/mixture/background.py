"""A background: one more component of constant density, which takes the points that no other component explains."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from em_lightning.mixture.e_step import BackgroundLevel
from em_lightning.mixture.points import Points

# The shortest side of the box of a flat set, as a share of its longest.
_THINNEST = 1e-3
# Bounds of an estimated weight: EM never returns from a weight of zero.
_LEAST = 1e-5


class UniformBackground(nn.Module):
    r"""A component that is uniform over the bounding box of each set: outliers are its points.

    .. math:: p(x) = w_0 \frac{1}{V} + (1 - w_0) \sum_k \pi_k \, p_k(x)

    with the volume :math:`V` of the box of the points that count (no side below a thousandth of the longest), or
    with :math:`1 / V = e^{-\mathrm{energy}}` where an energy is given. EM never lowers the likelihood, whether the
    weight :math:`w_0` is

    - fixed, where the share of outliers is known: the weights :math:`\pi_k` of a mixture then sum to 1;
    - estimated per set (``estimate=True``): the M-step sets it to the mean responsibility of the background,
      :math:`w_0 = \sum_n w_n r_{n0} / \sum_n w_n`, between 1e-5 and 1 - 1e-5. **The weights of a mixture then sum to**
      :math:`1 - w_0`, and its own ``log_prob`` is the density of the components alone. A Dirichlet prior applies to
      all K + 1 weights. The result depends more on the start than with a fixed weight, as a wide component and a
      uniform one explain similar points;
    - learned (``learnable=True``): one weight for all sets, trained by gradients.

    Args:
        weight: :math:`w_0` between 0 and 1, the expected share of outliers; the start of an estimated one.
        energy: minus the logarithm of the constant density, in place of that of the box.
        learnable: train the weight, the logistic sigmoid of a parameter (1,) that starts at zero.
        estimate: estimate the weight of each set by EM.

    Raises:
        ValueError: the weight is not between 0 and 1, the energy is not finite, or both ``learnable`` and ``estimate``
            are set.

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
            raise ValueError("learnable=True trains one weight for all sets, estimate=True fits one per set; give one")
        if not 0.0 < weight < 1.0:
            raise ValueError(f"weight={weight} must lie between 0 and 1: it is the share of the background")
        if energy is not None and not math.isfinite(energy):
            raise ValueError(f"energy={energy} must be finite; None takes the bounding box of each set")
        self._logit = math.log(weight) - math.log1p(-weight)
        self.energy = energy
        self.estimate = estimate
        self.logit_shift = nn.Parameter(torch.zeros(1)) if learnable else None

    @property
    def weight(self) -> Tensor:
        """The weight (), or the start of an estimated one."""
        return self._logits(torch.zeros((), dtype=torch.float64)).sigmoid()

    def _logits(self, like: Tensor) -> Tensor:
        logits = torch.full_like(like, self._logit)
        return logits if self.logit_shift is None else logits + self.logit_shift.to(like)

    def leave_room(self, log_weights: Tensor) -> Tensor:
        """Return log-weights (B, K) that leave an estimated background its start, where they sum to 1."""
        if not self.estimate:
            return log_weights
        total = log_weights.logsumexp(-1, keepdim=True)
        rest = functional.logsigmoid(-self._logits(total))
        return torch.where(total > math.log1p(-0.5 * _LEAST), log_weights + rest, log_weights)

    def maximize(self, log_weights: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
        """Return the log-weights (B, K) of the M-step beside the background.

        Args:
            log_weights: (B, K), of the components among themselves.
            inside: (B,), the mass of the components.
            outside: (B,), the mass of the background; a set without points keeps the start.
        """
        if not self.estimate:
            return log_weights
        total = inside + outside
        share = torch.where(total > 0, outside / torch.where(total > 0, total, 1.0), self._logits(total).sigmoid())
        return log_weights + torch.log1p(-share.clamp(_LEAST, 1.0 - _LEAST)).unsqueeze(-1)

    def level(self, points: Points, log_weights: Tensor) -> BackgroundLevel:
        """Return the background beside components of log-weights (B, K), in the coordinates of the points."""
        if self.estimate:
            log_weight = (-torch.expm1(log_weights.logsumexp(-1))).clamp(_LEAST, 1.0 - _LEAST).log()
            log_rest = torch.zeros_like(log_weight)
        else:
            logits = self._logits(points.mass)
            log_weight, log_rest = functional.logsigmoid(logits), functional.logsigmoid(-logits)
        return BackgroundLevel(self._log_density(points) + log_weight, log_weight, log_rest)

    def _log_density(self, points: Points) -> Tensor:
        """Return ``log p_0`` (B,) in the coordinates of the points."""
        if self.energy is not None:
            return points.log_volume() - self.energy
        z = points.coordinates()
        low = high = z
        if points.weights is not None:  # a set without points has no box, and any density is as good
            counted = (points.weights > 0).unsqueeze(1)
            counted = counted | ~counted.any(-1, keepdim=True)
            low, high = torch.where(counted, z, torch.inf), torch.where(counted, z, -torch.inf)
        sides = high.amax(-1) - low.amin(-1)
        least = (_THINNEST * sides.amax(-1, keepdim=True)).clamp(min=points.eps)
        return -torch.maximum(sides, least).log().sum(-1)

    def extra_repr(self) -> str:
        """Return the weight, how it is found, and the energy."""
        how = " (learnable)" if self.logit_shift is not None else " (estimated)" if self.estimate else ""
        return f"weight={float(self.weight.detach()):g}{how}, energy={self.energy}"
