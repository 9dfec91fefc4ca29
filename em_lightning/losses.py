"""Free energy and volume control."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["weight_redundancy"]


def weight_redundancy(weight: Tensor) -> Tensor:
    r"""Return the sum of squared cosines between different rows, :math:`\sum_{i \ne j} \cos^2(w_i, w_j)`.

    Args:
        weight: a matrix (D, ...) whose rows belong to the units; further axes are flattened. A row of zeros is at a
            right angle to every other.

    Example:
        >>> import torch
        >>> weight_redundancy(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
        tensor(2.)
    """
    rows = F.normalize(weight.flatten(1), dim=1)
    cosines = rows @ rows.T
    return cosines.square().sum() - cosines.diagonal().square().sum()
