"""Contract tests of a competition operator, for authors of new ones to subclass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from em_lightning.competition import Competition
from em_lightning.testing.modules import TemperedContract


class CompetitionContract(TemperedContract):
    """Tests that every operator must pass: r = dF/dd, sum r = 1, F(d + c) = F(d) + c, limits, axes and dtypes.

    Subclass it under a name that pytest collects, and define :meth:`make`. The other methods and attributes describe
    intended differences, such as an additional hypothesis.

    Attributes:
        tolerance: largest error of dF/dd - r, of sum r - 1 and of the shift rule in float64 for energies up to 1e3.

    Example:
        >>> from em_lightning.competition import Softmin
        >>> class TestMyOperator(CompetitionContract):
        ...     def make(self, **arguments):
        ...         return Softmin(**arguments)
    """

    tolerance = 1e-10

    def make(self, **arguments: Any) -> Competition:
        """Return a new operator; the arguments are a subset of temperature, learnable and dim."""
        raise NotImplementedError

    def example(self) -> Tensor:
        """Return energies (6 items, 8 hypotheses)."""
        return self.energies(6, 8)

    def outputs(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(x))[1:]

    def shift(self, operator: Competition, c: float) -> Competition:
        """Return the operator for energies shifted by c: the same, unless it owns an energy."""
        return operator

    def totals(self, responsibilities: Tensor) -> Tensor:
        """Return the sums over the last axis that must be 1."""
        return responsibilities.sum(-1)

    def cold(self, energies: Tensor) -> Tensor | None:
        """Return the responsibilities for T -> 0 along the last axis; ``None`` requires finite ones only."""
        return torch.nn.functional.one_hot(energies.argmin(-1), energies.shape[-1]).to(energies)

    def warm(self, energies: Tensor) -> Tensor:
        """Return the responsibilities for T -> inf along the last axis."""
        return torch.full_like(energies, 1 / energies.shape[-1])

    @staticmethod
    def energies(*shape: int, size: float = 3.0) -> Tensor:
        """Return random energies in [-size, size], float64."""
        return (torch.rand(*shape, dtype=torch.float64) * 2 - 1) * size

    def check_identities(self, operator: Competition, d: Tensor, log_prior: Tensor | None = None) -> None:
        """Assert dF/dd = r, r >= 0 and sum r = 1 for energies (N, K)."""
        posterior = operator(d.requires_grad_(), log_prior)
        (grad,) = torch.autograd.grad(posterior.free_energy.sum(), d)
        error = (grad - posterior.responsibilities[..., : d.shape[-1]]).abs().max()
        assert error <= self.tolerance, f"dF/dd differs from r by {error:.1e}"
        assert (posterior.responsibilities >= 0).all()
        assert (self.totals(posterior.responsibilities) - 1).abs().max() <= self.tolerance

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    @pytest.mark.parametrize("size", [1.0, 30.0, 1e3])
    def test_identities(self, size: float, temperature: float) -> None:
        operator = self.make(temperature=temperature)
        self.check_identities(operator, self.energies(16, 8, size=size))
        self.check_identities(operator, self.energies(16, 8, size=size), self.energies(8, size=1.0))

    def test_one_hypothesis(self) -> None:
        self.check_identities(self.make(), self.energies(5, 1))

    def test_shift_rule(self) -> None:
        d, operator = self.energies(16, 8, size=1e3), self.make(temperature=2.0)
        before = operator(d)
        after = self.shift(operator, 10.0)(d + 10.0)
        assert (after.free_energy - before.free_energy - 10.0).abs().max() <= self.tolerance
        assert (after.responsibilities - before.responsibilities).abs().max() <= self.tolerance

    def test_equal_prior_changes_no_responsibility(self) -> None:
        d, operator = self.energies(16, 8), self.make()
        torch.testing.assert_close(operator(d, torch.zeros(8).double()).responsibilities, operator(d).responsibilities)

    def test_permutation_equivariance(self) -> None:
        d, order, operator = self.energies(16, 8, size=30.0), self.permutation(8), self.make()
        plain, permuted = operator(d).responsibilities[..., :8], operator(d[:, order]).responsibilities[..., :8]
        torch.testing.assert_close(permuted, plain[:, order], rtol=0, atol=max(self.tolerance, 1e-12))

    @pytest.mark.parametrize("temperature", [1e-6, 1e-30])
    def test_cold_limit(self, temperature: float) -> None:
        d = self.energies(16, 8).requires_grad_()
        posterior = self.make(temperature=temperature)(d)
        (grad,) = torch.autograd.grad(posterior.free_energy.sum(), d)
        assert posterior.free_energy.isfinite().all() and grad.isfinite().all()
        expected = self.cold(d.detach())
        if expected is None:
            assert posterior.responsibilities.isfinite().all()
        else:
            torch.testing.assert_close(posterior.responsibilities, expected)

    def test_warm_limit(self) -> None:
        d = self.energies(16, 8)
        posterior = self.make(temperature=1e9)(d)
        assert posterior.free_energy.isfinite().all()
        torch.testing.assert_close(posterior.responsibilities, self.warm(d), rtol=0, atol=1e-7)

    @pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
    def test_any_axis(self, dim: int) -> None:
        d, log_prior = self.energies(8, 8, 8), self.energies(8)
        expected = self.make()(d.movedim(dim, -1), log_prior)
        for posterior in (self.make(dim=dim)(d, log_prior), self.make()(d, log_prior, dim)):
            torch.testing.assert_close(posterior.responsibilities.movedim(dim, -1), expected.responsibilities)
            moved = posterior.free_energy
            moved = moved.movedim(dim, -1) if moved.ndim == 3 else moved
            torch.testing.assert_close(moved, expected.free_energy)

    def test_gradients_of_energies_prior_and_temperature(self) -> None:
        operator = self.make(temperature=1.5, learnable=True).double()
        inputs = [self.energies(4, 4).requires_grad_(), self.energies(4).requires_grad_(), *operator.parameters()]

        def call(d: Tensor, log_prior: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            return tuple(operator(d, log_prior))[1:]  # gradcheck changes the parameters in place

        assert torch.autograd.gradcheck(call, inputs, atol=1e-6)

    def test_empty_batch(self) -> None:
        d = torch.zeros(0, 8, requires_grad=True)
        posterior = self.make()(d)
        assert posterior.responsibilities.shape[0] == 0 and posterior.free_energy.shape[0] == 0
        posterior.free_energy.sum().backward()
        assert d.grad is not None and d.grad.shape == (0, 8)

    def test_excluded_hypothesis(self) -> None:
        d = self.energies(3, 8).index_fill(1, torch.tensor([5]), torch.inf).requires_grad_()
        operator = self.make(learnable=True).double()
        posterior = operator(d)
        assert (posterior.responsibilities[:, 5] == 0).all()
        assert (self.totals(posterior.responsibilities) - 1).abs().max() <= self.tolerance
        loss = posterior.free_energy.sum() + posterior.responsibilities.square().sum()
        for grad in torch.autograd.grad(loss, [d, *operator.parameters()], allow_unused=True):
            assert grad is None or grad.isfinite().all()
