"""Robust kernels of the Mahalanobis distance: densities, steps against the textbook, objectives, gradients."""

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
    is_finite,
    log_prior,
    start_among,
    two_clusters,
    with_padding,
)
from scipy.stats import multivariate_t
from torch.autograd import gradcheck

from em_lightning import KERNELS, EMOperator
from em_lightning.kernels import (
    HuberKernel,
    LaplaceKernel,
    PseudoHuberKernel,
    StudentTKernel,
)

NAMES = list(textbook.ROBUST)
LEARNABLE = {
    "t": lambda: StudentTKernel(df=3.0, density=True, learnable=True),
    "scaled t": lambda: StudentTKernel(df=5.0, scale=2.0, density=True, learnable=True),
    "laplace": lambda: LaplaceKernel(learnable=True),
    "scaled laplace": lambda: LaplaceKernel(scale=0.5, learnable=True),
    "huber": lambda: HuberKernel(delta=1.5, learnable=True),
    "pseudo_huber": lambda: PseudoHuberKernel(delta=0.7, learnable=True),
}


@pytest.mark.parametrize("name", NAMES)
def test_log_prob_equals_the_textbook(name):
    x = two_clusters(1, 80, outliers=0.1)
    operator = EMOperator(3, 2, kernel=textbook.ROBUST[name], residual=False)
    mixture = operator(x)
    expected = textbook.log_prob(x[0], textbook.parameters_of(mixture), textbook.ROBUST[name])
    # Laplace is a parabola below a distance of 1e-4.
    torch.testing.assert_close(operator.log_prob(x, mixture)[0], expected, rtol=0, atol=1e-4 if "lap" in name else 1e-7)


def test_log_prob_of_a_t_mixture_equals_scipy():
    x = two_clusters(1, 80, outliers=0.1)
    operator = EMOperator(3, 2, kernel=textbook.ROBUST["t"], residual=False)
    mixture = operator(x)
    expected = sum(
        mixture.weights[0, k].item() * multivariate_t(mixture.means[0, k], mixture.covariances[0, k], df=3).pdf(x[0])
        for k in range(3)
    )
    np.testing.assert_allclose(operator.log_prob(x, mixture)[0], np.log(expected), atol=1e-10)
    mask = torch.rand(1, 80) < 0.5
    dirty = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    torch.testing.assert_close(operator.log_prob(dirty, mixture, mask), operator.log_prob(x, mixture) * mask)
    torch.testing.assert_close(operator.posterior(x, mixture).free_energy, -operator.log_prob(x, mixture))


def test_the_t_mixture_equals_peel_and_mclachlan():
    """Their algorithm of 2000 for known degrees of freedom, component by component and point by point."""
    x, df = two_clusters(1, 60, outliers=0.1), 3.0
    operator = EMOperator(3, 2, kernel=textbook.ROBUST["t"], residual=False, covariance_floor=0.0)
    path = list(operator.iterate(x, init=start_among(x, 3), num_iters=8))
    pi, mu, sigma = path[0].weights[0].numpy(), path[0].means[0].numpy(), path[0].covariances[0].numpy()
    points = x[0].numpy()
    for mixture in path[1:]:
        density = np.stack([pi[i] * multivariate_t(mu[i], sigma[i], df=df).pdf(points) for i in range(3)], 1)
        tau = density / density.sum(1, keepdims=True)
        new_mu, new_sigma = [], []
        for i in range(3):
            u = np.array([(df + 2) / (df + (p - mu[i]) @ np.linalg.inv(sigma[i]) @ (p - mu[i])) for p in points])
            mean = sum(tau[j, i] * u[j] * points[j] for j in range(60)) / sum(tau[j, i] * u[j] for j in range(60))
            scatter = sum(tau[j, i] * u[j] * np.outer(points[j] - mean, points[j] - mean) for j in range(60))
            new_mu.append(mean)
            new_sigma.append(scatter / tau[:, i].sum())
        pi, mu, sigma = tau.mean(0), np.array(new_mu), np.array(new_sigma)
        np.testing.assert_allclose(mixture.weights[0], pi, atol=1e-10)
        np.testing.assert_allclose(mixture.means[0], mu, atol=1e-9)
        np.testing.assert_allclose(mixture.covariances[0], sigma, atol=1e-9)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_equals_the_textbook(covariance, name):
    kernel = textbook.ROBUST[name]
    x, mask, weights = with_padding(two_clusters(1, 80, outliers=0.1))
    operator = EMOperator(3, 2, covariance=covariance, kernel=kernel, residual=False, covariance_floor=0.0)
    start = start_among(x.nan_to_num(), 3, covariance)
    after = operator(x, mask, weights, init=start, num_iters=1)
    points, counts = x[mask], weights[mask]
    expected = textbook.em_step(points, textbook.parameters_of(start), covariance, counts, kernel=kernel)
    for one, two in zip(textbook.parameters_of(after), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_autograd_through_the_textbook(name):
    kernel = textbook.ROBUST[name]
    x = two_clusters(1, 20, outliers=0.1).requires_grad_()
    start = start_among(x, 2)
    operator = EMOperator(2, 2, kernel=kernel, residual=False, covariance_floor=1e-3, num_iters=2)
    parameters = textbook.parameters_of(start)
    for _ in range(2):
        parameters = textbook.em_step(x[0], parameters, "full", kernel=kernel, floor=1e-3)
    found = []
    for weights, means, covariances in (textbook.parameters_of(operator(x, init=start)), parameters):
        value = weights[0] + (means * torch.tensor([1.0, -2.0])).sum() + covariances.square().sum()
        found.append(torch.autograd.grad(value, x)[0])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
@pytest.mark.parametrize("prior", [None, {"weight_concentration": 2.0}])
@pytest.mark.parametrize("name", NAMES)
def test_objective_is_monotone(covariance, prior, name):
    x = two_clusters(2, 100, outliers=0.1)
    operator = EMOperator(
        2, 2, covariance=covariance, kernel=textbook.ROBUST[name], prior=prior, covariance_floor=0.0, residual=False
    )
    before = torch.full((2,), -math.inf, dtype=torch.float64)
    for mixture in operator.iterate(x, init=start_among(x, 2, covariance), num_iters=30):
        after = operator.log_prob(x, mixture).sum(-1)
        if operator.prior is not None:
            after = after + log_prior(operator.prior, mixture, x)
        if operator.prior is None and mixture.variances().amin() < 1e-6:
            break  # a component collapses onto one point, where the likelihood has no bound
        assert (after >= before - 1e-9).all()
        before = after


@pytest.mark.parametrize("name, limit", [("huber", 50.0), ("pseudo_huber", 1e4), ("student_t", 1e9)])
def test_the_limit_is_the_gaussian(name, limit):
    x = two_clusters(2, 80, outliers=0.1)
    arguments = {"df": limit, "density": True} if name == "student_t" else {"delta": limit}
    operator = EMOperator(3, 2, kernel={"name": name, **arguments}, residual=False)
    gaussian = EMOperator(3, 2, residual=False)
    start = start_among(x, 3)
    mixture = gaussian(x, init=start)
    assert_close(operator(x, init=start), mixture, atol=1e-4)
    torch.testing.assert_close(operator.log_prob(x, mixture), mixture.log_prob(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(gaussian.log_prob(x, mixture), mixture.log_prob(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients(covariance, name):
    x = torch.randn(2, 8, 2, dtype=torch.float64, requires_grad=True)  # block size
    weights = torch.rand(2, 8, dtype=torch.float64, requires_grad=True)
    operator = EMOperator(2, 2, num_iters=2, covariance=covariance, kernel=LEARNABLE[name]().double(), residual=False)
    start = start_among(x, 2, covariance)

    def outcome(x, weights, *_):
        mixture = operator(x, weights=weights, init=start)
        return operator.log_prob(x, mixture), mixture.means, mixture.covariances

    assert gradcheck(outcome, (x, weights, *operator.kernel.parameters()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
@pytest.mark.parametrize("kernel", ["student_t", "laplace", "huber", "pseudo_huber"])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_sets_stay_finite(covariance, kernel, name, dtype):
    x, mask = degenerate(name, dtype)
    operator = EMOperator(4, 3, covariance=covariance, kernel=kernel).to(dtype)
    mixture = operator(x, mask)
    log_prob = operator.log_prob(x, mixture, mask)
    assert is_finite(mixture) and log_prob.isfinite().all()
    assert_finite_gradients(log_prob.sum() + mixture.means.sum(), x, operator)


@pytest.mark.parametrize(
    "kernel, words",
    [
        ("exponential", ["ExponentialKernel", "'student_t'"]),
        ("cosine", ["CosineKernel"]),
        ({"name": "student_t", "density": False}, ["num_features=3", "density"]),
    ],
)
def test_kernels_without_an_m_step_or_a_density_raise(kernel, words):
    assert_raises(ValueError, words, lambda: EMOperator(4, 3, kernel=kernel))


# The kernels' own side: rho, irls_weight and elliptical_log_normalizer.


@pytest.mark.parametrize("features", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("name", NAMES)
def test_elliptical_densities_integrate_to_one(name, features):
    kernel = KERNELS.build(textbook.ROBUST[name])
    expected = textbook.log_normalizer(lambda y: kernel.rho(y, features), features)
    found = float(kernel.elliptical_log_normalizer(features))
    assert found == pytest.approx(expected.item(), abs=1e-6 if features == 1 else 1e-8)


@pytest.mark.parametrize("features", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_energies_and_irls_weights_equal_their_formulas(name, features):
    kernel, y = KERNELS.build(textbook.ROBUST[name]), torch.logspace(-4, 4, 41, dtype=torch.float64).requires_grad_()
    energy, weight = kernel.rho(y, features), kernel.irls_weight(y, features)
    tolerance = 1e-4 if "laplace" in name else 1e-12  # a parabola below a distance of 1e-4
    torch.testing.assert_close(energy, textbook.energy(textbook.ROBUST[name], y, features), rtol=0, atol=tolerance)
    torch.testing.assert_close(weight, textbook.irls_weight(textbook.ROBUST[name], y, features), rtol=1e-9, atol=1e-12)
    (slope,) = torch.autograd.grad(energy.sum(), y)
    torch.testing.assert_close(2 * slope, weight)


@pytest.mark.parametrize("name", NAMES)
def test_one_feature_has_the_kernels_own_energy_and_normalizer(name):
    kernel = KERNELS.build(textbook.ROBUST[name])
    z = torch.linspace(-8, 8, 41, dtype=torch.float64).unsqueeze(-1)
    energy = kernel.rho(z.square(), 1)
    torch.testing.assert_close(energy, kernel(z, z.new_zeros(1, 1)), rtol=0, atol=6e-5 if "laplace" in name else 1e-12)
    assert float(kernel.elliptical_log_normalizer(1)) == pytest.approx(float(kernel.log_normalizer(1)), abs=1e-10)


@pytest.mark.parametrize("delta", [1e-3, 0.1, 30.0, 100.0])
@pytest.mark.parametrize("name", ["huber", "pseudo_huber"])
def test_normalizers_for_small_and_large_delta(name, delta):
    """Towards Laplace of scale 1 / delta, and towards the Gaussian, in value and gradient."""
    kernel = KERNELS.build({"name": name, "delta": delta, "learnable": True})
    found = kernel.elliptical_log_normalizer(6)
    gaussian = 3 * math.log(2 * math.pi)
    laplace = math.log(math.pi**3) + math.lgamma(6) - 6 * math.log(delta)
    assert found.item() == pytest.approx(gaussian if delta > 1 else laplace, abs=0.03)
    (slope,) = torch.autograd.grad(found, list(kernel.parameters()))
    assert slope.item() == pytest.approx(0.0 if delta > 1 else -6.0, abs=0.03)
