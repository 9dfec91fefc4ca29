"""Elliptical densities: rho, IRLS weights and normalizers in D dimensions."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, multivariate_t

from em_lightning import KERNELS
from em_lightning.kernels import EllipticalKernel, NoDensityError, StudentTKernel, density_kernel

SPECS = {
    "gaussian": {"name": "gaussian", "scale": 3.0},
    "t": {"name": "student_t", "df": 3.0},
    "scaled t": {"name": "student_t", "df": 5.0, "scale": 2.0},
    "laplace": {"name": "laplace"},
    "scaled laplace": {"name": "laplace", "scale": 0.5},
    "huber": {"name": "huber", "delta": 1.5},
    "pseudo_huber": {"name": "pseudo_huber", "delta": 0.7},
}


def build(name, learnable=False):
    return density_kernel({**SPECS[name], "learnable": learnable})


def formulas(name, y, features):
    """Return rho and the IRLS weight from their formulas, in numpy."""
    if name == "gaussian":
        return y / 2, np.ones_like(y)
    if name in ("t", "scaled t"):
        df, scale = SPECS[name]["df"], SPECS[name].get("scale", 1.0)
        return (df + features) / 2 * np.log1p(y / df / scale**2), (df + features) / (df * scale**2 + y)
    if name in ("laplace", "scaled laplace"):
        scale = SPECS[name].get("scale", 1.0)
        return np.sqrt(y) / scale, 1 / np.sqrt(y) / scale
    if name == "huber":
        return np.where(y <= 1.5**2, y / 2, 1.5 * (np.sqrt(y) - 0.75)), np.minimum(1, 1.5 / np.sqrt(y))
    return 0.49 * (np.sqrt(1 + y / 0.49) - 1), 1 / np.sqrt(1 + y / 0.49)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_rho_and_irls_weight_equal_the_formulas(name, learnable):
    kernel = build(name, learnable)
    y = 10.0 ** torch.linspace(-6, 6, 25, dtype=torch.float64)
    rho, weight = formulas(name, y.numpy(), 4)
    # Laplace is a parabola within 1e-4 scales of the center.
    np.testing.assert_allclose(kernel.rho(y, 4).detach(), rho, rtol=1e-12, atol=6e-5 if "laplace" in name else 1e-15)
    np.testing.assert_allclose(kernel.irls_weight(y, 4).detach(), weight, rtol=1e-12)
    for dtype in (torch.float32, torch.float64):
        assert kernel.rho(y.to(dtype), 4).dtype == dtype and kernel.irls_weight(y.to(dtype), 4).dtype == dtype


@pytest.mark.parametrize("name", SPECS)
def test_the_irls_weight_is_twice_the_slope_of_rho_also_at_the_center(name):
    kernel = build(name, learnable=True).double()
    y = torch.tensor([0.0, 1e-12, 1e-3, 0.3, 2.0, 50.0, 1e8], dtype=torch.float64, requires_grad=True)
    weight = kernel.irls_weight(y, 3)
    (slope,) = torch.autograd.grad(kernel.rho(y, 3).sum(), y, create_graph=True)
    torch.testing.assert_close(2 * slope, weight, rtol=1e-10, atol=0)
    assert weight.isfinite().all() and (weight > 0).all()
    if weight.requires_grad:
        inputs = (y, *kernel.parameters())
        for gradient in torch.autograd.grad((weight + slope).sum(), inputs, materialize_grads=True):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("features", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("name", SPECS)
def test_densities_integrate_to_one(name, features):
    kernel = build(name)
    log_area = math.log(2) + features / 2 * math.log(math.pi) - math.lgamma(features / 2)
    # Shells r^D exp(-rho) d(log r), by the trapezoidal rule, out to where a Student-t has 1e-21 of its mass.
    log_radius = torch.linspace(-16, 18, 400_001, dtype=torch.float64)
    rho = kernel.rho((2 * log_radius).exp(), features)
    normalizer = kernel.elliptical_log_normalizer(features)
    assert normalizer.shape == () and normalizer.dtype == torch.float64
    shells = (log_area + features * log_radius - rho - normalizer).exp()
    assert torch.trapezoid(shells, log_radius).item() == pytest.approx(1.0, abs=1e-6 if features == 1 else 1e-8)


@pytest.mark.parametrize(
    "name", [name for name in SPECS if name != "gaussian"]
)  # rho of the Gaussian ignores its scale
def test_with_one_feature_rho_is_the_kernels_energy(name):
    kernel = build(name)
    z = torch.linspace(-8, 8, 41, dtype=torch.float64).unsqueeze(-1)
    atol = 6e-5 if "laplace" in name else 1e-12
    torch.testing.assert_close(kernel.rho(z.square(), 1), kernel(z, z.new_zeros(1, 1)), rtol=1e-12, atol=atol)
    torch.testing.assert_close(kernel.elliptical_log_normalizer(1), kernel.log_normalizer(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("delta", [1e-3, 0.1, 30.0, 100.0])
@pytest.mark.parametrize("name", ["huber", "pseudo_huber"])
def test_normalizers_tend_to_laplace_and_gaussian_ones(name, delta):
    """Compare with Laplace of scale 1 / delta for small delta and with the Gaussian for large delta."""
    kernel = KERNELS.build({"name": name, "delta": delta, "learnable": True})
    found = kernel.elliptical_log_normalizer(6)
    gaussian = 3 * math.log(2 * math.pi)
    laplace = math.log(math.pi**3) + math.lgamma(6) - 6 * math.log(delta)
    assert found.item() == pytest.approx(gaussian if delta > 1 else laplace, abs=0.03)
    (slope,) = torch.autograd.grad(found, list(kernel.parameters()))
    assert slope.item() == pytest.approx(0.0 if delta > 1 else -6.0, abs=0.03)


def test_densities_of_scipy():
    x, mean = torch.randn(20, 3, dtype=torch.float64), np.array([0.3, -1.2, 0.5])
    sigma = np.array([[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]])
    z = x.numpy() - mean
    y = torch.from_numpy(np.einsum("nd,nd->n", z, np.linalg.solve(sigma, z.T).T))
    half_log_det = 0.5 * np.linalg.slogdet(sigma)[1]
    for name, expected in [("gaussian", multivariate_normal(mean, sigma)), ("t", multivariate_t(mean, sigma, df=3.0))]:
        kernel = build(name)
        found = -kernel.rho(y, 3) - kernel.elliptical_log_normalizer(3) - half_log_det
        np.testing.assert_allclose(found, expected.logpdf(x), rtol=1e-12)


def test_kernels_without_an_elliptical_density():
    elliptical = {key for key in KERNELS if issubclass(KERNELS[key], EllipticalKernel)}
    assert elliptical == {"gaussian", "student_t", "laplace", "huber", "pseudo_huber"}
    with pytest.raises(NoDensityError, match="StudentTKernel.*num_features=2"):
        StudentTKernel().elliptical_log_normalizer(2)
