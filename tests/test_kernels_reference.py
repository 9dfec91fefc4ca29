"""Kernels compared with scipy, scikit-learn and PyTorch's attention."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics.pairwise
import torch
from torch import nn
from torch.testing import assert_close

from em_lightning.kernels import (
    CosineKernel,
    DotProductKernel,
    GaussianKernel,
    HuberKernel,
    LaplaceKernel,
    MahalanobisKernel,
    PseudoHuberKernel,
    StudentTKernel,
)

SIGMA = torch.tensor([[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]], dtype=torch.float64)
# Fifty items about the center and one far in the tails.
ITEMS = torch.cat([torch.randn(50, 3, generator=torch.Generator().manual_seed(1)), torch.full((1, 3), 40.0)]).double()
CENTER = torch.tensor([[0.3, -1.2, 0.5]], dtype=torch.float64)


def log_density(kernel, num_features):
    x, center = ITEMS[:, :num_features], CENTER[:, :num_features]
    return (-kernel(x, center).squeeze(-1) - kernel.log_normalizer(num_features)).numpy()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    "kernel, reference",
    [
        (GaussianKernel(0.7), lambda x, m: scipy.stats.multivariate_normal(m, 0.49 * np.eye(len(m))).logpdf(x)),
        (
            StudentTKernel(3.5, 0.7, density=True),
            lambda x, m: scipy.stats.multivariate_t(m, 0.49 * np.eye(len(m)), df=3.5).logpdf(x),
        ),
        (LaplaceKernel(0.7), lambda x, m: scipy.stats.laplace(m, 0.7).logpdf(x).sum(-1)),
        (
            PseudoHuberKernel(0.8),
            lambda x, m: scipy.stats.genhyperbolic(p=1, a=0.8**2, b=0, loc=m, scale=0.8).logpdf(x).sum(-1),
        ),
    ],
    ids=["gaussian", "student_t", "laplace", "pseudo_huber"],
)
def test_densities_equal_scipy(kernel, reference, size):
    expected = reference(ITEMS[:, :size].numpy(), CENTER[0, :size].numpy()).reshape(-1)
    np.testing.assert_allclose(log_density(kernel, size), expected, rtol=1e-12, atol=1e-12)


def test_one_dimensional_student_t_and_cauchy_equal_scipy():
    z = ITEMS[:, 0].numpy()
    expected = scipy.stats.t(3.5, 0.3, 0.7).logpdf(z)
    np.testing.assert_allclose(log_density(StudentTKernel(3.5, 0.7, density=True), 1), expected, rtol=1e-12)
    cauchy = scipy.stats.cauchy(0.3, 0.7 * math.sqrt(3.5)).logpdf(z)
    np.testing.assert_allclose(log_density(StudentTKernel(3.5, 0.7), 1), cauchy, rtol=1e-12)


def test_mahalanobis_equals_scipy_normal_of_half_the_covariance():
    expected = scipy.stats.multivariate_normal(CENTER[0].numpy(), SIGMA.numpy() / 2).logpdf(ITEMS.numpy())
    np.testing.assert_allclose(log_density(MahalanobisKernel(3, SIGMA, learnable=False), 3), expected, rtol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 8, 100])
def test_cosine_equals_scipy_von_mises_fisher(size):
    x = nn.functional.normalize(torch.randn(20, size, dtype=torch.float64), dim=-1)
    center = nn.functional.normalize(torch.randn(1, size, dtype=torch.float64), dim=-1)
    found = -CosineKernel()(x, center).squeeze(-1) - CosineKernel().log_normalizer(size)
    expected = scipy.stats.vonmises_fisher(center[0].numpy(), 1.0).logpdf(x.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


def test_energies_equal_scipy_and_scikit_learn():
    x, centers = ITEMS[:20], ITEMS[20:26]
    z = (x[:, None] - centers).numpy()
    pairs = [
        (HuberKernel(0.8), scipy.special.huber(0.8, z).sum(-1)),
        (PseudoHuberKernel(0.8), scipy.special.pseudo_huber(0.8, z).sum(-1)),
        (LaplaceKernel(0.7), sklearn.metrics.pairwise.manhattan_distances(x, centers) / 0.7),
        (GaussianKernel(0.7), -np.log(sklearn.metrics.pairwise.rbf_kernel(x, centers, gamma=1 / (2 * 0.49)))),
        (CosineKernel(), sklearn.metrics.pairwise.cosine_distances(x, centers)),
        (DotProductKernel(0.7), -0.7 * sklearn.metrics.pairwise.linear_kernel(x, centers)),
    ]
    for kernel, expected in pairs:
        np.testing.assert_allclose(kernel(x, centers), expected, rtol=1e-12, atol=1e-12, err_msg=str(kernel))


def test_attention_is_the_posterior_mean_under_the_dot_product():
    q, k, v = (torch.randn(2, 4, 6, 8, dtype=torch.float64) for _ in range(3))
    r = (-DotProductKernel(scale=8**-0.5)(q, k)).softmax(-1)
    assert_close(r @ v, nn.functional.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-12)
