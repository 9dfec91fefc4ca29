"""Contract tests of an activation, for authors of new ones to subclass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from em_lightning.activations import Activation
from em_lightning.testing.modules import TemperedContract


class ActivationContract(TemperedContract):
    """Tests that every activation must pass: shapes, closed form, gradients, axes and dtypes.

    Subclass it under a name that pytest collects, and define :meth:`make`.

    Attributes:
        twice: whether second derivatives exist almost everywhere.
        large: finite pre-activations of this size must have finite values and gradients.

    Example:
        >>> from em_lightning.activations import SoftmaxGatedActivation
        >>> class TestMyActivation(ActivationContract):
        ...     def make(self, **arguments):
        ...         return SoftmaxGatedActivation(**arguments)
    """

    twice = True
    large = 1e4

    def make(self, **arguments: Any) -> Activation:
        """Return a new activation; the arguments are a subset of temperature, learnable and dim."""
        raise NotImplementedError

    def example(self) -> Tensor:
        """Return pre-activations (6 items, 8 units)."""
        return self.inputs(6, 8)

    @staticmethod
    def inputs(*shape: int, size: float = 2.0) -> Tensor:
        """Return random pre-activations, float64."""
        return torch.randn(*shape, dtype=torch.float64) * size

    def test_needs_no_argument_and_keeps_shape_and_dtype(self) -> None:
        activation = type(self.make())()
        for shape in [(8,), (5, 8), (2, 3, 8), (2, 8, 4, 4)]:
            for dtype in (torch.float32, torch.float64):
                z = torch.randn(shape, dtype=dtype)
                y = activation(z)
                assert y.shape == z.shape and y.dtype == dtype

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_closed_form_is_the_definition(self, temperature: float) -> None:
        activation, z = self.make(temperature=temperature), self.inputs(50, 8)
        torch.testing.assert_close(activation(z), activation.generic(z), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("shape, dim", [((2, 8, 3, 3), 1), ((2, 8, 5), 1), ((2, 5, 8), -1), ((8, 3), -2)])
    def test_any_axis(self, shape: tuple[int, ...], dim: int) -> None:
        z = self.inputs(*shape)
        expected = self.make()(z.movedim(dim, -1)).movedim(-1, dim)
        torch.testing.assert_close(self.make(dim=dim)(z), expected)

    def test_gradcheck(self) -> None:
        activation, z = self.make(temperature=1.5), self.inputs(3, 4).requires_grad_()
        assert torch.autograd.gradcheck(activation, z)
        assert not self.twice or torch.autograd.gradgradcheck(activation, z)

    def test_competes_describes_the_jacobian(self) -> None:
        activation = self.make()
        jacobian = torch.func.jacrev(activation)(self.inputs(4, size=0.3))
        mixed = jacobian - torch.diag(jacobian.diagonal())
        assert bool((mixed != 0).any()) == activation.competes

    def test_permutation_equivariance(self) -> None:
        activation, z, order = self.make(), self.inputs(6, 8), self.permutation(8)
        torch.testing.assert_close(activation(z[:, order]), activation(z)[:, order])

    @pytest.mark.parametrize("shape", [(5, 1), (0, 8)])
    def test_one_unit_and_no_items(self, shape: tuple[int, ...]) -> None:
        z = torch.randn(shape, requires_grad=True)
        y = self.make()(z)
        assert y.shape == shape and y.isfinite().all()
        (grad,) = torch.autograd.grad(y.sum(), z)
        assert grad.shape == shape and grad.isfinite().all()

    def test_large_zero_and_tied_inputs_stay_finite(self) -> None:
        for z in (self.inputs(4, 8, size=self.large), torch.zeros(2, 8), torch.full((2, 8), self.large)):
            for temperature in (1e-3, 1.0, 1e6):
                x = z.float().requires_grad_()
                y = self.make(temperature=temperature)(x)
                (grad,) = torch.autograd.grad(y.sum(), x)
                assert y.isfinite().all() and grad.isfinite().all()
