"""Generalized EM: mixtures under any kernel."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_raises, is_finite, replace, two_clusters, with_padding
from scipy.optimize import minimize
from torch import nn
from torch.autograd import gradcheck

from em_lightning import KERNELS, EMOperator, Mixture
from em_lightning.kernels import Kernel, LearnedEnergyKernel, NoDensityError, pairwise
from em_lightning.operators import GeneralizedEM, KernelMixture

STUDENT_T = {"name": "student_t", "df": 3.0, "density": True}
MAHALANOBIS = {"name": "mahalanobis", "num_features": 2}
NAMES = ("gaussian", "student_t", "laplace", "huber", "pseudo_huber", "exponential")
DENSITIES = {**{name: name for name in NAMES}, "mahalanobis": MAHALANOBIS}
OTHERS = {name: name for name in ("logistic", "dot_product", "cosine")}


class QuarticKernel(Kernel):
    """A kernel of a user: the fourth power of the distance plus a network of the offsets."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1), nn.Softplus()).double()

    def energy(self, x, centers):
        apart = pairwise(x, centers)
        return (apart**4).sum(-1) / 50 + self.network(apart).squeeze(-1)


def sets(count=2, items=60):
    return two_clusters(count, items, distance=5.0, outliers=0.1)


def test_a_gaussian_step_is_the_weighted_mean():
    x = sets()
    dirty, mask, weights = with_padding(x)
    operator = GeneralizedEM(3, 2, kernel={"name": "gaussian", "scale": 1.5})
    start, after = operator.iterate(dirty, mask, weights, num_iters=1)
    distances = (x.unsqueeze(2) - start.centers.unsqueeze(1)).square().sum(-1)
    r = (mask * weights).unsqueeze(-1) * (start.log_weights.unsqueeze(1) - distances / 2 / 1.5**2).softmax(-1)
    assert torch.allclose(after.centers, r.mT @ x / r.sum(1).unsqueeze(-1), atol=1e-10)
    assert torch.allclose(after.log_weights.exp(), r.sum(1) / r.sum((1, 2)).unsqueeze(-1), atol=1e-12)


def weighted_median(values, weights):
    order = values.argsort()
    return values[order][np.searchsorted(weights[order].cumsum(), weights.sum() / 2)]


def huber_location(values, weights, delta=0.8):
    location = np.median(values)
    for _ in range(500):
        irls = weights * np.minimum(1, delta / np.maximum(abs(values - location), 1e-12))
        location = (irls * values).sum() / irls.sum()
    return location


@pytest.mark.parametrize(
    ("kernel", "location", "tolerance"),
    [("laplace", weighted_median, 1e-3), ({"name": "huber", "delta": 0.8}, huber_location, 1e-6)],
)
def test_one_robust_component_is_the_location_of_each_feature(kernel, location, tolerance):
    x, weights = torch.randn(2, 51, 2, dtype=torch.float64) ** 3, torch.rand(2, 51, dtype=torch.float64) + 0.1
    found = GeneralizedEM(1, 2, kernel=kernel, num_iters=200)(x, weights=weights).centers[:, 0]
    for b in range(2):
        for i in range(2):
            expected = location(x[b, :, i].numpy(), weights[b].numpy())
            assert found[b, i].item() == pytest.approx(expected, abs=tolerance)


def test_one_component_of_a_student_t_has_the_fixed_point_of_the_operator():
    x = torch.randn(2, 80, 1, dtype=torch.float64) + 8 * (torch.arange(80) % 2).unsqueeze(-1)
    operator = GeneralizedEM(2, 1, kernel=STUDENT_T, num_iters=60)
    found = operator(x)
    reference = EMOperator(2, 1, kernel=STUDENT_T, covariance_floor=0.0, residual=False)
    unit = Mixture(found.log_weights, found.centers, torch.ones_like(found.log_weights))
    assert torch.allclose(operator.log_prob(x, found), reference.log_prob(x, unit), atol=1e-9)
    after = reference(x, init=replace(unit, covariances=torch.ones(2, 2, 1, 1).double()), num_iters=1)
    assert torch.allclose(after.means, found.centers, atol=1e-6)
    assert torch.allclose(after.log_weights, found.log_weights, atol=1e-6)


@pytest.mark.parametrize("name", [*DENSITIES, *OTHERS, "user"])
def test_objective_is_monotone(name):
    dirty, mask, weights = with_padding(sets())
    kernel = QuarticKernel() if name == "user" else {**DENSITIES, **OTHERS}[name]
    operator = GeneralizedEM(3, 2, kernel=kernel)
    before = torch.full((2,), -math.inf, dtype=torch.float64)
    with torch.no_grad():
        path = list(operator.iterate(dirty, mask, weights, num_iters=15))
    low = dirty.masked_fill(~mask.unsqueeze(-1), math.inf).amin(1, keepdim=True)
    high = dirty.masked_fill(~mask.unsqueeze(-1), -math.inf).amax(1, keepdim=True)
    for mixture in path:
        after = operator.objective(dirty, mixture, mask, weights)
        if name in (*DENSITIES, "cosine"):
            by_hand = (operator.log_prob(dirty, mixture, mask) * weights).sum(-1)
            assert torch.allclose(after, by_hand)
        assert (after >= before - 1e-9).all()
        assert (mixture.centers >= low).all() and (mixture.centers <= high).all()
        before = after
    assert (before > operator.objective(dirty, path[0], mask, weights) + 1.0).all()


@pytest.mark.parametrize("name", ["mahalanobis", "user", "pseudo_huber"])
def test_iterations_of_one_component_find_the_center_of_least_energy(name):
    """A general minimizer finds no lower energy."""
    x = sets(1, 48)
    kernel = QuarticKernel() if name == "user" else KERNELS.build(DENSITIES[name])
    with torch.no_grad():
        found = GeneralizedEM(1, 2, kernel=kernel, num_iters=150)(x)

        def energy(flat):
            return float(kernel(x, torch.from_numpy(flat).view(1, 1, 2)).sum())

        best = minimize(energy, x.mean((0, 1)).numpy(), method="Nelder-Mead", options={"maxiter": 2000})
        assert energy(found.centers.flatten().numpy()) <= best.fun + 1e-3


@pytest.mark.parametrize("kernel", ["pseudo_huber", STUDENT_T])
def test_gradients(kernel):
    x = sets(1, 12).requires_grad_()
    weights = (torch.rand(1, 12, dtype=torch.float64) + 0.5).requires_grad_()
    start = GeneralizedEM(2, 2, kernel=kernel)(x.detach(), num_iters=0)
    start = replace(start, centers=start.centers + 0.1)  # energies are not smooth where a center is a point

    def outcome(gradient, x, weights):
        operator = GeneralizedEM(2, 2, num_iters=2, gradient=gradient, kernel=kernel)
        mixture = operator(x, weights=weights, init=start)
        return mixture.log_weights, mixture.centers, operator.objective(x, mixture)

    assert gradcheck(lambda *args: outcome("unrolled", *args), (x, weights), fast_mode=True)
    grads = []
    for gradient in ("unrolled", "checkpoint", "last"):
        value = outcome(gradient, x, weights)[1].square().sum()
        grads.append(torch.autograd.grad(value, (x, weights)))
    assert all(torch.allclose(one, two) for one, two in zip(*grads[:2], strict=True))
    assert not torch.allclose(grads[0][0], grads[2][0])


def test_the_gradient_of_a_zero_weight_is_its_one_sided_derivative():
    x = sets(1, 12)
    weights = (torch.rand(1, 12, dtype=torch.float64) + 0.5).index_fill(1, torch.tensor([4]), 0.0)
    operator = GeneralizedEM(2, 2, kernel="pseudo_huber", num_iters=2)
    start = operator(x, num_iters=0)
    start = replace(start, centers=start.centers + 0.1)

    def outcome(weights):
        return operator(x, weights=weights, init=start).centers[0, :, 0].square().sum()

    (slope,) = torch.autograd.grad(outcome(weights.requires_grad_()), weights)
    step = torch.zeros(1, 12).double().index_fill(1, torch.tensor([4]), 1e-6)
    quotient = (outcome(weights.detach() + step) - outcome(weights.detach())) / 1e-6
    assert slope[0, 4].item() == pytest.approx(quotient.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["gaussian", "laplace", "pseudo_huber", "exponential"])
def test_a_center_on_its_only_point_moves_with_the_point(name):
    """All other points are so far away that their responsibilities underflow."""
    x = torch.tensor([[[-1810.0], [-2516.3], [80.5]]], dtype=torch.float64, requires_grad=True)
    operator = GeneralizedEM(3, 1, kernel=name, num_iters=3)
    order = operator(x).centers[0, :, 0].argsort()
    jacobian = torch.autograd.functional.jacobian(lambda x: operator(x).centers[0, order, 0], x)
    assert torch.allclose(jacobian.squeeze(), torch.eye(3)[[1, 0, 2]].double(), atol=1e-6)


@pytest.mark.parametrize("name", ["student_t", "huber", "pseudo_huber", "logistic"])
def test_centers_on_points_have_gradients_through_all_iterations(name):
    """Regression test: gradients were not finite if a center coincided with a point."""
    for scale in (1.0, 300.0, 1e5, 1e10):
        for items, components in ((3, 3), (20, 10)):
            x = scale * torch.randn(4, items, 2, generator=torch.Generator().manual_seed(0))
            x.requires_grad_()
            operator = GeneralizedEM(components, 2, kernel=name)
            mixture = operator(x)
            (mixture.centers.sum() + operator.objective(x, mixture).sum()).backward()
            assert x.grad.isfinite().all(), (scale, items)


def test_a_component_of_tiny_responsibilities_still_moves_to_its_mean():
    # Responsibilities of 1e-400 underflow, but their ratios are representable.
    x = torch.tensor([[[0.0], [1.0], [3.0]]], dtype=torch.float64)
    start = KernelMixture(torch.tensor([[0.0, -1000.0]]).double(), torch.tensor([[[0.5], [2.5]]]).double())
    after = GeneralizedEM(2, 1, num_iters=1)(x, init=start)
    mean = ((x[0] - start.centers[0].mT).square() / -2).diff(dim=1).softmax(0).mT @ x[0]
    assert after.centers[0, 1, 0].item() == pytest.approx(mean.item(), rel=1e-9)


def test_the_kernel_is_trained_through_the_loop():
    x = sets()
    operator = GeneralizedEM(2, 2, kernel=QuarticKernel())
    operator.objective(x, operator(x)).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in operator.parameters())
    with torch.no_grad():
        assert not operator(x).centers.requires_grad
    assert not GeneralizedEM(2, 2)(x).centers.requires_grad


def test_blocks_of_points_add_up():
    """A set of many points, each of a few repeated many times, equals the few points with weights."""
    x = sets(1)
    weights = torch.full((1, 60), 2000.0, dtype=torch.float64)
    operator = GeneralizedEM(3, 2, kernel="laplace")
    start = operator(x, num_iters=0)
    many = x.repeat(1, 2000, 1)  # more points than one block
    found = operator(many, init=start, num_iters=2)
    assert_close(found, operator(x, weights=weights, init=start, num_iters=2), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["one point repeated", "one point", "empty", "two points"])
def test_degenerate_sets_stay_finite(name, dtype):
    x = {
        "one point repeated": torch.ones(1, 10, 2),
        "one point": torch.ones(1, 1, 2),
        "empty": torch.randn(1, 10, 2),
        "two points": torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]),
    }[name].to(dtype)  # fmt: skip
    x.requires_grad_()
    mask = torch.zeros(1, 10, dtype=torch.bool) if name == "empty" else None
    for kernel in ("laplace", "gaussian"):
        operator = GeneralizedEM(3, 2, kernel=kernel)
        mixture = operator(x, mask)
        assert is_finite(mixture) and mixture.centers.dtype == dtype
        (grad,) = torch.autograd.grad(operator.objective(x, mixture, mask).sum() + mixture.centers.sum(), x)
        assert grad.isfinite().all()


def test_modes_and_round_trips():
    x = sets()
    operator = GeneralizedEM(2, 2, kernel={"name": "huber", "learnable": True}, num_iters=3)
    operator.kernel.log_delta.data += 0.3
    with torch.no_grad():
        expected = operator(x).centers
    with torch.inference_mode():
        assert torch.allclose(operator(x.clone()).centers, expected)
    fresh = GeneralizedEM(2, 2, kernel={"name": "huber", "learnable": True}, num_iters=3)
    fresh.load_state_dict(operator.state_dict())
    for other in (fresh, copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
        assert torch.equal(other(x).centers, expected)
    assert operator(x.half()).centers.dtype == torch.float32
    again = operator(x, init=operator(x, num_iters=1), num_iters=2)
    assert torch.allclose(again.centers, expected) and "num_iters=3" in repr(operator)


X = torch.randn(2, 10, 3)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: GeneralizedEM(0, 3), ValueError, ["num_components=0"]),
        (lambda: GeneralizedEM(2, 3, gradient="implicit"), ValueError, ["gradient", "'implicit'"]),
        (lambda: GeneralizedEM(2, 3, gradient="exact"), ValueError, ["gradient='exact'"]),
        (lambda: GeneralizedEM(2, 3, init="learned"), ValueError, ["init='learned'"]),
        (
            lambda: GeneralizedEM(2, 3, kernel=LearnedEnergyKernel(nn.Linear(3, 2))),
            ValueError,
            ["LearnedEnergyKernel"],
        ),
        (lambda: GeneralizedEM(2, 3)(X[..., :2]), ValueError, ["x", "(2, 10, 2)"]),
        (lambda: GeneralizedEM(2, 3)(X, num_iters=-1), ValueError, ["num_iters=-1"]),
        (lambda: GeneralizedEM(2, 3)(X, init=GeneralizedEM(3, 3)(X)), ValueError, ["(2, 3, 3)", "(2, 2, 3)"]),
        (
            lambda: GeneralizedEM(2, 3, kernel="logistic").log_prob(X, GeneralizedEM(2, 3)(X)),
            NoDensityError,
            ["density"],
        ),
    ],
)
def test_wrong_arguments_raise(call, error, words):
    assert_raises(error, words, call)
