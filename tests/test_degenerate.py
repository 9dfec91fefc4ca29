"""The whole grid of degenerate point sets: finite in value and gradient; and points far from 0."""

import math

import pytest
import torch

from em_lightning import EMOperator, Mixture
from em_lightning.estimator import GaussianMixture
from em_lightning.mixture import COVARIANCES

KINDS = sorted(COVARIANCES)
KERNELS = ["gaussian", "student_t", "laplace", "huber", "pseudo_huber"]
ITEMS, K = 12, 4


def sets(features):
    """Return points (B, 12, D), weights and the name of each set: those that float32 cannot tell apart are equal."""
    generator = torch.Generator().manual_seed(features)
    noise = torch.randn(ITEMS, features, generator=generator, dtype=torch.float64)
    side = (torch.arange(ITEMS) % 2).double()
    cases = {
        "equal": torch.full((ITEMS, features), 3.0, dtype=torch.float64),
        "far": noise + 1e8 * side.unsqueeze(1),
        "three points": noise[torch.arange(ITEMS) % 3],
        "on a line": torch.linspace(-1, 1, ITEMS).double().unsqueeze(1).expand(-1, features),
        "constant feature": torch.cat([noise[:, :-1], torch.full_like(noise[:, :1], 5.0)], 1),
        "some count": noise,
        "one counts": noise,
        "none counts": noise,
    }
    weights = torch.ones(len(cases), ITEMS, dtype=torch.float64)
    names = list(cases)
    weights[names.index("some count")] = side
    weights[names.index("one counts")] = (torch.arange(ITEMS) == 5).double()
    weights[names.index("none counts")] = 0.0
    return torch.stack(list(cases.values())), weights, names


def dense_start(kind, sets, components, features, dtype, starved=False):
    """Return a start whose last component, where starved, no point ever belongs to."""
    means = torch.linspace(-1, 1, components, dtype=dtype)[None, :, None].expand(sets, -1, features).clone()
    log_weights = torch.full((sets, components), -math.log(components), dtype=dtype)
    if starved:
        means[:, -1] = 1e6
        log_weights[:, -1] = -700.0 if dtype == torch.float64 else -80.0
    eye = torch.eye(features, dtype=dtype).expand(sets, 1 if kind == "tied" else components, features, features)
    diagonal = torch.ones(sets, components, features, dtype=dtype)
    covariances = {"full": eye, "tied": eye, "diag": diagonal, "spherical": diagonal[..., 0]}[kind]
    return Mixture(log_weights, means, covariances.clone())


def assert_finite(operator, x, weights, init=None):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    mixture = operator(x, weights=weights, init=init)
    log_prob = operator.log_prob(x, mixture)
    assert all(part.isfinite().all() for part in mixture), "value"
    assert log_prob.isfinite().all(), "log_prob"
    total = log_prob.sum() + mixture.log_weights.clamp(min=-50).sum() + mixture.means.sum()
    try:
        grads = torch.autograd.grad(total, [x, weights, *operator.parameters()], allow_unused=True)
    except RuntimeError as error:  # documented: such a fixed point is not isolated
        assert operator.gradient == "implicit" and "implicit gradient's linear system" in str(error)
        return
    for grad in grads:
        assert grad is None or grad.isfinite().all(), "gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_sets_stay_finite(kind, kernel, dtype):
    for features, components in ((1, K), (3, 1), (3, K)):
        x, weights, _ = sets(features)
        operator = EMOperator(components, features, num_iters=3, covariance=kind, kernel=kernel).to(dtype)
        for init in (None, dense_start(kind, len(x), components, features, dtype, starved=components > 1)):
            assert_finite(operator, x.to(dtype), weights.to(dtype), init)


@pytest.mark.parametrize("gradient", ["checkpoint", "last", "implicit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_degenerate_sets_under_other_gradients(kernel, dtype, gradient):
    x, weights, _ = sets(3)
    x, weights = x.to(dtype), weights.to(dtype)
    for kind in KINDS:
        operator = EMOperator(K, 3, num_iters=3, covariance=kind, kernel=kernel, gradient=gradient).to(dtype)
        if gradient != "implicit":
            assert_finite(operator, x, weights)
            continue
        for b in range(len(x)):  # one at a time some have converged; the others are refused
            try:
                assert_finite(operator, x[b : b + 1], weights[b : b + 1])
            except RuntimeError as error:
                assert "needs a converged loop" in str(error)


# Far from zero, as map coordinates are.

OFFSETS = [1e3, 1e4, 1e5, 1e6]


def offset_points(offset):
    """Return float32 points (2, 400, 3) of four clusters around an offset."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 400, 3, generator=generator, dtype=torch.float64)
    x = x + 6 * torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).repeat_interleave(100, 1)
    return (x + offset * torch.tensor([1.0, -0.7, 0.3])).float()


def in_double(mixture):
    return Mixture(*(part.double() for part in mixture))


def assert_equal_means(found, expected):
    torch.testing.assert_close(found.double().mean(-1), expected.mean(-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_points_far_from_zero(kind, offset, large, monkeypatch):
    if large:
        monkeypatch.setattr("em_lightning.mixture.cloud._WHOLE", 0)
        monkeypatch.setattr("em_lightning.mixture.cloud._CHUNK", 600)
        monkeypatch.setattr("em_lightning.mixture.starts._BLOCK", 600)
        monkeypatch.setattr("em_lightning.mixture.passes._BLOCK", 600)
    x = offset_points(offset)
    operator = EMOperator(4, 3, num_iters=10, covariance=kind, residual=False)
    narrow, wide = operator(x), operator(x.double())
    # Of the fit: what the operator climbed to, as float32 gives it back.
    assert_equal_means(in_double(narrow).log_prob(x.double()), wide.log_prob(x.double()))
    # Of the evaluation: the same mixture, points in float32.
    assert_equal_means(narrow.log_prob(x), in_double(narrow).log_prob(x.double()))
    assert_equal_means(operator.log_prob(x, narrow), in_double(narrow).log_prob(x.double()))
    objective = operator.objective(x, narrow).double()
    torch.testing.assert_close(objective, in_double(narrow).log_prob(x.double()).sum(-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kernel", KERNELS[1:])
@pytest.mark.parametrize("offset", OFFSETS)
def test_robust_kernels_far_from_zero(kernel, offset):
    x = offset_points(offset)
    operator = EMOperator(4, 3, num_iters=10, kernel=kernel, residual=False)
    narrow, wide = operator(x), operator(x.double())
    expected = operator.log_prob(x.double(), wide)
    assert_equal_means(operator.log_prob(x.double(), in_double(narrow)), expected)
    assert_equal_means(operator.log_prob(x, narrow), operator.log_prob(x.double(), in_double(narrow)))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_estimator_far_from_zero(kind, offset):
    rows = offset_points(offset)[0]
    start = EMOperator(4, 3, covariance=kind, residual=False)(rows[None].double(), num_iters=1)
    arguments = {"weights_init": start.weights[0].numpy(), "means_init": start.means[0].numpy()}
    covariances = start.covariances[0]
    precisions = {
        "full": lambda c: torch.linalg.inv(c),
        "tied": lambda c: torch.linalg.inv(c[0]),
        "diag": lambda c: 1 / c,
        "spherical": lambda c: 1 / c,
    }[kind](covariances)
    fits = [
        GaussianMixture(4, covariance_type=kind, tol=1e-5, precisions_init=precisions.numpy(), **arguments).fit(X)
        for X in (rows.numpy(), rows.double().numpy())
    ]
    scores = [fit.score(X) for fit in fits for X in (rows.numpy(), rows.double().numpy())]
    assert scores == pytest.approx([scores[-1]] * 4, rel=1e-4)
