"""Priors: MAP EM against the textbook, densities against scipy and their formula, pseudo-counts, relative floors."""

import copy
import math

import numpy as np
import pytest
import textbook
import torch
from helpers import (
    COVARIANCE_TYPES,
    DEGENERATE,
    assert_close,
    assert_finite_gradients,
    assert_raises,
    degenerate,
    full_covariances,
    is_finite,
    log_prior,
    random_mixture,
    start_among,
    two_clusters,
    with_padding,
)
from scipy.stats import dirichlet, invwishart, multivariate_normal

from em_lightning import EMOperator
from em_lightning.mixture import MixturePrior

PRIORS = {
    "all": dict(weight_concentration=3.0, mean_strength=2.0, covariance_strength=5.0, mean=[0.5, -0.5], covariance=0.3),
    "weights": dict(weight_concentration=3.0, mean_strength=0.0, covariance_strength=0.0),
    "means": dict(mean_strength=2.0, covariance_strength=0.0),
    "covariances": dict(mean_strength=0.0, covariance_strength=7.0, covariance=[0.2, 3.0]),
    "default": dict(),
}


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("weighted", [False, True])
def test_map_em_equals_the_textbook(covariance, name, weighted):
    x, mask, weights = two_clusters(2, 60), None, None
    if weighted:
        x, mask, weights = with_padding(x)
    operator = EMOperator(3, 2, covariance=covariance, prior=PRIORS[name], covariance_floor=0.0, residual=False)
    path = list(operator.iterate(x, mask, weights, num_iters=4))
    for b in range(2):
        points = x[b] if mask is None else x[b][mask[b]]
        counts = torch.ones(60).double() if weights is None else weights[b][mask[b]]
        prior = textbook.prior_of(PRIORS[name], points, counts, 3)
        parameters = textbook.parameters_of(path[0], b)
        for mixture in path[1:]:
            parameters = textbook.em_step(points, parameters, covariance, counts, prior=prior)
            for one, two in zip(textbook.parameters_of(mixture, b), parameters, strict=True):
                torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
@pytest.mark.parametrize("name", [None, *PRIORS])
def test_map_objective_is_monotone(covariance, name):
    x = two_clusters(3, 100)
    prior = None if name is None else PRIORS[name]
    operator = EMOperator(3, 2, covariance=covariance, prior=prior, covariance_floor=0.0, residual=False)
    before = torch.full((3,), -math.inf, dtype=torch.float64)
    for mixture in operator.iterate(x, init=start_among(x, 3, covariance), num_iters=40):
        after = mixture.log_prob(x).sum(-1)
        if operator.prior is not None:
            after = after + log_prior(operator.prior, mixture, x)
        assert (after >= before - 1e-9).all()
        before = after


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("factor", [1e-14, 2.0, 1e14])
def test_result_is_invariant_to_the_scale_of_the_weights(name, factor):
    """Weights are divided by their mean, so that pseudo-counts count points of mean weight."""
    x, mask, weights = with_padding(two_clusters(2, 60))
    operator = EMOperator(3, 2, prior=PRIORS[name], residual=False, init="farthest")
    assert_close(operator(x, mask, factor * weights), operator(x, mask, weights), atol=1e-8)
    ones = torch.ones_like(weights)
    assert_close(operator(x, mask, factor * ones), operator(x, mask), atol=1e-8)


def test_the_density_equals_scipy():
    x = two_clusters(1, 60)
    m0, s0, s, kappa, alpha = [0.5, -0.5], [0.7, 0.2], 9.0, 2.0, 3.0
    prior = MixturePrior(weight_concentration=alpha, mean_strength=kappa, mean=m0, covariance_strength=s, covariance=s0)

    def ours_and_scipys():
        mixture = random_mixture("full", sets=1)
        weights = mixture.weights[0].numpy()
        expected = dirichlet([alpha] * 3).logpdf(weights / weights.sum())
        for mean, covariance in zip(mixture.means[0].numpy(), mixture.covariances[0].numpy(), strict=True):
            expected += multivariate_normal(m0, covariance / kappa).logpdf(mean)
            expected += invwishart(s - 2 - 2, s * np.diag(s0)).logpdf(covariance)
        return log_prior(prior, mixture, x).item(), expected

    (one, first), (two, second) = ours_and_scipys(), ours_and_scipys()
    assert one - two == pytest.approx(first - second, abs=1e-9)  # equal up to a constant


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_the_density_equals_its_formula(covariance):
    x = two_clusters(1, 60)
    m0, s0, s, kappa, alpha = np.array([0.5, -0.5]), np.diag([0.7, 0.2]), 9.0, 2.0, 3.0
    prior = MixturePrior(
        weight_concentration=alpha, mean_strength=kappa, mean=m0, covariance_strength=s, covariance=[0.7, 0.2]
    )
    mixture = EMOperator(3, 2, covariance=covariance, residual=False)(x)
    expected = (alpha - 1) * mixture.log_weights.sum().item()
    covariances = full_covariances(mixture)[0].numpy()
    for mean, spread in zip(mixture.means[0].numpy(), covariances, strict=True):
        expected -= 0.5 * kappa * (mean - m0) @ np.linalg.solve(spread, mean - m0)
    for spread in covariances[:1] if covariance == "tied" else covariances:
        expected -= 0.5 * s * (np.linalg.slogdet(spread)[1] + np.trace(s0 @ np.linalg.inv(spread)))
    assert log_prior(prior, mixture, x).item() == pytest.approx(expected, abs=1e-9)


def test_a_strong_prior_determines_the_mixture():
    x = two_clusters(2, 60)
    strong = MixturePrior(
        weight_concentration=1e9, mean_strength=1e9, mean=[1.0, 2.0], covariance_strength=1e9, covariance=[3.0, 4.0]
    )
    mixture = EMOperator(3, 2, prior=strong, residual=False)(x)
    torch.testing.assert_close(mixture.weights, torch.full((2, 3), 1 / 3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(mixture.means, torch.tensor([1.0, 2.0]).double().expand(2, 3, 2), rtol=0, atol=1e-5)
    expected = torch.tensor([3.0, 4.0]).double().diag().expand(2, 3, 2, 2)
    torch.testing.assert_close(mixture.covariances, expected, rtol=0, atol=1e-5)


def test_pseudo_counts_are_learned():
    prior = MixturePrior(weight_concentration=2.0, mean_strength=0.0, covariance_strength=3.0, learnable=True)
    assert sorted(name for name, _ in prior.named_parameters()) == ["log_covariance", "log_spread", "log_weight"]
    operator = EMOperator(3, 2, prior=prior, residual=False)
    x = two_clusters(2, 60)
    operator(x).log_prob(x).sum().backward()
    for name, parameter in prior.named_parameters():
        step, values = 1e-5, []
        for sign in (1, -1):
            moved = copy.deepcopy(operator).double()
            moved.prior.get_parameter(name).data += sign * step
            values.append(moved(x).log_prob(x).sum().item())
        assert parameter.grad.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)
    assert "covariance=3" in repr(prior)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_sets_stay_finite(covariance, name):
    x, mask = degenerate(name)
    operator = EMOperator(4, 3, covariance=covariance, prior={"weight_concentration": 2.0, "learnable": True})
    mixture = operator(x, mask)
    assert is_finite(mixture)
    value = mixture.log_prob(x, mask).sum() + log_prior(operator.prior, mixture, x, mask).sum()
    assert_finite_gradients(value, x, operator)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: MixturePrior(weight_concentration=0.5), ValueError, ["weight_concentration=0.5"]),
        (lambda: MixturePrior(weight_concentration=math.inf), ValueError, ["weight_concentration=inf"]),
        (lambda: MixturePrior(mean_strength=-1.0), ValueError, ["mean_strength=-1.0"]),
        (lambda: MixturePrior(covariance_strength=math.inf), ValueError, ["covariance_strength=inf"]),
        (lambda: MixturePrior(covariance=-1.0), ValueError, ["covariance=-1.0"]),
        (lambda: MixturePrior(covariance=[1.0, 0.0]), ValueError, ["covariance", "[1.0, 0.0]"]),
        (lambda: EMOperator(2, 2, prior="weak"), TypeError, ["prior='weak'"]),
        (
            lambda: EMOperator(2, 2, prior={"mean": [0.0, 0.0, 0.0]})(torch.randn(1, 5, 2)),
            ValueError,
            ["mean", "(3,)", "(2,)"],
        ),
    ],
)
def test_wrong_arguments_raise(call, error, words):
    assert_raises(error, words, call)
