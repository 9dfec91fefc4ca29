import functools

import pytest
import torch
from torch.testing import assert_close

from em_lightning.kernels import squared_distance

many_distances = functools.partial(squared_distance, max_differences=0)


class TestManyDistances:
    """The path for large inputs, which stores no differences, on small inputs."""

    def test_values_and_derivatives(self):
        x = torch.randn(2, 1, 4, 3, dtype=torch.float64, requires_grad=True)
        centers = torch.randn(3, 5, 3, dtype=torch.float64, requires_grad=True)
        expected = (x.unsqueeze(-2) - centers.unsqueeze(-3)).square().sum(-1)
        assert_close(many_distances(x, centers), expected, rtol=1e-14, atol=1e-14)
        assert torch.autograd.gradcheck(many_distances, (x, centers))
        assert torch.autograd.gradgradcheck(many_distances, (x, centers))
        factor = torch.tensor([[1.5, 0, 0], [0.6, 0.7, 0], [-0.3, 0.2, 0.5]], dtype=torch.float64, requires_grad=True)
        whitened = (x.unsqueeze(-2) - centers.unsqueeze(-3)) @ torch.linalg.inv(factor).mT
        assert_close(many_distances(x, centers, factor), whitened.square().sum(-1), rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(many_distances, (x, centers, factor))
        assert torch.autograd.gradgradcheck(many_distances, (x, centers, factor))

    def test_third_derivatives(self):
        x, centers = torch.randn(3, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)

        def second(x, distances):
            total = distances(x, centers).sqrt().exp().sum()
            (slope,) = torch.autograd.grad(total, x, create_graph=True)
            (curvature,) = torch.autograd.grad(slope.square().sum(), x, create_graph=True)
            return torch.autograd.grad(curvature.square().sum(), x)[0]

        x.requires_grad_()
        assert_close(second(x, many_distances), second(x, squared_distance), rtol=1e-9, atol=1e-9)

    def test_distances_far_from_the_origin_are_accurate(self):
        """The error of an expanded square would exceed the distance."""
        x = torch.tensor([[1e4, -1e4]], requires_grad=True)
        centers = torch.tensor([[1e4 + 2**-9, -1e4], [-1e4, 1e4]])
        distances = many_distances(x, centers)
        assert distances[0, 0].item() == pytest.approx(2**-18, rel=1e-6)
        (slope,) = torch.autograd.grad(distances[0, 0], x)
        assert_close(slope, torch.tensor([[-(2**-8), 0.0]]), rtol=1e-6, atol=0)

    def test_derivatives_at_distance_zero(self):
        x = torch.ones(1, 2, requires_grad=True)
        hessian = torch.autograd.functional.hessian(lambda x: many_distances(x, torch.ones(1, 2)).sum(), x)
        assert_close(hessian.reshape(2, 2), 2 * torch.eye(2))
        assert torch.autograd.grad(many_distances(x, torch.ones(1, 2)).sum(), x)[0].tolist() == [[0.0, 0.0]]

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch.func.jvp calls it
    def test_transforms_and_empty_sets(self):
        x, centers = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)

        def total(x):
            return many_distances(x, centers).exp().sum()

        expected = torch.autograd.functional.jacobian(total, x)
        assert_close(torch.func.vmap(torch.func.grad(total))(x), expected, rtol=1e-12, atol=1e-12)
        x.requires_grad_()
        (slope,) = torch.autograd.grad(torch.func.vmap(total)(x).sum(), x)
        assert_close(slope, expected, rtol=1e-12, atol=1e-12)
        x = x.detach()
        empty = torch.zeros(0, 2, dtype=torch.float64, requires_grad=True)
        many_distances(empty, centers).sum().backward()
        assert many_distances(empty, centers).shape == (0, 5) and empty.grad.shape == (0, 2)
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(total, (x[0],), (x[0],))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch.func.jvp calls it
def test_few_distances_have_forward_derivatives():
    x, centers = torch.randn(4, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    hessian = torch.func.hessian(lambda x: squared_distance(x, centers).sum())(x)
    assert_close(hessian.reshape(8, 8), 2 * 5 * torch.eye(8, dtype=torch.float64))
