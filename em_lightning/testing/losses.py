"""Contract tests of a loss, and a comparison of one process with two."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from em_lightning.testing.distributed import run_ranks
from em_lightning.testing.modules import ModuleContract


class LossContract(ModuleContract):
    """Tests that every loss of a batch of energies must pass; subclass it in a test file and define :meth:`make`.

    The tests of mask and weights are for losses whose ``forward`` takes them, the test of the axis for losses with an
    attribute ``dim``.

    Example:
        >>> from em_lightning.losses import VarianceLoss
        >>> class TestVariance(LossContract):
        ...     def make(self):
        ...         return VarianceLoss()
        >>> TestVariance().test_gradient()
    """

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
        assert torch.autograd.gradcheck(lambda x: self.value(loss, x), (self.example().requires_grad_(),))

    def test_order_does_not_matter(self) -> None:
        loss, x = self.make(), self.example()
        value = self.value(loss, x)
        torch.testing.assert_close(self.value(loss, x[torch.randperm(12)]), value)
        torch.testing.assert_close(self.value(loss, x[:, torch.randperm(5)]), value)

    @pytest.mark.filterwarnings("ignore:a batch of:UserWarning")
    def test_extremes_are_finite(self) -> None:
        x = self.example().float()
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
            assert value.shape == (), f"{name}: the loss must be a scalar, got shape {tuple(value.shape)}"
            assert value.isfinite(), f"{name}: the loss is {value.item()}"
            assert gradient.isfinite().all(), f"{name}: the gradient has {gradient[~gradient.isfinite()][0].item()}"

    def test_low_precision_is_computed_in_float32(self) -> None:
        loss, x = self.make(), self.example().bfloat16().requires_grad_()
        value = self.value(loss, x)
        torch.testing.assert_close(value, self.value(loss, x.float()))
        (gradient,) = torch.autograd.grad(value, x)
        assert value.dtype == torch.float32 and gradient.dtype == torch.bfloat16
        weights = {"weights": torch.arange(12) / 7} if _takes_weights(loss) else {}
        expected = self.value(loss, x, **weights)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(self.value(loss, x, **weights), expected)

    def test_mask_and_weights(self) -> None:
        loss, x = self.make(), self.example()
        if not _takes_weights(loss):
            pytest.skip("the loss takes no weights")
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
        loss, x = self.make(), self.example()
        if not hasattr(loss, "dim"):
            pytest.skip("the loss has no dim")
        loss.dim = 1
        torch.testing.assert_close(self.value(loss, x.reshape(2, 2, 3, 5).movedim(-1, 1)), self.value(self.make(), x))


def _takes_weights(loss: nn.Module) -> bool:
    return "weights" in inspect.signature(loss.forward).parameters


def assert_ranks_agree(losses: Sequence[nn.Module], folder: Path, tolerance: float = 1e-6) -> None:
    """Check that two data-parallel processes with uneven shares of a batch get the loss and gradient of one process.

    The energies have a mean of 1,000, at which moments computed in one pass lose their digits. The check takes seconds
    and is therefore separate from the contract: call it once with all losses.

    Args:
        losses: losses of energies; the terms of a dictionary are summed.
        folder: an empty folder, such as pytest's ``tmp_path``.
        tolerance: largest difference allowed, relative to the loss, or to 1 if that is larger, and to the largest
            gradient.

    Raises:
        AssertionError: a loss differs; the message names it and the difference.
    """
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    ranks = run_ranks(_rank_gradients, list(losses), features, folder=folder)
    for index, loss in enumerate(losses):
        value, gradient = _gradient(loss, _network(), features)
        for rank in ranks:
            value_gap = float((rank[index][0] - value).abs() / value.abs().clamp(min=1.0))
            gradient_gap = float((rank[index][1] - gradient).abs().max() / gradient.abs().max())
            assert value_gap <= tolerance, f"{loss}: difference of the loss {value_gap:.1e}"
            assert gradient_gap <= tolerance, f"{loss}: relative difference of the gradient {gradient_gap:.1e}"


def _network() -> nn.Module:
    network = nn.Linear(4, 4)
    nn.init.eye_(network.weight)
    nn.init.constant_(network.bias, 1000.0)
    return network


def _gradient(loss: nn.Module, network: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    value = LossContract().value(loss, network(features))
    value.backward()
    return value.detach(), torch.cat([torch.as_tensor(parameter.grad).flatten() for parameter in network.parameters()])


def _rank_gradients(rank: int, losses: list[nn.Module], features: Tensor) -> list[tuple[Tensor, Tensor]]:
    share = features[:19] if rank == 0 else features[19:]
    return [_gradient(loss, DistributedDataParallel(_network()), share) for loss in losses]
