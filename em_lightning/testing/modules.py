"""Contract tests that all modules share: copies, function transforms, compilation, low precision."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
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
            expected = tuple(output.to(dtype) for output in self.outputs(module, x.to(dtype).float()))
            torch.testing.assert_close(self.outputs(module, x.to(dtype)), expected, rtol=0, atol=0)
        plain = self.outputs(module, x.float())
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(self.outputs(module, x.float()), plain, rtol=0, atol=0)


class TemperedContract(ModuleContract):
    """Base class of the contracts of competition operators and activations, which have a temperature and an axis."""

    settings = {"temperature": 0.3}

    def permutation(self, size: int) -> Tensor:
        """Return a permutation of the units or hypotheses under which the module is equivariant."""
        return torch.randperm(size)

    @pytest.mark.parametrize("learnable", [False, True])
    def test_temperature_can_be_learned_and_set(self, learnable: bool) -> None:
        x, module = self.example(), self.make(temperature=0.3, learnable=learnable).double()
        torch.testing.assert_close(self.outputs(module, x), self.outputs(self.make(temperature=0.3), x))
        if learnable:
            ratio = module.log_temperature_ratio
            assert ratio.shape == (1,)
            # gradcheck changes the parameter in place.
            assert torch.autograd.gradcheck(lambda _: self.objective(module, x), ratio, atol=1e-4)
        module.temperature = 0.7
        torch.testing.assert_close(self.outputs(module, x), self.outputs(self.make(temperature=0.7), x))

    def test_wrong_input_raises(self) -> None:
        with pytest.raises(TypeError, match="int64"):
            self.make()(torch.zeros(4, 8, dtype=torch.long))
        for temperature in (0.0, -1.0):
            with pytest.raises(ValueError, match=f"temperature={temperature}"):
                self.make(temperature=temperature)
