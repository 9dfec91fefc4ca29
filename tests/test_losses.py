"""Losses: contract tests, references, and equality of one and two processes."""

import math

import numpy as np
import pytest
import torch
from contracts import LossChecks
from ranks import assert_ranks_agree
from scipy import stats
from torch import nn
from torch.autograd import forward_ad

from em_lightning.competition import softmin
from em_lightning.losses import (
    LOSSES,
    BalanceLoss,
    BoundedVarianceLoss,
    DecorrelationLoss,
    EMLoss,
    EnergyLoss,
    FreeEnergyLoss,
    LogDetLoss,
    VarianceLoss,
    WeightRedundancyLoss,
)

DOUBLE = torch.float64


class TestFreeEnergySum(LossChecks):
    def make(self):
        return FreeEnergyLoss()


class TestFreeEnergyMean(LossChecks):
    def make(self):
        return FreeEnergyLoss(reduction="mean", temperature=0.5)


class TestVariance(LossChecks):
    def make(self):
        return VarianceLoss()


class TestBoundedVariance(LossChecks):
    def make(self):
        return BoundedVarianceLoss(target=0.5)


class TestDecorrelation(LossChecks):
    def make(self):
        return DecorrelationLoss()


class TestLogDet(LossChecks):
    def make(self):
        return LogDetLoss()


class TestBalance(LossChecks):
    def make(self):
        return BalanceLoss(temperature=2.0)


class TestWeightRedundancy(LossChecks):
    def make(self):
        return WeightRedundancyLoss()


class TestEM(LossChecks):
    def make(self):
        return EMLoss(log_det=0.5, balance=0.1, bounded_variance={"weight": 2.0, "target": 4.0})


def published(a):
    """Return the objective of arXiv 2601.06478 from torch's own statistics."""
    off_diagonal = ~torch.eye(a.shape[1], dtype=torch.bool)
    std = a.std(0) + 1e-8
    return {
        "free_energy": -torch.logsumexp(-a, dim=1).sum(),
        "variance": -(a.var(0) + 1e-6).log().sum(),
        "decorrelation": (torch.cov(a.T) / std / std[:, None])[off_diagonal].square().sum(),
    }


def test_the_default_is_the_published_objective():
    x = torch.rand(128, 10, dtype=DOUBLE)
    a = torch.relu(x @ torch.randn(10, 16, dtype=DOUBLE)).requires_grad_()
    terms, expected = EMLoss()(a), published(a)
    assert list(terms) == list(expected)
    for name in terms:
        torch.testing.assert_close(terms[name], expected[name], rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(each[name], a, retain_graph=True)[0] for each in (terms, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert EMLoss().total(a) == sum(terms.values())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_emloss_equals_its_terms_computed_alone(reduction, temperature):
    a = torch.rand(9, 4, dtype=DOUBLE, requires_grad=True)
    terms = EMLoss(free_energy={"temperature": temperature}, reduction=reduction)(a)
    logits = torch.logsumexp(-a / temperature, 1)
    expected = -temperature * (logits.sum() if reduction == "sum" else logits.mean())
    torch.testing.assert_close(terms["free_energy"], expected)
    for found, wanted in (
        (terms["free_energy"], expected),
        (terms["free_energy"] + terms["decorrelation"], expected + DecorrelationLoss()(a)),
        (terms["variance"], VarianceLoss()(a)),
    ):
        gradients = [torch.autograd.grad(each, a, retain_graph=True)[0] for each in (found, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_weights_of_the_free_energy_with_and_without_other_terms():
    a, counts = torch.rand(9, 4, dtype=DOUBLE), torch.randint(0, 3, (9,))
    expected = FreeEnergyLoss()(a.repeat_interleave(counts, 0))
    torch.testing.assert_close(EMLoss(variance=0, decorrelation=0)(a, weights=counts)["free_energy"], expected)
    torch.testing.assert_close(EMLoss()(a, weights=counts)["free_energy"], expected)


@pytest.mark.parametrize(
    "loss, shown",
    [
        (VarianceLoss(), "eps=1e-06"),
        (VarianceLoss(dim=1), "dim=1, eps=1e-06"),
        (FreeEnergyLoss("mean", 2.0), "reduction='mean', temperature=2.0"),
        (LogDetLoss(dim=0), "dim=0, eps=1e-06"),
        (EMLoss(variance=0.5, decorrelation=0), "free_energy=1, variance=0.5, decorrelation=0"),
    ],
)
def test_repr(loss, shown):
    assert loss.extra_repr() == shown


def test_terms_equal_plain_loops():
    a = np.random.default_rng(0).random((7, 3)) * 2
    free = variance = correlation = 0.0
    for row in a:
        free -= math.log(sum(math.exp(-value) for value in row))
    means = [sum(a[:, j]) / 7 for j in range(3)]
    var = [sum((value - means[j]) ** 2 for value in a[:, j]) / 6 for j in range(3)]
    for i in range(3):
        variance -= math.log(var[i] + 1e-6)
        for j in range(3):
            if i != j:
                cov = sum((a[n, i] - means[i]) * (a[n, j] - means[j]) for n in range(7)) / 6
                correlation += (cov / (math.sqrt(var[i]) + 1e-8) / (math.sqrt(var[j]) + 1e-8)) ** 2
    terms = EMLoss(reduction="mean")(torch.from_numpy(a))
    assert [value.item() for value in terms.values()] == pytest.approx([free / 7, variance, correlation], rel=1e-12)


def test_a_constant_unit_changes_the_variance_term_only():
    a = torch.rand(20, 3, dtype=DOUBLE)
    dead = torch.cat([a, torch.zeros(20, 1, dtype=DOUBLE)], dim=1)
    torch.testing.assert_close(DecorrelationLoss()(dead), DecorrelationLoss()(a), rtol=1e-12, atol=0)
    assert (VarianceLoss()(dead) - VarianceLoss()(a)).item() == pytest.approx(-math.log(1e-6))


def test_the_gradient_of_the_free_energy_is_the_responsibilities():
    energies = (torch.randn(6, 5, dtype=DOUBLE) * 100).requires_grad_()
    FreeEnergyLoss(temperature=0.7)(energies).backward()
    torch.testing.assert_close(energies.grad, torch.softmax(-energies / 0.7, dim=-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_free_energy_is_that_of_the_competition(temperature):
    x = torch.randn(7, 5)
    x[0, ::2] = math.inf
    torch.testing.assert_close(FreeEnergyLoss(temperature=temperature)(x), softmin(x, temperature).free_energy.sum())


@pytest.mark.parametrize("units", [3, 9])
@pytest.mark.parametrize("loss", [FreeEnergyLoss(temperature=0.7), VarianceLoss(), DecorrelationLoss(), EMLoss().total])
def test_second_derivatives(loss, units):
    x = torch.rand(7, units, dtype=DOUBLE)
    assert torch.autograd.gradgradcheck(loss, (x.clone().requires_grad_(),))
    one_by_one = torch.autograd.functional.jacobian(lambda x: torch.stack([loss(x), 2 * loss(x)]), x)
    at_once = torch.autograd.functional.jacobian(lambda x: torch.stack([loss(x), 2 * loss(x)]), x, vectorize=True)
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", [FreeEnergyLoss(temperature=0.7), VarianceLoss(), DecorrelationLoss(), EMLoss().total])
def test_forward_over_reverse(loss):
    x = torch.rand(7, 3, dtype=DOUBLE)
    torch.testing.assert_close(torch.func.hessian(loss)(x), torch.autograd.functional.hessian(loss, x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch.func.jvp calls it
def test_directional_derivatives():
    x, direction = torch.rand(7, 3, dtype=DOUBLE), torch.randn(7, 3, dtype=DOUBLE)
    loss = EMLoss().total
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(found, (torch.autograd.functional.jacobian(loss, x) * direction).sum())


def test_the_published_objective_of_batches_of_batches():
    x = torch.rand(2, 3, 7, 4, dtype=DOUBLE)
    loss = EMLoss().total
    expected = torch.stack([torch.stack([loss(each) for each in row]) for row in x])
    torch.testing.assert_close(torch.vmap(torch.vmap(loss))(x), expected)
    torch.testing.assert_close(torch.vmap(torch.vmap(loss, in_dims=2), in_dims=1)(x.permute(2, 0, 3, 1)), expected)


@pytest.mark.parametrize("key", sorted(set(LOSSES) - {"weight_redundancy"}))
def test_dim_selects_the_axis_of_the_units(key):
    x = torch.rand(4, 5, 3, dtype=DOUBLE)
    loss = LOSSES.build(key)
    torch.testing.assert_close(loss(x), loss(x.reshape(20, 3)))
    torch.testing.assert_close(LOSSES.build(key, dim=1)(x.movedim(-1, 1)), loss(x))


@pytest.mark.parametrize("items", [150, 40])
def test_the_objective_in_float32_with_more_and_fewer_items_than_units(items):
    x = (torch.rand(items, 60) * 4).requires_grad_()
    found = EMLoss()(x)
    exact = x.detach().double().requires_grad_()
    for name, expected in published(exact).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=0)
        (gradient,) = torch.autograd.grad(found[name], x, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, exact)
        assert (gradient - wanted).norm() < 1e-5 * wanted.norm(), name


def test_sum_and_mean_differ_by_the_number_of_items():
    a = torch.rand(3, 4, 5)
    torch.testing.assert_close(EMLoss()(a)["free_energy"], 12 * EMLoss(reduction="mean")(a)["free_energy"])
    assert EMLoss()(a)["variance"] == EMLoss(reduction="mean")(a)["variance"]


def test_log_det_against_numpy_and_its_bounds():
    a = torch.randn(40, 6, dtype=DOUBLE) @ torch.randn(6, 6, dtype=DOUBLE)
    expected = -np.linalg.slogdet(np.cov(a.numpy().T) + 1e-6 * np.eye(6))[1]
    assert LogDetLoss()(a).item() == pytest.approx(expected, rel=1e-10)
    assert LogDetLoss()(a) > VarianceLoss()(a)
    nearly = torch.randn(200_000, 4, dtype=DOUBLE) + 0.02 * torch.randn(200_000, 1, dtype=DOUBLE)
    half = 0.5 * DecorrelationLoss()(nearly)
    apart = LogDetLoss(eps=1e-12)(nearly) - VarianceLoss(eps=1e-12)(nearly)
    torch.testing.assert_close(apart, half, rtol=0.02, atol=0)


def test_balance_against_scipy_and_its_bounds():
    a = torch.rand(9, 5, dtype=DOUBLE) * 5
    mean = torch.softmax(-a, dim=1).mean(0).numpy()
    assert BalanceLoss()(a).item() == pytest.approx(stats.entropy(mean, np.full(5, 0.2)), rel=1e-12)
    one_for_all = torch.tensor([0.0, 1e6, 1e6, 1e6]).expand(8, 4)
    assert BalanceLoss()(one_for_all).item() == pytest.approx(math.log(4))


def test_variance_loss_is_unbounded_under_scaling_and_bounded_variance_is_not():
    a = torch.relu(torch.randn(128, 64, dtype=DOUBLE))
    assert EMLoss().total(a) - EMLoss().total(a * 1e4) > 1000
    assert VarianceLoss()(a) - VarianceLoss()(a * 1e4) > 1000
    assert all(BoundedVarianceLoss()(a * scale) >= 0 for scale in (1.0, 1e2, 1e4, 1e8))
    bounded = EMLoss(variance=0.0, bounded_variance=1.0)
    free = FreeEnergyLoss()(a).item()
    assert all(bounded.total(a * scale) > free - 1 for scale in (1e1, 1e2, 1e4, 1e8))
    # Far below the target, the gradient equals that of the published term.
    dying = (a * 1e-2).requires_grad_()
    (pull,) = torch.autograd.grad(BoundedVarianceLoss()(dying), dying)
    (wanted,) = torch.autograd.grad(VarianceLoss()(dying), dying)
    torch.testing.assert_close(pull, wanted, rtol=1e-4, atol=0)


def test_terms_are_weighted_and_those_of_weight_zero_are_not_computed():
    class Explosive(EnergyLoss):
        def forward(self, energies, mask=None, weights=None):
            raise AssertionError("computed")

    a = torch.rand(8, 3)
    loss = EMLoss(free_energy=0.5, variance=0, decorrelation={"weight": 2.0, "eps": 1e-3})
    loss.terms["variance"] = Explosive()
    terms = loss(a)
    assert list(terms) == ["free_energy", "decorrelation"]
    assert terms["free_energy"] == 0.5 * FreeEnergyLoss()(a)
    assert terms["decorrelation"] == 2 * DecorrelationLoss(eps=1e-3)(a)
    loss.weights["free_energy"] = 0.0
    assert list(loss(a)) == ["decorrelation"]


def test_a_registered_loss_is_a_term_by_its_key(monkeypatch):
    class Mean(EnergyLoss):
        def __init__(self, power=1):
            super().__init__()
            self.power = power

        def forward(self, energies, mask=None, weights=None):
            return energies.pow(self.power).mean()

    monkeypatch.setitem(LOSSES._classes, "mean_energy", Mean)
    a = torch.rand(2, 3, 4)
    terms = EMLoss(mean_energy={"weight": 3.0, "power": 2}, dim=1)(a)
    assert terms["mean_energy"] == 3 * a.pow(2).mean()


def test_weight_redundancy_reads_the_weight():
    layer = nn.Linear(6, 4)
    loss = EMLoss(weight_redundancy=0.1)
    cosines = np.corrcoef(np.hstack([layer.weight.detach().numpy(), -layer.weight.detach().numpy()]))
    expected = 0.1 * (np.square(cosines).sum() - 4)
    terms = loss(layer(torch.rand(9, 6)), weight_matrix=layer.weight)
    assert terms["weight_redundancy"].item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="weight_redundancy.*weight_matrix"):
        loss(torch.rand(9, 4))
    with pytest.raises(ValueError, match=r"weight.*\(4,\)"):
        WeightRedundancyLoss()(torch.rand(4))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: EMLoss(variance=-1.0), ValueError, "variance=-1.0"),
        (lambda: EMLoss(variance=math.nan), ValueError, "variance=nan"),
        (lambda: EMLoss(free_energy={"weight": math.inf}), ValueError, "free_energy=inf"),
        (lambda: EMLoss(variance="high"), TypeError, "variance='high'"),
        (lambda: EMLoss(variance=True), TypeError, "variance=True"),
        (lambda: EMLoss(0, 0, 0), ValueError, "free_energy, variance, decorrelation"),
        (lambda: EMLoss(decorelation=1.0), ValueError, "'decorrelation'"),
        (lambda: EMLoss(reduction="none"), ValueError, "reduction='none'"),
        (lambda: EMLoss(balance={"temprature": 1.0}), TypeError, "loss 'balance'"),
        (
            lambda: FreeEnergyLoss(temperature=0.0),
            ValueError,
            "temperature=0.0",
        ),
        (lambda: BalanceLoss(temperature=-1), ValueError, "temperature=-1"),
        (lambda: BoundedVarianceLoss(target=0), ValueError, "target=0"),
        (lambda: VarianceLoss(eps=0), ValueError, "eps=0"),
        (lambda: EMLoss()(torch.zeros(4, 0)), ValueError, "dim=-1"),
    ],
)
def test_wrong_arguments_raise(make, error, words):
    with pytest.raises(error) as caught:
        make()
    assert words in str(caught.value)


def test_registry_contains_the_built_in_losses():
    assert {"free_energy", "variance", "decorrelation", "weight_redundancy", "log_det", "balance"} <= set(LOSSES)
    assert all(type(LOSSES.build(key)) is LOSSES[key] for key in LOSSES)


def test_two_processes_equal_one(tmp_path):
    published = [EMLoss(), EMLoss(reduction="mean"), FreeEnergyLoss(), VarianceLoss(), DecorrelationLoss()]
    others = [BoundedVarianceLoss(), BalanceLoss(), LogDetLoss()]
    # The inverse in the gradient of a log-determinant magnifies float32's own rounding.
    for losses, tolerance in ((published, 1e-6), (others, 5e-6)):
        folder = tmp_path / str(tolerance)
        folder.mkdir()
        assert_ranks_agree(losses, folder, tolerance)
