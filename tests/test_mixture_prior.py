import copy
import math

import numpy as np
import pytest
import torch
from scipy.stats import dirichlet, invwishart, multivariate_normal

from em_lightning import EMOperator, Mixture
from em_lightning.mixture import COVARIANCES, MixturePrior

KINDS = sorted(COVARIANCES)
PRIORS = {
    "all": dict(weight_concentration=3.0, mean_strength=2.0, covariance_strength=5.0, mean=[0.5, -0.5], covariance=0.3),
    "weights": dict(weight_concentration=3.0, mean_strength=0.0, covariance_strength=0.0),
    "means": dict(mean_strength=2.0, covariance_strength=0.0),
    "covariances": dict(mean_strength=0.0, covariance_strength=7.0, covariance=[0.2, 3.0]),
    "default": dict(),
}


def clouds(sets=2, items=60):
    return torch.randn(sets, items, 2, dtype=torch.float64) + 4 * torch.randint(0, 2, (sets, items, 1))


def full_covariances(mixture, b):
    parts, components = mixture.covariances[b], mixture.means.shape[1]
    if mixture.covariance_type == "tied":
        return [parts[0]] * components
    if mixture.covariance_type == "full":
        return list(parts)
    return [part * torch.eye(2, dtype=part.dtype) for part in parts]


def reference_step(x, w, weights, means, covariances, kind, arguments):
    """One MAP iteration on one cloud (N, 2), a plain loop after Fraley and Raftery."""
    arguments = {"weight_concentration": 1.0, "mean_strength": 0.01, "covariance_strength": 1.0, **arguments}
    alpha, kappa, s = (arguments[n] for n in ("weight_concentration", "mean_strength", "covariance_strength"))
    center = np.average(x, axis=0, weights=w)
    variance = np.average((x - center) ** 2, axis=0, weights=w)
    m0 = np.array(arguments.get("mean", center))
    share = arguments.get("covariance", 1 / len(means))
    s0 = np.diag(share * variance) if np.isscalar(share) else np.diag(share)
    joint = np.stack(
        [p * multivariate_normal(m, c).pdf(x) for p, m, c in zip(weights, means, covariances, strict=True)], 1
    )
    r = w[:, None] * joint / joint.sum(1, keepdims=True)
    n = r.sum(0)
    new_weights = (n + alpha - 1) / (n + alpha - 1).sum()
    new_means = [(r[:, k] @ x + kappa * m0) / (n[k] + kappa) for k in range(len(n))]
    scatters = []
    for k, m in enumerate(new_means):
        scatters.append((x - m).T @ (r[:, k, None] * (x - m)) + kappa * np.outer(m - m0, m - m0))
    if kind == "tied":
        new = [(sum(scatters) + s * s0) / (n.sum() + s)] * len(n)
    else:
        new = [(scatter + s * s0) / (n[k] + s) for k, scatter in enumerate(scatters)]
    if kind == "diag":
        new = [np.diag(np.diag(c)) for c in new]
    if kind == "spherical":
        new = [np.trace(c) / 2 * np.eye(2) for c in new]
    return new_weights, np.array(new_means), new


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("weighted", [False, True])
def test_map_em_is_a_plain_loop(kind, name, weighted):
    x = clouds()
    mask = torch.rand(2, 60) < 0.8 if weighted else None
    weights = torch.rand(2, 60, dtype=torch.float64) if weighted else None
    operator = EMOperator(3, 2, covariance=kind, prior=PRIORS[name], covariance_floor=0.0, residual=False)
    path = list(operator.iterate(x, mask, weights, num_iters=4))
    counted = torch.ones(2, 60, dtype=torch.float64) if weights is None else weights * mask
    for b in range(2):
        start = path[0]
        state = (start.weights[b].numpy(), start.means[b].numpy(), [c.numpy() for c in full_covariances(start, b)])
        for mixture in path[1:]:
            state = reference_step(x[b].numpy(), counted[b].numpy(), *state, kind, PRIORS[name])
            np.testing.assert_allclose(mixture.weights[b], state[0], atol=1e-10)
            np.testing.assert_allclose(mixture.means[b], state[1], atol=1e-10)
            for one, two in zip(full_covariances(mixture, b), state[2], strict=True):
                np.testing.assert_allclose(one, two, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [None, *PRIORS])
def test_the_map_objective_never_falls(kind, name):
    x = clouds(3, 100)
    prior = None if name is None else PRIORS[name]
    operator = EMOperator(4, 2, covariance=kind, prior=prior, covariance_floor=0.0, init="random", residual=False)
    before = torch.full((3,), -math.inf, dtype=torch.float64)
    for mixture in operator.iterate(x, num_iters=40):
        after = mixture.log_prob(x).sum(-1)
        if operator.prior is not None:
            after = after + operator.prior.log_prob(mixture, x)
        assert (after >= before - 1e-9).all()
        before = after


def test_the_prior_density_is_scipys():
    x = clouds(1)
    m0, s0, s, kappa, alpha = [0.5, -0.5], [0.7, 0.2], 9.0, 2.0, 3.0
    prior = MixturePrior(weight_concentration=alpha, mean_strength=kappa, mean=m0, covariance_strength=s, covariance=s0)

    def both():
        factor = torch.randn(1, 3, 2, 2, dtype=torch.float64)
        mixture = Mixture(
            torch.randn(1, 3, dtype=torch.float64).log_softmax(-1),
            torch.randn(1, 3, 2, dtype=torch.float64),
            factor @ factor.mT + 0.1 * torch.eye(2),
        )
        expected = dirichlet([alpha] * 3).logpdf(mixture.weights[0].numpy() / mixture.weights[0].sum().item())
        for mean, covariance in zip(mixture.means[0].numpy(), mixture.covariances[0].numpy(), strict=True):
            expected += multivariate_normal(m0, covariance / kappa).logpdf(mean)
            expected += invwishart(s - 2 - 2, s * np.diag(s0)).logpdf(covariance)
        return prior.log_prob(mixture, x).item(), expected

    (one, first), (two, second) = both(), both()
    assert one - two == pytest.approx(first - second, abs=1e-9)  # equal up to the constant


@pytest.mark.parametrize("kind", KINDS)
def test_the_prior_density_is_the_formula(kind):
    x = clouds(1)
    m0, s0, s, kappa, alpha = np.array([0.5, -0.5]), np.diag([0.7, 0.2]), 9.0, 2.0, 3.0
    prior = MixturePrior(
        weight_concentration=alpha, mean_strength=kappa, mean=m0, covariance_strength=s, covariance=[0.7, 0.2]
    )
    mixture = EMOperator(3, 2, covariance=kind, residual=False)(x)
    expected = (alpha - 1) * mixture.log_weights.sum().item()
    covariances = [c.numpy() for c in full_covariances(mixture, 0)]
    for mean, covariance in zip(mixture.means[0].numpy(), covariances, strict=True):
        expected -= 0.5 * kappa * (mean - m0) @ np.linalg.solve(covariance, mean - m0)
    for covariance in covariances[:1] if kind == "tied" else covariances:
        expected -= 0.5 * s * (np.linalg.slogdet(covariance)[1] + np.trace(s0 @ np.linalg.inv(covariance)))
    assert prior.log_prob(mixture, x).item() == pytest.approx(expected, abs=1e-9)


def test_strong_priors_are_obeyed():
    x = clouds()
    strong = MixturePrior(
        weight_concentration=1e9, mean_strength=1e9, mean=[1.0, 2.0], covariance_strength=1e9, covariance=[3.0, 4.0]
    )
    mixture = EMOperator(3, 2, prior=strong, residual=False)(x)
    assert torch.allclose(mixture.weights, torch.full((2, 3), 1 / 3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(mixture.means, torch.tensor([1.0, 2.0], dtype=torch.float64), atol=1e-5)
    assert torch.allclose(mixture.covariances, torch.tensor([3.0, 4.0], dtype=torch.float64).diag(), atol=1e-5)


def test_pseudo_counts_are_learned():
    prior = MixturePrior(weight_concentration=2.0, mean_strength=0.0, covariance_strength=3.0, learnable=True)
    assert sorted(name for name, _ in prior.named_parameters()) == ["log_covariance", "log_spread", "log_weight"]
    operator = EMOperator(3, 2, prior=prior, residual=False)
    x = clouds()
    operator(x).log_prob(x).sum().backward()
    for name, parameter in prior.named_parameters():
        step, values = 1e-5, []
        for sign in (1, -1):
            moved = copy.deepcopy(operator).double()
            moved.prior.get_parameter(name).data += sign * step
            values.append(moved(x).log_prob(x).sum().item())
        assert parameter.grad.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)
    assert "covariance=3" in repr(prior)


DEGENERATE = {
    "one point repeated": torch.ones(1, 40, 3),
    "collinear": torch.linspace(-1, 1, 40)[None, :, None] * torch.tensor([1.0, 2.0, -1.0]),
    "one point": torch.ones(1, 1, 3),
    "empty": torch.randn(1, 10, 3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_clouds_stay_finite(kind, name):
    x = DEGENERATE[name].clone().requires_grad_()
    mask = torch.zeros(1, 10, dtype=torch.bool) if name == "empty" else None
    operator = EMOperator(4, 3, covariance=kind, prior={"weight_concentration": 2.0, "learnable": True})
    mixture = operator(x, mask)
    (mixture.log_prob(x, mask).sum() + operator.prior.log_prob(mixture, x, mask).sum()).backward()
    assert all(part.isfinite().all() for part in mixture) and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in operator.parameters())


def test_a_relative_floor_follows_the_units():
    x = torch.ones(1, 40, 2, dtype=torch.float64) * torch.linspace(-1, 1, 40)[None, :, None]
    operator = EMOperator(2, 2, covariance_floor=1e-3, relative_floor=True, residual=False)
    one, two = operator(x), operator(1e4 * x)
    assert torch.allclose(1e8 * one.covariances, two.covariances)
    smallest = torch.linalg.eigvalsh(one.covariances).amin(-1)
    assert torch.allclose(smallest, 1e-3 * x.var((0, 1), correction=0).mean().expand_as(smallest))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: MixturePrior(weight_concentration=0.5), ValueError, ["weight_concentration=0.5", "at least 1"]),
        (lambda: MixturePrior(mean_strength=-1.0), ValueError, ["mean_strength=-1.0", "at least 0"]),
        (lambda: MixturePrior(covariance_strength=math.inf), ValueError, ["covariance_strength=inf", "finite"]),
        (lambda: MixturePrior(mean_strength=0, covariance_strength=0), ValueError, ["flat", "no prior"]),
        (lambda: MixturePrior(covariance=-1.0), ValueError, ["covariance=-1.0", "positive"]),
        (lambda: MixturePrior(covariance=[1.0, 0.0]), ValueError, ["[1.0, 0.0]", "positive"]),
        (lambda: EMOperator(2, 2, prior="weak"), TypeError, ["prior='weak'", "MixturePrior"]),
        (
            lambda: EMOperator(2, 2, prior={"mean": [0.0, 0.0, 0.0]})(torch.randn(1, 5, 2)),
            ValueError,
            ["prior's mean", "(3,)", "(2,)"],
        ),
    ],
)
def test_wrong_use_is_answered(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
