"""The curvature of the free energy, against the eigenvalues of its Hessian."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from em_lightning.competition import softmin
from em_lightning.scope import curvature


def dense(r):
    return torch.linalg.eigvalsh(torch.diag_embed(r) - r.unsqueeze(-1) * r.unsqueeze(-2))[..., -1]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([1e-3, 0.3, 3.0, 30.0, 300.0]), st.booleans())
def test_it_is_the_largest_eigenvalue_of_the_hessian(seed, num_units, spread, ties):
    energies = spread * torch.rand(8, num_units, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    energies = energies.relu_().sub_(spread / 2).relu_() if ties else energies
    r = softmin(energies).responsibilities
    found = curvature(r)
    torch.testing.assert_close(found, dense(r), rtol=1e-12, atol=1e-15)
    assert (found <= 0.5 + 1e-15).all()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1.0], 0.0),
        ([1.0, 0.0, 0.0], 0.0),
        ([0.0, 0.0, 0.0], 0.0),
        ([0.5, 0.5], 0.5),
        ([0.0, 0.5, 0.5, 0.0], 0.5),
        ([0.25, 0.75], 0.375),
        ([1 / 3, 1 / 3, 1 / 3], 1 / 3),
        ([0.2] * 5, 0.2),
        ([0.5, 0.25, 0.25], None),
        ([0.4, 0.4, 0.2], None),
        ([1 - 1e-12, 1e-12], None),
        ([0.5 + 1e-14, 0.5 - 1e-14], None),
        ([1e-300, 1.0, 1e-300], None),
    ],
)
def test_ties_winners_and_zeros(row, expected):
    r = torch.tensor(row, dtype=torch.float64, requires_grad=True)
    value = curvature(r)
    expected = dense(r.detach()) if expected is None else torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=1e-15)
    (gradient,) = torch.autograd.grad(value, r)
    assert gradient.isfinite().all()


def test_the_bound_is_attained_by_two_equal_winners_only():
    r = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.49, 0.01], [0.34, 0.33, 0.33]], dtype=torch.float64)
    for temperature in (0.5, torch.tensor(2.0)):
        value = curvature(r, temperature)
        bound = 1 / (2 * float(temperature))
        torch.testing.assert_close(float(value[0]), bound, rtol=1e-15, atol=0.0)
        assert (value[1:] < bound).all()


def test_gradient():
    generator = torch.Generator().manual_seed(0)
    energies = torch.rand(5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: curvature(softmin(d).responsibilities, 0.7), energies)
    two = torch.tensor([[0.4, 0.4, 0.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(curvature, two)


def test_second_derivatives_are_refused():
    r = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(curvature(r).sum(), r, create_graph=True)


def test_axis_dtype_and_errors():
    r = torch.rand(2, 6, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    assert torch.equal(curvature(r, dim=1), curvature(r.movedim(1, -1)))
    assert curvature(r.half(), dim=1).dtype == torch.float16
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        curvature(r, 0.0)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        curvature(torch.ones(3, dtype=torch.int64))
