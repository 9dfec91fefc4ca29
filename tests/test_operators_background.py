"""A background whose weight EM estimates, one for each set."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch.autograd import gradcheck

from em_lightning import EMOperator, Mixture
from em_lightning.competition import none_of_the_above
from em_lightning.mixture import COVARIANCES, UniformBackground

KINDS = sorted(COVARIANCES)
LEAST = 1e-5


def clouds(shares=(0.1, 0.4), items=120):
    """Two clusters of two features, and a share of points uniform over a square of side 30 in each set."""
    sets = []
    for share in shares:
        x = torch.randn(items, 2, dtype=torch.float64) + 6 * (torch.arange(items) % 2).unsqueeze(-1)
        noise = round(share * items)
        x[:noise] = 30 * torch.rand(noise, 2, dtype=torch.float64) - 12
        sets.append(x)
    return torch.stack(sets)


def start_of(x, kind="full"):
    means = torch.tensor([[0.0, 0.0], [6.0, 6.0]], dtype=x.dtype).expand(len(x), -1, -1)
    factors = COVARIANCES[kind].expand(x.new_ones(len(x), 2), 2, 2)
    return Mixture(x.new_full((len(x), 2), math.log(0.5)), means, COVARIANCES[kind].covariances(factors.scale))


def weight_of(mixture):
    return 1.0 - mixture.weights.sum(-1)


def huber(y, features):
    """Energies and pulls of squared distances, written anew for delta = 1, with the density's normalizer in 2-D."""
    energy = np.where(y <= 1.0, 0.5 * y, np.sqrt(y) - 0.5)
    integral = 2 * math.pi * (1 - math.exp(-0.5) + 2 * math.exp(-0.5))
    return energy + math.log(integral), np.minimum(1.0, 1.0 / np.sqrt(y))


def loop(points, counts, weight, pi, mu, sigma, density, *, steps, kernel=None, pseudo=0.0):
    """EM for Gaussians beside a uniform component, one set, point by point."""
    for _ in range(steps):
        mass, outside = np.zeros(len(pi)), 0.0
        pulled, first, second = np.zeros(len(pi)), np.zeros_like(mu), np.zeros_like(sigma)
        for point, count in zip(points, counts, strict=True):
            likelihoods, pulls = [], []
            for k in range(len(pi)):
                if kernel is None:
                    likelihoods.append(multivariate_normal(mu[k], sigma[k]).pdf(point))
                    pulls.append(1.0)
                else:
                    y = (point - mu[k]) @ np.linalg.solve(sigma[k], point - mu[k])
                    energy, pull = kernel(y, len(point))
                    likelihoods.append(math.exp(-energy) / math.sqrt(np.linalg.det(sigma[k])))
                    pulls.append(pull)
            joint = (1 - weight) * pi * np.array(likelihoods)
            total = joint.sum() + weight * density
            outside += count * weight * density / total
            for k, r in enumerate(count * joint / total):
                mass[k] += r
                pulled[k] += r * pulls[k]
                first[k] += r * pulls[k] * point
                second[k] += r * pulls[k] * np.outer(point, point)
        mu = first / pulled[:, None]
        for k in range(len(pi)):
            sigma[k] = (second[k] - pulled[k] * np.outer(mu[k], mu[k])) / mass[k]
        mass, outside = mass + pseudo, outside + pseudo
        weight, pi = outside / (outside + mass.sum()), mass / mass.sum()
    return weight, pi, mu, sigma


@pytest.mark.parametrize("path", ["fast", "large", "robust", "prior", "energy", "lowrank"])
def test_steps_are_a_plain_loop_with_mask_and_weights(path, monkeypatch):
    x = clouds()
    mask, counted = torch.rand(2, 120) < 0.8, torch.rand(2, 120, dtype=torch.float64)
    arguments = {
        "robust": {"kernel": "huber"},
        "prior": {
            "prior": {"weight_concentration": 4.0, "mean_strength": 0.0, "covariance_strength": 0.0},
        },
        "energy": {"background": {"estimate": True, "weight": 0.2, "energy": 5.0}},
    }.get(path, {})
    if path == "large":
        monkeypatch.setattr("em_lightning.mixture.cloud._WHOLE", 0)
        monkeypatch.setattr("em_lightning.mixture.passes._BLOCK", 100)
    build = {"background": {"estimate": True, "weight": 0.2}, "covariance_floor": 0.0, "residual": False, **arguments}
    operator = EMOperator(2, 2, **build)
    found = operator(x.masked_fill(~mask.unsqueeze(-1), torch.nan), mask, counted, init=start_of(x), num_iters=3)
    for b in range(2):
        points, counts = x[b][mask[b]].numpy(), counted[b][mask[b]].numpy()
        density = math.exp(-5.0) if path == "energy" else 1 / (points.max(0) - points.min(0)).prod()
        weight, pi, mu, sigma = loop(
            points,
            counts,
            0.2,
            np.full(2, 0.5),
            start_of(x).means[b].numpy().copy(),
            start_of(x).covariances[b].numpy().copy(),
            density,
            steps=3,
            kernel=huber if path == "robust" else None,
            pseudo=3.0 if path == "prior" else 0.0,
        )
        assert weight_of(found)[b].item() == pytest.approx(weight, abs=1e-10)
        np.testing.assert_allclose(found.weights[b], (1 - weight) * pi, atol=1e-10)
        np.testing.assert_allclose(found.means[b], mu, atol=1e-8)
        np.testing.assert_allclose(found.covariances[b], sigma, atol=1e-8)


def test_the_weight_is_that_of_each_set():
    x = clouds((0.05, 0.25, 0.5), 800)
    operator = EMOperator(2, 2, background={"estimate": True}, num_iters=60, residual=False)
    mixture = operator(x, init=start_of(x))
    # A uniform point within a cluster is a point of the cluster.
    assert torch.allclose(weight_of(mixture), torch.tensor([0.05, 0.25, 0.5]).double(), atol=0.04)
    assert (mixture.means - start_of(x).means).norm(dim=-1).max() < 0.5
    outlier = none_of_the_above(operator.posterior(x, mixture))
    assert torch.allclose(outlier.mean(1), weight_of(mixture), atol=1e-3)  # the fixed point
    volume = (x.amax(1) - x.amin(1)).prod(-1, keepdim=True)
    expected = (weight_of(mixture).unsqueeze(-1) / volume + mixture.log_prob(x).exp()).log()
    assert torch.allclose(operator.log_prob(x, mixture), expected, atol=1e-12)
    fitted, steps = operator.fit(x, init=start_of(x), tol=1e-9, max_iters=500)
    assert (steps < 500).all() and torch.allclose(weight_of(fitted), weight_of(mixture), atol=1e-3)
    # The mixture holds the weight: going on from it is going on.
    half = operator(x, init=start_of(x), num_iters=30)
    assert torch.allclose(operator(x, init=half, num_iters=30).means, mixture.means, atol=1e-9)
    single = EMOperator(2, 2, background={"estimate": True}, num_iters=60, residual=False)(
        x.float(), init=Mixture(*(part.float() for part in start_of(x)))
    )
    assert torch.allclose(weight_of(single).double(), weight_of(mixture), atol=1e-5)
    assert mixture.sample(5).shape == (3, 5, 2)


@pytest.mark.parametrize("kind", [*KINDS, "lowrank"])
@pytest.mark.parametrize("arguments", [{}, {"kernel": "student_t"}, {"prior": {"weight_concentration": 3.0}}])
def test_the_objective_never_falls(kind, arguments):
    x = torch.cat([clouds((0.1, 0.4), 60), torch.randn(2, 60, 1, dtype=torch.float64)], -1)
    mask, weights = torch.rand(2, 60) < 0.8, torch.rand(2, 60, dtype=torch.float64)
    rank = 1 if kind == "lowrank" else None
    operator = EMOperator(
        2, 3, covariance=kind, rank=rank, background={"estimate": True}, covariance_floor=0.0, residual=False,
        **arguments,
    )  # fmt: skip
    before = torch.full((2,), -math.inf, dtype=torch.float64)
    variance = x.var(1, correction=0)
    dense = COVARIANCES["full" if rank else kind]
    factors = dense.expand(variance, 2, 3)
    start = Mixture(x.new_full((2, 2), math.log(0.5)), x[:, 50:52], dense.covariances(factors.scale))
    for mixture in operator.iterate(x, mask, weights, init=start, num_iters=20):
        after = operator.objective(x, mixture, mask, weights)
        by_hand = (operator.log_prob(x, mixture, mask) * weights).sum(-1)
        if operator.prior is not None:
            by_hand = by_hand + operator.prior.log_prob(mixture, x, mask, weights) + 2.0 * weight_of(mixture).log()
        assert torch.allclose(after, by_hand) and (after >= before - 1e-9).all()
        before = after


@pytest.mark.parametrize("competition", ["softmin", "sparsemin"])
@pytest.mark.parametrize("kernel", ["gaussian", "huber"])
def test_gradients(kernel, competition):
    x = clouds((0.2, 0.3), 12).requires_grad_()
    counted = torch.rand(2, 12, dtype=torch.float64).add(0.5).requires_grad_()
    energy = {"estimate": True, "energy": 5.0}  # that of a box has corners where points on its sides change places

    def outcome(gradient, x, counted):
        operator = EMOperator(
            2, 2, kernel=kernel, competition=competition, background=energy, prior={"weight_concentration": 2.0},
            num_iters=3, residual=False, gradient=gradient,
        )  # fmt: skip
        mixture = operator(x, weights=counted, init=start_of(x))
        return mixture.log_weights, mixture.means, operator.log_prob(x, mixture)

    assert gradcheck(lambda *args: outcome("unrolled", *args), (x, counted), fast_mode=True)
    grads = {}
    for gradient in ("unrolled", "checkpoint", "last"):
        value = sum(
            (part * torch.linspace(0, 1, part.numel()).view(part.shape)).sum() for part in outcome(gradient, x, counted)
        )
        grads[gradient] = torch.autograd.grad(value, (x, counted))
    for one, two in zip(grads["unrolled"], grads["checkpoint"], strict=True):
        assert torch.allclose(one, two)
    assert grads["last"][0].isfinite().all()


def test_the_implicit_gradient_is_that_of_the_converged_weight():
    x = clouds((0.1, 0.3), 80).requires_grad_()
    grads = []
    for gradient in ("unrolled", "implicit"):
        operator = EMOperator(
            2, 2, background={"estimate": True}, num_iters=300, residual=False, gradient=gradient, covariance_floor=1e-3
        )
        mixture = operator(x, init=start_of(x))
        grads.append(torch.autograd.grad(weight_of(mixture).sum() + mixture.means[..., 0].sum(), x)[0])
    assert torch.allclose(*grads, atol=1e-8)


def test_the_weight_neither_dies_nor_takes_all():
    x = clouds((0.0,), 200)
    operator = EMOperator(2, 2, background={"estimate": True, "energy": 30.0}, num_iters=50, residual=False)
    mixture = operator(x, init=start_of(x))
    assert weight_of(mixture).item() == pytest.approx(LEAST, rel=1e-6)
    # A fit that goes on from there comes back.
    noisy = torch.cat([x, 30 * torch.rand(1, 60, 2, dtype=torch.float64) - 12], 1)
    again = EMOperator(2, 2, background={"estimate": True}, num_iters=50, residual=False)
    assert weight_of(again(noisy, init=mixture)).item() == pytest.approx(60 / 260, abs=0.05)
    everything = EMOperator(2, 2, background={"estimate": True, "energy": -9.0}, num_iters=50, residual=False)
    mixture = everything(x, init=start_of(x))
    assert weight_of(mixture).item() == pytest.approx(1 - LEAST, rel=1e-9)
    assert all(part.isfinite().all() for part in mixture)


@pytest.mark.parametrize("arguments", [{}, {"kernel": "laplace"}])
def test_an_empty_set_keeps_the_start(arguments):
    x = clouds().float().requires_grad_()
    mask = torch.tensor([[False], [True]]).expand(2, 120)
    operator = EMOperator(3, 2, background=UniformBackground(0.3, estimate=True), init="kmeans++", num_starts=2)
    mixture = operator.eval()(x, mask)
    assert weight_of(mixture)[0].item() == pytest.approx(0.3, abs=1e-6)
    operator.log_prob(x, mixture, mask).sum().backward()
    assert all(part.isfinite().all() for part in mixture) and x.grad.isfinite().all()


def test_what_is_said():
    assert "weight=0.1 (estimated)" in repr(UniformBackground(estimate=True))
    with pytest.raises(ValueError, match="learnable=True .* estimate=True .* give one"):
        EMOperator(2, 2, background={"learnable": True, "estimate": True})


@pytest.mark.parametrize("features", [1, 2])
def test_the_energy_of_the_box_is_the_box(features):
    x = clouds()[..., :features]
    sides = x[0].amax(0) - x[0].amin(0)
    found = []
    for background in ({"weight": 0.2}, {"weight": 0.2, "energy": float(sides.log().sum())}):
        found.append(EMOperator(2, features, background=background, residual=False)(x[:1], num_iters=5))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
