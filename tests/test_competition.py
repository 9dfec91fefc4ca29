"""Competition operators: contract tests, references, and wrong arguments."""

import warnings

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from contracts import CompetitionChecks

from em_lightning.competition import (
    COMPETITIONS,
    Background,
    Balanced,
    Entmin,
    Grouped,
    Hardmin,
    ScopeWarning,
    Softmin,
    Sparsemin,
    Tempered,
    TopK,
    background,
    balanced,
    entmin,
    grouped,
    hardmin,
    none_of_the_above,
    softmin,
    sparsemin,
    topk,
)

FUNCTIONS = {
    "softmin": softmin,
    "sparsemin": sparsemin,
    "entmin": entmin,
    "grouped": grouped,
    "background": background,
    "topk": topk,
    "balanced": balanced,
    "hardmin": hardmin,
}


class TestSoftmin(CompetitionChecks):
    def make(self, **arguments):
        return Softmin(**arguments)


class TestSparsemin(CompetitionChecks):
    def make(self, **arguments):
        return Sparsemin(**arguments)


class TestEntmin(CompetitionChecks):
    def make(self, **arguments):
        return Entmin(**arguments)


class TestTopK(CompetitionChecks):
    def make(self, **arguments):
        return TopK(k=3, **arguments)

    def warm(self, energies):
        best = energies.argsort(-1).argsort(-1) < 3
        return best / best.sum(-1, keepdim=True).to(energies.dtype)


class TestGrouped(CompetitionChecks):
    def make(self, **arguments):
        return Grouped(group_size=4, **arguments)

    def totals(self, responsibilities):
        return responsibilities.unflatten(-1, (-1, 4)).sum(-1)

    def permutation(self, size):
        return torch.cat([size // 2 + torch.randperm(size // 2), torch.randperm(size // 2)])

    def cold(self, energies):
        halves = energies.unflatten(-1, (2, -1))
        return torch.nn.functional.one_hot(halves.argmin(-1), halves.shape[-1]).to(energies).flatten(-2)

    def warm(self, energies):
        return torch.full_like(energies, 2 / energies.shape[-1])

    def test_one_hypothesis(self):
        posterior = Grouped(group_size=1)(torch.tensor([[3.0]]))
        assert posterior.responsibilities.tolist() == [[1.0]] and posterior.free_energy.tolist() == [[3.0]]


class TestBackground(CompetitionChecks):
    def make(self, **arguments):
        return Background(energy=-0.5, **arguments)

    def shift(self, operator, c):
        return Background(energy=operator.energy + c, temperature=operator.temperature)

    def with_background(self, energies):
        return torch.cat([energies, torch.full_like(energies[..., :1], -0.5)], -1)

    def cold(self, energies):
        return super().cold(self.with_background(energies))

    def warm(self, energies):
        return super().warm(self.with_background(energies))

    def test_equal_prior_changes_no_responsibility(self):
        d = self.energies(16, 8)
        zeros = torch.zeros(8, dtype=torch.float64)
        torch.testing.assert_close(self.make()(d, zeros).responsibilities, self.make()(d).responsibilities)


class TestBalanced(CompetitionChecks):
    def make(self, **arguments):
        return Balanced(**arguments)

    def cold(self, energies):
        return None

    def test_compiles_to_one_graph(self):
        d, operator = self.energies(6, 8), Balanced(num_iters=3)
        compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(tuple(compiled(d)), tuple(operator(d)))


@pytest.mark.filterwarnings("ignore::em_lightning.competition.ScopeWarning")
class TestHardmin(CompetitionChecks):
    def make(self, **arguments):
        return Hardmin(**arguments)

    def warm(self, energies):
        return self.cold(energies)


def test_every_operator_is_registered_and_has_a_contract():
    assert set(COMPETITIONS) == set(FUNCTIONS)
    contracts = {cls for cls in globals().values() if isinstance(cls, type) and issubclass(cls, CompetitionChecks)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScopeWarning)
        covered = {type(cls().make()) for cls in contracts - {CompetitionChecks}}
    assert covered == {COMPETITIONS[key] for key in COMPETITIONS}


@pytest.mark.filterwarnings("ignore::em_lightning.competition.ScopeWarning")
@pytest.mark.parametrize("key", FUNCTIONS)
def test_module_equals_function(key):
    d, log_prior = torch.randn(6, 4).double(), torch.randn(4).double()
    module = COMPETITIONS.build({"name": key, "temperature": 0.3})
    torch.testing.assert_close(tuple(module(d, log_prior)), tuple(FUNCTIONS[key](d, 0.3, log_prior)), rtol=0, atol=0)
    assert "temperature=0.3" in repr(module)


def test_softmin_equals_scipy():
    d = torch.randn(5, 7, dtype=torch.float64) * 100
    posterior = softmin(d, temperature=0.7)
    np.testing.assert_allclose(posterior.responsibilities, scipy.special.softmax(-d.numpy() / 0.7, -1), atol=1e-14)
    np.testing.assert_allclose(posterior.free_energy, -0.7 * scipy.special.logsumexp(-d.numpy() / 0.7, -1), rtol=1e-13)


def test_softmin_prior_is_the_limit_of_high_temperature():
    log_prior = torch.tensor([0.2, 0.3, 0.5]).double().log()
    r = softmin(torch.randn(3).double(), 1e9, log_prior).responsibilities
    torch.testing.assert_close(r, log_prior.exp())


def test_all_energies_infinite_give_zero_responsibilities():
    for function in (softmin, sparsemin, entmin, topk):
        d = torch.full((2, 3), torch.inf, requires_grad=True)
        posterior = function(d)
        assert (posterior.free_energy == torch.inf).all() and (posterior.responsibilities == 0).all()
        assert (torch.autograd.grad(posterior.responsibilities.sum(), d)[0] == 0).all()
    assert background(torch.full((3,), torch.inf)).responsibilities.tolist() == [0.0, 0.0, 0.0, 1.0]


def test_compiled_softmin_with_infinite_energies():
    d = torch.randn(4, 3)
    d[0], d[1, 2] = torch.inf, torch.inf
    _, responsibilities, free_energy = torch.compile(softmin, backend="eager", fullgraph=True)(d)
    torch.testing.assert_close((responsibilities, free_energy), softmin(d)[1:])
    assert (responsibilities[0] == 0).all() and free_energy[0] == torch.inf


def test_temperature_is_fixed_by_default():
    assert not list(Tempered(2.0).parameters()) and Tempered(2.0).temperature == 2.0
    assert [parameter.shape for parameter in Tempered(2.0, learnable=True).parameters()] == [(1,)]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_softmin_in_higher_order_and_forward_mode():
    d = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def call(d):
        return tuple(softmin(d, 0.7))[1:]

    assert torch.autograd.gradcheck(call, d, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, d)
    # The Hessian of F is minus the covariance of the assignment: -(diag r - r r^T) / T.
    r = softmin(d[0].detach(), 0.7).responsibilities
    hessian = torch.func.hessian(lambda d: softmin(d, 0.7).free_energy)(d[0].detach())
    torch.testing.assert_close(hessian, -(torch.diag(r) - torch.outer(r, r)) / 0.7)


def test_softmin_saves_one_tensor_and_numbers_per_item():
    d = torch.randn(64, 32, requires_grad=True)
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        softmin(d)
    assert sum(saved.values()) <= d.numel() + 3 * len(d)


def test_temperature_tensor_for_each_item():
    d = torch.randn(5, 4, dtype=torch.float64)
    temperature = torch.rand(5, 1, dtype=torch.float64) + 0.5
    posterior = softmin(d, temperature)
    for n in range(5):
        torch.testing.assert_close(posterior.free_energy[n], softmin(d[n], float(temperature[n])).free_energy)
    posterior = softmin(d.T, temperature.flatten(), dim=0)  # hypotheses on axis 0
    torch.testing.assert_close(posterior.free_energy, softmin(d, temperature).free_energy)


def test_temperature_tensor_for_each_item_of_groups():
    d = torch.randn(3, 4, dtype=torch.float64)
    temperature = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)
    expected = torch.stack([grouped(d[n], float(temperature[n])).free_energy for n in range(3)])
    torch.testing.assert_close(grouped(d, temperature).free_energy, expected)
    torch.testing.assert_close(grouped(d.T, temperature.T, dim=0).free_energy, expected.T)


@pytest.mark.parametrize(
    "key, arguments, shown",
    [
        ("softmin", {}, "temperature=1"),
        ("softmin", {"temperature": 2.0, "learnable": True, "dim": 1}, "temperature=2, learnable=True, dim=1"),
        ("grouped", {"group_size": 3}, "group_size=3, temperature=1"),
        ("grouped", {}, "group_size=2, temperature=1"),
        ("background", {"energy": 2.0}, "energy=2.0, temperature=1"),
        ("topk", {"k": 3}, "k=3, temperature=1"),
        ("balanced", {"item_dim": 0, "num_iters": 9}, "item_dim=0, num_iters=9, temperature=1"),
        ("balanced", {}, "num_iters=40, temperature=1"),
    ],
)
def test_module_repr(key, arguments, shown):
    assert COMPETITIONS.build(key, **arguments).extra_repr() == shown


@pytest.mark.parametrize(
    "function, entropy",
    [
        (softmin, lambda r: -(r * np.log(np.maximum(r, 1e-300))).sum()),
        (sparsemin, lambda r: (r - r**2).sum() / 2),
        (entmin, lambda r: (r - r**1.5).sum() * 4 / 3),
    ],
)
def test_free_energy_is_the_minimum_over_the_simplex(function, entropy):
    d, temperature = torch.randn(5, dtype=torch.float64) * 2, 1.3
    posterior = function(d, temperature)
    found = scipy.optimize.minimize(
        lambda r: r @ d.numpy() - temperature * entropy(np.maximum(r, 0)),
        np.full(5, 0.2),
        bounds=[(0, 1)] * 5,
        constraints={"type": "eq", "fun": lambda r: r.sum() - 1},
        tol=1e-14,
    )
    np.testing.assert_allclose(posterior.free_energy, found.fun, atol=1e-8)
    np.testing.assert_allclose(posterior.responsibilities, found.x, atol=1e-3)


@pytest.mark.parametrize("function", [sparsemin, entmin])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("dim", [0, -1])
def test_deterministic_algorithms_change_nothing(function, size, dim):
    d = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def results():
        posterior = function(d, dim=dim)
        return (*posterior[1:], *torch.autograd.grad(posterior.free_energy.sum(), d))

    expected = results()
    torch.use_deterministic_algorithms(True)
    try:
        found = results()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("function, power", [(sparsemin, 1), (entmin, 2)])
def test_sparse_operators_are_the_root_found_by_bisection(function, power):
    for row in torch.randn(20, 9, dtype=torch.float64) * 2:
        z = -row.numpy() / power
        tau = scipy.optimize.brentq(lambda t, z=z: (np.maximum(z - t, 0) ** power).sum() - 1, z.max() - 1, z.max())
        np.testing.assert_allclose(function(row).responsibilities, np.maximum(z - tau, 0) ** power, atol=1e-11)


@pytest.mark.parametrize("function", [sparsemin, entmin])
def test_sparse_operators_have_zeros_ties_and_second_derivatives(function):
    assert (function(torch.tensor([0.0, 0.1, 9.0])).responsibilities == 0).tolist() == [False, False, True]
    torch.testing.assert_close(function(torch.zeros(4)).responsibilities, torch.full((4,), 0.25))
    d = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda d: tuple(function(d))[1:], d)


@pytest.mark.parametrize("function", [sparsemin, entmin])
def test_sparse_operators_sum_to_one_in_float32_over_many(function):
    r = function(torch.randn(8, 4096) * 3).responsibilities
    assert (r.sum(-1) - 1).abs().max() < 2e-5


@pytest.mark.parametrize("function", [sparsemin, entmin])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_energies_have_zero_responsibility(function, dtype):
    for size in range(2, 40):
        d = torch.full((size,), torch.inf, dtype=dtype).index_fill(0, torch.tensor([size // 2]), 1.5)
        assert function(d).responsibilities.tolist() == [float(k == size // 2) for k in range(size)]


def test_groups_are_independent():
    d = torch.randn(2, 6, 3, dtype=torch.float64)
    posterior = grouped(d, 0.7, dim=1, group_size=3)
    assert posterior.free_energy.shape == (2, 2, 3)
    for g in range(2):
        alone = softmin(d[:, 3 * g : 3 * g + 3], 0.7, dim=1)
        torch.testing.assert_close(posterior.responsibilities[:, 3 * g : 3 * g + 3], alone.responsibilities)
        torch.testing.assert_close(posterior.free_energy[:, g], alone.free_energy)


def test_grouped_rejects_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="group_size=2.* 5 hypotheses.*dim=-1"):
        grouped(torch.zeros(5))
    with pytest.raises(ValueError, match="group_size=0"):
        Grouped(group_size=0)


def test_background_reads_none_of_the_above():
    d = torch.randn(5, 3, dtype=torch.float64)
    posterior = background(d, energy=0.4)
    known = posterior.responsibilities[:, :3]
    torch.testing.assert_close(known.sum(-1), 1 - none_of_the_above(posterior))
    torch.testing.assert_close(none_of_the_above(posterior), (-0.4 - torch.logsumexp(-posterior.energies, -1)).exp())
    assert none_of_the_above(background(d + 50, energy=0.4)).min() > 0.999
    assert none_of_the_above(background(d, dim=0), dim=0).shape == (3,)


def test_background_energy_has_a_gradient():
    energy = torch.ones(1, dtype=torch.float64, requires_grad=True)
    d = torch.zeros(4, 3, dtype=torch.float64)
    none_of_the_above(background(d, energy=energy)).sum().backward()
    assert energy.grad.item() < 0
    assert torch.autograd.gradcheck(lambda energy: background(d, energy=energy).free_energy, energy)


def test_topk_keeps_ties_and_rejects_k_of_zero():
    assert topk(torch.tensor([0.0, 0.0, 0.0, 1.0]), k=1).responsibilities.tolist() == pytest.approx([1 / 3] * 3 + [0])
    with pytest.raises(ValueError, match="k=0"):
        TopK(k=0)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3])
@pytest.mark.parametrize("shape", [(6, 4), (3, 8), (7, 5), (64, 16)])
def test_balanced_satisfies_both_constraints(shape, size):
    d = (torch.rand(shape, dtype=torch.float64) * 2 - 1) * size
    r = balanced(d).responsibilities
    torch.testing.assert_close(r.sum(-1), torch.ones(shape[0]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(r.sum(0), torch.full(shape[1:], shape[0] / shape[1], dtype=r.dtype), rtol=0, atol=1e-9)


def test_balanced_equals_plain_sinkhorn():
    d, shares = torch.rand(7, 3, dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2]).double()
    plan, mass = torch.exp(-d / 0.5), 7 * shares
    for _ in range(2000):
        plan = plan * (mass / plan.sum(0))
        plan = plan / plan.sum(1, keepdim=True)
    posterior = balanced(d, 0.5, shares.log())
    torch.testing.assert_close(posterior.responsibilities, plan, rtol=0, atol=1e-10)
    cost = (plan * d).sum() + 0.5 * torch.special.xlogy(plan, plan).sum()
    torch.testing.assert_close(posterior.free_energy.sum(), cost)


def test_balanced_at_low_temperature_is_the_linear_assignment():
    d = torch.rand(6, 6, dtype=torch.float64)
    rows, columns = scipy.optimize.linear_sum_assignment(d.numpy())
    r = balanced(d, temperature=1e-3, num_iters=200).responsibilities
    assert (r[rows, columns] > 0.99).all()


def test_balanced_with_item_dim_solves_independent_problems():
    d = torch.randn(3, 5, 4, dtype=torch.float64)
    posterior = balanced(d, item_dim=1)
    swapped = balanced(d.movedim(2, 0), dim=0, item_dim=-1)
    for n in range(3):
        torch.testing.assert_close(posterior.responsibilities[n], balanced(d[n]).responsibilities)
        torch.testing.assert_close(posterior.free_energy[n], balanced(d[n]).free_energy)
    torch.testing.assert_close(swapped.responsibilities.movedim(0, 2), posterior.responsibilities)
    torch.testing.assert_close(swapped.free_energy, posterior.free_energy)


def test_balanced_stays_finite_in_float32():
    for d in (torch.randn(32, 8) * 1e3, torch.zeros(4, 4), torch.randn(1, 5) * 100):
        d.requires_grad_()
        posterior = balanced(d)
        (posterior.free_energy.sum() + posterior.responsibilities.square().sum()).backward()
        assert d.grad.isfinite().all() and posterior.free_energy.isfinite().all()
        torch.testing.assert_close(posterior.responsibilities.sum(-1), torch.ones(len(d)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e4, 1e6, 1e9])
@pytest.mark.parametrize("shape", [(1, 3), (5, 4), (16, 8), (3, 8)])
def test_balanced_gradient_is_the_responsibilities_at_large_energies(shape, scale, dtype):
    d = (torch.rand(shape, dtype=dtype) * scale).requires_grad_()
    posterior = balanced(d)
    (grad,) = torch.autograd.grad(posterior.free_energy.sum(), d)
    torch.testing.assert_close(grad, posterior.responsibilities, rtol=0, atol=1e-6)
    shares = posterior.responsibilities.double().sum(0)
    torch.testing.assert_close(shares, torch.full_like(shares, shape[0] / shape[1]), rtol=0, atol=1e-5)


def test_balanced_with_infinite_energies_in_some_items():
    d = torch.randn(6, 3, dtype=torch.float64)
    d[2], d[3, 1] = torch.inf, torch.inf
    d.requires_grad_()
    module = Balanced(learnable=True).double()
    posterior = module(d)
    kept = torch.tensor([True, True, False, True, True, True])
    assert posterior.free_energy.isfinite().tolist() == kept.tolist() and posterior.free_energy[2] == torch.inf
    assert not posterior.responsibilities[2].any() and posterior.responsibilities[3, 1] == 0
    torch.testing.assert_close(posterior.responsibilities.sum(0), torch.full((3,), 5 / 3).double())
    torch.testing.assert_close(posterior.responsibilities[kept], balanced(d[kept]).responsibilities)
    inputs = [d, *module.parameters()]
    grad = torch.autograd.grad(posterior.free_energy.sum(), d, retain_graph=True)[0]
    torch.testing.assert_close(grad, posterior.responsibilities)
    for gradient in torch.autograd.grad(posterior.responsibilities.square().sum(), inputs):
        assert gradient.isfinite().all()


def test_balanced_with_a_mask_equals_balanced_without_the_masked_items():
    d, mask = torch.randn(2, 7, 3, dtype=torch.float64), torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1] * 7]).bool()
    d[0, 2], d[0, 4, 1] = torch.nan, torch.inf
    d.requires_grad_()
    posterior = balanced(d, item_dim=1, mask=mask)
    alone = [balanced(own[kept]) for own, kept in zip(d, mask, strict=True)]
    for n in range(2):
        torch.testing.assert_close(posterior.responsibilities[n][mask[n]], alone[n].responsibilities)
        torch.testing.assert_close(posterior.free_energy[n][mask[n]], alone[n].free_energy)
    assert not posterior.responsibilities[~mask].any() and not posterior.free_energy[~mask].any()
    (grad,) = torch.autograd.grad(posterior.free_energy.sum(), d)
    torch.testing.assert_close(grad, posterior.responsibilities)
    first = balanced(d[0].T, dim=0, item_dim=1, mask=mask[0])
    torch.testing.assert_close(first.responsibilities.T, posterior.responsibilities[0])
    with pytest.raises(ValueError, match=r"mask \(3,\)"):
        balanced(torch.zeros(4, 2), mask=torch.ones(3).bool())


@pytest.mark.parametrize("size", [(6, 3), (100, 10)])
def test_a_hypothesis_of_infinite_energies_only_has_no_share(size):
    d = torch.randn(size, dtype=torch.float64)
    d[:, 1] = torch.inf
    d.requires_grad_()
    posterior, kept = balanced(d), torch.arange(size[1]) != 1
    expected = balanced(d[:, kept])
    torch.testing.assert_close(posterior.responsibilities[:, kept], expected.responsibilities)
    torch.testing.assert_close(posterior.free_energy, expected.free_energy)
    for value in (posterior.free_energy, posterior.responsibilities.square()):
        (grad,) = torch.autograd.grad(value.sum(), d, retain_graph=True)
        assert grad.isfinite().all() and not grad[:, 1].any()


def test_any_infinite_energies_leave_balanced_finite():
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        d = torch.randn(9, 4, generator=generator) * 10.0 ** (seed % 5)
        d = d.masked_fill(torch.rand(9, 4, generator=generator) < (0.1, 0.5, 0.9)[seed % 3], torch.inf).requires_grad_()
        posterior, counted = balanced(d), d.isfinite().any(1)
        assert posterior.free_energy[counted].isfinite().all()
        torch.testing.assert_close(posterior.responsibilities.sum(1), counted.float())
        (grad,) = torch.autograd.grad(posterior.free_energy[counted].sum(), d)
        torch.testing.assert_close(grad, posterior.responsibilities, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reduce", [torch.mean, lambda free: (free * torch.arange(5.0)).sum() / 10])
def test_balanced_gradient_of_weighted_free_energies_at_large_energies(reduce):
    """Shifting all energies of an item shifts its free energy, whatever the weight of the item."""
    for scale in (1e4, 1e7, 1e9):
        d = (torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) * scale).requires_grad_()
        shift = torch.zeros(5, 1, requires_grad=True)
        (found,) = torch.autograd.grad(reduce(balanced(d + shift).free_energy), shift)
        free = torch.zeros(5, requires_grad=True)
        (expected,) = torch.autograd.grad(reduce(free), free)
        torch.testing.assert_close(found[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_only_balanced_couples_items():
    assert [key for key in COMPETITIONS if COMPETITIONS[key].couples_items] == ["balanced"]


def test_balanced_rejects_wrong_arguments():
    with pytest.raises(ValueError, match="item_dim=1.*dim=-1"):
        balanced(torch.zeros(3, 2), item_dim=1)
    with pytest.raises(ValueError, match="num_iters=0"):
        Balanced(num_iters=0)
    with pytest.raises(ValueError, match=r"log_prior.*\(3,\).* 2 "):
        balanced(torch.zeros(3, 2), 1.0, torch.zeros(3))
    with pytest.raises(ValueError, match=r"log_prior.*\(1,\).* 2 "):
        balanced(torch.zeros(3, 2), 1.0, torch.zeros(1))


def test_hardmin_warns():
    with pytest.warns(ScopeWarning, match="scope of implicit EM.*no gradient"):
        posterior = hardmin(torch.tensor([3.0, 1.0, 1.0]))
    assert posterior.responsibilities.tolist() == [0.0, 0.5, 0.5] and posterior.free_energy == 1.0
    with pytest.warns(ScopeWarning, match="scope of implicit EM.*no gradient"):
        Hardmin()(torch.zeros(2))


def test_learnable_temperature_has_a_gradient_and_stays_positive():
    module = Softmin(temperature=0.3, learnable=True)
    assert module.temperature.item() == torch.tensor(0.3).item()
    optimizer = torch.optim.SGD(module.parameters(), lr=100.0)
    module(torch.randn(4, 3)).free_energy.sum().backward()
    optimizer.step()
    assert module.temperature.item() > 0 and module.temperature.item() != pytest.approx(0.3)


def test_temperature_changes_do_not_recompile_every_step():
    torch._dynamo.reset()
    module = Softmin()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    d = torch.randn(3, 4)
    for step in range(20):
        module.temperature = 1.0 + step
        torch.testing.assert_close(compiled(d).free_energy, softmin(d, 1.0 + step).free_energy)
