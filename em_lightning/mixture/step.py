"""One EM iteration on a batch of point sets, as pure functions of points and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from em_lightning.mixture.cloud import Cloud, effective_floor, prepare
from em_lightning.mixture.covariance import Structure
from em_lightning.mixture.factors import State
from em_lightning.mixture.general import origins_of, softmin_moments
from em_lightning.mixture.moments import accumulate, get_ready, loses_all_digits, lost_digits
from em_lightning.mixture.state import Mixture, check_points, structure_of

# The state after an iteration, and the log-likelihood (B,) of the state before it if asked for.
Step = tuple[State, Tensor | None]


class Manner(NamedTuple):
    """How a step is to be taken.

    precision: of the products; ``None`` leaves the choice to the pass.
    apart: (B,), the clouds whose points the E-step takes about the means of the components.
    origins: (B, K, D), what moments are taken about, and the means that come of them.
    """

    precision: torch.dtype | None = None
    apart: Tensor | None = None
    origins: Tensor | None = None


def with_all_digits(
    step: Callable[[Manner], Step], cloud: Cloud, state: State, theta: Tensor, structure: Structure
) -> Step:
    """Return what a step makes in the precision that the pass chooses, or in more where that was not enough.

    Where not even double precision is, as among clusters 1e8 of their widths apart, points are taken about the means:
    in the E-step about those before it, in the M-step about those that come of it, as a component may have moved far.
    """
    apart = loses_all_digits(cloud, theta, structure) if cloud.narrow else None
    if apart is None:
        after, objective = step(Manner())
        if cloud.points.dtype != theta.dtype:
            natural = structure.natural(after)
            if lost_digits(theta, natural, cloud, structure):
                after, objective = step(Manner(theta.dtype))
            else:
                after = after._replace(theta=natural)
    else:
        with torch.no_grad():  # for the means alone
            after, objective = step(Manner(theta.dtype, apart, origins_of(state, apart)))
    if not cloud.narrow:
        return after, objective
    lost = loses_all_digits(cloud, structure.natural(after) if after.theta is None else after.theta, structure)
    far = [clouds for clouds in (apart, lost) if clouds is not None]
    if not far:
        return after, objective
    origins = origins_of(after, torch.stack(far).any(0)).detach()
    return step(Manner(theta.dtype, apart, origins))[0], objective


def em_step(
    x: Tensor, mixture: Mixture, mask: Tensor | None = None, weights: Tensor | None = None, floor: float = 1e-6
) -> Mixture:
    r"""Return the mixtures after one exact EM iteration on point sets.

    ``r_nk = pi_k N(x_n | mu_k, Sigma_k) / p(x_n)``, then weights, means and covariances are the moments of the
    points under ``r``, with ``floor`` added to the variances as scikit-learn's ``reg_covar`` is.

    Args:
        x: points (B, N, D).
        mixture: B mixtures, of any covariance structure, which is kept.
        mask: (B, N), false where a row is padding.
        weights: (B, N), how often each point counts.
        floor: added to every variance, in squared units of the points.

    Raises:
        ValueError: the points do not fit the mixtures, or there are none.

    Example:
        >>> x = torch.tensor([[[-1.0], [-0.9], [1.0], [1.1]]])
        >>> start = Mixture(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[[-1.0], [1.0]]]), torch.ones(1, 2))
        >>> em_step(x, start).means.shape
        torch.Size([1, 2, 1])

    Source: Dempster, Laird and Rubin, Maximum Likelihood from Incomplete Data via the EM Algorithm, 1977.
    """
    check_points(mixture, x)
    if x.shape[1] == 0:
        raise ValueError(f"x of shape {tuple(x.shape)} has no points; give at least one, masked where a set has none")
    structure = structure_of(mixture)
    cloud = prepare(x, mask, weights)
    cloud = cloud._replace(ready=get_ready(cloud, structure, cloud.mass), narrow=True)
    state, least = enter(cloud, mixture), effective_floor(cloud, floor)
    theta = structure.natural(state)

    def step(manner: Manner) -> Step:
        precision, apart, origins = manner
        if origins is None:
            return structure.maximize(accumulate(cloud, theta, structure, precision)[0], least), None
        after = structure.maximize(softmin_moments(cloud, state, structure, apart, origins)[0], least)
        return after._replace(means=after.means + origins), None

    return leave(cloud, with_all_digits(step, cloud, state, theta, structure)[0], structure)


def enter(cloud: Cloud, mixture: Mixture) -> State:
    """Return a mixture's parameters as the loop holds them."""
    log_weights, means, covariances = (part.to(cloud.center.dtype) for part in mixture)
    return State(log_weights, means - cloud.center.unsqueeze(1), structure_of(mixture).factorize(covariances))


def leave(cloud: Cloud, state: State, structure: Structure) -> Mixture:
    """Return the mixture that the loop's parameters stand for, in the type of the points."""
    means = state.means + cloud.center.unsqueeze(1)
    parts = (state.log_weights, means, structure.covariances(state.factors.scale))
    return Mixture(*(part.to(cloud.points.dtype) for part in parts))
