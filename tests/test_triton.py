"""The Triton kernels of the E-step and of the start in Triton's interpreter, against float64."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from em_lightning import EMOperator
from em_lightning.mixture import Mixture, em_step, farthest_points, kmeans_plus_plus
from em_lightning.mixture.backends import use_backend
from em_lightning.mixture.e_step import _e_step_in_torch, _joint_in_torch

pytest.importorskip("triton", reason="triton is not installed")
kernels = pytest.importorskip("em_lightning.mixture.backends.triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("conftest.py turns the interpreter on where there is no CUDA device", allow_module_level=True)

KINDS = ["full", "diag", "spherical"]
DOUBLE = {"dtype": torch.float64}


@pytest.fixture
def interpreted():
    with use_backend("triton"):
        yield


def problem(kind, sets=2, features=3, items=70, components=3, weighted=True, seed=0):
    """Return the arguments of the E-step, in which means and factors may require gradients."""
    torch.manual_seed(seed)
    x = 2.0 * torch.randn(sets, features, items) + 5.0
    weights = torch.rand(sets, items, **DOUBLE) if weighted else None
    means = 0.3 * torch.randn(sets, components, features, **DOUBLE)
    if kind == "full":
        scale = 0.2 * torch.randn(sets, components, features, features, **DOUBLE).tril(-1)
        scale = scale + (0.2 + torch.rand(sets, components, features, **DOUBLE)).diag_embed()
        inverse = torch.linalg.inv(scale)
    else:
        scale = 0.2 + torch.rand(sets, components, features if kind == "diag" else 1, **DOUBLE)
        inverse = scale.reciprocal()
    peak = torch.randn(sets, components, **DOUBLE)
    return [x, weights, means, inverse, peak, scale, x.double().mean(-1), torch.full((sets,), 4.0, **DOUBLE), kind]


def assert_near(found, expected, tolerance=1e-5):
    for own, other in zip(found, expected, strict=True):
        assert own.shape == other.shape
        assert (own.double() - other).abs().max() <= tolerance * other.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)  # the interpreter takes a tenth of a second for each
@given(
    sets=st.integers(1, 2),
    features=st.integers(1, 5),
    items=st.integers(1, 70),
    components=st.integers(1, 3),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_sums_and_gradients_are_those_of_torch(kind, sets, features, items, components, weighted, seed):
    x, weights, *others = problem(kind, sets, features, items, components, weighted, seed)
    double = [part.requires_grad_() if i < 3 else part for i, part in enumerate(others)]
    double_x = x.double().requires_grad_()
    double_weights = None if weights is None else weights.clone().requires_grad_()
    sums, log_likelihood = _e_step_in_torch(double_x, double_weights, *double, True)
    with torch.no_grad():
        assert_near(kernels.e_step(x, weights, *others, True), (sums, log_likelihood))
        expected = _joint_in_torch(double_x, None, *double)[1].logsumexp(1)
        assert_near([kernels.log_density(x, None, *others)], [expected])
    grads, outer = torch.randn_like(sums), torch.randn(sets, 1, **DOUBLE)
    inputs = [double_x, *([] if weights is None else [double_weights]), *double[:3]]
    total = (sums * grads).sum() + (log_likelihood * outer.squeeze(1)).sum()
    of_x, *of_weights, of_means, of_inverse, of_peak = torch.autograd.grad(total, inputs)
    if kind == "full":
        of_inverse = of_inverse.tril()  # W is lower triangular
    own, own_x, own_weights = kernels.e_step_gradient(
        x, weights, *(part.detach() if isinstance(part, torch.Tensor) else part for part in others), grads, outer
    )
    own_parts = own.split([1, features, own.shape[-1] - 1 - features], -1)
    found = [own_x, *([] if weights is None else [own_weights]), own_parts[1], own_parts[2].reshape(of_inverse.shape)]
    # Relative to the sums of absolute values, as contributions of points may cancel.
    assert_near(found, [of_x, *of_weights, of_means, of_inverse], 1e-4)
    assert_near([own_parts[0].squeeze(-1)], [of_peak], 1e-4)


@pytest.mark.parametrize("covariance", ["full", "diag", "spherical", "tied"])
def test_the_operator_learns_through_the_kernels(interpreted, covariance):
    x = torch.randn(2, 40, 2)
    mask = torch.arange(40).expand(2, -1) < torch.tensor([[40], [23]])
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        operator = EMOperator(3, 2, num_iters=2, covariance=covariance)
        points = (x if backend == "triton" else x.double()).clone().requires_grad_()
        operator = operator if backend == "triton" else operator.double()
        with use_backend(backend):
            mixture = operator(points, mask=mask)
            loss = -operator.log_prob(points, mixture, mask).sum()
        loss.backward()
        results.append((mixture.means, mixture.log_weights, points.grad))
    assert_near(*results, tolerance=1e-4)


def test_sets_without_points_and_thin_components(interpreted):
    operator = EMOperator(2, 3, num_iters=2, residual=False)
    x = torch.rand(2, 30, 3) * torch.tensor([1.0, 1.0, 1e-3])
    mask = torch.tensor([[True], [False]]).expand(2, 30)
    found = operator(x, mask=mask)
    assert all(part.isfinite().all() for part in (found.log_weights, found.means, found.covariances))
    with use_backend("reference"):
        expected = operator(x.double(), mask=mask)
    assert_near([operator.log_prob(x, found)[0]], [operator.log_prob(x.double(), expected)[0]], 1e-4)


def test_the_backend_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="CUDA"):
        use_backend("triton")


def test_components_of_zero_weight_change_nothing(interpreted):
    x = torch.randn(1, 40, 2)
    means, covariances = torch.randn(1, 3, 2), torch.ones(1, 3, 2)
    mixture = Mixture(torch.tensor([[0.0, 0.3, 0.7]]).log(), means, covariances)
    without = Mixture(torch.tensor([[0.3, 0.7]]).log(), means[:, 1:], covariances[:, 1:])
    assert_near([mixture.log_prob(x)], [without.log_prob(x).double()])
    assert_near([em_step(x, mixture).means[:, 1:]], [em_step(x, without).means.double()])


def chosen(choose, x, num_components, weights):
    options = {} if choose is farthest_points else {"generator": torch.Generator().manual_seed(3)}
    return choose(x, num_components, weights, **options)


@pytest.mark.parametrize("choose", [farthest_points, kmeans_plus_plus])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape, components", [((2, 70, 3), 5), ((1, 1500, 2), 4), ((1, 5, 3), 8), ((2, 40, 1), 1)])
def test_centers_are_those_of_torch(choose, weighted, shape, components):
    torch.manual_seed(components)
    x = torch.randn(shape)
    weights = torch.rand(shape[:2]) * (torch.rand(shape[:2]) < 0.5) if weighted else None
    if weighted and len(x) > 1:
        weights[1] = 0.0
    with use_backend("triton"):
        found = chosen(choose, x, components, weights)
    assert torch.equal(found.double(), chosen(choose, x.double(), components, weights))


STARTS = {  # shape of the points, K, mask, weights
    "plain": ((2, 80, 3), 4, False, False),
    "masks, weights and an empty set": ((3, 80, 3), 4, True, True),
    "several chunks": ((1, 1030, 2), 3, False, True),
    "fewer points than components": ((2, 5, 3), 8, True, False),
}


@pytest.mark.parametrize(
    "name, covariance",
    [*((name, covariance) for name in STARTS for covariance in ("full", "diag"))]
    + [("masks, weights and an empty set", covariance) for covariance in ("spherical", "tied", "lowrank")],
)
def test_the_mixture_of_cells_is_that_of_torch(name, covariance):
    shape, components, masked, weighted = STARTS[name]
    x = 3.0 * torch.randn(shape) + 100.0
    mask = torch.rand(shape[:2]) < 0.8 if masked else None
    if masked:
        mask[-1] = False
    weights = torch.rand(shape[:2]) if weighted else None
    operator = EMOperator(components, shape[2], covariance=covariance, rank=1 if covariance == "lowrank" else None)
    expected = operator(x.double(), mask, weights, num_iters=0)
    with use_backend("triton"):
        assert_near(operator(x, mask, weights, num_iters=0).parameters(), expected.parameters())


def test_cells_at_the_limits_of_float32(interpreted):
    operator = EMOperator(3, 2)
    for scale in (1e-15, 1e15):
        x = torch.randn(1, 50, 2) * scale
        found = operator._start(operator._prepare(x, None, None), try_several=False)
        expected = operator._start(operator._prepare(x.double(), None, None), try_several=False)
        assert_near(found, expected)


def test_gradients_of_a_start_are_those_of_torch():
    x, direction = torch.randn(1, 40, 2), torch.randn(1, 40, 2)
    operator = EMOperator(3, 2, num_iters=0)

    def outputs(points):
        mixture = operator(points)
        return mixture.log_weights.sum() + mixture.means.square().sum() + mixture.covariances.square().sum()

    def derivatives(points):
        given = points.clone().requires_grad_()
        (first,) = torch.autograd.grad(outputs(given), given, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), given)
        forward = torch.func.jvp(outputs, (points,), (direction.to(points),))[1]
        return first.detach(), second, forward

    with use_backend("triton"):
        found = derivatives(x)
    assert_near(found, derivatives(x.double()), 1e-4)
