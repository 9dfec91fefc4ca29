"""Mixtures, EM steps, priors, backgrounds and other densities against numpy and scipy."""

import functools
import math

import drawing
import numpy as np
import pytest
import torch
from helpers import (
    COVARIANCE_TYPES,
    cast,
    full_covariances,
    is_finite,
    log_prior,
    of_mean_one,
    random_mixture,
    replace,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ive, logsumexp

from em_lightning import EMOperator
from em_lightning.competition import Posterior
from em_lightning.mixture import (
    COVARIANCES,
    LowRankCovariance,
    Mixture,
    MixturePrior,
    StreamedEM,
    SufficientStatistics,
    UniformBackground,
    em_step,
    fit_blocks,
    information_criteria,
)
from em_lightning.mixture.initialization import farthest_points, kmeans_plus_plus, random_points
from em_lightning.operators import DirectionalMixture, GeneralizedEM, KernelMixture


@st.composite
def mixtures(draw, covariance, sets, components, features, dtype=torch.float64, size=1.0):
    """Draw mixtures about the origin with components of similar size."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    mixture = random_mixture(covariance, sets, components, features, generator=generator)
    return cast(Mixture(mixture.log_weights, size * mixture.means, size**2 * mixture.covariances), dtype)


def matrices(mixture):
    """Return covariances as (B, K, D, D), in numpy."""
    return full_covariances(mixture).double().numpy()


def log_joint(x, mixture):
    """Return log pi_k + log N(x_n | mu_k, Sigma_k) by numpy, as (B, N, K)."""
    weights, means = mixture.log_weights.double().numpy(), mixture.means.double().numpy()
    spread = matrices(mixture)
    x = x.double().numpy()
    sets, components, features = means.shape
    found = np.zeros((sets, x.shape[1], components))
    for b in range(sets):
        for k in range(components):
            offset = x[b] - means[b, k]
            square = (offset * np.linalg.solve(spread[b, k], offset.T).T).sum(1)
            log_det = np.log(np.linalg.cholesky(spread[b, k]).diagonal()).sum()
            found[b, :, k] = weights[b, k] - 0.5 * square - log_det - 0.5 * features * math.log(2 * math.pi)
    return found


def shapes(values, features=3, items=7):
    """Return sets, items, components and features."""
    return (values.draw(st.integers(1, 2)), *(values.draw(st.integers(1, n)) for n in (items, 3, features)))


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@given(values=st.data())
def test_densities_posteriors_and_samples(kind, values):
    sets, items, components, features = shapes(values)
    items -= values.draw(st.sampled_from((0, items)))
    dtype = values.draw(st.sampled_from(drawing.WIDE))
    size = 10.0 ** values.draw(st.integers(-6, 6) if dtype == torch.float32 else st.integers(-9, 9))
    mixture = values.draw(mixtures(kind, sets, components, features, dtype, size))
    assert mixture.covariance_type == ("full" if kind == "tied" and components == 1 else kind)
    assert kind in COVARIANCES
    criteria = information_criteria(mixture, -3.0, 100)
    assert criteria.bic - 6.0 == pytest.approx((criteria.aic - 6.0) / 2 * math.log(100))
    x = (values.draw(drawing.tensors((sets, items, features), least=-6, most=3)) * size).to(dtype).requires_grad_()
    joint = log_joint(x.detach(), mixture)
    density = logsumexp(joint, axis=2)
    # In float32 the error of the worst point is below 1e-3.
    eps = 1e-9 if dtype == torch.float64 else 2e-4
    found = mixture.log_prob(x)
    np.testing.assert_allclose(found.detach(), density, rtol=eps, atol=eps * 10)
    np.testing.assert_allclose(mixture.log_joint(x).detach(), joint, rtol=eps, atol=eps * 10)
    posterior = mixture.posterior(x)
    assert isinstance(posterior, Posterior)
    share = np.exp(joint - density[..., None])
    np.testing.assert_allclose(
        posterior.responsibilities.detach(), share, atol=eps * 10 * (1 + np.abs(joint).max(initial=0.0))
    )
    np.testing.assert_allclose(-posterior.free_energy.detach(), density, rtol=eps, atol=eps * 10)
    assert torch.autograd.grad(found.sum(), x)[0].isfinite().all()
    mask = values.draw(drawing.holes((sets, items)))
    if mask is not None:
        dirty = torch.where(mask.unsqueeze(-1), x.detach(), torch.inf)
        torch.testing.assert_close(mixture.log_prob(dirty, mask), torch.where(mask, found.detach(), 0.0))
    drawn = mixture.sample(items)
    assert drawn.shape == (sets, items, features) and drawn.dtype == dtype and drawn.isfinite().all()
    torch.testing.assert_close(mixture.weights.sum(-1), torch.ones(sets, dtype=dtype))
    moved = mixture.affine(torch.full((sets,), 2.0, dtype=dtype), torch.full((sets, features), size, dtype=dtype))
    again = moved.log_prob(2 * x.detach() + size) + features * math.log(2)
    close = torch.isclose(again, found.detach(), rtol=10 * eps, atol=eps * 100)
    assert (close | (x.detach().abs().amax(-1) > 50 * size)).all()
    if not items:
        return  # torch.distributions does not accept empty batches
    other = mixture.to_distribution().log_prob(x.detach().movedim(1, 0)).movedim(0, 1).double()
    close = torch.isclose(other, torch.from_numpy(density), rtol=2 * eps, atol=10 * eps)
    assert (close | (x.detach().abs().amax(-1) > 50 * size)).all()


def sums(x, mixture, w):
    """Return responsibilities times weights (B, N, K) and the log-likelihood (B,)."""
    joint = log_joint(x, mixture)
    density = logsumexp(joint, axis=2)
    return np.exp(joint - density[..., None]) * w.numpy()[..., None], (density * w.numpy()).sum(1)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@given(values=st.data())
def test_a_step_equals_numpy_in_memory_and_in_blocks(kind, values):
    sets, items, components, features = shapes(values)
    dtype = values.draw(st.sampled_from(drawing.WIDE))
    size = 10.0 ** values.draw(st.integers(-6, 6) if dtype == torch.float32 else st.integers(-9, 9))
    mixture = values.draw(mixtures(kind, sets, components, features, dtype, size))
    x = (size * values.draw(drawing.tensors((sets, items, features), least=-2, most=1))).to(dtype)
    mask, weights = values.draw(drawing.holes((sets, items))), values.draw(drawing.counts((sets, items), dtype))
    w = torch.ones(sets, items, dtype=torch.float64) if weights is None else weights.double()
    w = w if mask is None else w * mask
    dirty = x if mask is None else torch.where(mask.unsqueeze(-1), x, torch.nan)
    floor = 1e-2 * size**2
    new = em_step(dirty, mixture, mask, weights, floor=floor)
    assert is_finite(new) and new.means.dtype == dtype
    r, density = sums(x, mixture, w)
    # In float32 log-densities and so responsibilities have an error of 1e-3.
    eps = 1e-8 if dtype == torch.float64 else 1e-2
    reach = float(x.abs().max()) + size
    for b in range(sets):
        check_step(new, b, kind, x[b].double().numpy(), r[b], floor, None, size, eps, reach)
    if kind == "tied" and components == 1:
        return  # a start of this shape has full covariances
    prior = MixturePrior(
        weight_concentration=values.draw(st.sampled_from((1.0, 2.5))),
        mean_strength=values.draw(st.sampled_from((0.0, 0.5))),
        mean=[size] * features,
        covariance_strength=values.draw(st.sampled_from((0.5, 3.0))),
        covariance=[size**2] * features,
    )
    for given_prior in (None, prior):
        for b in range(sets):
            own = torch.ones(items, dtype=torch.bool) if mask is None else mask[b]
            points, counts = x[b][own], None if weights is None or given_prior is not None else weights[b][own]
            if not len(points) or (counts is not None and not counts.sum() > 0):
                continue
            mass = torch.ones(len(points)).double() if counts is None else counts.double()
            share, level = sums(points[None], Mixture(*(part[b : b + 1] for part in tensors_of(mixture))), mass[None])

            def blocks(points=points, counts=counts):
                return [
                    (points[row : row + 3], None if counts is None else counts[row : row + 3])
                    for row in range(0, len(points), 3)
                ]

            start = cast(Mixture(*(part[b : b + 1] for part in tensors_of(mixture))), torch.float64)
            expected = level[0] / mass.sum().item()
            if given_prior is None:
                fit = fit_blocks(blocks, start, max_iters=1, tol=0.0, floor=floor)
                after, found = fit.mixture, fit.log_likelihoods[0]
            else:
                streamed = StreamedEM.about(start)
                first, *others = [streamed.e_step(rows, start, counts) for rows, counts in blocks()]
                statistics = functools.reduce(SufficientStatistics.plus, others, first)
                after = streamed.m_step(statistics, start, floor, given_prior)
                found = statistics.log_likelihood.item() / statistics.mass.sum().item()
            assert found == pytest.approx(expected, rel=eps, abs=eps * 10)
            check_step(after, 0, kind, points.double().numpy(), share[0], floor, given_prior, size, eps, reach)


def tensors_of(mixture):
    return mixture.log_weights, mixture.means, mixture.covariances


def check_step(found, b, kind, x, r, floor, prior, size, eps, reach):
    mass = r.sum(0)
    if mass.min() < 1e-3 * max(mass.sum(), 1.0):
        return  # empty components are only checked to be finite
    alpha, kappa, s = (0.0, 0.0, 0.0)
    if prior is not None:
        alpha, kappa, s = (float(prior.count(name)) for name in ("weight", "mean", "covariance"))
    features = x.shape[1]
    place, shape = size * np.ones(features), size**2 * np.eye(features)
    np.testing.assert_allclose(found.weights[b], (mass + alpha) / (mass + alpha).sum(), atol=eps)
    means = (r.T @ x + kappa * place) / (mass + kappa)[:, None]
    np.testing.assert_allclose(found.means[b], means, atol=eps * reach)
    apart, pull = x[:, None] - means, means - place
    scatter = np.einsum("nk,nki,nkj->kij", r, apart, apart) + kappa * pull[:, :, None] * pull[:, None]
    if kind == "tied":
        spread = (scatter.sum(0, keepdims=True) + s * shape) / (mass.sum() + s)
    else:
        spread = (scatter + s * shape) / (mass + s)[:, None, None]
    spread = spread + floor * np.eye(features)
    expected = {
        "full": spread,
        "tied": spread,
        "diag": np.einsum("kii->ki", spread),
        "spherical": np.einsum("kii->k", spread) / features,
    }[kind]
    np.testing.assert_allclose(found.covariances[b], expected, atol=10 * eps * reach**2)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@given(values=st.data())
def test_priors_equal_their_formula(kind, values):
    sets, items, components, features = shapes(values)
    size = 10.0 ** values.draw(st.integers(-9, 9))
    mixture = values.draw(mixtures(kind, sets, components, features, size=size))
    x = size * values.draw(drawing.tensors((sets, items, features), least=-2, most=1))
    alpha, kappa, s = (10.0 ** values.draw(st.integers(-3, 3)) for _ in range(3))
    place = [values.draw(st.sampled_from((0.0, -size, 3 * size))) for _ in range(features)]
    shape = [values.draw(st.sampled_from((0.1, 1.0, 20.0))) * size**2 for _ in range(features)]
    prior = MixturePrior(
        weight_concentration=1 + alpha, mean_strength=kappa, mean=place, covariance_strength=s, covariance=shape
    )
    alpha = prior.count("weight")
    found = log_prior(prior, mixture, x, values.draw(drawing.holes((sets, items))))
    spread = matrices(mixture)
    terms, expected = np.zeros(sets), np.zeros(sets)
    for b in range(sets):
        parts = [alpha * mixture.log_weights[b].sum().item()]
        for k in range(components):
            pull = mixture.means[b, k].numpy() - np.array(place)
            solved = np.linalg.solve(spread[b, k], pull)
            parts.append(-0.5 * kappa * pull @ solved)
            if kind != "tied" or k == 0:
                root = np.linalg.cholesky(spread[b, k])
                parts.append(-s * np.log(root.diagonal()).sum())
                parts.append(-0.5 * s * np.trace(np.linalg.solve(spread[b, k], np.diag(shape))))
        expected[b], terms[b] = sum(parts), sum(map(abs, parts))
    # The pull is a difference of features about the mean of the points.
    away = 1 + float((x.abs().max() / size) ** 2) * (1 + kappa + s)
    assert (np.abs(found.numpy() - expected) <= 1e-12 * (terms + 100 * away)).all(), (found, expected)


@given(values=st.data())
def test_priors_from_the_points(values):
    sets, items, components, features = shapes(values)
    dtype = values.draw(st.sampled_from(drawing.WIDE))
    x = values.draw(drawing.tensors((sets, items, features), dtype, -9, 9))
    prior = MixturePrior(
        weight_concentration=1 + 10.0 ** values.draw(st.integers(-3, 3)),
        mean_strength=10.0 ** values.draw(st.integers(-3, 3)),
        covariance_strength=10.0 ** values.draw(st.integers(-3, 3)),
        learnable=values.draw(st.booleans()),
    )
    kind = values.draw(st.sampled_from(COVARIANCE_TYPES))
    operator = EMOperator(components, features, covariance=kind, prior=prior, residual=False, num_iters=2)
    mask, weights = values.draw(drawing.holes((sets, items))), values.draw(drawing.counts((sets, items)))
    mixture = operator(x, mask, weights)
    assert is_finite(mixture)
    found = log_prior(prior, mixture, x, mask, weights)
    assert found.isfinite().all()
    if found.requires_grad:
        grads = torch.autograd.grad(found.sum() + mixture.means.sum(), list(prior.parameters()))
        assert all(grad.isfinite().all() for grad in grads)


@given(values=st.data())
def test_backgrounds_equal_one_more_component(values):
    sets, items, components, features = shapes(values)
    size = 10.0 ** values.draw(st.integers(-9, 9))
    share, kind = values.draw(st.sampled_from((0.01, 0.3, 0.99))), values.draw(st.sampled_from(COVARIANCE_TYPES))
    energy = values.draw(st.sampled_from((None, 0.0, -3.0, 700.0)))
    estimate = values.draw(st.booleans())
    background = UniformBackground(share, energy=energy, estimate=estimate)
    operator = EMOperator(components, features, covariance=kind, background=background, residual=False, num_iters=1)
    mixture = values.draw(mixtures(kind, sets, components, features, size=size))
    x = size * values.draw(drawing.tensors((sets, items, features), least=-2, most=2))
    mask = values.draw(drawing.holes((sets, items)))
    if mask is not None:
        x = torch.where(mask.unsqueeze(-1), x, x.mean(1, keepdim=True))
    joint = log_joint(x, mixture)
    for b in range(sets):
        kept = x[b] if mask is None else x[b][mask[b]]
        level = -energy if energy is not None else None
        if level is None:
            if not len(kept):
                continue
            sides = kept.amax(0) - kept.amin(0)
            # If the sides of the box are rounding errors, the density is only checked to be finite.
            if (sides < 1e-12 * kept.abs().max()).any():
                continue
            level = -torch.maximum(sides, 1e-3 * sides.max()).clamp(min=2.0**-52).log().sum().item()
        outside = math.log(share) + level
        whole = logsumexp(np.append(joint[b] + math.log1p(-share), np.full((items, 1), outside), 1), axis=1)
        whole = whole if mask is None else np.where(mask[b], whole, 0.0)
        found = operator.log_prob(x, mixture, mask)[b]
        np.testing.assert_allclose(found, whole, rtol=1e-9, atol=1e-8)
        shares = operator.posterior(x, mixture, mask).responsibilities[b, :, -1]
        expected = np.exp(
            outside - logsumexp(np.append(joint[b] + math.log1p(-share), np.full((items, 1), outside), 1), axis=1)
        )
        counted = slice(None) if mask is None else mask[b].numpy()
        allowed = 1e-8 * (1 + np.abs(joint[b]).max())
        np.testing.assert_allclose(shares.numpy()[counted], expected[counted], atol=allowed)
    after = operator(x, mask, init=mixture)
    assert is_finite(after)
    total = after.weights.sum(-1)
    assert ((total > 0.9e-5) & (total < 1 + 1e-9)).all() if estimate else torch.allclose(total, torch.ones_like(total))


@given(values=st.data())
def test_directions_of_any_length(values):
    sets, items, components, features = shapes(values, 9)
    features = max(features, 2)
    dtype = values.draw(st.sampled_from(drawing.WIDE))
    means = torch.randn(sets, components, features, dtype=torch.float64)
    means = (means / means.norm(dim=-1, keepdim=True)).to(dtype)
    power = values.draw(st.integers(-6, 6))
    concentrations = torch.full((sets, components), 10.0**power, dtype=dtype)
    log_weights = torch.randn(sets, components, dtype=dtype).log_softmax(-1)
    mixture = DirectionalMixture(log_weights, means, concentrations)
    x = values.draw(drawing.tensors((sets, items, features), dtype, -9, 9))
    mask = values.draw(drawing.holes((sets, items)))
    dirty = x if mask is None else torch.where(mask.unsqueeze(-1), x, torch.nan)
    found = mixture.log_prob(dirty.requires_grad_(), mask)
    order = 0.5 * features - 1
    kappa = float(concentrations[0, 0])
    bessel = ive(order, kappa)
    log_bessel = math.log(bessel) + kappa if bessel > 1e-200 else math.nan
    constant = order * math.log(kappa) - 0.5 * features * math.log(2 * math.pi) - log_bessel
    eps = 1e-9 if dtype == torch.float64 else 1e-5
    for b in range(sets):
        for n in range(items):
            if mask is not None and not mask[b, n]:
                assert found[b, n] == 0
                continue
            row = x[b, n].tolist()
            norm = math.hypot(*row) or 1.0
            cosines = [math.fsum(m * (z / norm) for m, z in zip(mean, row, strict=True)) for mean in means[b].tolist()]
            logits = [w + kappa * c for w, c in zip(log_weights[b].tolist(), cosines, strict=True)]
            expected = constant + float(logsumexp(logits))
            assert found[b, n].item() == pytest.approx(expected, rel=eps, abs=eps * (10 + 10 * kappa))
    (grad,) = torch.autograd.grad(found.sum(), dirty)
    # The gradient with respect to a direction: kappa over the length.
    lengths = x.double().norm(dim=-1)
    steep = (lengths > 0) & (kappa / lengths.clamp(min=1e-300) > 0.1 * torch.finfo(dtype).max)
    kept = ~steep if mask is None else mask & ~steep
    assert grad[kept].isfinite().all() and not grad[mask if mask is not None else slice(None)].isnan().any()
    assert torch.allclose(
        mixture.posterior(x).responsibilities.sum(-1), torch.ones(sets, items, dtype=dtype), atol=1e-5
    )


LOG_DENSITIES = {
    "gaussian": lambda z: -0.5 * z**2 - 0.5 * math.log(2 * math.pi),
    "laplace": lambda z: -abs(z) - math.log(2),
}


@pytest.mark.parametrize("kernel", LOG_DENSITIES)
@given(values=st.data())
def test_kernel_mixtures_equal_their_formula(kernel, values):
    sets, items, components, features = shapes(values)
    size = 10.0 ** values.draw(st.integers(-9, 9))
    generator = torch.Generator().manual_seed(values.draw(st.integers(0, 2**20)))
    centers = size * torch.randn(sets, components, features, generator=generator, dtype=torch.float64)
    scale = size * (0.1 + torch.rand((), generator=generator, dtype=torch.float64).item())
    log_weights = torch.randn(sets, components, generator=generator, dtype=torch.float64).log_softmax(-1)
    mixture = KernelMixture(log_weights, centers)
    x = size * values.draw(drawing.tensors((sets, items, features), least=-3, most=3))
    mask, weights = values.draw(drawing.holes((sets, items))), values.draw(drawing.counts((sets, items)))
    operator = GeneralizedEM(components, features, kernel={"name": kernel, "scale": scale})
    found = operator.log_prob(x, mixture, mask)
    w = torch.ones(sets, items) if weights is None else of_mean_one(weights, mask)
    total = (found * w).sum(-1)
    torch.testing.assert_close(operator.objective(x, mixture, mask, weights), total, rtol=1e-9, atol=1e-9)
    for b in range(sets):
        for n in range(items):
            logits = [
                log_weights[b, k].item()
                + math.fsum(
                    LOG_DENSITIES[kernel]((z - c) / scale)
                    for z, c in zip(x[b, n].tolist(), centers[b, k].tolist(), strict=True)
                )
                - features * math.log(scale)
                for k in range(components)
            ]
            expected = logsumexp(logits) if mask is None or mask[b, n] else 0.0
            assert found[b, n].item() == pytest.approx(expected, rel=1e-9, abs=1e-8)


@given(values=st.data())
def test_low_ranks_of_any_points(values):
    sets, items, components, _ = shapes(values)
    features = values.draw(st.integers(2, 5))
    rank = values.draw(st.integers(1, features - 1))
    assert LowRankCovariance(rank).name == "lowrank"
    size = 10.0 ** values.draw(st.integers(-6, 6))
    mixture = values.draw(mixtures("full", sets, components, features, size=size))
    x = size * values.draw(drawing.tensors((sets, items, features), least=-2, most=1))
    floor = 1e-3 * size**2
    options = {"covariance_floor": floor, "num_iters": 1, "residual": False}
    operator = EMOperator(components, features, covariance="lowrank", rank=rank, **options)
    start = operator(x, init=mixture, num_iters=0)  # the low-rank approximation of the mixture
    after, spread = operator(x, init=mixture), full_covariances(start)
    full = EMOperator(components, features, **options)(x, init=replace(start, covariances=spread))
    assert is_finite(after)
    torch.testing.assert_close(after.weights, full.weights, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(after.means, full.means, rtol=1e-8, atol=1e-8 * size)
    spread = full_covariances(after)
    values = torch.linalg.eigvalsh(spread)
    assert (values >= floor * (1 - 1e-6) - 1e-9 * values.amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("draw", [farthest_points, kmeans_plus_plus, random_points])
@given(values=st.data())
def test_centers_are_points_that_count(draw, values):
    sets, items, components, features = shapes(values)
    x = values.draw(drawing.tensors((sets, items, features), least=-3, most=3))
    weights = values.draw(drawing.counts((sets, items)))
    counted = torch.ones(sets, items, dtype=torch.bool) if weights is None else weights > 0
    centers = draw(x, components, weights)
    assert centers.shape == (sets, components, features)
    assert centers.isfinite().all()
    for b in range(sets):
        points = x[b][counted[b]]
        if not len(points):
            continue
        size = 1e-9 * (1 + points.abs().max())
        assert torch.cdist(centers[b], points).amin(1).max() <= size
