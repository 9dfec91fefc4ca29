"""Contract tests of kernels: subclass :class:`KernelContract` to test a kernel of your own."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from em_lightning.kernels import Kernel, NoDensityError
from em_lightning.testing.modules import ModuleContract

_N, _K = 5, 3


class KernelContract(ModuleContract):
    r"""Tests of one kernel: subclass it in a test file under a name that starts with ``Test``.

    Define ``make`` and ``energy``; override the attributes where the defaults do not hold.

    Attributes:
        num_features: the values of D to test.
        density_features: the values of D for which exp(-d) has a finite integral, checked by quadrature; () for none.
        kinks: distances from the center, besides 0, at which a derivative is discontinuous.
        reach: distance from the center beyond which each feature has less than 1e-7 of the probability.
        twice: whether second derivatives exist almost everywhere.

    Example:
        >>> import em_lightning.kernels as kernels
        >>> class TestLaplace(KernelContract):
        ...     def make(self, num_features):
        ...         return kernels.LaplaceKernel(scale=0.5, learnable=True)
        ...
        ...     def energy(self, x, center):
        ...         return sum(abs(a - b) / 0.5 for a, b in zip(x, center))
        >>> contract = TestLaplace()
        >>> contract.test_energies_are_the_formula()
    """

    num_features: Sequence[int] = (1, 2, 3)
    density_features: Sequence[int] = (1, 2, 3)
    kinks: Sequence[float] = ()
    reach: float = 64.0
    twice: bool = True

    def make(self, num_features: int) -> Kernel:  # type: ignore[override]
        """Return a new kernel with learnable shape parameters, the same at every call."""
        raise NotImplementedError

    def energy(self, x: list[float], center: list[float]) -> float:
        """Return the energy of one item under one center, in plain Python, without the kernel's code."""
        raise NotImplementedError

    def default(self) -> Kernel:
        return self.make(self.num_features[-1]).double()

    def other(self) -> Kernel:
        return self.moved(self.default())

    def moved(self, kernel: Kernel) -> Kernel:
        """Return a copy with other parameter values."""
        moved = copy.deepcopy(kernel)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(0.1)
        return moved

    def example(self) -> Tensor:
        return torch.cat(self.draw(self.num_features[-1]))

    def outputs(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return (module(x[:_N], x[_N:]),)

    def draw(self, num_features: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Return normal random items (5, D) and centers (3, D)."""
        generator = torch.Generator().manual_seed(num_features)
        x = 1.5 * torch.randn(_N, num_features, generator=generator, dtype=torch.float64)
        centers = torch.randn(_K, num_features, generator=generator, dtype=torch.float64)
        return x.to(dtype), centers.to(dtype)

    def quadrature(self, center: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield blocks of nodes (M, D) and weights (M,) of a quadrature of R^D around a center (D,).

        A product of Gauss-Legendre rules on intervals whose width doubles away from the center; it assumes no symmetry.
        Override it for a density over another domain, such as a sphere.
        """
        edges = sorted({0.0, *self.kinks, *(2.0**k for k in range(-1, 1 + math.ceil(math.log2(self.reach))))})
        roots, root_weights = (torch.from_numpy(value) for value in np.polynomial.legendre.leggauss(10))
        low, high = torch.tensor(edges[:-1]).double(), torch.tensor(edges[1:]).double()
        half = ((high - low) / 2).unsqueeze(-1)
        distance = (low.unsqueeze(-1) + half * (1 + roots)).flatten()
        offsets, weights = torch.cat([-distance, distance]), (half * root_weights).flatten().repeat(2)
        grid = torch.cartesian_prod(*[torch.arange(len(offsets))] * len(center)).reshape(-1, len(center))
        for index in grid.split(2**16):
            yield center + offsets[index], weights[index].prod(-1)

    def cases(self) -> Iterator[tuple[Kernel, Tensor, Tensor]]:
        """Yield kernel, items and centers in float64 for each number of features."""
        for size in self.num_features:
            yield (self.make(size).double(), *self.draw(size))

    def test_energies_are_the_formula(self) -> None:
        for kernel, x, centers in self.cases():
            x[0] = centers[0]
            expected = [[self.energy(item.tolist(), center.tolist()) for center in centers] for item in x]
            assert_close(kernel(x, centers), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)

    def test_leading_dimensions_broadcast(self) -> None:
        for kernel, x, centers in self.cases():
            xs = torch.stack([x, x + 0.5]).unsqueeze(1)  # (2, 1, N, D)
            stacks = torch.stack([centers, 2 * centers, centers - 0.25])  # (3, K, D)
            energies = kernel(xs, stacks)
            assert energies.shape == (2, 3, _N, _K)
            for i in range(2):
                for j in range(3):
                    assert_close(energies[i, j], kernel(xs[i, 0], stacks[j]), rtol=1e-12, atol=1e-12)
            assert kernel(x[:0], centers).shape == (0, _K)

    def test_gradients_are_those_of_the_energies(self) -> None:
        for kernel, x, centers in self.cases():
            inputs = [value.requires_grad_() for value in (x, centers, *kernel.parameters())]

            def energies(x: Tensor, centers: Tensor, *parameters: Tensor, kernel: Kernel = kernel) -> Tensor:
                return kernel(x, centers)  # gradcheck changes the kernel's parameters in place

            assert gradcheck(energies, inputs)
            assert not self.twice or gradgradcheck(energies, inputs)

    def test_the_density_integrates_to_one(self) -> None:
        for size in self.density_features:
            center = self.draw(size)[1][:1]
            for kernel in (self.make(size).double(), self.moved(self.make(size).double())):
                log_normalizer = kernel.log_normalizer(size).detach()
                assert log_normalizer.shape == (), f"log_normalizer must have shape (), got {log_normalizer.shape}"
                integral = 0.0
                for nodes, weights in self.quadrature(center[0]):
                    density = (-kernel(nodes, center).squeeze(-1) - log_normalizer).exp()
                    integral += float(weights @ density.detach())
                assert abs(integral - 1) < 1e-6, f"D = {size}: {integral} with {kernel}"

    def test_log_normalizer_has_a_gradient_or_a_reason(self) -> None:
        for kernel, x, _ in self.cases():
            size = x.shape[-1]
            if size not in self.density_features:
                with pytest.raises(NoDensityError, match=type(kernel).__name__):
                    kernel.log_normalizer(size)
                continue

            def log_normalizer(*parameters: Tensor, kernel: Kernel = kernel, size: int = size) -> Tensor:
                return kernel.log_normalizer(size)

            if parameters := tuple(kernel.parameters()):
                assert gradcheck(log_normalizer, parameters)
                assert gradgradcheck(log_normalizer, parameters)

    def test_extreme_distances_stay_finite(self) -> None:
        steps = torch.tensor([0.0, *(10.0**k for k in range(-8, 7))])
        for size in self.num_features:
            kernel = self.make(size).float()
            offsets = torch.cat([steps, -steps]).unsqueeze(-1) * torch.ones(size)
            for center in (torch.zeros(1, size), self.draw(size, torch.float32)[1][:1]):
                x, center = (center + offsets).requires_grad_(), center.clone().requires_grad_()
                energies = kernel(x, center)
                assert energies.isfinite().all(), f"energies {energies.flatten().tolist()}"
                inputs = [x, center, *kernel.parameters()]
                for gradient in torch.autograd.grad(energies.sum(), inputs, materialize_grads=True):
                    assert gradient.isfinite().all(), f"gradient {gradient}"

    def test_wrong_inputs_raise(self) -> None:
        size = self.num_features[-1]
        x, centers = self.draw(size, torch.float32)
        with pytest.raises(TypeError, match="x .*int64"):
            self.make(size)(x.long(), centers)
        with pytest.raises(ValueError) as caught:
            self.make(size)(x, torch.cat([centers, centers], dim=-1))
        assert str(tuple(x.shape)) in str(caught.value) and str((_K, 2 * size)) in str(caught.value)
