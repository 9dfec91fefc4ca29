import pytest
import torch

from em_lightning import EMOperator
from em_lightning.mixture import COVARIANCES
from em_lightning.operators.gradients import gmres

KINDS = sorted(COVARIANCES)


def separated(sets=2, items=60, features=2):
    centers = 6 * torch.randn(sets, 3, features, dtype=torch.float64)
    return centers.repeat_interleave(items // 3, 1) + torch.randn(sets, items, features, dtype=torch.float64)


def trained(operator, size=0.05):
    for parameter in operator.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return operator


def gradients_of(operator, x, weights, target):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    value = (operator(x, weights=weights).log_prob(x) * target).sum()
    return value, torch.autograd.grad(value, [x, weights, *operator.parameters()], allow_unused=True)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_is_unrolled(kind):
    x, weights = separated(), torch.rand(2, 60, dtype=torch.float64)
    target = torch.randn(2, 60, dtype=torch.float64)
    operator = trained(EMOperator(3, 2, num_iters=4, covariance=kind, init="learned").double())
    value, exact = gradients_of(operator, x, weights, target)
    operator.gradient = "checkpoint"
    again, recomputed = gradients_of(operator, x, weights, target)
    assert torch.equal(value, again)
    for one, two in zip(exact, recomputed, strict=True):
        assert torch.allclose(one, two, rtol=1e-10, atol=1e-12)


def test_last_is_one_iteration_from_where_the_others_led():
    x, weights = separated(), torch.rand(2, 60, dtype=torch.float64)
    target = torch.randn(2, 60, dtype=torch.float64)
    operator = EMOperator(3, 2, num_iters=4, residual=False, gradient="last")
    value, found = gradients_of(operator, x, weights, target)
    unrolled = EMOperator(3, 2, num_iters=1, residual=False)
    with torch.no_grad():
        before = operator(x, weights=weights, num_iters=3)
    one = (unrolled(x, weights=weights, init=before).log_prob(x) * target).sum()
    assert torch.allclose(value, one)
    exact = gradients_of(EMOperator(3, 2, num_iters=4, residual=False), x, weights, target)[1]
    assert not torch.allclose(found[1], exact[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [False, True])
def test_implicit_is_the_derivative_of_the_converged_mixture(kind, residual):
    x, weights = separated(1, 30), 0.5 + torch.rand(1, 30, dtype=torch.float64)
    operator = EMOperator(3, 2, num_iters=150, covariance=kind, gradient="implicit", residual=residual).double()
    trained(operator, 0.01)
    start = operator(x, num_iters=0)
    inputs = [x, weights, *operator.parameters()]
    target = [torch.randn_like(part) for part in start]

    def outcome():
        mixture = operator(x, weights=weights, init=start)
        return sum((part * t).sum() for part, t in zip(mixture, target, strict=True))

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


def test_implicit_refuses_what_has_not_converged():
    x = torch.randn(3, 100, 2, requires_grad=True)
    operator = EMOperator(3, 2, num_iters=5, residual=False, gradient="implicit")
    with pytest.raises(RuntimeError, match=r"changed 3 of 3 sets, set \d by .* raise num_iters"):
        operator(x)
    with torch.no_grad():
        assert operator(x).means.isfinite().all()


def test_gmres_is_the_solution_of_each_system():
    matrix = torch.eye(40, dtype=torch.float64) - 0.1 * torch.randn(3, 40, 40, dtype=torch.float64)
    target = torch.randn(3, 40, dtype=torch.float64)
    target[1] = 0.0
    found = gmres(lambda v: (matrix @ v.unsqueeze(2)).squeeze(2), target)
    assert torch.allclose(found, torch.linalg.solve(matrix, target), atol=1e-6)
    matrix[2, 5] = 0.0
    with pytest.raises(RuntimeError, match=r"relative residual of .*; use gradient='unrolled'"):
        gmres(lambda v: (matrix @ v.unsqueeze(2)).squeeze(2), target)
