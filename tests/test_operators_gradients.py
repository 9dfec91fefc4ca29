"""Gradients of the operator: checkpointed, last, implicit; second derivatives; the cost of gradients of a start."""

import pytest
import textbook
import torch
from helpers import (
    COVARIANCE_TYPES,
    assert_close,
    assert_raises,
    clusters,
    detached,
    parts,
    start_among,
    trained,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from em_lightning import EMOperator


def separated(items=60, sets=2):
    return clusters(sets, items, 2, 3, distance=6.0)


def gradients_of(operator, x, weights, target):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    value = (operator(x, weights=weights).log_prob(x) * target).sum()
    return value, torch.autograd.grad(value, [x, weights, *operator.parameters()], allow_unused=True)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_checkpoint_equals_unrolled(covariance):
    x, weights = separated(), torch.rand(2, 60, dtype=torch.float64)
    target = torch.randn(2, 60, dtype=torch.float64)
    operator = trained(EMOperator(3, 2, num_iters=4, covariance=covariance, init="learned").double())
    value, exact = gradients_of(operator, x, weights, target)
    operator.gradient = "checkpoint"
    again, recomputed = gradients_of(operator, x, weights, target)
    torch.testing.assert_close(value, again)
    for one, two in zip(exact, recomputed, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_last_gradient_has_the_unrolled_value_and_another_gradient():
    x, weights = separated(), torch.rand(2, 60, dtype=torch.float64)
    target = torch.randn(2, 60, dtype=torch.float64)
    operator = EMOperator(3, 2, num_iters=4, residual=False, gradient="last")
    value, found = gradients_of(operator, x, weights, target)
    with torch.no_grad():
        before = operator(x, weights=weights, num_iters=3)
    one = EMOperator(3, 2, num_iters=1, residual=False)(x, weights=weights, init=before)
    torch.testing.assert_close(value, (one.log_prob(x) * target).sum())
    exact = gradients_of(EMOperator(3, 2, num_iters=4, residual=False), x, weights, target)[1]
    assert not torch.allclose(found[1], exact[1])


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_implicit_is_the_derivative_of_the_converged_mixture(covariance, residual):
    x, weights = separated(30, 1), 0.5 + torch.rand(1, 30, dtype=torch.float64)
    operator = EMOperator(3, 2, num_iters=150, covariance=covariance, gradient="implicit", residual=residual).double()
    trained(operator, 0.01)
    start = detached(operator(x, num_iters=0))
    inputs = [x, weights, *operator.parameters()]
    target = [torch.randn_like(part) for part in parts(start)]

    def outcome():
        mixture = operator(x, weights=weights, init=start)
        return sum((part * t).sum() for part, t in zip(parts(mixture), target, strict=True))

    directions = [torch.randn_like(part) for part in inputs]
    for part in inputs:
        part.requires_grad_()
    found = torch.autograd.grad(outcome(), inputs)
    slopes = [(g * d).sum().item() for g, d in zip(found, directions, strict=True)]
    values = []
    with torch.no_grad():
        for sign in (1e-6, -2e-6):
            for part, direction in zip(inputs, directions, strict=True):
                part += sign * direction
            values.append(outcome().item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(sum(slopes), rel=1e-4)


def test_implicit_raises_where_the_loop_has_not_converged():
    x = torch.randn(3, 100, 2, requires_grad=True)
    operator = EMOperator(3, 2, num_iters=5, residual=False, gradient="implicit")
    assert_raises(RuntimeError, ["num_iters"], lambda: operator(x))
    with torch.no_grad():
        assert operator(x).means.isfinite().all()


# Second derivatives: right, or an error that names them.


@pytest.mark.parametrize("gradient", ["unrolled", "checkpoint", "last"])
@pytest.mark.parametrize("kernel", ["gaussian", "pseudo_huber"])
@pytest.mark.parametrize("wanted", ["means", "log_prob"])
def test_second_derivatives_are_correct_or_raise(kernel, gradient, wanted):
    """A sum has a constant incoming gradient, for which a once-differentiable function would be silently zero."""
    x = clusters(1, 20, 2, 2).requires_grad_()
    start = start_among(x, 2)
    steps = 1 if gradient == "last" else 2
    operator = EMOperator(
        2, 2, num_iters=steps, kernel=kernel, residual=False, covariance_floor=1e-3, gradient=gradient
    )
    parameters = textbook.parameters_of(start)
    for _ in range(steps):
        spec = {"name": kernel}
        parameters = textbook.em_step(x[0], parameters, "full", kernel=spec, floor=1e-3)
    direction = torch.randn_like(x)

    def second(value):
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        return torch.autograd.grad((slope * direction).sum(), x)[0]

    factor = torch.tensor([1.0, -2.0]).double()
    if wanted == "means":
        expected = second((parameters.means * factor).sum())
    else:
        spec = "gaussian" if kernel == "gaussian" else {"name": kernel}
        expected = second(textbook.log_prob(x[0], parameters, spec).sum())
    assert expected.abs().max() > 1e-3
    try:
        mixture = operator(x, init=start)
        found = second((mixture.means * factor).sum() if wanted == "means" else operator.log_prob(x, mixture).sum())
    except (RuntimeError, NotImplementedError) as error:
        assert any(word in str(error) for word in ("second", "twice", "double backward", "once_differentiable")), error
        return
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


# The cost of a backward pass.


class Numbers(TorchDispatchMode):
    """Count the numbers in all results of operations, views excluded."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.count += sum(part.numel() for part in tree_leaves(result) if isinstance(part, torch.Tensor))
        return result


@pytest.mark.parametrize("covariance", ["full", "diag", "spherical"])
@pytest.mark.parametrize("init", ["farthest", "kmeans++"])
def test_the_gradient_of_a_start_with_cells_of_few_points_is_that_of_differences(init, covariance):
    """Such a cell has the variance around all centers, which are points themselves."""
    options = {"seed": 0} if init == "kmeans++" else {}
    operator = EMOperator(4, 2, init=init, covariance=covariance, residual=False, **options).double()
    x = torch.randn(1, 7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def covariances(x):
        return operator(x, num_iters=0).covariances

    assert torch.autograd.gradcheck(covariances, x.clone().requires_grad_(), check_forward_ad=True)


@pytest.mark.parametrize("covariance", ["full", "diag"])
@pytest.mark.parametrize("init", ["farthest", "kmeans++", "learned"])
def test_the_backward_pass_of_a_start_is_linear_in_the_points(init, covariance):
    operator = EMOperator(4, 2, covariance=covariance, init=init, residual=False)
    counts = []
    for items in (2**20, 2**21):
        x = torch.randn(1, items, 2, requires_grad=True)
        mixture = operator(x, num_iters=0)
        with Numbers() as seen:
            torch.autograd.grad(mixture.means.sum() + mixture.covariances.sum(), x)
        counts.append(seen.count)
    assert counts[1] <= 2.2 * counts[0], counts


@pytest.mark.parametrize("gradient", ["unrolled", "checkpoint"])
def test_the_backward_pass_of_an_iteration_is_linear_in_the_points(gradient):
    counts = []
    for items in (2**18, 2**19):
        x = torch.randn(1, items, 2, requires_grad=True)
        operator = EMOperator(4, 2, num_iters=1, residual=False, gradient=gradient)
        mixture = operator(x, init=start_among(x, 4))
        with Numbers() as seen:
            torch.autograd.grad(mixture.means.sum() + mixture.covariances.sum(), x)
        counts.append(seen.count)
    assert counts[1] <= 2.2 * counts[0], counts


def test_checkpoint_and_last_have_the_values_of_unrolled():
    x = separated()
    expected = EMOperator(3, 2, residual=False)(x)
    for gradient in ("checkpoint", "last"):
        assert_close(EMOperator(3, 2, residual=False, gradient=gradient)(x), expected, atol=1e-12)
