"""Degenerate point sets: finite values and gradients, monotone likelihoods; float32 points far from zero."""

import itertools

import pytest
import torch
from helpers import (
    COVARIANCE_TYPES,
    as_type,
    cast,
    full_covariances,
    is_finite,
    mixture_at,
    replace,
)

from em_lightning import EMOperator
from em_lightning.estimator import GaussianMixture
from em_lightning.operators import DirectionalEM, EMAbstraction, EMPooling, EMRefinement, GeneralizedEM

KERNELS = ["gaussian", "student_t", "laplace", "huber", "pseudo_huber"]
ITEMS, K = 12, 4


def sets(features):
    """Return points (B, 12, D), weights (B, 12) and the name of each set."""
    generator = torch.Generator().manual_seed(features)
    noise = torch.randn(ITEMS, features, generator=generator, dtype=torch.float64)
    side = (torch.arange(ITEMS) % 2).double()
    cases = {
        "equal": torch.full((ITEMS, features), 3.0, dtype=torch.float64),
        "two distant clusters": noise + 1e4 * side.unsqueeze(1),
        "three points": noise[torch.arange(ITEMS) % 3],
        "on a line": torch.linspace(-1, 1, ITEMS).double().unsqueeze(1).expand(-1, features),
        "constant feature": torch.cat([noise[:, :-1], torch.full_like(noise[:, :1], 5.0)], 1),
        "half of the weights zero": noise,
        "one weight not zero": noise,
        "all weights zero": noise,
    }
    weights = torch.ones(len(cases), ITEMS, dtype=torch.float64)
    names = list(cases)
    weights[names.index("half of the weights zero")] = side
    weights[names.index("one weight not zero")] = (torch.arange(ITEMS) == 5).double()
    weights[names.index("all weights zero")] = 0.0
    return torch.stack(list(cases.values())), weights, names


def dense_start(covariance, sets, components, features, dtype, starved=False):
    """Return an initial mixture whose last component receives no point in starved sets."""
    means = torch.linspace(-1, 1, components, dtype=dtype)[None, :, None].expand(sets, -1, features).clone()
    start = mixture_at(means, covariance)
    if not starved:
        return start
    means[:, -1], log_weights = 1e6, start.log_weights.clone()
    log_weights[:, -1] = -700.0 if dtype == torch.float64 else -80.0
    return replace(start, means=means, log_weights=log_weights)


def assert_finite(operator, x, weights, init=None):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    mixture = operator(x, weights=weights, init=init)
    log_prob = operator.log_prob(x, mixture)
    assert is_finite(mixture), "value"
    assert log_prob.isfinite().all(), "log_prob"
    total = log_prob.sum() + mixture.log_weights.clamp(min=-50).sum() + mixture.means.sum()
    try:
        grads = torch.autograd.grad(total, [x, weights, *operator.parameters()], allow_unused=True)
    except RuntimeError as error:  # documented: the fixed point of a degenerate set may not be isolated
        assert operator.gradient == "implicit" and "implicit" in str(error)
        return
    for grad in grads:
        assert grad is None or grad.isfinite().all(), "gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_degenerate_sets_stay_finite(covariance, kernel, dtype):
    for features, components in ((1, K), (3, 1), (3, K)):
        x, weights, _ = sets(features)
        operator = EMOperator(components, features, num_iters=3, covariance=covariance, kernel=kernel).to(dtype)
        for init in (None, dense_start(covariance, len(x), components, features, dtype, starved=components > 1)):
            assert_finite(operator, x.to(dtype), weights.to(dtype), init)


@pytest.mark.parametrize("gradient", ["checkpoint", "last", "implicit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_degenerate_sets_under_other_gradients(kernel, dtype, gradient):
    x, weights, _ = sets(3)
    x, weights = x.to(dtype), weights.to(dtype)
    for covariance in COVARIANCE_TYPES:
        operator = EMOperator(K, 3, num_iters=3, covariance=covariance, kernel=kernel, gradient=gradient).to(dtype)
        if gradient != "implicit":
            assert_finite(operator, x, weights)
            continue
        for b in range(len(x)):  # some have converged, the others raise an error
            try:
                assert_finite(operator, x[b : b + 1], weights[b : b + 1])
            except RuntimeError as error:
                assert "num_iters" in str(error)


# Other sizes: every covariance, dtype and start, and one kernel and gradient each.
SIZES = [(1, 16), (2, 1), (2, K), (2, 16), (16, 1), (16, K), (64, 1), (64, K)]
GRADIENTS = ["unrolled", "checkpoint", "last"]


@pytest.mark.parametrize("gradient", ["unrolled", "checkpoint", "last", "implicit"])
@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
@pytest.mark.parametrize("covariance", [*COVARIANCE_TYPES, "lowrank"])
def test_batches_without_sets_have_empty_mixtures(covariance, kernel, gradient):
    x, rank = torch.zeros(0, 5, 2, requires_grad=True), 1 if covariance == "lowrank" else None
    for options in ({"init": "learned"}, {"init": "kmeans++", "num_starts": 2, "prior": {}}, {"background": 0.1}):
        operator = EMOperator(3, 2, covariance=covariance, rank=rank, kernel=kernel, gradient=gradient, **options)
        for layer in (operator, operator.eval()):
            mixture = layer(x)
            assert mixture.means.shape == (0, 3, 2)
            (mixture.means.sum() + layer.log_prob(x, mixture).sum()).backward()
            assert x.grad.shape == (0, 5, 2) and layer.objective(x, mixture).shape == (0,)
        fitted, steps = operator.fit(x, max_iters=2)
        assert fitted.means.shape == (0, 3, 2) and steps.shape == (0,)


def test_layers_take_batches_without_sets():
    x = torch.zeros(0, 5, 2, requires_grad=True)
    assert GeneralizedEM(3, 2, kernel="laplace")(x).centers.shape == (0, 3, 2)
    assert DirectionalEM(3, 2)(x).means.shape == (0, 3, 2)
    assert EMPooling(3, 2)(x).shape[0] == 0 and EMRefinement(3, 2)(x).shape == x.shape
    centers, tokens = EMAbstraction(3, 2, None, 4, pitch=1.0, blocks=1).eval()(x)
    assert centers.shape == (0, 3, 2) and tokens.shape == (0, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
@pytest.mark.parametrize("place", range(len(SIZES)))
def test_degenerate_sets_of_other_sizes_stay_finite(place, covariance, dtype):
    features, components = SIZES[place]
    x, weights, _ = sets(features)
    kernel = KERNELS[(place + COVARIANCE_TYPES.index(covariance)) % len(KERNELS)]
    gradient = GRADIENTS[(place + COVARIANCE_TYPES.index(covariance)) % len(GRADIENTS)]
    # Corrections of many features are large networks.
    options = {"covariance": covariance, "kernel": kernel, "gradient": gradient, "residual": features < 64}
    operator = EMOperator(components, features, num_iters=2, **options).to(dtype)
    for init in (None, dense_start(covariance, len(x), components, features, dtype, starved=components > 1)):
        assert_finite(operator, x.to(dtype), weights.to(dtype), init)


# Likelihoods.

FLOOR = 1e-6


def largest_fall(x, mass, irls_weight, before, mixture):
    r"""Return by how much (B,) an iteration from one mixture to another may lower the log-likelihood.

    The M-step adds the floor f to the eigenvalues s of the best covariance, while the eigenvalues before it were at
    least f. The loss is at most that from max(s, f) to s + f, with log v + s / v per point and feature for an
    eigenvalue v. Rounding adds the error of squared distances, from the mean of the points and from the means before,
    and that of the smallest eigenvalue.
    """
    values = torch.linalg.eigvalsh(full_covariances(mixture))
    best = (values - FLOOR).clamp(min=0.0)
    allowed = best.clamp(min=FLOOR)
    cost = 0.5 * ((values / allowed).log() + best / values - best / allowed).sum(-1)
    floor = (mass.unsqueeze(-1) * mixture.weights * cost).sum(-1)
    least = values.amin(-1).clamp(min=FLOOR)
    from_means = (torch.cdist(x, before.means).square() * before.weights.unsqueeze(1)).sum(-1)
    squares = (x - x.mean(1, keepdim=True)).square().sum(-1) + from_means
    terms = squares.amax(1) / least.amin(1)
    condition = (values.sum(-1) / least).amax(1)
    return floor + 16 * irls_weight * x.shape[1] * x.shape[2] * torch.finfo(x.dtype).eps * (terms + condition)


@pytest.mark.parametrize("features", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_likelihood_of_degenerate_sets_is_monotone(covariance, features):
    x, weights, names = sets(features)
    mass = weights.sum(1)
    for place, components in enumerate((1, K, 16) if features < 64 else (1, K)):
        for kernel in KERNELS if features <= 3 else ("gaussian", KERNELS[1 + place]):
            options = {"covariance": covariance, "kernel": kernel, "covariance_floor": FLOOR, "residual": False}
            operator = EMOperator(components, features, **options).double()
            for init in (None, dense_start(covariance, len(x), components, features, x.dtype, starved=components > 1)):
                steps = list(operator.iterate(x, weights=weights, init=init, num_iters=6))
                likelihoods = [operator.objective(x, mixture, weights=weights) for mixture in steps]
                # Half of a decrease by rounding may appear only in the next step.
                irls_weight = {"student_t": 1.0 + features, "laplace": 1e4}.get(kernel, 1.0)
                falls = [
                    torch.zeros_like(mass),
                    *(largest_fall(x, mass, irls_weight, *pair) for pair in itertools.pairwise(steps)),
                ]
                for step in range(1, len(steps)):
                    before, after = likelihoods[step - 1 : step + 1]
                    assert after.isfinite().all()
                    fell = before - after > 4.0 * (falls[step] + falls[step - 1]) + 1e-11 * (1 + before.abs())
                    assert not fell.any(), (components, kernel, [names[b] for b in fell.nonzero().flatten()])


# Float32 points far from zero, such as map coordinates.

OFFSETS = [1e3, 1e4, 1e5, 1e6]


def offset_points(offset):
    """Return float32 points (2, 400, 3) of four clusters around an offset."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 400, 3, generator=generator, dtype=torch.float64)
    x = x + 6 * torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).repeat_interleave(100, 1)
    return (x + offset * torch.tensor([1.0, -0.7, 0.3])).float()


def assert_equal_means(found, expected):
    torch.testing.assert_close(found.double().mean(-1), expected.mean(-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_float32_points_far_from_zero(covariance, offset):
    x = offset_points(offset)
    operator = EMOperator(4, 3, num_iters=10, covariance=covariance, residual=False)
    narrow, wide = operator(x), operator(x.double())
    # The fit: the likelihood that the operator reached.
    assert_equal_means(cast(narrow, torch.float64).log_prob(x.double()), wide.log_prob(x.double()))
    # The evaluation: the same mixture at float32 points.
    assert_equal_means(narrow.log_prob(x), cast(narrow, torch.float64).log_prob(x.double()))
    assert_equal_means(operator.log_prob(x, narrow), cast(narrow, torch.float64).log_prob(x.double()))
    objective = operator.objective(x, narrow).double()
    torch.testing.assert_close(objective, cast(narrow, torch.float64).log_prob(x.double()).sum(-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kernel", KERNELS[1:])
@pytest.mark.parametrize("offset", OFFSETS)
def test_robust_kernels_far_from_zero(kernel, offset):
    x = offset_points(offset)
    operator = EMOperator(4, 3, num_iters=10, kernel=kernel, residual=False)
    narrow, wide = operator(x), operator(x.double())
    expected = operator.log_prob(x.double(), wide)
    assert_equal_means(operator.log_prob(x.double(), cast(narrow, torch.float64)), expected)
    assert_equal_means(operator.log_prob(x, narrow), operator.log_prob(x.double(), cast(narrow, torch.float64)))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_an_estimator_far_from_zero(covariance, offset):
    rows = offset_points(offset)[0]
    start = EMOperator(4, 3, covariance=covariance, residual=False)(rows[None].double(), num_iters=1)
    arguments = {"weights_init": start.weights[0].numpy(), "means_init": start.means[0].numpy()}
    precisions = as_type(torch.linalg.inv(full_covariances(start)), covariance)[0]
    precisions = precisions[0] if covariance == "tied" else precisions
    fits = [
        GaussianMixture(4, covariance_type=covariance, tol=1e-5, precisions_init=precisions.numpy(), **arguments).fit(X)
        for X in (rows.numpy(), rows.double().numpy())
    ]
    scores = [fit.score(X) for fit in fits for X in (rows.numpy(), rows.double().numpy())]
    assert scores == pytest.approx([scores[-1]] * 4, rel=1e-4)
