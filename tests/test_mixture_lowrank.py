import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import FactorAnalysis
from torch.autograd import gradcheck

from em_lightning import EMOperator
from em_lightning.mixture import LowRankCovariance
from em_lightning.mixture.cloud import prepare
from em_lightning.mixture.moments import accumulate
from em_lightning.mixture.step import enter


def points(sets=1, items=200, features=5, rank=2, groups=1):
    loadings = 2 * torch.randn(sets, groups, features, rank, dtype=torch.float64)
    group = torch.arange(items) % groups
    latent = torch.randn(sets, items, rank, 1, dtype=torch.float64)
    x = (loadings[:, group] @ latent).squeeze(-1)
    noise = torch.rand(features, dtype=torch.float64) + 0.2
    place = 8 * torch.randn(sets, groups, features, dtype=torch.float64)
    return x + noise * torch.randn(sets, items, features, dtype=torch.float64) + place[:, group]


@pytest.mark.parametrize("rank", [1, 2])
def test_one_component_is_scikit_learns_factor_analysis(rank):
    x = points(items=500, features=7, rank=2)
    operator = EMOperator(1, 7, covariance="lowrank", rank=rank, covariance_floor=0.0, residual=False)
    mixture, _ = operator.fit(x, max_iters=2000, tol=1e-9)
    reference = FactorAnalysis(rank, tol=1e-6, max_iter=20_000, svd_method="lapack").fit(x[0].numpy())
    assert mixture.log_prob(x).mean().item() == pytest.approx(reference.score(x[0].numpy()), abs=1e-5)
    np.testing.assert_allclose(mixture.covariances[0, 0], reference.get_covariance(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("prior", [None, {"weight_concentration": 2.0}])
@pytest.mark.parametrize("floor", [0.0, 0.5])
@pytest.mark.parametrize("kernel", ["gaussian", "huber"])
def test_the_objective_never_falls(prior, floor, kernel):
    x = points(3, groups=3)
    operator = EMOperator(
        3, 5, covariance="lowrank", rank=2, covariance_floor=floor, prior=prior, kernel=kernel, residual=False
    )
    before = torch.full((3,), -math.inf, dtype=torch.float64)
    for mixture in operator.iterate(x, num_iters=30):
        after = operator.objective(x, mixture)
        assert (after >= before - 1e-9).all()
        before = after
    values = torch.linalg.eigvalsh(mixture.covariances)
    assert values.amin() >= floor * (1 - 1e-9)  # Psi alone is that large


def test_a_step_is_ghahramani_and_hintons(monkeypatch):
    """Their update, point by point: the latent factors have a posterior mean and a posterior covariance."""
    monkeypatch.setattr("em_lightning.mixture.lowrank._STEPS", 1)
    x = points(groups=2)
    operator = EMOperator(2, 5, covariance="lowrank", rank=2, residual=False)
    structure, cloud = LowRankCovariance(2), prepare(x)
    start = structure.maximize(
        accumulate(cloud, structure.natural(enter(cloud, operator(x, num_iters=3))), structure)[0],
        torch.zeros(1, dtype=torch.float64),
    )
    theta = structure.natural(start)
    new = structure.maximize(accumulate(cloud, theta, structure)[0], torch.zeros(1).double(), start.factors)
    r = torch.bmm(theta, structure.features(cloud.points, theta.dtype)).softmax(1)[0].numpy()
    data = cloud.points[0].T.numpy()
    for k in range(2):
        loadings, root = start.factors.loadings[0, k, :, :2].numpy(), start.factors.loadings[0, k, :, 2].numpy()
        np.testing.assert_allclose(
            start.factors.scale[0, k] @ start.factors.scale[0, k].T, loadings @ loadings.T + np.diag(root**2)
        )
        beta = loadings.T @ np.linalg.inv(loadings @ loadings.T + np.diag(root**2))
        offsets = data - new.means[0, k].numpy()
        cross, second, scatter = np.zeros((5, 2)), np.zeros((2, 2)), np.zeros(5)
        for n in range(len(data)):
            z = beta @ offsets[n]
            cross += r[k, n] * np.outer(offsets[n], z)
            second += r[k, n] * (np.eye(2) - beta @ loadings + np.outer(z, z))
        found = cross @ np.linalg.inv(second)
        for n in range(len(data)):
            scatter += r[k, n] * (offsets[n] - found @ (beta @ offsets[n])) * offsets[n]
        np.testing.assert_allclose(new.factors.loadings[0, k, :, :2], found, atol=1e-8)
        np.testing.assert_allclose(new.factors.loadings[0, k, :, 2] ** 2, scatter / r[k].sum(), atol=1e-8)


@pytest.mark.parametrize("gradient", ["unrolled", "checkpoint"])
def test_gradients(gradient):
    x = points(1, 16, 3, groups=2).requires_grad_()
    operator = EMOperator(2, 3, num_iters=2, covariance="lowrank", rank=1, gradient=gradient, init="learned").double()
    for parameter in operator.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)

    def outcome(x):
        mixture = operator(x)
        return mixture.log_prob(x), mixture.means, mixture.covariances

    assert gradcheck(outcome, (x,), fast_mode=True)
    untrained = EMOperator(2, 3, num_iters=4, covariance="lowrank", rank=1).double()
    plain = untrained.classical()(x)
    assert all(torch.equal(one, two) for one, two in zip(untrained(x), plain, strict=True))
    assert torch.autograd.grad(operator(x).log_prob(x).sum(), list(operator.parameters()))[0].isfinite().all()


@pytest.mark.parametrize("init", ["farthest", "kmeans++", "learned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["one point repeated", "collinear", "one point", "empty"])
def test_degenerate_clouds_stay_finite(name, init, dtype):
    x = {
        "one point repeated": torch.ones(1, 40, 3),
        "collinear": torch.linspace(-1, 1, 40)[None, :, None] * torch.tensor([1.0, 2.0, -1.0]),
        "one point": torch.ones(1, 1, 3),
        "empty": torch.randn(1, 10, 3),
    }[name]
    x = x.to(dtype).requires_grad_()
    mask = torch.zeros(1, 10, dtype=torch.bool) if name == "empty" else None
    operator = EMOperator(4, 3, covariance="lowrank", rank=1, init=init).to(dtype)
    mixture = operator(x, mask)
    (mixture.log_prob(x, mask).sum() + mixture.means.sum()).backward()
    assert all(part.isfinite().all() for part in mixture) and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in operator.parameters())


def test_a_rank_belongs_to_lowrank():
    for arguments, words in [
        ({"covariance": "lowrank"}, "rank=None with covariance='lowrank'"),
        ({"covariance": "full", "rank": 1}, "rank=1 with covariance='full'"),
        ({"covariance": "lowrank", "rank": 3}, "rank=3 must be at least 1 and less than num_features=3"),
    ]:
        with pytest.raises(ValueError, match=words):
            EMOperator(2, 3, **arguments)
    x = points(1, 50, 3)
    again = EMOperator(2, 3, covariance="lowrank", rank=1, residual=False)
    assert again(x, init=again(x)).means.isfinite().all()  # a low-rank mixture is given back as a full one


def test_a_correction_is_the_formula():
    """``U + L (T - I) W U`` and a stretched ``Psi``, with matrices written out."""
    structure, x = LowRankCovariance(2), points(2, groups=2)
    mixture = EMOperator(2, 5, covariance="lowrank", rank=2, residual=False)(x, num_iters=3)
    moments, _ = accumulate(prepare(x), structure.natural(enter(prepare(x), mixture)), structure)
    after = structure.maximize(moments, torch.full((2,), 1e-3, dtype=torch.float64)).factors
    correction = 0.3 * torch.randn(2, 2, structure.step_size(5), dtype=torch.float64)
    found = structure.correct(after, after, correction, torch.full((2,), 1e-3, dtype=torch.float64))
    unchanged = structure.correct(after, after, 0 * correction, torch.full((2,), 1e-3, dtype=torch.float64))
    torch.testing.assert_close(unchanged.scale, after.scale)
    for b in range(2):
        for k in range(2):
            triangle = np.diag(np.exp(correction[b, k, :5].numpy()))
            triangle[np.tril_indices(5, -1)] = correction[b, k, 5:-2].numpy()
            factor, loadings = after.scale[b, k].numpy(), after.loadings[b, k, :, :-1].numpy()
            moved = loadings + factor @ (triangle - np.eye(5)) @ np.linalg.solve(factor, loadings)
            noise = after.loadings[b, k, :, -1].numpy() * np.exp(correction[b, k, :5].numpy())
            expected = moved @ moved.T + np.diag(noise**2)
            np.testing.assert_allclose((found.scale @ found.scale.mT)[b, k], expected, rtol=1e-7, atol=1e-9)
