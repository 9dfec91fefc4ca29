"""Mixtures of von Mises-Fisher densities: normalizers, concentrations, steps against a plain loop, gradients."""

import numpy as np
import pytest
import torch
from helpers import assert_finite_gradients, assert_raises, clusters, detached, is_finite
from scipy.optimize import brentq
from scipy.special import gammaln, ive
from torch.autograd import gradcheck, gradgradcheck

from em_lightning.operators import DirectionalEM, DirectionalMixture


def on_sphere(sets=2, items=90, features=3, spread=0.3):
    """Draw points around three directions, with different norms."""
    x = clusters(sets, items, features, 3, distance=1.0, spread=spread)
    return x * (0.5 + torch.rand(sets, items, 1, dtype=torch.float64))


def log_normalizer(kappa, features):
    """Return log Z of exp(kappa cos) / Z for concentrations (M,), from the density at the mean direction."""
    mean = torch.eye(features, dtype=torch.float64)[:1].expand(len(kappa), 1, -1)
    mixture = DirectionalMixture(torch.zeros(len(kappa), 1).double(), mean, kappa.unsqueeze(1))
    return kappa - mixture.log_prob(mean)[:, 0]


def concentration_of(resultant, features, dispersion_floor=None):
    """Return the concentration that one component finds for two unit vectors whose mean has a given length."""
    across = np.sqrt(max(1.0 - resultant**2, 0.0))
    x = torch.zeros(1, 2, features, dtype=torch.float64)
    x[..., 0], x[0, 0, 1], x[0, 1, 1] = resultant, across, -across
    options = {} if dispersion_floor is None else {"dispersion_floor": dispersion_floor}
    return DirectionalEM(1, features, num_iters=2, **options)(x).concentrations.item()


@pytest.mark.parametrize("features", [2, 3, 4, 7, 8, 30, 101])
def test_the_normalizer_equals_scipy(features):
    kappa = torch.logspace(-3, 2.5, 30, dtype=torch.float64)
    order = features / 2 - 1
    scaled = ive(order, kappa.numpy())
    known = scaled > 1e-300  # scipy underflows at high order
    assert known.sum() >= 15
    log_bessel = np.log(scaled[known]) + kappa.numpy()[known]
    expected = features / 2 * np.log(2 * np.pi) + log_bessel - order * np.log(kappa.numpy()[known])
    np.testing.assert_allclose(log_normalizer(kappa, features).numpy()[known], expected, atol=1e-8)


@pytest.mark.parametrize("features", [2, 3, 8, 101])
def test_the_interpolated_normalizer_equals_that_of_the_mixture(features):
    """Iterations and objectives interpolate in a table; log_prob does not."""
    kappa = torch.logspace(-5, 6, 200, dtype=torch.float64).requires_grad_()
    mean = torch.eye(features, dtype=torch.float64)[:1].expand(len(kappa), 1, -1)
    mixture = DirectionalMixture(torch.zeros(len(kappa), 1).double(), mean, kappa.unsqueeze(1))
    found, expected = DirectionalEM(1, features).objective(mean, mixture), mixture.log_prob(mean)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-10)
    slopes = [torch.autograd.grad(values.sum(), kappa)[0] for values in (found, expected)]  # 1 - A(kappa)
    large = kappa > 1e4  # there the recurrence loses digits of 1 - A
    torch.testing.assert_close(slopes[0][~large], slopes[1][~large], rtol=1e-6, atol=1e-10)
    asymptotic = 0.5 * (features - 1) / kappa[large]
    torch.testing.assert_close(slopes[0][large], asymptotic.detach(), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("features", [2, 3, 5, 10])
@pytest.mark.parametrize("kappa", [0.01, 1.0, 50.0, 3000.0, 1e5])
def test_densities_integrate_to_one(features, kappa):
    """Integrate over rings of equal cosine t, of (1 - t^2)^((D - 3) / 2) dt times the area of the sphere in D - 1."""
    log_area = np.log(2) + (features - 1) / 2 * np.log(np.pi) - gammaln((features - 1) / 2)
    width = min(np.pi, 40 / np.sqrt(kappa))
    angle = torch.linspace(0, width, 200_001, dtype=torch.float64)
    log_density = kappa * angle.cos() - log_normalizer(torch.tensor([kappa], dtype=torch.float64), features)
    ring = (log_density + log_area + (features - 2) * angle.sin().clamp(min=1e-300).log()).exp()
    assert torch.trapezoid(ring, angle).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("features", [2, 3, 10, 50])
@pytest.mark.parametrize("resultant", [0.01, 0.3, 0.9, 0.99])
def test_the_concentration_has_the_given_resultant(features, resultant):
    def miss(log_kappa):
        kappa = np.exp(log_kappa)
        return ive(features / 2, kappa) / ive(features / 2 - 1, kappa) - resultant

    expected = np.exp(brentq(miss, np.log(1e-3), np.log(1e6), xtol=1e-13))
    assert concentration_of(resultant, features, 1e-9) == pytest.approx(expected, rel=1e-5)


def test_points_of_one_direction_have_a_finite_concentration():
    assert np.isfinite(concentration_of(1.0, 3))
    assert concentration_of(1.0, 3, 1e-3) < concentration_of(1.0, 3, 1e-5)


def test_a_step_equals_a_plain_loop_with_mask_and_weights():
    x, weights = on_sphere(1), torch.rand(1, 90, dtype=torch.float64)
    mask = torch.rand(1, 90) < 0.8
    operator = DirectionalEM(3, 3)
    dirty = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    start = operator(dirty, mask, weights, num_iters=0)
    new = operator(dirty, mask, weights, init=start, num_iters=1)
    units, w = (x / x.norm(dim=-1, keepdim=True))[0].numpy(), (mask * weights)[0].numpy()
    kappa, mu = start.concentrations[0].numpy(), start.means[0].numpy()
    log_c = 0.5 * np.log(kappa) - 1.5 * np.log(2 * np.pi) - np.log(ive(0.5, kappa)) - kappa
    joint = start.log_weights[0].numpy() + log_c + kappa * (units @ mu.T)
    r = w[:, None] * np.exp(joint - np.logaddexp.reduce(joint, 1, keepdims=True))
    total = r.T @ units
    np.testing.assert_allclose(new.log_weights.exp()[0], r.sum(0) / r.sum())
    np.testing.assert_allclose(new.means[0], total / np.linalg.norm(total, axis=1, keepdims=True), atol=1e-9)
    for k in range(3):
        resultant = np.linalg.norm(total[k]) / r.sum(0)[k]
        root = brentq(lambda c, a=resultant: 1 / np.tanh(c) - 1 / c - a, 1e-3, 1e4)
        assert new.concentrations[0, k].item() == pytest.approx(root, rel=1e-6)
    density = new.log_prob(dirty, mask)
    assert torch.allclose(density, -new.posterior(x).free_energy * mask)


@pytest.mark.parametrize("features", [2, 3, 6])
@pytest.mark.parametrize("init", ["farthest", "kmeans++", "random"])
def test_likelihood_is_monotone(features, init):
    x = on_sphere(3, features=features)
    operator = DirectionalEM(4, features, init=init)
    mixture, before = operator(x, num_iters=0), -np.inf
    for _ in range(30):
        mixture = operator(x, init=mixture, num_iters=1)
        after = mixture.log_prob(x).sum().item()
        assert after >= before - 1e-8
        before = after


def test_separated_directions_are_found():
    truth = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    x = truth.repeat_interleave(200, 1) + 0.1 * torch.randn(1, 600, 3, dtype=torch.float64)
    mixture = DirectionalEM(3, 3)(x)
    assert (mixture.means @ truth.mT).amax(-1).min() > 0.99
    # A spread of s about a unit vector is about a concentration of 1 / s^2.
    assert torch.allclose(mixture.concentrations, torch.full((1, 3), 100.0).double(), rtol=0.2)


@pytest.mark.parametrize("gradient", ["unrolled", "checkpoint"])
def test_gradients(gradient):
    x = on_sphere(1, 12).requires_grad_()
    operator = DirectionalEM(2, 3, num_iters=2, gradient=gradient)
    start = detached(operator(x, num_iters=1))

    def outcome(x):
        mixture = operator(x, init=start)
        return mixture.log_prob(x), mixture.means, mixture.concentrations

    assert gradcheck(outcome, (x,))


def test_second_derivatives_of_concentrations():
    x = on_sphere(1, 10).requires_grad_()
    operator = DirectionalEM(2, 3, num_iters=1)
    start = detached(operator(x))
    assert gradgradcheck(lambda x: operator(x, init=start).concentrations, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [torch.ones(1, 8, 3), torch.zeros(1, 8, 3), torch.randn(1, 1, 3), torch.randn(1, 8, 3)])
def test_degenerate_sets_stay_finite(x, dtype):
    x = x.to(dtype).clone().requires_grad_()
    mask = torch.zeros(1, 8, dtype=torch.bool) if x.shape[1] == 8 else None
    for given in (None, mask):
        mixture = DirectionalEM(4, 3)(x, given)
        assert is_finite(mixture)
        assert_finite_gradients(mixture.log_prob(x, given).sum() + mixture.concentrations.log().sum(), x)


def test_float32_equals_float64():
    x = on_sphere(2, spread=0.01).float()  # concentrations of 1e4
    operator = DirectionalEM(3, 3)
    narrow, wide = operator(x), operator(x.double())
    rounding = 1e-7 * wide.concentrations.max().item()  # of the float32 means in the log-density
    assert torch.allclose(narrow.log_prob(x).double(), wide.log_prob(x.double()), atol=2 * rounding)
    assert narrow.means.dtype == torch.float32


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: DirectionalEM(0, 3), ["num_components=0"]),
        (lambda: DirectionalEM(2, 1), ["num_features=1"]),
        (lambda: DirectionalEM(2, 3, init="learned"), ["init='learned'"]),
        (lambda: DirectionalEM(2, 3, dispersion_floor=0.0), ["dispersion_floor=0.0"]),
        (lambda: DirectionalEM(2, 3)(torch.randn(2, 5, 2)), ["x", "(2, 5, 2)"]),
    ],
)
def test_wrong_arguments_raise(call, words):
    assert_raises(ValueError, words, call)


def test_many_sets_equal_each_set_alone():
    x = torch.randn(300, 20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operator = DirectionalEM(4, 3, num_iters=2).double()
    together = operator(x)
    for index in (0, 299):
        alone = operator(x[index : index + 1])
        torch.testing.assert_close(together.log_prob(x)[index], alone.log_prob(x[index : index + 1])[0])
