"""The contract tests with finer checks of the built-in classes: extremes, compilation, transforms, wrong input."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from em_lightning import testing
from em_lightning.kernels import NoDensityError


class ModuleChecks:
    def objective(self, module, x):
        """Return a scalar that depends on all outputs."""
        return torch.stack([output.square().sum() for output in self.outputs(module, x)]).sum()

    def test_function_transforms(self):
        module, x = self.default(), torch.stack([self.example(), self.example() + 0.5])
        batched = torch.func.vmap(lambda x: self.outputs(module, x))(x)
        gradients = torch.func.vmap(torch.func.grad(lambda x: self.objective(module, x)))(x)
        for n in range(2):
            torch.testing.assert_close(tuple(output[n] for output in batched), self.outputs(module, x[n]))
            item = x[n].clone().requires_grad_()
            (expected,) = torch.autograd.grad(self.objective(module, item), item)
            torch.testing.assert_close(gradients[n], expected)

    def test_compiles_to_one_graph(self):
        torch.compiler.reset()  # otherwise the compilations of other modules count as recompilations
        module, x = self.default(), self.example().requires_grad_()
        compiled = torch.compile(lambda x: self.outputs(module, x), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), self.outputs(module, x))
        total = torch.stack([output.square().sum() for output in compiled(x)]).sum()
        torch.testing.assert_close(torch.autograd.grad(total, x), torch.autograd.grad(self.objective(module, x), x))


class TemperedChecks(ModuleChecks):
    """Checks of competition operators and activations, which have a temperature and an axis."""

    def permutation(self, size):
        """Return a permutation of the units or hypotheses under which the module is equivariant."""
        return torch.randperm(size)

    @pytest.mark.parametrize("learnable", [False, True])
    def test_temperature_can_be_learned_and_set(self, learnable):
        x, module = self.example(), self.make(temperature=0.3, learnable=learnable).double()
        torch.testing.assert_close(self.outputs(module, x), self.outputs(self.make(temperature=0.3), x))
        if learnable:
            ratio = module.log_temperature_ratio
            assert ratio.shape == (1,)
            # gradcheck changes the parameter in place.
            assert gradcheck(lambda _: self.objective(module, x), ratio, atol=1e-4)
        module.temperature = 0.7
        torch.testing.assert_close(self.outputs(module, x), self.outputs(self.make(temperature=0.7), x))

    def test_wrong_input_raises(self):
        with pytest.raises(TypeError, match="int64"):
            self.make()(torch.zeros(4, 8, dtype=torch.long))
        for temperature in (0.0, -1.0):
            with pytest.raises(ValueError, match=f"temperature={temperature}"):
                self.make(temperature=temperature)


class KernelChecks(ModuleChecks, testing.KernelContract):
    def test_log_normalizer_has_a_gradient_or_a_reason(self):
        for kernel, x, _ in self.cases():
            size = x.shape[-1]
            if size not in self.density_features:
                with pytest.raises(NoDensityError, match=type(kernel).__name__):
                    kernel.log_normalizer(size)
                continue

            def log_normalizer(*parameters, kernel=kernel, size=size):
                return kernel.log_normalizer(size)

            if parameters := tuple(kernel.parameters()):
                assert gradcheck(log_normalizer, parameters)
                assert gradgradcheck(log_normalizer, parameters)

    def test_no_items(self):
        for kernel, x, centers in self.cases():
            assert kernel(x[:0], centers).shape == (0, len(centers))

    def test_extreme_distances_stay_finite(self):
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

    def test_wrong_inputs_raise(self):
        size = self.num_features[-1]
        x, centers = self.draw(size, torch.float32)
        with pytest.raises(TypeError, match="x .*int64"):
            self.make(size)(x.long(), centers)
        with pytest.raises(ValueError) as caught:
            self.make(size)(x, torch.cat([centers, centers], dim=-1))
        assert str(tuple(x.shape)) in str(caught.value) and str((len(centers), 2 * size)) in str(caught.value)


class CompetitionChecks(TemperedChecks, testing.CompetitionContract):
    def cold(self, energies):
        """Return the responsibilities for T -> 0 along the last axis; ``None`` requires finite ones only."""
        return torch.nn.functional.one_hot(energies.argmin(-1), energies.shape[-1]).to(energies)

    def warm(self, energies):
        """Return the responsibilities for T -> inf along the last axis."""
        return torch.full_like(energies, 1 / energies.shape[-1])

    def test_one_hypothesis(self):
        self.check_identities(self.make(), self.energies(5, 1))

    def test_equal_prior_changes_no_responsibility(self):
        d, operator = self.energies(16, 8), self.make()
        torch.testing.assert_close(operator(d, torch.zeros(8).double()).responsibilities, operator(d).responsibilities)

    def test_permutation_equivariance(self):
        d, order, operator = self.energies(16, 8, size=30.0), self.permutation(8), self.make()
        plain, permuted = operator(d).responsibilities[..., :8], operator(d[:, order]).responsibilities[..., :8]
        torch.testing.assert_close(permuted, plain[:, order], rtol=0, atol=1e-10)

    @pytest.mark.parametrize("temperature", [1e-6, 1e-30])
    def test_cold_limit(self, temperature):
        d = self.energies(16, 8).requires_grad_()
        posterior = self.make(temperature=temperature)(d)
        (grad,) = torch.autograd.grad(posterior.free_energy.sum(), d)
        assert posterior.free_energy.isfinite().all() and grad.isfinite().all()
        expected = self.cold(d.detach())
        if expected is None:
            assert posterior.responsibilities.isfinite().all()
        else:
            torch.testing.assert_close(posterior.responsibilities, expected)

    def test_warm_limit(self):
        d = self.energies(16, 8)
        posterior = self.make(temperature=1e9)(d)
        assert posterior.free_energy.isfinite().all()
        torch.testing.assert_close(posterior.responsibilities, self.warm(d), rtol=0, atol=1e-7)

    def test_empty_batch(self):
        d = torch.zeros(0, 8, requires_grad=True)
        posterior = self.make()(d)
        assert posterior.responsibilities.shape[0] == 0 and posterior.free_energy.shape[0] == 0
        posterior.free_energy.sum().backward()
        assert d.grad is not None and d.grad.shape == (0, 8)

    def test_excluded_hypothesis(self):
        d = self.energies(3, 8).index_fill(1, torch.tensor([5]), torch.inf).requires_grad_()
        operator = self.make(learnable=True).double()
        posterior = operator(d)
        assert (posterior.responsibilities[:, 5] == 0).all()
        assert (self.totals(posterior.responsibilities) - 1).abs().max() <= 1e-10
        loss = posterior.free_energy.sum() + posterior.responsibilities.square().sum()
        for grad in torch.autograd.grad(loss, [d, *operator.parameters()], allow_unused=True):
            assert grad is None or grad.isfinite().all()


class ActivationChecks(TemperedChecks, testing.ActivationContract):
    def test_competes_describes_the_jacobian(self):
        activation = self.make()
        jacobian = torch.func.jacrev(activation)(self.inputs(4, size=0.3))
        mixed = jacobian - torch.diag(jacobian.diagonal())
        assert bool((mixed != 0).any()) == activation.competes

    def test_permutation_equivariance(self):
        activation, z, order = self.make(), self.inputs(6, 8), self.permutation(8)
        torch.testing.assert_close(activation(z[:, order]), activation(z)[:, order])

    @pytest.mark.parametrize("shape", [(5, 1), (0, 8)])
    def test_one_unit_and_no_items(self, shape):
        z = torch.randn(shape, requires_grad=True)
        y = self.make()(z)
        assert y.shape == shape and y.isfinite().all()
        (grad,) = torch.autograd.grad(y.sum(), z)
        assert grad.shape == shape and grad.isfinite().all()

    def test_large_zero_and_tied_inputs_stay_finite(self):
        for z in (self.inputs(4, 8, size=1e4), torch.zeros(2, 8), torch.full((2, 8), 1e4)):
            for temperature in (1e-3, 1.0, 1e6):
                x = z.float().requires_grad_()
                y = self.make(temperature=temperature)(x)
                (grad,) = torch.autograd.grad(y.sum(), x)
                assert y.isfinite().all() and grad.isfinite().all()


class LossChecks(ModuleChecks, testing.LossContract):
    @pytest.mark.filterwarnings("ignore:a batch of:UserWarning")
    def test_extremes_are_finite(self):
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

    def test_weights_are_computed_in_float32_under_autocast(self):
        loss, x = self.make(), self.example().bfloat16()
        if not hasattr(loss, "dim"):
            pytest.skip("the loss takes no weights")
        expected = self.value(loss, x, weights=torch.arange(12) / 7)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(self.value(loss, x, weights=torch.arange(12) / 7), expected)
