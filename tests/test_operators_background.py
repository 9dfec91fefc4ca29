"""A background whose weight EM estimates, one per set."""

import math

import pytest
import textbook
import torch
from helpers import (
    COVARIANCE_TYPES,
    assert_close,
    assert_raises,
    cast,
    is_finite,
    log_prior,
    mixture_at,
    of_mean_one,
    two_clusters,
    with_padding,
)
from torch.autograd import gradcheck

from em_lightning import EMOperator
from em_lightning.competition import none_of_the_above
from em_lightning.mixture import UniformBackground

LEAST = 1e-5


def sets(shares=(0.1, 0.4), items=120):
    return two_clusters(len(shares), items, outliers=shares)


def start_of(x, covariance="full"):
    means = torch.tensor([[0.0, 0.0], [6.0, 6.0]], dtype=x.dtype).expand(len(x), -1, -1)
    return mixture_at(means, covariance)


def weight_of(mixture):
    """Return the weight of the background: what the weights of the components leave."""
    return 1.0 - mixture.weights.sum(-1)


@pytest.mark.parametrize("name", ["default", "robust", "prior", "energy"])
def test_steps_equal_the_textbook(name):
    x, mask, weights = with_padding(sets())
    arguments = {
        "robust": {"kernel": textbook.ROBUST["huber"]},
        "prior": {"prior": {"weight_concentration": 4.0, "mean_strength": 0.0, "covariance_strength": 0.0}},
        "energy": {"background": {"estimate": True, "weight": 0.2, "energy": 5.0}},
    }.get(name, {})
    options = {"background": {"estimate": True, "weight": 0.2}, "covariance_floor": 0.0, "residual": False}
    operator = EMOperator(2, 2, **(options | arguments))
    start = start_of(x)
    found = operator(x, mask, weights, init=start, num_iters=3)
    kernel = arguments.get("kernel", "gaussian")
    for b in range(2):
        points, counts = x[b][mask[b]], weights[b][mask[b]]
        volume = (points.amax(0) - points.amin(0)).prod()
        log_density = torch.tensor(-5.0).double() if name == "energy" else -volume.log()
        prior = textbook.prior_of(arguments["prior"], points, counts, 2) if name == "prior" else None
        parameters, weight = textbook.parameters_of(start, b), torch.tensor(0.2).double()
        for _ in range(3):
            parameters, weight = textbook.em_step_beside_background(
                points, parameters, weight, log_density, "full", counts, kernel=kernel, prior=prior
            )
        torch.testing.assert_close(weight_of(found)[b], weight, rtol=0, atol=1e-7)
        torch.testing.assert_close(found.weights[b], (1 - weight) * parameters.weights, rtol=0, atol=1e-7)
        torch.testing.assert_close(found.means[b], parameters.means, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.covariances[b], parameters.covariances, rtol=0, atol=1e-6)


def test_each_set_has_its_own_weight():
    x = sets((0.05, 0.25, 0.5), 800)
    operator = EMOperator(2, 2, background={"estimate": True}, num_iters=60, residual=False)
    mixture = operator(x, init=start_of(x))
    # Uniform points inside a cluster count as points of the cluster.
    assert torch.allclose(weight_of(mixture), torch.tensor([0.05, 0.25, 0.5]).double(), atol=0.04)
    assert (mixture.means - start_of(x).means).norm(dim=-1).max() < 0.5
    outlier = none_of_the_above(operator.posterior(x, mixture))
    assert torch.allclose(outlier.mean(1), weight_of(mixture), atol=1e-3)  # the fixed point
    volume = (x.amax(1) - x.amin(1)).prod(-1, keepdim=True)
    expected = (weight_of(mixture).unsqueeze(-1) / volume + mixture.log_prob(x).exp()).log()
    assert torch.allclose(operator.log_prob(x, mixture), expected, atol=1e-12)
    fitted, steps = operator.fit(x, init=start_of(x), tol=1e-9, max_iters=500)
    assert (steps < 500).all() and torch.allclose(weight_of(fitted), weight_of(mixture), atol=1e-3)
    # The mixture contains the weight of the background, so that a fit can be continued.
    half = operator(x, init=start_of(x), num_iters=30)
    assert torch.allclose(operator(x, init=half, num_iters=30).means, mixture.means, atol=1e-9)
    single = EMOperator(2, 2, background={"estimate": True}, num_iters=60, residual=False)(
        x.float(), init=cast(start_of(x), torch.float32)
    )
    assert torch.allclose(weight_of(single).double(), weight_of(mixture), atol=1e-5)
    assert mixture.sample(5).shape == (3, 5, 2)


@pytest.mark.parametrize("covariance", [*COVARIANCE_TYPES, "lowrank"])
@pytest.mark.parametrize("arguments", [{}, {"kernel": "student_t"}, {"prior": {"weight_concentration": 3.0}}])
def test_objective_is_monotone(covariance, arguments):
    x = torch.cat([sets((0.1, 0.4), 60), torch.randn(2, 60, 1, dtype=torch.float64)], -1)
    mask = torch.rand(2, 60) < 0.8
    weights = of_mean_one(torch.rand(2, 60, dtype=torch.float64), mask)
    lowrank = covariance == "lowrank"
    options = {"background": {"estimate": True}, "covariance_floor": 0.0, "residual": False}
    operator = EMOperator(2, 3, covariance=covariance, rank=1 if lowrank else None, **options, **arguments)
    before = torch.full((2,), -math.inf, dtype=torch.float64)
    start = mixture_at(x[:, 50:52], "full" if lowrank else covariance, x.var(1, correction=0))
    for mixture in operator.iterate(x, mask, weights, init=start, num_iters=20):
        after = operator.objective(x, mixture, mask, weights)
        by_hand = (operator.log_prob(x, mixture, mask) * weights).sum(-1)
        if operator.prior is not None:
            by_hand = by_hand + log_prior(operator.prior, mixture, x, mask, weights) + 2.0 * weight_of(mixture).log()
        torch.testing.assert_close(after, by_hand)
        assert (after >= before - 1e-9).all()
        before = after


@pytest.mark.parametrize("competition", ["softmin", "sparsemin"])
@pytest.mark.parametrize("kernel", ["gaussian", "huber"])
def test_gradients(kernel, competition):
    x = sets((0.2, 0.3), 12).requires_grad_()
    counted = torch.rand(2, 12, dtype=torch.float64).add(0.5).requires_grad_()
    energy = {"estimate": True, "energy": 5.0}  # the volume of a box is not differentiable where points tie

    def outcome(gradient, x, counted):
        operator = EMOperator(
            2, 2, kernel=kernel, competition=competition, background=energy, prior={"weight_concentration": 2.0},
            num_iters=3, residual=False, gradient=gradient,
        )  # fmt: skip
        mixture = operator(x, weights=counted, init=start_of(x))
        return mixture.log_weights, mixture.means, operator.log_prob(x, mixture)

    assert gradcheck(lambda *args: outcome("unrolled", *args), (x, counted), fast_mode=True)
    grads = {}
    for gradient in ("unrolled", "checkpoint", "last"):
        value = sum(
            (part * torch.linspace(0, 1, part.numel()).view(part.shape)).sum() for part in outcome(gradient, x, counted)
        )
        grads[gradient] = torch.autograd.grad(value, (x, counted))
    for one, two in zip(grads["unrolled"], grads["checkpoint"], strict=True):
        assert torch.allclose(one, two)
    assert grads["last"][0].isfinite().all()


def test_the_implicit_gradient_is_that_of_the_converged_weight():
    x = sets((0.1, 0.3), 80).requires_grad_()
    grads = []
    for gradient in ("unrolled", "implicit"):
        operator = EMOperator(
            2, 2, background={"estimate": True}, num_iters=300, residual=False, gradient=gradient, covariance_floor=1e-3
        )
        mixture = operator(x, init=start_of(x))
        grads.append(torch.autograd.grad(weight_of(mixture).sum() + mixture.means[..., 0].sum(), x)[0])
    assert torch.allclose(*grads, atol=1e-8)


def test_the_weight_stays_between_its_bounds():
    x = sets((0.0,), 200)
    operator = EMOperator(2, 2, background={"estimate": True, "energy": 30.0}, num_iters=50, residual=False)
    mixture = operator(x, init=start_of(x))
    assert weight_of(mixture).item() == pytest.approx(LEAST, rel=1e-6)
    # A fit that starts at the bound leaves it.
    noisy = torch.cat([x, 30 * torch.rand(1, 60, 2, dtype=torch.float64) - 12], 1)
    again = EMOperator(2, 2, background={"estimate": True}, num_iters=50, residual=False)
    assert weight_of(again(noisy, init=mixture)).item() == pytest.approx(60 / 260, abs=0.05)
    everything = EMOperator(2, 2, background={"estimate": True, "energy": -9.0}, num_iters=50, residual=False)
    mixture = everything(x, init=start_of(x))
    assert weight_of(mixture).item() == pytest.approx(1 - LEAST, rel=1e-9)
    assert is_finite(mixture)


@pytest.mark.parametrize("weight", [1e-9, 0.2, 1 - 1e-9])
def test_the_share_of_the_background_is_reserved_once(weight):
    background = UniformBackground(weight, estimate=True)
    once = background.reserve_share(torch.tensor([[0.25, 0.75]], dtype=torch.float64).log())
    assert -torch.expm1(once.logsumexp(-1)).item() == pytest.approx(min(max(weight, LEAST), 1 - LEAST), rel=1e-9)
    assert torch.equal(background.reserve_share(once), once)


@pytest.mark.parametrize("arguments", [{}, {"kernel": "laplace"}])
def test_an_empty_set_keeps_the_start(arguments):
    x = sets().float().requires_grad_()
    mask = torch.tensor([[False], [True]]).expand(2, 120)
    operator = EMOperator(3, 2, background=UniformBackground(0.3, estimate=True), init="kmeans++", num_starts=2)
    mixture = operator.eval()(x, mask)
    assert weight_of(mixture)[0].item() == pytest.approx(0.3, abs=1e-6)
    operator.log_prob(x, mixture, mask).sum().backward()
    assert is_finite(mixture) and x.grad.isfinite().all()


@pytest.mark.parametrize("features", [1, 2])
def test_the_energy_of_the_box_gives_the_same_fit(features):
    x = sets()[..., :features]
    sides = x[0].amax(0) - x[0].amin(0)
    found = []
    for background in ({"weight": 0.2}, {"weight": 0.2, "energy": float(sides.log().sum())}):
        found.append(EMOperator(2, features, background=background, residual=False)(x[:1], num_iters=5))
    assert_close(*found, rtol=1e-7)


@pytest.mark.parametrize("background", [0.2, {"estimate": True}, {"energy": 3.0}])
def test_densities_under_the_background_of_the_fit_do_not_depend_on_other_points(background):
    x, mask, _ = with_padding(sets())
    operator = EMOperator(2, 2, background=background, residual=False)
    mixture = operator(x, mask, init=start_of(x))
    energies = operator.background.energies(x, mask)
    density, posterior = operator.log_prob(x, mixture, mask), operator.posterior(x, mixture, mask)
    for rows in (slice(0, 1), slice(3, 20)):
        alone = operator.log_prob(x[:, rows], mixture, mask[:, rows], energies)
        torch.testing.assert_close(alone, density[:, rows], rtol=0, atol=1e-9)
        shares = operator.posterior(x[:, rows], mixture, mask[:, rows], energies).responsibilities
        counted = mask[:, rows]
        torch.testing.assert_close(shares[counted], posterior.responsibilities[:, rows][counted], rtol=0, atol=1e-9)


def test_energies_are_log_volumes_of_boxes_in_units_of_the_points():
    x = 1e4 + torch.tensor([[[0.0, 0.0], [2.0, 3.0], [1.0, 90.0]]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    box = UniformBackground()
    assert box.energies(x, mask).item() == pytest.approx(math.log(6.0))
    assert box.energies(x, weights=mask.double()).item() == pytest.approx(math.log(6.0))
    assert box.energies(5.0 * x, mask).item() == pytest.approx(math.log(150.0))
    assert UniformBackground(energy=2.0).energies(x).item() == pytest.approx(2.0)


def test_one_point_needs_the_energies_of_the_fit():
    x = sets()
    operator = EMOperator(2, 2, background=0.1, residual=False)
    mixture, energies = start_of(x), operator.background.energies(x)
    for evaluate in (operator.log_prob, operator.posterior):
        assert_raises(ValueError, ["one point", "background_energies"], lambda e=evaluate: e(x[:, :1], mixture))
        evaluate(x[:, :1], mixture, background_energies=energies)
    constant = EMOperator(2, 2, background={"energy": 3.0}, residual=False)
    torch.testing.assert_close(constant.log_prob(x[:, :1], mixture), constant.log_prob(x, mixture)[:, :1])


def test_wrong_energies_are_reported():
    x = sets()
    with_box, without = EMOperator(2, 2, background=0.1, residual=False), EMOperator(2, 2, residual=False)
    mixture = start_of(x)
    two, three = torch.zeros(2), torch.zeros(3)
    assert_raises(ValueError, ["background_energies", "None"], lambda: without.log_prob(x, mixture, None, two))
    assert_raises(ValueError, ["background_energies", "None"], lambda: without.posterior(x, mixture, None, two))
    assert_raises(ValueError, ["background_energies", "(3,)"], lambda: with_box.log_prob(x, mixture, None, three))
