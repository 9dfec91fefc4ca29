import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_t
from torch.autograd import gradcheck

from em_lightning import KERNELS, EMOperator, Mixture
from em_lightning.mixture import COVARIANCES
from em_lightning.mixture.radial import radial_of

KINDS = sorted(COVARIANCES)
ROBUST = {
    "t": {"name": "student_t", "df": 3.0, "density": True},
    "scaled t": {"name": "student_t", "df": 5.0, "scale": 2.0, "density": True},
    "laplace": "laplace",
    "scaled laplace": {"name": "laplace", "scale": 0.5},
    "huber": {"name": "huber", "delta": 1.5},
    "pseudo_huber": {"name": "pseudo_huber", "delta": 0.7},
}


def clouds(sets=2, items=80, features=2):
    x = torch.randn(sets, items, features, dtype=torch.float64) + 6 * torch.randint(0, 2, (sets, items, 1))
    x[:, ::10] = 20 * torch.rand(sets, items // 10, features, dtype=torch.float64) - 10
    return x


def wide_start(x, components, kind):
    """Means among the points and the covariance of the cloud: no component begins on a few outliers, and collapses."""
    variance = x.detach().var(1, correction=0)
    factors = COVARIANCES[kind].expand(variance, components, x.shape[-1])
    rows = torch.arange(1, 1 + 3 * components, 3)
    log_weights = x.new_full((len(x), components), -math.log(components))
    return Mixture(log_weights, x.detach()[:, rows] + 0.3, COVARIANCES[kind].covariances(factors.scale))


def energy_and_pull(name, y, features):
    """The formulas, written anew."""
    if name in ("t", "scaled t"):
        df, scale = {"t": (3.0, 1.0), "scaled t": (5.0, 2.0)}[name]
        return (df + features) / 2 * np.log1p(y / df / scale**2), (df + features) / (df * scale**2 + y)
    if name in ("laplace", "scaled laplace"):
        scale = {"laplace": 1.0, "scaled laplace": 0.5}[name]
        return np.sqrt(y) / scale, 1 / np.sqrt(y) / scale
    if name == "huber":
        return np.where(y <= 1.5**2, y / 2, 1.5 * (np.sqrt(y) - 0.75)), np.minimum(1, 1.5 / np.sqrt(y))
    return 0.49 * (np.sqrt(1 + y / 0.49) - 1), 1 / np.sqrt(1 + y / 0.49)


@pytest.mark.parametrize("features", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("name", ROBUST)
def test_densities_integrate_to_one(name, features):
    radial = radial_of(KERNELS.build(ROBUST[name]), features)
    log_area = math.log(2) + features / 2 * math.log(math.pi) - math.lgamma(features / 2)
    # Shells r^D exp(-energy) d(log r), by the trapezoidal rule, out to where a Student-t has 1e-21 of its mass.
    log_radius = torch.linspace(-16, 18, 400_001, dtype=torch.float64)
    energy, _ = radial.energy((2 * log_radius).exp())
    shells = (log_area + features * log_radius - energy - float(radial.log_normalizer)).exp()
    assert torch.trapezoid(shells, log_radius).item() == pytest.approx(1.0, abs=1e-6 if features == 1 else 1e-8)


@pytest.mark.parametrize("name", ROBUST)
def test_one_feature_has_the_kernels_own_energy_and_normalizer(name):
    kernel = KERNELS.build(ROBUST[name])
    radial = radial_of(kernel, 1)
    z = torch.linspace(-8, 8, 41, dtype=torch.float64).unsqueeze(-1)
    energy, pull = radial.energy(z.square())
    # Laplace is a parabola within 1e-4 of its center.
    assert torch.allclose(energy, kernel(z, z.new_zeros(1, 1)), atol=6e-5 if "laplace" in name else 1e-12)
    assert float(radial.log_normalizer) == pytest.approx(float(kernel.log_normalizer(1)), abs=1e-10)
    y = z[z.abs() > 0.01].square().requires_grad_()
    (slope,) = torch.autograd.grad(radial.energy(y)[0].sum(), y)
    assert torch.allclose(2 * slope, radial.energy(y)[1])


@pytest.mark.parametrize("delta", [1e-3, 0.1, 30.0, 100.0])
@pytest.mark.parametrize("name", ["huber", "pseudo_huber"])
def test_normalizers_at_the_ends_of_delta(name, delta):
    """Toward Laplace of scale 1 / delta, and toward the Gaussian, in value and gradient."""
    kernel = KERNELS.build({"name": name, "delta": delta, "learnable": True})
    found = radial_of(kernel, 6).log_normalizer
    gaussian = 3 * math.log(2 * math.pi)
    laplace = math.log(math.pi**3) + math.lgamma(6) - 6 * math.log(delta)
    assert found.item() == pytest.approx(gaussian if delta > 1 else laplace, abs=0.03)
    (slope,) = torch.autograd.grad(found, list(kernel.parameters()))
    assert slope.item() == pytest.approx(0.0 if delta > 1 else -6.0, abs=0.03)


def test_log_prob_is_scipys():
    x, features = clouds(1), 2
    operator = EMOperator(3, features, kernel=ROBUST["t"], residual=False)
    mixture = operator(x)
    expected = sum(
        mixture.weights[0, k].item() * multivariate_t(mixture.means[0, k], mixture.covariances[0, k], df=3).pdf(x[0])
        for k in range(3)
    )
    np.testing.assert_allclose(operator.log_prob(x, mixture)[0], np.log(expected), atol=1e-10)
    mask = torch.rand(1, 80) < 0.5
    dirty = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    assert torch.allclose(operator.log_prob(dirty, mixture, mask), operator.log_prob(x, mixture) * mask)
    posterior = operator.posterior(x, mixture)
    assert torch.allclose(posterior.free_energy, -operator.log_prob(x, mixture))


def test_the_t_mixture_is_peel_and_mclachlans():
    """Their algorithm of 2000 for known degrees of freedom, component by component and point by point."""
    x, df = clouds(1, 60), 3.0
    operator = EMOperator(3, 2, kernel=ROBUST["t"], residual=False, covariance_floor=0.0)
    path = list(operator.iterate(x, init=wide_start(x, 3, "full"), num_iters=8))
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ROBUST)
def test_a_step_is_a_plain_loop_with_mask_and_weights(kind, name):
    x = clouds(1)
    mask, counted = torch.rand(1, 80) < 0.8, torch.rand(1, 80, dtype=torch.float64)
    operator = EMOperator(3, 2, covariance=kind, kernel=ROBUST[name], residual=False, covariance_floor=0.0)
    start, new = operator.iterate(x.masked_fill(~mask.unsqueeze(-1), torch.nan), mask, counted, num_iters=1)
    dense = start.covariances[0]
    if kind in ("diag", "spherical"):
        dense = dense.reshape(3, 1, -1) * torch.eye(2, dtype=torch.float64)
    dense = dense.expand(3, -1, -1).numpy()
    points, w = x[0].numpy(), (mask * counted)[0].numpy()
    offsets = points[:, None] - start.means[0].numpy()
    y = np.einsum("nki,kij,nkj->nk", offsets, np.linalg.inv(dense), offsets)
    energy, pull = energy_and_pull(name, y, 2)
    joint = start.log_weights[0].numpy() - 0.5 * np.linalg.slogdet(dense)[1] - energy
    r = w[:, None] * np.exp(joint - np.logaddexp.reduce(joint, 1, keepdims=True))
    mass, pulled = r.sum(0), r * pull
    means = pulled.T @ points / pulled.sum(0)[:, None]
    apart = points[:, None] - means
    scatter = np.einsum("nk,nki,nkj->kij", pulled, apart, apart)
    expected = {
        "full": scatter / mass[:, None, None],
        "tied": scatter.sum(0, keepdims=True) / mass.sum(),
        "diag": np.einsum("kii->ki", scatter) / mass[:, None],
        "spherical": np.einsum("kii->k", scatter) / mass / 2,
    }[kind]
    np.testing.assert_allclose(new.weights[0], mass / mass.sum(), atol=1e-10)
    np.testing.assert_allclose(new.means[0], means, atol=1e-9)
    np.testing.assert_allclose(new.covariances[0], expected, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prior", [None, {"weight_concentration": 2.0}])
@pytest.mark.parametrize("name", ROBUST)
def test_the_objective_never_falls(kind, prior, name):
    x = clouds(2, 100)
    operator = EMOperator(2, 2, covariance=kind, kernel=ROBUST[name], prior=prior, covariance_floor=0.0, residual=False)
    before = torch.full((2,), -math.inf, dtype=torch.float64)
    for mixture in operator.iterate(x, init=wide_start(x, 2, kind), num_iters=30):
        after = operator.log_prob(x, mixture).sum(-1)
        if operator.prior is not None:
            after = after + operator.prior.log_prob(mixture, x)
        assert (after >= before - 1e-9).all()
        before = after


@pytest.mark.parametrize("name, limit", [("huber", 50.0), ("pseudo_huber", 1e4), ("student_t", 1e9)])
def test_the_limit_is_the_gaussian(name, limit):
    x = clouds()
    arguments = {"df": limit, "density": True} if name == "student_t" else {"delta": limit}
    operator = EMOperator(3, 2, kernel={"name": name, **arguments}, residual=False)
    gaussian = EMOperator(3, 2, residual=False)
    for one, two in zip(operator(x), gaussian(x), strict=True):
        assert torch.allclose(one, two, atol=1e-4)
    mixture = gaussian(x)
    assert torch.allclose(operator.log_prob(x, mixture), mixture.log_prob(x), atol=1e-4)
    assert torch.allclose(gaussian.log_prob(x, mixture), mixture.log_prob(x), atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ROBUST)
def test_gradients(kind, name, monkeypatch):
    monkeypatch.setattr("em_lightning.mixture.general._BLOCK", 10)  # several blocks of clouds and rows
    x = torch.randn(2, 8, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 8, dtype=torch.float64, requires_grad=True)
    kernel = KERNELS.build(ROBUST[name], learnable=True)
    operator = EMOperator(2, 2, num_iters=2, covariance=kind, kernel=kernel.double(), residual=False)
    start = wide_start(x, 2, kind)
    parameters = list(kernel.parameters())

    def outcome(x, weights, *_):
        mixture = operator(x, weights=weights, init=start)
        return operator.log_prob(x, mixture), mixture.means, mixture.covariances

    assert gradcheck(outcome, (x, weights, *parameters), fast_mode=True)


DEGENERATE = {
    "one point repeated": torch.ones(1, 40, 3),
    "collinear": torch.linspace(-1, 1, 40)[None, :, None] * torch.tensor([1.0, 2.0, -1.0]),
    "two points for four components": torch.tensor([[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]]),
    "empty": torch.randn(1, 10, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["student_t", "laplace", "huber", "pseudo_huber"])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_clouds_stay_finite(kind, kernel, name, dtype):
    x = DEGENERATE[name].to(dtype).clone().requires_grad_()
    mask = torch.zeros(1, 10, dtype=torch.bool) if name == "empty" else None
    operator = EMOperator(4, 3, covariance=kind, kernel=kernel).to(dtype)
    mixture = operator(x, mask)
    log_prob = operator.log_prob(x, mixture, mask)
    (log_prob.sum() + mixture.means.sum()).backward()
    assert all(part.isfinite().all() for part in mixture) and log_prob.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in operator.parameters())


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: EMOperator(4, 3, kernel="exponential"), ["ExponentialKernel", "no M-step", "'student_t'"]),
        (lambda: EMOperator(4, 3, kernel="cosine"), ["CosineKernel", "no M-step"]),
        (lambda: EMOperator(4, 3, kernel={"name": "student_t"}), ["num_features=3", "density=True"]),
    ],
)
def test_wrong_use_is_answered(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
