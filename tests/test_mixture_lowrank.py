"""Low-rank plus diagonal covariances: factor analyzers, their steps, corrections and gradients."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    DEGENERATE,
    assert_close,
    assert_finite_gradients,
    assert_raises,
    degenerate,
    is_finite,
    replace,
    trained,
)
from sklearn.decomposition import FactorAnalysis
from torch.autograd import gradcheck

from em_lightning import EMOperator


def factor_clusters(sets=1, items=200, features=5, rank=2, groups=1):
    """Draw points (B, N, D) of groups that each vary most within a subspace of their own."""
    loadings = 2 * torch.randn(sets, groups, features, rank, dtype=torch.float64)
    group = torch.arange(items) % groups
    latent = torch.randn(sets, items, rank, 1, dtype=torch.float64)
    noise = (torch.rand(features, dtype=torch.float64) + 0.2) * torch.randn(sets, items, features, dtype=torch.float64)
    centers = 8 * torch.randn(sets, groups, features, dtype=torch.float64)
    return (loadings[:, group] @ latent).squeeze(-1) + noise + centers[:, group]


@pytest.mark.parametrize("rank", [1, 2])
def test_one_component_equals_scikit_learn_factor_analysis(rank):
    x = factor_clusters(items=500, features=7, rank=2)
    operator = EMOperator(1, 7, covariance="lowrank", rank=rank, covariance_floor=0.0, residual=False)
    mixture, _ = operator.fit(x, max_iters=2000, tol=1e-9)
    reference = FactorAnalysis(rank, tol=1e-6, max_iter=20_000, svd_method="lapack").fit(x[0].numpy())
    assert mixture.log_prob(x).mean().item() == pytest.approx(reference.score(x[0].numpy()), abs=1e-5)
    np.testing.assert_allclose(mixture.covariances[0, 0], reference.get_covariance(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("prior", [None, {"weight_concentration": 2.0}])
@pytest.mark.parametrize("floor", [0.0, 0.5])
@pytest.mark.parametrize("kernel", ["gaussian", "huber"])
def test_objective_is_monotone(prior, floor, kernel):
    x = factor_clusters(3, groups=3)
    operator = EMOperator(
        3, 5, covariance="lowrank", rank=2, covariance_floor=floor, prior=prior, kernel=kernel, residual=False
    )
    before = torch.full((3,), -math.inf, dtype=torch.float64)
    for mixture in operator.iterate(x, num_iters=30):
        after = operator.objective(x, mixture)
        assert (after >= before - 1e-9).all()
        before = after
    assert torch.linalg.eigvalsh(mixture.covariances).amin() >= floor * (1 - 1e-9)  # the diagonal part alone is


def test_means_and_weights_of_a_step_are_those_of_full_covariances():
    """A low-rank structure restricts covariances only."""
    x = factor_clusters(groups=2)
    operator = EMOperator(2, 5, covariance="lowrank", rank=2, residual=False)
    start = operator(x, num_iters=3)
    after = operator(x, init=start, num_iters=1)
    full = EMOperator(2, 5, residual=False)(x, init=start, num_iters=1)
    assert_close(replace(after, covariances=full.covariances), full, atol=1e-5)


def test_a_covariance_is_of_low_rank_plus_diagonal():
    x = factor_clusters(groups=2)
    covariances = EMOperator(2, 5, covariance="lowrank", rank=1, residual=False)(x).covariances[0]
    for covariance in covariances.numpy():
        # Off the diagonal, a matrix of rank one has no 2 x 2 minor but zero.
        minor = covariance[0, 2] * covariance[1, 3] - covariance[0, 3] * covariance[1, 2]
        assert abs(minor) < 1e-9 * np.abs(covariance).max() ** 2
        assert not np.allclose(covariance, np.diag(np.diag(covariance)))


@pytest.mark.parametrize("gradient", ["unrolled", "checkpoint"])
def test_gradients(gradient):
    x = factor_clusters(1, 16, 3, groups=2).requires_grad_()
    operator = EMOperator(2, 3, num_iters=2, covariance="lowrank", rank=1, gradient=gradient, init="learned").double()
    trained(operator)

    def outcome(x):
        mixture = operator(x)
        return mixture.log_prob(x), mixture.means, mixture.covariances

    assert gradcheck(outcome, (x,), fast_mode=True)
    grads = torch.autograd.grad(operator(x).log_prob(x).sum(), list(operator.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


def test_an_untrained_operator_is_classical():
    x = factor_clusters(1, 30, 3, groups=2)
    untrained = EMOperator(2, 3, num_iters=4, covariance="lowrank", rank=1).double()
    assert_close(untrained(x), untrained.classical()(x), atol=1e-12)


@pytest.mark.parametrize("init", ["farthest", "kmeans++", "learned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_sets_stay_finite(name, init, dtype):
    x, mask = degenerate(name, dtype)
    operator = EMOperator(4, 3, covariance="lowrank", rank=1, init=init).to(dtype)
    mixture = operator(x, mask)
    assert is_finite(mixture)
    assert_finite_gradients(mixture.log_prob(x, mask).sum() + mixture.means.sum(), x, operator)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"covariance": "lowrank"}, ["rank=None", "'lowrank'"]),
        ({"covariance": "full", "rank": 1}, ["rank=1", "'full'"]),
        ({"covariance": "lowrank", "rank": 3}, ["rank=3", "num_features=3"]),
    ],
)
def test_rank_is_for_lowrank_only(arguments, words):
    assert_raises(ValueError, words, lambda: EMOperator(2, 3, **arguments))


def test_low_rank_mixture_is_returned_as_full_and_accepted_as_start():
    x = factor_clusters(1, 50, 3)
    operator = EMOperator(2, 3, covariance="lowrank", rank=1, residual=False)
    mixture = operator(x)
    assert mixture.covariance_type == "full" and is_finite(operator(x, init=mixture))
