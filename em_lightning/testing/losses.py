"""The contract of a loss."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from em_lightning.testing.distributed import run_ranks

__all__ = ["LossContract", "assert_ranks_agree"]


class LossContract:
    """What every loss of a batch of energies must satisfy; subclass it in a test file and say how to make yours.

    Example:
        >>> from em_lightning.losses import VarianceLoss
        >>> class TestVariance(LossContract):
        ...     def make(self):
        ...         return VarianceLoss()
        >>> TestVariance().test_gradient()
    """

    takes_mask = True
    """Whether the loss takes ``mask`` and ``weights`` of its items."""
    has_dim = True
    """Whether the constructor set an attribute ``dim``, the axis of the units."""

    def make(self) -> nn.Module:
        """Return a new loss with the units along the last axis."""
        raise NotImplementedError

    def energies(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return energies (12 items, 5 units), positive as those behind a ReLU."""
        return torch.rand(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype) * 4

    def value(self, loss: nn.Module, *arguments: Any, **named: Any) -> Tensor:
        """Return the loss as a scalar, the sum where it returns terms by name."""
        result = loss(*arguments, **named)
        return torch.stack(list(result.values())).sum() if isinstance(result, dict) else result

    def test_gradient(self) -> None:
        """The gradient is that of finite differences."""
        loss = self.make()
        assert torch.autograd.gradcheck(lambda x: self.value(loss, x), (self.energies().requires_grad_(),))

    def test_order_does_not_matter(self) -> None:
        """Neither the order of the items nor that of the units changes the loss."""
        loss, x = self.make(), self.energies()
        value = self.value(loss, x)
        torch.testing.assert_close(self.value(loss, x[torch.randperm(12)]), value)
        torch.testing.assert_close(self.value(loss, x[:, torch.randperm(5)]), value)

    def test_extremes_are_finite(self) -> None:
        """Value and gradient are finite for constant, zero, huge and tiny energies and for one item or unit."""
        x = self.energies(torch.float32)
        constant = x.clone()
        constant[:, :2] = 1000.1
        cases = {
            "constant units": constant,
            "zeros": torch.zeros_like(x),
            "one huge unit": x * torch.tensor([1e6, 1, 1, 1, 1]),
            "huge": x * 1e6,
            "tiny": x * 1e-30,
            "equal units": x[:, :1].expand(-1, 5).clone(),
            "fewer items than units": x[:3],
            "one item": x[:1],
            "one unit": x[:, :1],
        }
        for name, case in cases.items():
            case.requires_grad_()
            value = self.value(self.make(), case)
            (gradient,) = torch.autograd.grad(value, case)
            assert value.shape == (), f"{name}: a loss is a scalar, this one has shape {tuple(value.shape)}"
            assert value.isfinite(), f"{name}: the loss is {value.item()}"
            assert gradient.isfinite().all(), f"{name}: the gradient holds {gradient[~gradient.isfinite()][0].item()}"

    def test_low_precision(self) -> None:
        """Energies in bfloat16, and autocast, give what float32 gives for the same numbers."""
        loss, x = self.make(), self.energies(torch.bfloat16).requires_grad_()
        value = self.value(loss, x)
        torch.testing.assert_close(value, self.value(loss, x.float()))
        (gradient,) = torch.autograd.grad(value, x)
        assert value.dtype == torch.float32 and gradient.dtype == torch.bfloat16
        weights = (None, torch.arange(12) / 7) if self.takes_mask else ()
        expected = self.value(loss, x, *weights)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(self.value(loss, x, *weights), expected)

    def test_mask_and_weights(self) -> None:
        """A masked item may hold anything and changes nothing; a weight of 2 counts an item twice."""
        if not self.takes_mask:
            return
        loss, x = self.make(), self.energies()
        mask = torch.arange(12) % 3 > 0
        holes = torch.where(mask[:, None], x, torch.nan).requires_grad_()
        value = self.value(loss, holes, mask)
        torch.testing.assert_close(value, self.value(loss, x[mask]))
        (gradient,) = torch.autograd.grad(value, holes)
        assert gradient[mask].isfinite().all() and not gradient[~mask].any()
        counts = torch.arange(12) % 3
        repeated = self.value(loss, x.repeat_interleave(counts, dim=0))
        torch.testing.assert_close(self.value(loss, x, weights=counts.double()), repeated)

    def test_positions_are_items(self) -> None:
        """With the units along axis 1, each position of a feature map is an item."""
        if not self.has_dim:
            return
        loss, x = self.make(), self.energies()
        setattr(loss, "dim", 1)  # noqa: B010
        torch.testing.assert_close(self.value(loss, x.reshape(2, 2, 3, 5).movedim(-1, 1)), self.value(self.make(), x))

    def test_compile(self) -> None:
        """``torch.compile(fullgraph=True)`` gives the same value and gradient."""
        loss, x = self.make(), self.energies(torch.float32).requires_grad_()
        torch.compiler.reset()  # else every loss that compiles this line counts as a recompilation of it
        compiled = torch.compile(lambda x: self.value(loss, x), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), self.value(loss, x))
        torch.testing.assert_close(*(torch.autograd.grad(f(x), x) for f in (compiled, lambda x: self.value(loss, x))))

    def test_function_transforms(self) -> None:
        """``torch.func.grad`` under ``torch.func.vmap`` equals a loop."""
        loss, x = self.make(), self.energies().reshape(2, 6, 5)
        gradient = torch.func.grad(lambda x: self.value(loss, x))
        torch.testing.assert_close(torch.func.vmap(gradient)(x), torch.stack([gradient(x[0]), gradient(x[1])]))

    def test_copies(self) -> None:
        """A deep copy, a pickled one, and a new one with the same state agree with the original."""
        loss, x = self.make(), self.energies()
        new = self.make()
        new.load_state_dict(loss.state_dict())
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), new):
            assert torch.equal(self.value(other, x), self.value(loss, x))
        assert repr(loss)


def assert_ranks_agree(losses: Sequence[nn.Module], folder: Path, tolerance: float = 1e-6) -> list[tuple[float, float]]:
    """Check that two data-parallel processes with uneven shares of a batch get the loss and gradient of one process.

    The energies come from a linear layer and have a mean of 1,000, where one-pass moments are lost to rounding. This
    takes seconds, so it is no part of the contract: call it once with all your losses.

    Args:
        losses: losses of energies; those that return terms by name are summed.
        folder: an empty folder, such as pytest's ``tmp_path``.
        tolerance: the largest difference allowed, relative to the loss and to the largest gradient.

    Returns:
        For each loss the largest relative difference of its value and of its gradient.

    Raises:
        AssertionError: a loss differs, which it is, and by how much.
    """
    ranks = run_ranks(_rank_gradients, list(losses), folder=folder)
    differences = []
    for index, loss in enumerate(losses):
        value, gradient = _gradient(loss, _network(), _features())
        value_gap = max(float((rank[index][0] - value).abs() / value.abs()) for rank in ranks)
        gradient_gap = max(float((rank[index][1] - gradient).abs().max() / gradient.abs().max()) for rank in ranks)
        differences.append((value_gap, gradient_gap))
        assert value_gap <= tolerance, f"{loss}: two processes change the loss by {value_gap:.1e} of its value"
        assert gradient_gap <= tolerance, f"{loss}: two processes change the gradient by {gradient_gap:.1e} of its size"
    return differences


def _features() -> Tensor:
    return torch.randn(30, 6, generator=torch.Generator().manual_seed(0))


def _network() -> nn.Module:
    network = nn.Linear(6, 4)
    with torch.no_grad():
        # Orthogonal rows, so that what differs is the statistics and not an ill-conditioned covariance.
        nn.init.orthogonal_(network.weight, generator=torch.Generator().manual_seed(1))
        network.bias.fill_(1000.0)
    return network


def _gradient(loss: nn.Module, network: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    value = LossContract().value(loss, network(features))
    value.backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return value.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def _rank_gradients(rank: int, losses: list[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    share = (slice(None, 19), slice(19, None))[rank]
    return [_gradient(loss, DistributedDataParallel(_network()), _features()[share]) for loss in losses]
