"""Float32 points: products are taken in float32 where that is accurate, and in float64 where it is not."""

import pytest
import torch

from em_lightning import EMOperator, Mixture
from em_lightning.mixture import COVARIANCES, em_step, passes
from em_lightning.mixture.cloud import Cloud, prepare
from em_lightning.mixture.covariance import State
from em_lightning.mixture.moments import accumulate, get_ready
from em_lightning.mixture.step import leave

KINDS = sorted(COVARIANCES)


@pytest.fixture
def precisions(monkeypatch):
    """Record the precision of each pass, and the clouds that it was taken over."""
    seen = []
    forward = passes.Moments.forward

    def record(ctx, points, shift, weights, theta, plan):
        seen.append((plan.precision, None if plan.chosen is None else plan.chosen.tolist()))
        return forward(ctx, points, shift, weights, theta, plan)

    monkeypatch.setattr(passes.Moments, "forward", record)
    return seen


def turned_slab(thickness, items=600):
    """Points (items, 3) of four parallel slabs, thin in a direction that is no axis."""
    x = torch.randn(items, 3, dtype=torch.float64) * torch.tensor([1.0, 1.0, thickness])
    x[:, 2] += 2.0 * (torch.arange(items) % 4)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    return x @ turn


def test_the_precision_is_chosen_by_the_farthest_point_on_either_side():
    x = torch.randn(2, 30, 3)
    x[:, 0] = -50.0  # one far point, whose place moves the mean by little
    cloud, structure = prepare(x), COVARIANCES["full"]
    assert torch.equal(get_ready(cloud, structure).extent, cloud.points.abs().amax(2))
    for sign in (1.0, -1.0):  # of large sets the center is still to be subtracted
        shift = sign * torch.tensor([[3.0, -7.0, 90.0], [0.0, 1.0, 2.0]]).double()
        shifted = cloud._replace(points=cloud.points + shift.float().unsqueeze(2), shift=shift)
        torch.testing.assert_close(get_ready(shifted, structure).extent, cloud.points.abs().amax(2))
    assert accumulate(cloud, torch.zeros(2, 1, 10).double(), structure)[1] is None  # unless it is asked for


def test_the_choice_is_made_for_each_cloud(precisions):
    x = torch.stack([turned_slab(t) for t in (1.0, 1e-3, 1e-3, 0.5)]).float()
    operator = EMOperator(4, 3, num_iters=20, residual=False)
    operator(x)
    assert precisions[-2:] == [(torch.float32, None), (torch.float64, [1, 2])]
    operator(x[:3])
    assert precisions[-2:] == [(torch.float32, [0]), (torch.float64, [1, 2])]
    precisions.clear()
    operator(x.double())
    assert {precision for precision, _ in precisions} == {torch.float64}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("thickness", [1.0, 0.05, 0.02, 0.01, 1e-3, 1e-4])
def test_float32_likelihood_is_float64s(kind, thickness):
    x = torch.stack([turned_slab(thickness), turned_slab(1.0)]).float()
    operator = EMOperator(4, 3, num_iters=20, covariance=kind, residual=False, covariance_floor=0.0)
    start = operator(x, num_iters=0)
    *_, (cloud, state) = operator._loop(x, None, None, start, None)
    # In double, as the loop holds it: in float32 the result itself cannot say how thin a tilted slab is.
    found = leave(cloud._replace(points=cloud.points.double()), state, COVARIANCES[kind])
    narrow = found.log_prob(x.double()).mean(1)
    wide = operator(x.double(), init=Mixture(*(part.double() for part in start))).log_prob(x.double()).mean(1)
    assert torch.allclose(narrow, wide, atol=1e-4)


def test_axis_parallel_scales_need_no_digits(precisions):
    x = torch.randn(1, 500, 3) * torch.tensor([1.0, 1e-2, 1e-4])
    operator = EMOperator(4, 3, num_iters=5, covariance="diag", residual=False, covariance_floor=0.0)
    narrow = operator(x).log_prob(x)
    assert {precision for precision, _ in precisions[:5]} == {torch.float32}
    start = Mixture(*(part.double() for part in operator(x, num_iters=0)))
    wide = operator(x.double(), init=start).log_prob(x.double())
    assert narrow.mean().item() == pytest.approx(wide.mean().item(), abs=1e-4)


def test_a_step_that_makes_components_thin_is_taken_again(precisions):
    x = torch.cat([torch.randn(40, 3), torch.randn(40, 3) + 1e4])[None]
    start = Mixture(torch.full((1, 2), 0.5).log(), x[:, [0, 40]], 1e7 * torch.eye(3).expand(1, 2, 3, 3))
    one = em_step(x, start, floor=0.0)
    assert precisions == [(torch.float32, None), (torch.float64, None)]
    two = em_step(x.double(), Mixture(*(part.double() for part in start)), floor=0.0)
    assert torch.allclose(one.covariances.double(), two.covariances, rtol=1e-5)


@pytest.mark.parametrize("size", [1e12, 1e13, 1e15])
def test_gradients_of_large_points_are_float64s(size):
    """The gradient of natural parameters grows with the third power of a coordinate, which float32 does not hold."""
    x = size * torch.tensor([[[1.5], [-0.3], [-2.2], [0.4]]], dtype=torch.float64)
    start = EMOperator(2, 1, covariance="diag")(x, num_iters=0)
    start = Mixture(start.log_weights, start.means, torch.full_like(start.covariances, size**2))
    operator = EMOperator(2, 1, covariance="diag", num_iters=2, residual=False)
    slopes = []
    for dtype in (torch.float32, torch.float64):
        points = x.to(dtype).requires_grad_()
        mixture = operator(points, init=start)
        total = (mixture.means * torch.tensor([1.0, -2.0])[None, :, None]).sum() + mixture.log_prob(points).sum() * size
        slopes.append(torch.autograd.grad(total, points)[0].double())
    assert torch.allclose(*slopes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mass", [0.0, 1e-12])
def test_gradients_of_a_cloud_without_mass_are_finite(mass):
    x = torch.tensor([[[1.5e6], [-2e6]]], requires_grad=True)
    weights = torch.full((1, 2), mass)
    operator = EMOperator(1, 1, covariance="diag", num_iters=1, init="learned", residual=False)
    operator.log_prob(x, operator(x, weights=weights)).sum().backward()
    assert x.grad.isfinite().all() and all(part.grad.isfinite().all() for part in operator.parameters())


def test_gradients_of_a_cloud_without_extent_are_finite():
    """Its components are 1e-14 wide, and a gradient of moments grows with the fourth power of the inverse."""
    options = {"covariance": "diag", "lloyd_steps": 1, "background": {"estimate": True}, "relative_floor": True}
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.zeros(1, 1, 1, requires_grad=True)
        operator = EMOperator(3, 1, num_iters=2, **options)
        for mlp in (operator.correction.mean_mlp, operator.correction.covariance_mlp):
            torch.nn.init.normal_(mlp[-1].weight, std=0.3)
        operator.log_prob(x, operator(x)).sum().backward()
        assert all(part.grad.isfinite().all() for part in (x, *operator.parameters()) if part.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("thicknesses", [(1.0, 1e-3, 0.5), (1e-3, 1.0, 2e-3)])
def test_float32_gradients_are_float64s(kind, weighted, thicknesses):
    structure = COVARIANCES[kind]
    x = torch.stack([turned_slab(t) for t in thicknesses])
    points = (x - x.mean(1, keepdim=True)).mT.contiguous().float()
    weights = torch.rand(3, 600) if weighted else None
    spread = structure.expand(torch.full((3, 3), 0.1), 4, 3)
    means = points[..., :4].mT.double()
    state = State(
        torch.full((3, 4), -1.4).double(), means, type(spread)(spread.scale.double(), spread.inverse.double())
    )
    theta = structure.natural(state).requires_grad_()
    target = torch.randn_like(theta)
    grads = []
    for dtype in (torch.float32, torch.float64):
        p = points.to(dtype).requires_grad_()
        w = None if weights is None else weights.to(dtype).requires_grad_()
        none = torch.zeros(3, 3)
        out, _ = accumulate(Cloud(p, w, none[:, 0], none, none), theta, structure)
        wanted = [p, theta] if w is None else [p, theta, w]
        grads.append(torch.autograd.grad((out * target).sum(), wanted))
    for narrow, wide in zip(*grads, strict=True):
        assert torch.allclose(narrow.double(), wide.double(), rtol=1e-3, atol=1e-4 * wide.abs().max().item())
