import pytest
import torch
from torch.testing import assert_close

from em_lightning.kernels import squared_distance


class TestManyDistances:
    """Beyond a size the differences are not kept; the path is forced here on inputs small enough to check."""

    @pytest.fixture(autouse=True)
    def force(self, monkeypatch):
        monkeypatch.setattr("em_lightning.kernels.distance._FEW", 0)

    def test_values_and_derivatives(self):
        x = torch.randn(2, 1, 4, 3, dtype=torch.float64, requires_grad=True)
        centers = torch.randn(3, 5, 3, dtype=torch.float64, requires_grad=True)
        expected = (x.unsqueeze(-2) - centers.unsqueeze(-3)).square().sum(-1)
        assert_close(squared_distance(x, centers), expected, rtol=1e-14, atol=1e-14)
        assert torch.autograd.gradcheck(squared_distance, (x, centers))
        assert torch.autograd.gradgradcheck(squared_distance, (x, centers))

    def test_no_digit_is_lost_far_from_zero(self):
        """The expanded square would be off by more than the distance itself."""
        x = torch.tensor([[1e4, -1e4]], requires_grad=True)
        centers = torch.tensor([[1e4 + 2**-9, -1e4], [-1e4, 1e4]])
        distances = squared_distance(x, centers)
        assert distances[0, 0].item() == pytest.approx(2**-18, rel=1e-6)
        (slope,) = torch.autograd.grad(distances[0, 0], x)
        assert_close(slope, torch.tensor([[-(2**-8), 0.0]]), rtol=1e-6, atol=0)

    def test_meeting_points_have_slope_zero_and_a_curvature(self):
        x = torch.ones(1, 2, requires_grad=True)
        hessian = torch.autograd.functional.hessian(lambda x: squared_distance(x, torch.ones(1, 2)).sum(), x)
        assert_close(hessian.reshape(2, 2), 2 * torch.eye(2))
        assert torch.autograd.grad(squared_distance(x, torch.ones(1, 2)).sum(), x)[0].tolist() == [[0.0, 0.0]]

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch.func.jvp calls it
    def test_transforms_and_empty_sets(self):
        x, centers = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)

        def total(x):
            return squared_distance(x, centers).exp().sum()

        expected = torch.autograd.functional.jacobian(total, x)
        assert_close(torch.func.vmap(torch.func.grad(total))(x), expected, rtol=1e-12, atol=1e-12)
        empty = torch.zeros(0, 2, dtype=torch.float64, requires_grad=True)
        squared_distance(empty, centers).sum().backward()
        assert squared_distance(empty, centers).shape == (0, 5) and empty.grad.shape == (0, 2)
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(total, (x[0],), (x[0],))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch.func.jvp calls it
def test_few_distances_have_forward_derivatives():
    x, centers = torch.randn(4, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    hessian = torch.func.hessian(lambda x: squared_distance(x, centers).sum())(x)
    assert_close(hessian.reshape(8, 8), 2 * 5 * torch.eye(8, dtype=torch.float64))
