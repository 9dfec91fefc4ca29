"""Kernels: contract tests of each kernel, precision, dtypes and wrong arguments."""

import math

import numpy as np
import pytest
import torch
from contracts import KernelChecks
from torch import nn
from torch.testing import assert_close

from em_lightning.kernels import (
    KERNELS,
    CosineKernel,
    DotProductKernel,
    ExponentialKernel,
    GaussianKernel,
    HuberKernel,
    Kernel,
    LaplaceKernel,
    LearnedEnergyKernel,
    LogisticKernel,
    MahalanobisKernel,
    NoDensityError,
    PseudoHuberKernel,
    StudentTKernel,
    density_kernel,
)


def norm(values):
    return math.sqrt(sum(value * value for value in values))


def differences(x, center):
    return [a - b for a, b in zip(x, center, strict=True)]


class TestGaussian(KernelChecks):
    def make(self, num_features):
        return GaussianKernel(scale=0.7, learnable=True)

    def energy(self, x, center):
        return norm(differences(x, center)) ** 2 / (2 * 0.7**2)


class TestStudentT(KernelChecks):
    density_features = (1,)
    reach = 1e9  # Cauchy distribution

    def make(self, num_features):
        return StudentTKernel(df=3.0, scale=0.7, learnable=True)

    def energy(self, x, center):
        return math.log(1 + norm(differences(x, center)) ** 2 / (3.0 * 0.7**2))


class TestStudentTDensity(KernelChecks):
    def make(self, num_features):
        return StudentTKernel(df=5.0, scale=0.7, learnable=True, density=True)

    def energy(self, x, center):
        return (5.0 + len(x)) / 2 * math.log(1 + norm(differences(x, center)) ** 2 / (5.0 * 0.7**2))


SIGMA = torch.tensor([[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]], dtype=torch.float64)


def sigma(num_features):
    return SIGMA[:num_features, :num_features]


class TestMahalanobis(KernelChecks):
    def make(self, num_features):
        return MahalanobisKernel(num_features, covariance=sigma(num_features))

    def energy(self, x, center):
        z = np.array(differences(x, center))
        return float(z @ np.linalg.solve(sigma(len(x)).numpy(), z))


class TestLaplace(KernelChecks):
    def make(self, num_features):
        return LaplaceKernel(scale=0.7, learnable=True)

    def energy(self, x, center):
        return sum(abs(z) / 0.7 for z in differences(x, center))


class TestLogistic(KernelChecks):
    density_features = ()

    def make(self, num_features):
        return LogisticKernel(slope=1.7, learnable=True)

    def energy(self, x, center):
        return sum(math.log(1 + math.exp(-1.7 * z)) for z in differences(x, center))


class TestHuber(KernelChecks):
    kinks = (0.8, 0.8 * math.exp(0.1))

    def make(self, num_features):
        return HuberKernel(delta=0.8, learnable=True)

    def energy(self, x, center):
        return sum(z**2 / 2 if abs(z) <= 0.8 else 0.8 * (abs(z) - 0.8 / 2) for z in differences(x, center))


class TestPseudoHuber(KernelChecks):
    def make(self, num_features):
        return PseudoHuberKernel(delta=0.8, learnable=True)

    def energy(self, x, center):
        return sum(0.8**2 * (math.sqrt(1 + (z / 0.8) ** 2) - 1) for z in differences(x, center))


class TestExponential(KernelChecks):
    def make(self, num_features):
        return ExponentialKernel(rate=1.3, learnable=True)

    def energy(self, x, center):
        return sum(math.exp(1.3 * abs(z)) for z in differences(x, center))


class TestCosine(KernelChecks):
    def make(self, num_features):
        return CosineKernel()

    def energy(self, x, center):
        return 1 - sum(a * b for a, b in zip(x, center, strict=True)) / (norm(x) * norm(center))

    def quadrature(self, center):
        """Return two points, a circle, or Gauss-Legendre nodes in height times equally spaced angles."""
        around = torch.arange(64, dtype=torch.float64) * (2 * math.pi / 64)
        circle = torch.stack([around.cos(), around.sin()], dim=-1)
        if len(center) == 1:
            yield torch.tensor([[-1.0], [1.0]], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        elif len(center) == 2:
            yield circle, torch.full((64,), 2 * math.pi / 64, dtype=torch.float64)
        else:
            for height, weight in zip(*np.polynomial.legendre.leggauss(32), strict=True):
                ring = torch.cat([math.sqrt(1 - height**2) * circle, circle.new_full((64, 1), height)], dim=-1)
                yield ring, torch.full((64,), weight * 2 * math.pi / 64, dtype=torch.float64)


class TestDotProduct(KernelChecks):
    density_features = ()

    def make(self, num_features):
        return DotProductKernel(scale=0.7, learnable=True)

    def energy(self, x, center):
        return -0.7 * sum(a * b for a, b in zip(x, center, strict=True))


class WrongKernel(GaussianKernel):
    """Gaussian kernel with a wrong energy factor or normalizer."""

    def __init__(self, factor=1.0, shift=0.0):
        super().__init__(scale=0.7, learnable=True)
        self.factor, self.shift = factor, shift

    def energy(self, x, centers):
        return super().energy(x, centers) * self.factor

    def log_normalizer(self, num_features):
        return super().log_normalizer(num_features) + self.shift


def test_the_contract_rejects_wrong_kernels():
    class Contract(TestGaussian):
        def __init__(self, *arguments):
            self.make = lambda num_features: WrongKernel(*arguments)

    Contract().test_energies_are_the_formula()
    Contract().test_the_density_integrates_to_one()
    with pytest.raises(AssertionError, match="not close"):
        Contract(1 + 1e-10).test_energies_are_the_formula()
    with pytest.raises(AssertionError, match="D = 1: 0.99999"):
        Contract(1.0, 2e-6).test_the_density_integrates_to_one()


@pytest.mark.parametrize("key", ["gaussian", "laplace", "student_t", "huber", "pseudo_huber", "exponential"])
def test_fixed_and_learnable_shape_parameters_give_equal_energies(key):
    x, centers = torch.randn(4, 1, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    name = {"huber": "delta", "pseudo_huber": "delta", "exponential": "rate"}.get(key, "scale")
    fixed, learned = KERNELS.build(key, **{name: 0.7}), KERNELS.build(key, **{name: 0.7}, learnable=True)
    assert_close(fixed(x, centers), learned(x, centers), rtol=1e-15, atol=0)
    assert list(fixed.parameters()) == [] and all(value.shape == (1,) for value in learned.parameters())
    for kernel in (learned, fixed):
        assert_close(getattr(kernel, name), torch.tensor(0.7, dtype=torch.float64), rtol=0, atol=0)


def test_fixed_shapes_are_in_the_state_dict():
    kernel = StudentTKernel(df=5.0, scale=2.0)
    kernel.load_state_dict(StudentTKernel(df=3.0, scale=0.1).state_dict())
    assert kernel.extra_repr() == "df=3, scale=0.1" and kernel.scale.item() == 0.1
    with pytest.raises(ValueError, match="1 shape.*StudentTKernel.*df.*scale"):
        kernel.load_state_dict(GaussianKernel().state_dict())


def test_every_kernel_with_shape_parameters_can_learn_them():
    for key in KERNELS:
        if KERNELS[key] in (CosineKernel, LearnedEnergyKernel):  # no shape parameters; parameters of the network
            continue
        arguments = {"num_features": 2} if key == "mahalanobis" else {}
        kernel = KERNELS.build(key, **arguments, learnable=True)
        energies = kernel(torch.randn(4, 2), torch.randn(3, 2)).sum()
        assert list(kernel.parameters())
        assert all(slope.abs().sum() > 0 for slope in torch.autograd.grad(energies, list(kernel.parameters())))
        assert list(KERNELS.build(key, **arguments, learnable=False).parameters()) == []


@pytest.mark.parametrize(
    "spec", ["student_t", {"name": "student_t"}, StudentTKernel, {"class_path": "em_lightning.kernels.StudentTKernel"}]
)
def test_density_kernel_sets_density_true(spec):
    assert density_kernel(spec).density and density_kernel(spec).log_normalizer(5).isfinite()


def test_density_kernel_keeps_explicit_options():
    kernel = StudentTKernel()
    assert density_kernel(kernel) is kernel
    assert not density_kernel({"name": "student_t", "density": False}).density
    assert density_kernel({"name": "student_t", "df": 3.0}).df == 3.0
    assert isinstance(density_kernel("gaussian"), GaussianKernel)
    with pytest.raises(ValueError, match="studentt.*student_t"):
        density_kernel("studentt")
    with pytest.raises(TypeError, match="3"):
        density_kernel(3)


def test_registry_contains_the_built_in_kernels():
    assert {key: KERNELS[key].__name__ for key in KERNELS if KERNELS[key].__module__.startswith("em_lightning.")} == {
        "gaussian": "GaussianKernel",
        "laplace": "LaplaceKernel",
        "logistic": "LogisticKernel",
        "student_t": "StudentTKernel",
        "huber": "HuberKernel",
        "pseudo_huber": "PseudoHuberKernel",
        "exponential": "ExponentialKernel",
        "cosine": "CosineKernel",
        "mahalanobis": "MahalanobisKernel",
        "learned": "LearnedEnergyKernel",
        "dot_product": "DotProductKernel",
    }


def test_small_distances_keep_full_precision():
    """The energy of a distance of 1e-8 would vanish in sqrt(1 + z^2) - 1."""
    z, zero = torch.tensor([[1e-8]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for kernel in (PseudoHuberKernel(2.0), HuberKernel(2.0), GaussianKernel()):
        assert_close(kernel(z, zero), 0.5 * z**2, rtol=1e-14, atol=0)
    assert_close(StudentTKernel()(z, zero), z**2, rtol=1e-14, atol=0)
    far = torch.tensor([[10000.0]]), torch.tensor([[10000.0 + 2**-9]])
    assert GaussianKernel()(*far).item() == 0.5 * 2**-18


def test_logistic_is_accurate_for_large_arguments():
    z = torch.tensor([[30.0]], dtype=torch.float64)
    assert_close(LogisticKernel()(-z, 0 * z), z + math.exp(-30), rtol=1e-16, atol=0)
    assert_close(LogisticKernel()(z, 0 * z), torch.exp(-z), rtol=1e-12, atol=0)


def test_exponential_saturates_with_finite_energy_and_slope():
    z = torch.tensor([[39.0], [40.0], [41.0], [1e6]], requires_grad=True)
    energies = ExponentialKernel()(z, torch.zeros(1, 1))
    slopes = torch.autograd.grad(energies.sum(), z)[0].flatten()
    top = math.exp(40)
    assert_close(energies.flatten().detach(), torch.tensor([math.exp(39), top, 2 * top, (1e6 - 39) * top]))
    assert_close(slopes, torch.tensor([math.exp(39), top, top, top]))
    assert slopes.norm().isfinite()


def test_the_cosine_of_a_zero_vector_is_zero():
    x = torch.zeros(1, 3, requires_grad=True)
    energies = CosineKernel()(x, torch.eye(3))
    energies.sum().backward()
    assert energies.tolist() == [[1.0, 1.0, 1.0]] and x.grad.isfinite().all()


def test_float16_energies_are_clamped_to_the_largest_number():
    energies = GaussianKernel()(torch.tensor([[1000.0]]).half(), torch.zeros(1, 1).half())
    assert energies.item() == 65504.0


@pytest.mark.parametrize("items", [200, 80_000])  # 80,000 x 5 x 3 differences are not stored
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_mahalanobis_is_accurate_far_from_the_origin(offset, items):
    x, centers = torch.randn(items, 3) + offset, torch.randn(5, 3) + offset
    thin = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.5], [0.0, 0.5, 1.4]])
    found, exact = (
        MahalanobisKernel(3, thin.to(dtype))(x.to(dtype), centers.to(dtype)) for dtype in (torch.float32, torch.float64)
    )
    assert_close(found.double(), exact, rtol=2e-4, atol=1e-6)
    centers[0] = torch.inf
    assert MahalanobisKernel(3, thin)(x, centers)[:, 1:].isfinite().all()  # the other centers are not affected


def test_mahalanobis_covariance():
    kernel = MahalanobisKernel(3, sigma(3))
    assert_close(kernel.covariance.detach(), sigma(3))
    torch.nn.init.normal_(kernel.log_factor)
    assert torch.linalg.eigvalsh(kernel.covariance.detach()).min() > 0
    assert (kernel.factor.diagonal() > 0).all() and kernel.factor.triu(1).eq(0).all()
    assert list(MahalanobisKernel(2, learnable=False).parameters()) == []
    assert_close(MahalanobisKernel(2).covariance.detach(), torch.eye(2), rtol=0, atol=0)
    assert_close(MahalanobisKernel(2, [[4, 0], [0, 9]]).factor.detach(), torch.diag(torch.tensor([2.0, 3.0])))


class TestLearned:
    def kernel(self):
        return LearnedEnergyKernel(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))).double()

    def test_energies_are_the_output_of_the_network(self):
        kernel, x = self.kernel(), torch.randn(4, 5, 2, dtype=torch.float64)
        first, last = kernel.network[0], kernel.network[2]
        expected = torch.tanh(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
        assert_close(kernel(x), expected, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(kernel, (x[0].requires_grad_(),))
        compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), kernel(x), rtol=1e-12, atol=1e-12)
        assert_close(torch.func.vmap(kernel)(x), kernel(x), rtol=1e-12, atol=1e-12)
        twin = self.kernel()
        twin.load_state_dict(kernel.state_dict())
        assert_close(twin(x, None), kernel(x), rtol=0, atol=0)

    def test_learned_kernel_rejects_centers(self):
        with pytest.raises(ValueError, match="centers.*None.*LearnedEnergyKernel"):
            self.kernel()(torch.zeros(5, 2).double(), torch.zeros(3, 2).double())

    def test_wrong_arguments_raise(self):
        with pytest.raises(ValueError, match=r"network.*x \(5, 2\).*\(3,\)"):
            LearnedEnergyKernel(Sum())(torch.zeros(5, 2))
        with pytest.raises(TypeError, match="network='mlp'.*Module"):
            LearnedEnergyKernel("mlp")
        with pytest.raises(NoDensityError, match="LearnedEnergyKernel.*VarianceLoss"):
            self.kernel().log_normalizer(2)


class Sum(nn.Module):
    def forward(self, x):
        return x.sum(0)[:1].repeat(3)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: GaussianKernel(0.0), ValueError, ["scale=0.0", "positive"]),
        (lambda: StudentTKernel(df=-1), ValueError, ["df=-1", "positive"]),
        (lambda: HuberKernel(math.inf), ValueError, ["delta=inf", "finite"]),
        (lambda: ExponentialKernel(math.nan), ValueError, ["rate=nan", "finite"]),
        (lambda: LogisticKernel("steep"), ValueError, ["slope='steep'", "number"]),
        (lambda: MahalanobisKernel(0), ValueError, ["num_features=0", "at least 1"]),
        (lambda: MahalanobisKernel(2, torch.eye(3)), ValueError, ["(3, 3)", "(2, 2)"]),
        (lambda: MahalanobisKernel(2, -torch.eye(2)), ValueError, ["covariance=", "positive definite"]),
        (lambda: MahalanobisKernel(2, [[1.0, 0.9], [0.0, 1.0]]), ValueError, ["covariance=", "symmetric"]),
        (
            lambda: MahalanobisKernel(2)(torch.zeros(4, 3), torch.zeros(1, 3)),
            ValueError,
            ["x (4, 3)", "num_features=2"],
        ),
        (lambda: MahalanobisKernel(2).log_normalizer(3), ValueError, ["num_features=3", "2"]),
        (lambda: GaussianKernel()(torch.zeros(4), torch.zeros(1, 1)), ValueError, ["x (4,)"]),
        (lambda: GaussianKernel()(torch.zeros(1, 1), torch.zeros(4)), ValueError, ["centers (4,)"]),
        (
            lambda: GaussianKernel()(torch.zeros(4, 3), torch.zeros(5, 2)),
            ValueError,
            ["x (4, 3)", "centers (5, 2)"],
        ),
        (lambda: StudentTKernel().log_normalizer(2), NoDensityError, ["num_features=2", "density=True"]),
        (lambda: LogisticKernel().log_normalizer(1), NoDensityError, ["LogisticKernel", "infinite"]),
        (lambda: DotProductKernel().log_normalizer(1), NoDensityError, ["DotProductKernel", "infinite"]),
        (lambda: Kernel().log_normalizer(1), NoDensityError, ["Kernel", "log_normalizer"]),
        (lambda: Kernel()(torch.zeros(1, 1), torch.zeros(1, 1)), NotImplementedError, ["energy"]),
    ],
)
def test_wrong_arguments_raise(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_leading_axes_broadcast():
    kernel = GaussianKernel()
    x, centers = torch.randn(3, 1, 4, 2), torch.randn(5, 6, 2)
    expected = torch.stack([torch.stack([kernel(x[i, 0], centers[j]) for j in range(5)]) for i in range(3)])
    torch.testing.assert_close(kernel(x, centers), expected)
    torch.testing.assert_close(kernel(centers, x).mT, expected)


def test_meta_tensors_have_the_right_shape():
    energies = GaussianKernel()(torch.zeros(5, 2, device="meta"), torch.zeros(3, 2, device="meta"))
    assert energies.shape == (5, 3)
