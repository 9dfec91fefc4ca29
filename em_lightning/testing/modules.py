"""Contract tests that all modules share: copies, function transforms, compilation, low precision."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn


class ModuleContract:
    """Base class of the contracts of modules that map one tensor to one or more tensors."""

    settings: dict[str, Any] = {}
    """Arguments of a module whose state differs from the default."""

    def make(self, **arguments: Any) -> Any:
        """Return a new module with these constructor arguments."""
        raise NotImplementedError

    def default(self) -> Any:
        """Return a new module, the same at every call."""
        return self.make()

    def other(self) -> Any:
        """Return a module of the same class in another state."""
        return self.make(**self.settings)

    def example(self) -> Tensor:
        """Return a float64 input."""
        raise NotImplementedError

    def outputs(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs that are compared."""
        return (module(x),)

    def objective(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return a scalar that depends on all outputs."""
        return torch.stack([output.square().sum() for output in self.outputs(module, x)]).sum()

    def test_copies_and_state(self) -> None:
        x, module, loaded = self.example(), self.other(), self.default()
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
            torch.testing.assert_close(self.outputs(other, x), self.outputs(module, x), rtol=0, atol=0)
            assert repr(other) == repr(module)

    def test_function_transforms(self) -> None:
        module, x = self.default(), torch.stack([self.example(), self.example() + 0.5])
        batched = torch.func.vmap(lambda x: self.outputs(module, x))(x)
        gradients = torch.func.vmap(torch.func.grad(lambda x: self.objective(module, x)))(x)
        for n in range(2):
            torch.testing.assert_close(tuple(output[n] for output in batched), self.outputs(module, x[n]))
            item = x[n].clone().requires_grad_()
            (expected,) = torch.autograd.grad(self.objective(module, item), item)
            torch.testing.assert_close(gradients[n], expected)

    def test_compiles_to_one_graph(self) -> None:
        torch.compiler.reset()  # otherwise the compilations of other modules count as recompilations
        module, x = self.default(), self.example().requires_grad_()
        compiled = torch.compile(lambda x: self.outputs(module, x), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), self.outputs(module, x))
        total = torch.stack([output.square().sum() for output in compiled(x)]).sum()
        torch.testing.assert_close(torch.autograd.grad(total, x), torch.autograd.grad(self.objective(module, x), x))

    def test_low_precision_is_computed_in_float32(self) -> None:
        module, x = self.default().float(), self.example()
        for dtype in (torch.float16, torch.bfloat16):
            half, wide = self.outputs(module, x.to(dtype)), self.outputs(module, x.to(dtype).float())
            for found, expected in zip(half, wide, strict=True):
                torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=0)
        plain = self.outputs(module, x.float())
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(self.outputs(module, x.float()), plain, rtol=0, atol=0)
