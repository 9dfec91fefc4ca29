import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch.autograd import gradcheck

from em_lightning.mixture import COVARIANCES, LowRankCovariance, Mixture, em_step
from em_lightning.mixture.cloud import Cloud
from em_lightning.mixture.covariance import cholesky_with_inverse
from em_lightning.mixture.moments import accumulate, log_density

KINDS = sorted(COVARIANCES)


def random_mixture(kind, sets=2, components=3, features=2, dtype=torch.float64):
    factor = torch.randn(sets, components, features, features, dtype=dtype)
    full = factor @ factor.mT + 0.3 * torch.eye(features, dtype=dtype)
    covariances = {
        "full": full,
        "tied": full[:, :1],
        "diag": full.diagonal(dim1=-2, dim2=-1),
        "spherical": full[..., 0, 0],
    }[kind]
    log_weights = torch.randn(sets, components, dtype=dtype).log_softmax(-1)
    return Mixture(log_weights, torch.randn(sets, components, features, dtype=dtype), covariances)


def cloud_of(points, weights=None, shift=None):
    """The given points in the frame of the loop, without centring."""
    none = points.new_zeros(points.shape[:2])
    return Cloud(points, weights, none[:, 0], none, none, shift)


def covariance_of(mixture, b, k):
    features = mixture.means.shape[-1]
    part = mixture.covariances[b]
    return {
        "full": lambda: part[k],
        "tied": lambda: part[0],
        "diag": lambda: part[k].diag(),
        "spherical": lambda: part[k] * torch.eye(features, dtype=part.dtype),
    }[mixture.covariance_type]()


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_is_scipys(kind):
    mixture, x = random_mixture(kind), torch.randn(2, 7, 2, dtype=torch.float64)
    assert mixture.covariance_type == kind
    expected = torch.zeros(2, 7, dtype=torch.float64)
    for b in range(2):
        density = sum(
            mixture.weights[b, k].item()
            * multivariate_normal(mixture.means[b, k].numpy(), covariance_of(mixture, b, k).numpy()).pdf(x[b].numpy())
            for k in range(3)
        )
        expected[b] = torch.from_numpy(np.log(density))
    assert torch.allclose(mixture.log_prob(x), expected, atol=1e-12)
    posterior = mixture.posterior(x)
    assert torch.allclose(posterior.free_energy, -expected, atol=1e-12)
    assert torch.allclose(posterior.responsibilities.sum(-1), torch.ones(2, 7, dtype=torch.float64))
    distribution = mixture.to_distribution()
    assert torch.allclose(distribution.log_prob(x.transpose(0, 1)).T, expected, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_points_have_no_density_and_may_hold_anything(kind):
    mixture, x = random_mixture(kind), torch.randn(2, 7, 2, dtype=torch.float64)
    mask = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    dirty = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    assert torch.equal(mixture.log_prob(dirty, mask), mixture.log_prob(x).masked_fill(~mask, 0.0))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_moments_of_the_mixture(kind):
    mixture = random_mixture(kind, sets=1)
    x = mixture.sample(200_000, generator=torch.Generator().manual_seed(3))[0]
    weights = mixture.weights[0]
    mean = weights @ mixture.means[0]
    second = sum(
        weights[k] * (covariance_of(mixture, 0, k) + torch.outer(mixture.means[0, k], mixture.means[0, k]))
        for k in range(3)
    )
    assert torch.allclose(x.mean(0), mean, atol=0.03)
    assert torch.allclose(x.T @ x / len(x), second, atol=0.1)
    assert mixture.sample(0).shape == (1, 0, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_affine_changes_units(kind):
    mixture, x = random_mixture(kind), torch.randn(2, 5, 2, dtype=torch.float64)
    scale, shift = torch.tensor([2.0, 0.5], dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    moved = mixture.affine(scale, shift).log_prob(x * scale[:, None, None] + shift[:, None])
    assert torch.allclose(moved, mixture.log_prob(x) - 2 * scale.log()[:, None], atol=1e-12)


@pytest.mark.parametrize("features", [1, 2, 6])  # more than four are not written out but left to the library
@pytest.mark.parametrize("kind", KINDS)
def test_em_step_is_the_textbook_loop(kind, features):
    mixture = random_mixture(kind, features=features)
    x = torch.randn(2, 30, features, dtype=torch.float64)
    weights = torch.rand(2, 30, dtype=torch.float64)
    new = em_step(x, mixture, weights=weights, floor=1e-3)
    r = mixture.posterior(x).responsibilities * weights.unsqueeze(-1)
    for b in range(2):
        mass = r[b].sum(0)
        assert torch.allclose(new.weights[b], mass / mass.sum(), atol=1e-12)
        scatter = []
        for k in range(3):
            mean = (r[b, :, k, None] * x[b]).sum(0) / mass[k]
            assert torch.allclose(new.means[b, k], mean, atol=1e-12)
            offset = x[b] - mean
            scatter.append(sum(r[b, n, k] * torch.outer(offset[n], offset[n]) for n in range(30)) / mass[k])
        eye = torch.eye(features, dtype=torch.float64)
        tied = sum(m * s for m, s in zip(mass, scatter, strict=True)) / mass.sum()
        for k in range(3):
            expected = {
                "full": scatter[k],
                "tied": tied,
                "diag": scatter[k].diag().diag(),
                "spherical": scatter[k].trace() / features * eye,
            }[kind] + 1e-3 * eye
            assert torch.allclose(covariance_of(new, b, k), expected, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_likelihood_never_falls(kind):
    x = torch.randn(3, 200, 3, dtype=torch.float64) + 4 * torch.randint(0, 2, (3, 200, 1))
    mixture = random_mixture(kind, 3, 4, 3)
    before = -math.inf
    for _ in range(30):
        mixture = em_step(x, mixture, floor=0.0)
        after = mixture.log_prob(x).mean().item()
        assert after >= before - 1e-12
        before = after


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted, shifted", [(False, False), (True, True)])
def test_gradients_of_both_passes(kind, weighted, shifted, monkeypatch):
    monkeypatch.setattr("em_lightning.mixture.passes._BLOCK", 12)  # several blocks of clouds and rows
    structure = COVARIANCES[kind]
    points = torch.randn(2, 2, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 7, dtype=torch.float64, requires_grad=True) if weighted else None
    theta = torch.randn(2, 3, structure.num_moments(2), dtype=torch.float64, requires_grad=True)
    shift = torch.randn(2, 2, dtype=torch.float64, requires_grad=True) if shifted else None

    def passes(points, shift, weights, theta):
        cloud = cloud_of(points, weights, shift)
        return accumulate(cloud, theta, structure)[0], log_density(cloud, theta, structure)

    assert gradcheck(passes, (points, shift, weights, theta))


@pytest.mark.parametrize("wanted", range(4))
def test_the_gradient_of_one_input_alone(wanted):
    structure = COVARIANCES["full"]
    shapes = [(2, 2, 7), (2, 2), (2, 7), (2, 3, 6)]
    inputs = [torch.rand(shape, dtype=torch.float64) for shape in shapes]

    def gradients(which):
        given = [value.clone().requires_grad_(n in which) for n, value in enumerate(inputs)]
        points, shift, weights, theta = given
        moments, _ = accumulate(cloud_of(points, weights, shift), theta, structure)
        (moments * torch.arange(6)).sum().backward()
        return [value.grad for value in given]

    alone, together = gradients({wanted}), gradients(set(range(4)))
    torch.testing.assert_close(alone[wanted], together[wanted])
    assert all(value is None for n, value in enumerate(alone) if n != wanted)


def test_blocks_change_nothing(monkeypatch):
    structure = COVARIANCES["full"]
    points, theta = torch.randn(5, 3, 40, dtype=torch.float64), torch.randn(5, 4, 10, dtype=torch.float64)
    whole = accumulate(cloud_of(points), theta, structure, likelihood=True)
    for block in (1, 7, 100, 350):
        monkeypatch.setattr("em_lightning.mixture.passes._BLOCK", block)
        for one, two in zip(accumulate(cloud_of(points), theta, structure, likelihood=True), whole, strict=True):
            assert torch.allclose(one, two, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_cholesky_and_its_inverse(size):
    root = torch.randn(4, size, size, dtype=torch.float64)
    matrix = root @ root.mT + 0.1 * torch.eye(size, dtype=torch.float64)
    scale, inverse, _ = cholesky_with_inverse(matrix, torch.zeros(4, size, dtype=torch.float64))
    assert torch.allclose(scale, torch.linalg.cholesky(matrix), atol=1e-12)
    assert torch.allclose(inverse @ scale, torch.eye(size, dtype=torch.float64).expand(4, -1, -1), atol=1e-9)
    indefinite = -torch.eye(size, dtype=torch.float64).expand(4, -1, -1)
    scale, inverse, _ = cholesky_with_inverse(indefinite, torch.full((4, size), 1e-8, dtype=torch.float64))
    assert scale.isfinite().all() and inverse.isfinite().all()
    mixed = torch.cat([matrix[:2], indefinite[:1], matrix[2:]])  # one of them spoils no other
    scale, _, _ = cholesky_with_inverse(mixed, torch.full((5, size), 1e-8, dtype=torch.float64))
    assert torch.allclose(scale[[0, 1, 3, 4]], torch.linalg.cholesky(matrix), atol=1e-12)


@pytest.mark.parametrize("structure", [*COVARIANCES.values(), LowRankCovariance(2)], ids=lambda part: part.name)
def test_a_variance_of_each_set_becomes_that_of_all_its_components(structure):
    variance = torch.rand(2, 4, dtype=torch.float64) + 0.1
    found = Mixture(
        torch.zeros(2, 3), torch.zeros(2, 3, 4), structure.covariances(structure.expand(variance, 3, 4).scale)
    )
    for b in range(2):
        expected = variance[b].mean().expand(4) if structure.name == "spherical" else variance[b]
        for k in range(3):
            assert torch.allclose(covariance_of(found, b, k).to(expected), expected.diag())


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_float32_keeps_its_digits_far_from_the_origin(offset):
    x = torch.randn(2, 500, 3).double() * torch.tensor([1.0, 0.1, 0.01]) + offset
    x = x.float()
    start = random_mixture("full", 2, 4, 3)
    start = start._replace(means=x[:, ::125].double())
    wide, narrow = start, Mixture(*(part.float() for part in start))
    for _ in range(10):
        wide, narrow = em_step(x.double(), wide), em_step(x, narrow)
    wide_ll, narrow_ll = wide.log_prob(x.double()).mean().item(), narrow.log_prob(x).mean().item()
    # All that is lost is the place of a mean in float32, a hundredth of a deviation at 1e3 and all of it at 1e5.
    assert narrow_ll == pytest.approx(wide_ll, abs={0.0: 1e-4, 1e3: 1e-3, 1e5: 0.3}[offset])


def test_wrong_shapes_are_named():
    mixture = random_mixture("full")
    with pytest.raises(ValueError, match=r"covariances of shape \(2, 9\) fit no structure.*full \(2, 3, 2, 2\)"):
        mixture._replace(covariances=torch.ones(2, 9)).log_prob(torch.zeros(2, 1, 2))
    with pytest.raises(ValueError, match=r"x of shape \(2, 5, 3\) does not fit 2 mixtures of 2 features"):
        mixture.log_prob(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="n=-1 points"):
        mixture.sample(-1)
