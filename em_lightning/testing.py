"""Contract tests of kernels, competition operators, activations, losses and other modules, one class for each kind.

Subclass a contract in a test file under a name that starts with ``Test``, and define ``make``.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from em_lightning.competition import Competition
from em_lightning.kernels import Kernel

__all__ = ["ActivationContract", "CompetitionContract", "KernelContract", "LossContract", "ModuleContract"]

_NUM_ITEMS, _NUM_CENTERS = 5, 3  # in the tests of kernels
_TOLERANCE = 1e-10  # of the identities of competition operators


class ModuleContract:
    """Tests of a module that maps one tensor to one or more tensors: copies, state and low precision.

    Attributes:
        settings: arguments of a module whose state differs from the default.
        keeps_dtype: whether outputs have the dtype of half-precision inputs; otherwise float32.
    """

    settings: dict[str, Any] = {}
    keeps_dtype: bool = True

    def make(self, **arguments: Any) -> Any:
        """Return a new module; operators and activations are given some of temperature, learnable and dim."""
        raise NotImplementedError

    def default(self) -> Any:
        """Return a new module, the same at every call."""
        return self.make()

    def other(self) -> Any:
        """Return a module of the same class whose state differs from the default."""
        return self.make(**self.settings)

    def example(self) -> Tensor:
        """Return a float64 input."""
        raise NotImplementedError

    def outputs(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs that are compared."""
        return (module(x),)

    def test_copies_and_state(self) -> None:
        x, module, loaded = self.example(), self.other(), self.default()
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
            assert_close(self.outputs(other, x), self.outputs(module, x), rtol=0, atol=0)
            assert repr(other) == repr(module)

    def test_low_precision_is_computed_in_float32(self) -> None:
        module, x = self.default().float(), self.example()
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            rounded = x.to(dtype)
            expected = self.outputs(module, rounded.float())
            if self.keeps_dtype:
                expected = tuple(output.to(dtype) for output in expected)
            for autocast in (False, dtype != torch.float16):  # on CPUs, torch.cat refuses float16 under autocast
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    assert_close(self.outputs(module, rounded), expected, rtol=0, atol=0)


class KernelContract(ModuleContract):
    r"""Tests of a kernel: its formula, shapes, derivatives and density. Define ``make`` and ``energy``.

    Attributes:
        num_features: the values of D to test.
        density_features: the values of D for which exp(-d) has a finite integral, checked by quadrature; () for none.
        kinks: distances from the center, besides 0, at which a derivative is discontinuous.
        reach: distance from the center beyond which each feature has less than 1e-7 of the probability.

    Example:
        >>> import em_lightning.kernels as kernels
        >>> class TestLaplace(KernelContract):
        ...     def make(self, num_features):
        ...         return kernels.LaplaceKernel(scale=0.5, learnable=True)
        ...
        ...     def energy(self, x, center):
        ...         return sum(abs(a - b) / 0.5 for a, b in zip(x, center))
        >>> TestLaplace().test_energies_are_the_formula()
    """

    num_features: Sequence[int] = (1, 2, 3)
    density_features: Sequence[int] = (1, 2, 3)
    kinks: Sequence[float] = ()
    reach: float = 64.0

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
        """Return a copy with changed parameter values."""
        moved = copy.deepcopy(kernel)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(0.1)
        return moved

    def example(self) -> Tensor:
        return torch.cat(self.draw(self.num_features[-1]))

    def outputs(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return (module(x[:_NUM_ITEMS], x[_NUM_ITEMS:]),)

    def draw(self, num_features: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Return normal random items (5, D) and centers (3, D)."""
        generator = torch.Generator().manual_seed(num_features)
        x = 1.5 * torch.randn(_NUM_ITEMS, num_features, generator=generator, dtype=torch.float64)
        centers = torch.randn(_NUM_CENTERS, num_features, generator=generator, dtype=torch.float64)
        return x.to(dtype), centers.to(dtype)

    def quadrature(self, center: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield blocks of nodes (M, D) and weights (M,) of a quadrature of R^D around a center (D,).

        It is a product of Gauss-Legendre rules on intervals that double away from the center.
        Override it for a density on a subset of R^D, such as a sphere.
        """
        powers = [2.0**k for k in range(-1, 1 + math.ceil(math.log2(self.reach)))]
        edges = torch.tensor(sorted({0.0, *self.kinks, *powers})).double()
        # Ten nodes per interval (chosen) make the integrals of the library's kernels exact to the 1e-6 of the test.
        roots, root_weights = (torch.from_numpy(value) for value in np.polynomial.legendre.leggauss(10))
        half_widths = edges.diff().unsqueeze(-1) / 2
        distances = (edges[:-1].unsqueeze(-1) + half_widths * (1 + roots)).flatten()
        weights = (half_widths * root_weights).flatten().repeat(2)  # of one axis, for both directions
        offsets = torch.cat([-distances, distances])
        node_indices = torch.cartesian_prod(*[torch.arange(len(offsets))] * len(center)).reshape(-1, len(center))
        for indices in node_indices.split(2**16):  # blocks that fit into memory
            yield center + offsets[indices], weights[indices].prod(-1)

    def cases(self) -> Iterator[tuple[Kernel, Tensor, Tensor]]:
        """Yield kernel, items and centers in float64 for each number of features."""
        for num_features in self.num_features:
            yield (self.make(num_features).double(), *self.draw(num_features))

    def test_energies_are_the_formula(self) -> None:
        for kernel, x, centers in self.cases():
            x[0] = centers[0]
            expected = [[self.energy(item.tolist(), center.tolist()) for center in centers] for item in x]
            assert_close(kernel(x, centers), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)

    def test_leading_dimensions_broadcast(self) -> None:
        for kernel, x, centers in self.cases():
            items = torch.stack([x, x + 0.5]).unsqueeze(1)  # (2, 1, N, D)
            centers = torch.stack([centers, 2 * centers, centers - 0.25])  # (3, K, D)
            expected = torch.stack([torch.stack([kernel(x[0], some) for some in centers]) for x in items])
            assert_close(kernel(items, centers), expected, rtol=1e-12, atol=1e-12)

    def test_gradients_are_those_of_the_energies(self) -> None:
        for kernel, x, centers in self.cases():
            inputs = [value.requires_grad_() for value in (x, centers, *kernel.parameters())]
            for check in (gradcheck, gradgradcheck):  # both change the kernel's parameters in place
                assert check(lambda x, centers, *_, kernel=kernel: kernel(x, centers), inputs)

    def test_the_density_integrates_to_one(self) -> None:
        for num_features in self.density_features:
            center = self.draw(num_features)[1][:1]  # the first of the centers
            default = self.make(num_features).double()
            for kernel in (default, self.moved(default)):
                log_normalizer = kernel.log_normalizer(num_features).detach()
                assert log_normalizer.shape == (), f"log_normalizer must have shape (), got {log_normalizer.shape}"
                integral = 0.0
                for nodes, weights in self.quadrature(center[0]):
                    density = (-kernel(nodes, center).squeeze(-1) - log_normalizer).exp()
                    integral += float(weights @ density.detach())
                assert abs(integral - 1) < 1e-6, f"D = {num_features}: {integral} with {kernel}"


class CompetitionContract(ModuleContract):
    """Tests of a competition operator: r = dF/dd, sum r = 1, F(d + c) = F(d) + c, gradients and axes.

    Energies d up to 1e3, responsibilities r, free energy F, a number c. Identities must hold to 1e-10 in float64.
    """

    settings = {"temperature": 0.3}

    def example(self) -> Tensor:
        return self.energies(6, 8)

    def outputs(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(x))[1:]  # responsibilities and free energy; the energies are the input

    def shift(self, operator: Competition, c: float) -> Competition:
        """Return the operator for energies shifted by c: the same, or one whose background energy is shifted too."""
        return operator

    def totals(self, responsibilities: Tensor) -> Tensor:
        """Return the sums over the last axis that must be 1."""
        return responsibilities.sum(-1)

    @staticmethod
    def energies(*shape: int, size: float = 3.0) -> Tensor:
        """Return random energies in [-size, size], float64."""
        return (torch.rand(*shape, dtype=torch.float64) * 2 - 1) * size

    def check_identities(self, operator: Competition, d: Tensor, log_prior: Tensor | None = None) -> None:
        """Assert dF/dd = r, r >= 0 and sum r = 1 for energies (N, K)."""
        posterior = operator(d.requires_grad_(), log_prior)
        (grad,) = torch.autograd.grad(posterior.free_energy.sum(), d)
        error = (grad - posterior.responsibilities[..., : d.shape[-1]]).abs().max()
        assert error <= _TOLERANCE, f"dF/dd differs from r by {error:.1e}"
        assert (posterior.responsibilities >= 0).all()
        assert (self.totals(posterior.responsibilities) - 1).abs().max() <= _TOLERANCE

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    @pytest.mark.parametrize("size", [1.0, 30.0, 1e3])
    def test_identities(self, size: float, temperature: float) -> None:
        operator = self.make(temperature=temperature)
        self.check_identities(operator, self.energies(16, 8, size=size))
        self.check_identities(operator, self.energies(16, 8, size=size), self.energies(8, size=1.0))

    def test_shift_rule(self) -> None:
        d, operator = self.energies(16, 8, size=1e3), self.make(temperature=2.0)
        before = operator(d)
        after = self.shift(operator, 10.0)(d + 10.0)
        assert (after.free_energy - before.free_energy - 10.0).abs().max() <= _TOLERANCE
        assert (after.responsibilities - before.responsibilities).abs().max() <= _TOLERANCE

    @pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
    def test_any_axis(self, dim: int) -> None:
        d, log_prior = self.energies(8, 8, 8), self.energies(8)
        expected = self.make()(d.movedim(dim, -1), log_prior)
        for posterior in (self.make(dim=dim)(d, log_prior), self.make()(d, log_prior, dim)):
            assert_close(posterior.responsibilities.movedim(dim, -1), expected.responsibilities)
            free_energy = posterior.free_energy  # grouped competitions keep the axis, with one entry per group
            if free_energy.ndim == 3:
                free_energy = free_energy.movedim(dim, -1)
            assert_close(free_energy, expected.free_energy)

    def test_gradients_of_energies_prior_and_temperature(self) -> None:
        operator = self.make(temperature=1.5, learnable=True).double()
        inputs = [self.energies(4, 4).requires_grad_(), self.energies(4).requires_grad_(), *operator.parameters()]
        # Without the energies among the outputs; gradcheck changes the parameters in place.
        assert gradcheck(lambda d, log_prior, *_: tuple(operator(d, log_prior))[1:], inputs, atol=1e-6)


class ActivationContract(ModuleContract):
    """Tests of an activation: shapes, closed form, first and second derivatives, and axes."""

    settings = {"temperature": 0.3}

    def example(self) -> Tensor:
        return self.inputs(6, 8)

    @staticmethod
    def inputs(*shape: int, size: float = 2.0) -> Tensor:
        """Return normal random pre-activations of standard deviation ``size``, float64."""
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
        assert_close(activation(z), activation.generic(z), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("shape, dim", [((2, 8, 3, 3), 1), ((2, 8, 5), 1), ((2, 5, 8), -1), ((8, 3), -2)])
    def test_any_axis(self, shape: tuple[int, ...], dim: int) -> None:
        z = self.inputs(*shape)
        assert_close(self.make(dim=dim)(z), self.make()(z.movedim(dim, -1)).movedim(-1, dim))

    def test_gradcheck(self) -> None:
        activation, z = self.make(temperature=1.5), self.inputs(3, 4).requires_grad_()
        assert gradcheck(activation, z)
        assert gradgradcheck(activation, z)


class LossContract(ModuleContract):
    """Tests of a loss of a batch of energies: gradient, order of items and units, axis, mask, weights and precision.

    Losses whose ``forward`` takes no weights, or that have no attribute ``dim``, skip the tests of weights or axes.
    """

    keeps_dtype = False

    def example(self) -> Tensor:
        """Return energies (12 items, 5 units), positive like those after a ReLU."""
        return torch.rand(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4

    def outputs(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return (self.value(module, x),)

    def value(self, loss: nn.Module, *arguments: Any, **named: Any) -> Tensor:
        """Return the loss as a scalar: the sum of the terms if it returns a dictionary."""
        result = loss(*arguments, **named)
        return torch.stack(list(result.values())).sum() if isinstance(result, dict) else result

    def test_gradient(self) -> None:
        loss = self.make()
        assert gradcheck(lambda x: self.value(loss, x), (self.example().requires_grad_(),))

    def test_order_does_not_matter(self) -> None:
        loss, x = self.make(), self.example()
        value = self.value(loss, x)
        assert_close(self.value(loss, x[torch.randperm(12)]), value)
        assert_close(self.value(loss, x[:, torch.randperm(5)]), value)

    def test_mask_and_weights(self) -> None:
        loss, x = self.make(), self.example()
        if "weights" not in inspect.signature(loss.forward).parameters:
            pytest.skip("the loss takes no weights")
        mask = torch.arange(12) % 3 > 0
        holes = torch.where(mask[:, None], x, torch.nan).requires_grad_()
        value = self.value(loss, holes, mask)
        assert_close(value, self.value(loss, x[mask]))
        (gradient,) = torch.autograd.grad(value, holes)
        assert gradient[mask].isfinite().all() and not gradient[~mask].any()
        counts = torch.arange(12) % 3
        repeated = self.value(loss, x.repeat_interleave(counts, dim=0))
        assert_close(self.value(loss, x, weights=counts.double()), repeated)

    def test_positions_are_items(self) -> None:
        loss, x = self.make(), self.example()
        if not hasattr(loss, "dim"):
            pytest.skip("the loss has no dim")
        loss.dim = 1
        assert_close(self.value(loss, x.reshape(2, 2, 3, 5).movedim(-1, 1)), self.value(self.make(), x))
