"""The parameters of a mixture inside the EM loop."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Parameters(NamedTuple):
    """The parameters of a mixture inside the EM loop, in the coordinates of its :class:`~.points.Points`.

    log_weights: (B, K).
    means: (B, K, D).
    covariances: in the shape of the covariance type; concentrations (B, K) for von Mises-Fisher.
    """

    log_weights: Tensor
    means: Tensor
    covariances: Tensor
