"""Activations: contract tests, closed forms and Jacobians."""

import math

import pytest
import torch
from contracts import ActivationChecks

from em_lightning.activations import (
    ACTIVATIONS,
    Activation,
    DirectionActivation,
    GatedActivation,
    GroupedActivation,
    LogSoftmaxActivation,
    NegLogSoftminActivation,
    ReLUGatedActivation,
    ResidualSoftmaxActivation,
    SignedActivation,
    SoftmaxGatedActivation,
    SparseminActivation,
)
from em_lightning.kernels import GaussianKernel, StudentTKernel

TEN = [
    "direction",
    "gated",
    "grouped",
    "log_softmax",
    "neg_log_softmin",
    "relu_gated",
    "residual_softmax",
    "signed",
    "softmax_gated",
    "sparsemin",
]
SCALAR_KERNELS = {
    "gaussian": {"scale": 0.8},
    "laplace": {"scale": 0.7},
    "logistic": {"slope": 1.3},
    "student_t": {"df": 1.5, "scale": 0.6},
    "huber": {"delta": 0.9},
    "pseudo_huber": {"delta": 0.9},
    "exponential": {"rate": 0.4},
    "dot_product": {"scale": 1.2},
}


class TestSigned(ActivationChecks):
    def make(self, **arguments):
        return SignedActivation(**arguments)


class TestSignedStudentT(ActivationChecks):
    def make(self, **arguments):
        return SignedActivation({"name": "student_t", "df": 2.0, "density": True}, margin=0.5, **arguments)


class TestGated(ActivationChecks):
    def make(self, **arguments):
        return GatedActivation(**arguments)


class TestNegLogSoftmin(ActivationChecks):
    def make(self, **arguments):
        return NegLogSoftminActivation(**arguments)


class TestLogSoftmax(ActivationChecks):
    def make(self, **arguments):
        return LogSoftmaxActivation(**arguments)


class TestSoftmaxGated(ActivationChecks):
    def make(self, **arguments):
        return SoftmaxGatedActivation(**arguments)


class TestReLUGated(ActivationChecks):
    def make(self, **arguments):
        return ReLUGatedActivation(**arguments)


class TestResidualSoftmax(ActivationChecks):
    def make(self, **arguments):
        return ResidualSoftmaxActivation(**arguments)


class TestGrouped(ActivationChecks):
    def make(self, **arguments):
        return GroupedActivation(**arguments)

    def permutation(self, size):
        return torch.arange(size).reshape(-1, 2)[torch.randperm(size // 2)].flip(1).flatten()


class TestSparsemin(ActivationChecks):
    def make(self, **arguments):
        return SparseminActivation(**arguments)


class TestDirection(ActivationChecks):
    def make(self, **arguments):
        return DirectionActivation(**arguments)


def test_every_activation_is_registered_and_has_a_contract():
    assert sorted(ACTIVATIONS) == TEN
    contracts = [cls for cls in globals().values() if isinstance(cls, type) and issubclass(cls, ActivationChecks)]
    covered = {type(cls().make()) for cls in contracts if cls is not ActivationChecks}
    assert covered == {ACTIVATIONS[key] for key in ACTIVATIONS}


def signed(kernel, **arguments):
    return SignedActivation({"name": kernel, **SCALAR_KERNELS[kernel]}, **arguments).double()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("margin", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("kernel", SCALAR_KERNELS)
def test_closed_forms_equal_the_generic_path(kernel, margin, temperature):
    activation = signed(kernel, margin=margin, temperature=temperature)
    z = torch.cat([torch.linspace(-6, 6, 121), torch.tensor([margin, -margin, 30.0, -30.0])]).double()
    torch.testing.assert_close(activation(z), activation.generic(z), rtol=1e-12, atol=1e-12)
    z = torch.cat([torch.linspace(-5.03, 5.03, 40), torch.tensor([0.0, margin, -margin])]).double().requires_grad_()
    expected = torch.autograd.grad(activation.generic(z).sum(), z)
    torch.testing.assert_close(torch.autograd.grad(activation(z).sum(), z), expected, rtol=1e-9, atol=1e-12)


def formula(kernel, z, m):
    """Return the posterior mean from energies at +-m, in plain Python."""

    def energy(u):
        return {
            "gaussian": lambda: u**2 / (2 * 0.8**2),
            "laplace": lambda: abs(u) / 0.7,
            "logistic": lambda: math.log1p(math.exp(-1.3 * u)),
            "student_t": lambda: math.log(1 + u**2 / (1.5 * 0.6**2)),
            "huber": lambda: u**2 / 2 if abs(u) <= 0.9 else 0.9 * (abs(u) - 0.45),
            "pseudo_huber": lambda: 0.9**2 * (math.sqrt(1 + (u / 0.9) ** 2) - 1),
            "exponential": lambda: math.exp(0.4 * abs(u)),
        }[kernel]()

    if kernel == "dot_product":
        plus, minus = math.exp(1.2 * z * m), math.exp(-1.2 * z * m)
    else:
        plus, minus = math.exp(-energy(z - m)), math.exp(-energy(z + m))
    return (plus - minus) / (plus + minus)


@pytest.mark.parametrize("kernel", SCALAR_KERNELS)
def test_signed_is_the_posterior_mean(kernel):
    for z in torch.randn(30).double().tolist():
        y = signed(kernel, margin=1.4)(torch.tensor(z).double()).item()
        assert y == pytest.approx(formula(kernel, z, 1.4), abs=1e-12)


@pytest.mark.parametrize("kernel", SCALAR_KERNELS)
def test_signed_is_stable_for_large_inputs(kernel):
    activation = SignedActivation({"name": kernel, **SCALAR_KERNELS[kernel]})
    z = torch.tensor([-1e6, -1e3, -1e-8, 0.0, 1e-8, 1e3, 1e6], requires_grad=True)
    y = activation(z)
    (grad,) = torch.autograd.grad(y.sum(), z)
    assert y.isfinite().all() and grad.isfinite().all()
    exact = signed(kernel)(z.detach().double())
    torch.testing.assert_close(y.detach().double(), exact, rtol=1e-5, atol=1e-6)
    assert kernel == "logistic" or grad[3] > 0


def test_signed_named_forms():
    z = torch.linspace(-4, 4, 81).double()
    torch.testing.assert_close(signed("gaussian", margin=1.4)(z), torch.tanh(1.4 * z / 0.64))
    torch.testing.assert_close(signed("laplace", margin=1.4)(z), torch.tanh(z.clamp(-1.4, 1.4) / 0.7))
    rational = 2 * 1.4 * z / (1.5 * 0.36 + z**2 + 1.4**2)
    torch.testing.assert_close(signed("student_t", margin=1.4)(z), rational)
    a = torch.tensor(1.3 * 1.4).double()
    one_sided = -a.tanh() * torch.sigmoid(a.cosh().log() - 1.3 * z)
    torch.testing.assert_close(signed("logistic", margin=1.4)(z), one_sided)


@pytest.mark.parametrize("spec", ["cosine", {"name": "mahalanobis", "num_features": 1}])
def test_other_kernels_use_the_generic_path(spec):
    activation = SignedActivation(spec)
    z = torch.tensor([-2.0, 1.0])
    assert activation(z).sign().tolist() == [-1.0, 1.0]
    torch.testing.assert_close(activation(z), activation.generic(z))


def test_subclasses_of_kernels_use_the_generic_path():
    class Doubled(GaussianKernel):
        def energy(self, x, centers):
            return 2 * super().energy(x, centers)

    z = torch.randn(5)
    torch.testing.assert_close(SignedActivation(Doubled())(z), torch.tanh(2 * z))


@pytest.mark.parametrize("kernel", SCALAR_KERNELS)
def test_learnable_kernels_learn_through_the_closed_form(kernel):
    activation = SignedActivation({"name": kernel, "learnable": True, **SCALAR_KERNELS[kernel]}, margin=0.7).double()
    z = torch.randn(20).double()
    ours = torch.autograd.grad(activation(z).square().sum(), list(activation.parameters()))
    generic = torch.autograd.grad(activation.generic(z).square().sum(), list(activation.parameters()))
    assert len(ours) >= 1
    torch.testing.assert_close(ours, generic)


def test_a_kernel_may_be_a_key_a_class_a_mapping_or_an_instance():
    for spec in ("student_t", StudentTKernel, {"name": "student_t", "df": 1.0}, StudentTKernel()):
        assert isinstance(SignedActivation(spec).kernel, StudentTKernel)
    built = ACTIVATIONS.build({"name": "signed", "kernel": {"name": "laplace", "scale": 2.0}, "margin": 0.5})
    assert "margin=0.5" in repr(built) and "LaplaceKernel(scale=2" in repr(built)


def test_signed_rejects_wrong_margins_and_kernels():
    with pytest.raises(ValueError, match=r"margin=0"):
        SignedActivation(margin=0)
    with pytest.raises(ValueError, match="'gaussian'"):
        SignedActivation("gausian")


def test_formulas():
    z = torch.randn(6, 7).double()
    r, n = z.softmax(-1), z.norm(dim=-1, keepdim=True)
    for key, expected in {
        "gated": z * z.sigmoid(),
        "neg_log_softmin": z + torch.logsumexp(-z, -1, keepdim=True),
        "log_softmax": r.log(),
        "softmax_gated": z * r,
        "relu_gated": z.relu() * r,
        "residual_softmax": z + r,
        "direction": n * (z / n).softmax(-1),
    }.items():
        torch.testing.assert_close(ACTIVATIONS.build(key)(z), expected, msg=key)
    assert torch.allclose(ACTIVATIONS.build("sparsemin")(z).sum(-1), torch.ones(6).double())


def test_documented_jacobians():
    z = torch.randn(5).double()
    eye, t = torch.eye(5).double(), 0.7
    r = (z / t).softmax(-1)
    core = torch.diag(r) - torch.outer(r, r)
    u = z / z.norm()
    ru = (u / t).softmax(-1)
    low = (-z / t).softmax(-1)
    gate = (z / t).sigmoid()
    for key, expected in {
        "signed": torch.diag((1 - torch.tanh(z / t) ** 2) / t),
        "gated": torch.diag(gate + z / t * gate * (1 - gate)),
        "neg_log_softmin": eye - low,
        "log_softmax": (eye - r) / t,
        "softmax_gated": torch.diag(r) + z[:, None] / t * core,
        "relu_gated": torch.diag((z > 0) * r) + z.relu()[:, None] / t * core,
        "residual_softmax": eye + core / t,
        "direction": torch.outer(ru, u) + (torch.diag(ru) - torch.outer(ru, ru)) @ (eye - torch.outer(u, u)) / t,
    }.items():
        activation = ACTIVATIONS.build({"name": key, "temperature": t})
        torch.testing.assert_close(torch.func.jacrev(activation)(z), expected, msg=key)
    y = SparseminActivation(temperature=t)(z)
    inside = (y > 0).double()
    expected = -(torch.diag(inside) - torch.outer(inside, inside) / inside.sum()) / t
    torch.testing.assert_close(torch.func.jacrev(SparseminActivation(temperature=t))(z), expected)


def test_groups_are_independent_and_the_last_may_be_smaller():
    z = torch.randn(3, 7).double()
    y = GroupedActivation(group_size=3)(z)
    for first, last in ((0, 3), (3, 6), (6, 7)):
        part = z[:, first:last]
        torch.testing.assert_close(y[:, first:last], part * part.softmax(-1))
    with pytest.raises(ValueError, match="group_size=0"):
        GroupedActivation(0)


def test_direction_is_homogeneous():
    z = torch.randn(3, 7).double()
    torch.testing.assert_close(DirectionActivation()(100 * z), 100 * DirectionActivation()(z))


def test_gated_at_low_temperature_is_relu():
    z = torch.randn(100)
    torch.testing.assert_close(GatedActivation(temperature=1e-6)(z), z.relu(), rtol=0, atol=1e-6)


def test_a_custom_activation_defines_two_methods():
    class Mine(Activation):
        def posterior(self, z):
            return SoftmaxGatedActivation().posterior(z)

        def summarize(self, z, posterior):
            return posterior.responsibilities

    torch.testing.assert_close(Mine()(torch.zeros(4)), torch.full((4,), 0.25))


FORMULAS = {
    "neg_log_softmin": lambda z: z + torch.logsumexp(-z, -1, keepdim=True),
    "softmax_gated": lambda z: z * z.softmax(-1),
    "relu_gated": lambda z: z.relu() * z.softmax(-1),
}


@pytest.mark.parametrize("key", FORMULAS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_reverse_forward_and_batched_derivatives(key):
    activation, z = ACTIVATIONS.build(key), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(activation, z, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(activation, z)
    hessian = torch.func.hessian(lambda z: activation(z).square().sum())(z.detach())
    expected = torch.func.hessian(lambda z: FORMULAS[key](z).square().sum())(z.detach())
    torch.testing.assert_close(hessian, expected)


def saved_elements(call, z):
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = call(z)
    assert y.shape == z.shape
    return sum(size for pointer, size in saved.items() if pointer != z.untyped_storage().data_ptr())


@pytest.mark.parametrize(
    "key", ["neg_log_softmin", "softmax_gated", "log_softmax", "residual_softmax", "signed", "gated"]
)
def test_backward_saves_one_tensor_besides_the_input(key):
    z = torch.randn(32, 64, requires_grad=True)
    assert saved_elements(ACTIVATIONS.build(key), z) <= z.numel()
