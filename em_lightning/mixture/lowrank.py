"""Covariances of low rank plus a diagonal: each component is a factor analysis."""

from __future__ import annotations

import torch
from torch import Tensor

from em_lightning.mixture.covariance import FullCovariance, moments_of
from em_lightning.mixture.factors import Factors, State, cholesky_with_inverse, least_pivots_of

# Steps towards the best factors of given moments: in an M-step, which has those of the iteration before, and without.
_STEPS = 4
_FIRST_STEPS = 40


class LowRankCovariance(FullCovariance):
    r"""Covariances ``Sigma = U U^T + Psi`` with ``U (D, R)`` and a diagonal ``Psi``: a mixture of factor analysers.

    The moments of the points are those of full covariances, and so is the cost. Given the mean square ``S`` of a
    component's points about their mean, the M-step takes a few steps of EM for factor analysis,

    .. math::
        \beta = (I + U^\top \Psi^{-1} U)^{-1} U^\top \Psi^{-1}, \quad
        U \leftarrow S \beta^\top (I - \beta U + \beta S \beta^\top)^{-1}, \quad
        \Psi \leftarrow \operatorname{diag}(S - U \beta S)

    none of which lowers the likelihood. The floor is the least value of ``Psi``.

    Args:
        rank: R, of at least 1 and less than D.

    Source: Ghahramani and Hinton, The EM Algorithm for Mixtures of Factor Analyzers, 1996.
    """

    name = "lowrank"

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def maximize(self, moments: Tensor, floor: Tensor, before: Factors | None = None) -> State:
        """Return weights and means of largest expected log-likelihood, and factors better than those before.

        Args:
            moments: (B, K, F).
            floor: (B,), the least value of ``Psi``.
            before: the factors that the E-step saw; without loadings the search starts anew.
        """
        log_weights, means, second = moments_of(moments)
        spread = second - means.unsqueeze(-1) * means.unsqueeze(-2)
        variance, least = spread.diagonal(dim1=-2, dim2=-1), least_pivots_of(second.diagonal(dim1=-2, dim2=-1))
        least = torch.maximum(least, floor[:, None, None])
        if before is None or before.loadings is None:
            root = cholesky_with_inverse(spread, least).scale[..., : self.rank]
            loadings, steps = 0.5**0.5 * root, _FIRST_STEPS
            noise = torch.maximum(variance - loadings.square().sum(-1), least)
        else:
            loadings, noise, steps = before.loadings[..., :-1], before.loadings[..., -1].square(), _STEPS
        eye = torch.eye(self.rank, dtype=spread.dtype, device=spread.device)
        for _ in range(steps):
            weighted = loadings / noise.unsqueeze(-1)
            inner = torch.linalg.inv(eye + loadings.mT @ weighted)
            reach = spread @ (weighted @ inner)  # S beta^T
            loadings = torch.linalg.solve(inner + inner @ weighted.mT @ reach, reach, left=False)
            noise = torch.maximum(variance - (loadings * reach).sum(-1), least)
        return State(log_weights, means, _factors(loadings, noise.sqrt()))

    def expand(self, variance: Tensor, num_components: int, num_features: int) -> Factors:
        """Return the factors of ``variance (B, D) * I`` for every component, half of some axes in ``U``."""
        root = variance.sqrt().unsqueeze(-2).expand(-1, num_components, -1)
        share = torch.eye(num_features, self.rank, dtype=root.dtype, device=root.device) * 0.5**0.5
        loadings = root.unsqueeze(-1) * share
        return _factors(loadings, (root.square() - loadings.square().sum(-1)).sqrt())

    def correct(self, before: Factors, after: Factors, correction: Tensor, floor: Tensor) -> Factors:
        """Return the factors of ``U + L (T - I) W U`` and a stretched ``Psi``, no entry of it below the floor.

        ``T`` is a lower triangle with a positive diagonal; ``Psi`` is stretched by its square. Both are what they were
        where the correction (B, K, step_size) is zero.
        """
        assert after.loadings is not None
        features = after.scale.shape[-1]
        below = torch.tril_indices(features, features, -1, device=correction.device)
        stretch = correction[..., :features]
        change = correction.new_zeros(*correction.shape[:-1], features, features)
        change[..., below[0], below[1]] = correction[..., features:-2]
        change = change + stretch.expm1().diag_embed()
        loadings, root = after.loadings[..., :-1], after.loadings[..., -1]
        loadings = loadings + after.scale @ (change @ (after.inverse @ loadings))
        least = torch.maximum(floor[:, None, None], least_pivots_of(root.square()))
        return _factors(loadings, torch.maximum((root * stretch.exp()).square(), least).sqrt())


def _factors(loadings: Tensor, root: Tensor) -> Factors:
    matrix = loadings @ loadings.mT + root.square().diag_embed()
    scale, inverse, _ = cholesky_with_inverse(matrix, least_pivots_of(matrix.diagonal(dim1=-2, dim2=-1)))
    return Factors(scale, inverse, torch.cat([loadings, root.unsqueeze(-1)], -1))
