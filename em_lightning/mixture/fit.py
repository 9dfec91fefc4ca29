"""EM to convergence over points that come in blocks, and criteria that tell one fit from another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from em_lightning.mixture.prior import MixturePrior
from em_lightning.mixture.state import Mixture
from em_lightning.mixture.stream import collect, maximize, no_statistics


class Fit(NamedTuple):
    """What EM came to: a mixture, the log-likelihood a point before each of its M-steps, and whether it converged."""

    mixture: Mixture
    log_likelihoods: list[float]
    converged: bool


class Criteria(NamedTuple):
    r"""Criteria of a fit, the lower the better.

    bic: :math:`-2 \log p(X) + m \log N`.
    aic: :math:`-2 \log p(X) + 2 m`.
    """

    bic: float
    aic: float


def fit_blocks(
    blocks: Callable[[], Iterable[tuple[Tensor, Tensor | None]]],
    start: Mixture,
    *,
    max_iters: int = 100,
    tol: float = 1e-3,
    floor: float = 1e-6,
    prior: MixturePrior | None = None,
) -> Fit:
    """Fit one mixture to points in blocks by EM, one pass over the blocks an iteration.

    It ends as scikit-learn's does: when the log-likelihood a point changes by less than ``tol``.

    Args:
        blocks: returns the blocks of a pass, each as points (n, D) and how often each counts (n,) or ``None``.
        start: a mixture of one set.
        max_iters: most iterations.
        tol: in nats a point; 0 makes all iterations.
        floor: added to every variance.
        prior: of the parameters, with its mean and covariance given.

    Example:
        >>> import torch
        >>> x = torch.tensor([[-2.0], [-1.9], [3.0], [3.1]])
        >>> start = Mixture(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[[-1.0], [1.0]]]), torch.ones(1, 2, 1))
        >>> fit = fit_blocks(lambda: [(x[:3], None), (x[3:], None)], start)
        >>> [round(mean, 2) for mean in fit.mixture.means.flatten().tolist()], fit.converged
        ([-1.95, 3.05], True)
    """
    mixture = Mixture(*(part.double() for part in start))
    center, _ = marginal(mixture)
    covariance = mixture.covariance_type
    levels: list[float] = []
    for _ in range(max_iters):
        statistics = no_statistics(mixture, center)
        for points, weights in blocks():
            statistics = collect(
                points.unsqueeze(0), mixture, statistics, weights=None if weights is None else weights.unsqueeze(0)
            )
        levels.append(float(statistics.log_likelihood / statistics.moments[..., 0].sum()))
        if not math.isfinite(levels[-1]):
            raise ValueError(
                f"the log-likelihood is {levels[-1]}; the points hold NaN or infinity, or none counts, "
                "or their squares are beyond floats: scale them"
            )
        mixture = maximize(statistics, covariance, floor, prior)
        if len(levels) > 1 and abs(levels[-1] - levels[-2]) < tol:
            return Fit(mixture, levels, True)
    return Fit(mixture, levels, False)


def marginal(mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Return the mean (B, D) and the variances (B, D) of the mixture's own density."""
    weights = mixture.weights.unsqueeze(-1)
    mean = (weights * mixture.means).sum(1)
    spread = mixture.covariances
    if mixture.covariance_type in ("full", "tied"):
        spread = spread.diagonal(dim1=-2, dim2=-1)
    elif mixture.covariance_type == "spherical":
        spread = spread.unsqueeze(-1)
    return mean, (weights * (spread + (mixture.means - mean.unsqueeze(1)).square())).sum(1)


def num_parameters(mixture: Mixture) -> int:
    """Return how many free parameters each of the mixtures has.

    Example:
        >>> import torch
        >>> num_parameters(Mixture(torch.zeros(1, 3), torch.zeros(1, 3, 2), torch.ones(1, 3, 2)))  # 2 + 6 + 6
        14
    """
    components, features = mixture.means.shape[1:]
    shape = {
        "full": components * features * (features + 1) // 2,
        "tied": features * (features + 1) // 2,
        "diag": components * features,
        "spherical": components,
    }[mixture.covariance_type]
    return components - 1 + components * features + shape


def criteria(mixture: Mixture, log_likelihood: float, mass: float) -> Criteria:
    """Return the criteria of a mixture whose points, ``mass`` of them, have this log-likelihood in all.

    Source: Schwarz, Estimating the Dimension of a Model, 1978; Akaike, A New Look at the Statistical Model
    Identification, 1974.
    """
    size = num_parameters(mixture)
    return Criteria(size * math.log(mass) - 2.0 * log_likelihood, 2.0 * size - 2.0 * log_likelihood)
