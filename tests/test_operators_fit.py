"""Backgrounds, fits to convergence, starts: everything beside the plain loop of the operator."""

import math
import pickle

import numpy as np
import pytest
import torch
from helpers import (
    COVARIANCE_TYPES,
    DEGENERATE,
    assert_close,
    assert_finite_gradients,
    assert_raises,
    degenerate,
    is_finite,
    log_prior,
    mixture_at,
    of_mean_one,
    set_of,
    trained,
    two_clusters,
)

from em_lightning import EMOperator
from em_lightning.competition import none_of_the_above


def start_of(x):
    return mixture_at(torch.tensor([[0.0, 0.0], [6.0, 6.0]], dtype=x.dtype).expand(len(x), -1, -1))


def test_a_background_is_a_uniform_component():
    x = two_clusters(3, 200, outliers=0.25)
    operator = EMOperator(2, 2, background=0.25, residual=False)
    mixture = operator(x, init=start_of(x))
    volume = (x.amax(1) - x.amin(1)).prod(-1, keepdim=True)
    expected = (0.25 / volume + 0.75 * mixture.log_prob(x).exp()).log()
    assert torch.allclose(operator.log_prob(x, mixture), expected, atol=1e-12)
    outlier = none_of_the_above(operator.posterior(x, mixture))
    assert torch.allclose(outlier, 0.25 / volume / expected.exp(), atol=1e-12)
    assert outlier[:, :50].mean() > 0.8 and outlier[:, 50:].mean() < 0.1
    # One step by hand: the other components share what the background leaves.
    (after,) = list(operator.iterate(x, init=mixture, num_iters=1))[1:]
    r = mixture.posterior(x).responsibilities * (1 - outlier).unsqueeze(-1)
    assert torch.allclose(after.weights, r.sum(1) / r.sum((1, 2)).unsqueeze(-1), atol=1e-10)
    assert torch.allclose(after.means, r.mT @ x / r.sum(1).unsqueeze(-1), atol=1e-9)
    plain = EMOperator(2, 2, residual=False)(x, init=start_of(x))
    truth = start_of(x).means
    assert (mixture.means - truth).norm(dim=-1).max() < 0.5 < (plain.means - truth).norm(dim=-1).max()


@pytest.mark.parametrize("kernel", ["gaussian", "huber"])
@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_objective_with_a_background_is_monotone(covariance, kernel):
    x = two_clusters(3, 200, outliers=0.25)
    mask = torch.rand(3, 200) < 0.8
    weights = of_mean_one(torch.rand(3, 200, dtype=torch.float64), mask)
    operator = EMOperator(
        2, 2, covariance=covariance, kernel=kernel, background=0.2, prior={}, covariance_floor=0.0, residual=False
    )
    before = torch.full((3,), -math.inf, dtype=torch.float64)
    for mixture in operator.iterate(x, mask, weights, num_iters=30):
        after = operator.objective(x, mixture, mask, weights)
        by_hand = (operator.log_prob(x, mixture, mask) * weights).sum(-1)
        by_hand = by_hand + log_prior(operator.prior, mixture, x, mask, weights)
        assert torch.allclose(after, by_hand) and (after >= before - 1e-9).all()
        before = after


def test_masked_points_do_not_enlarge_the_box():
    x = two_clusters(3, 200, outliers=0.25)
    padded = torch.cat([x, torch.full((3, 5, 2), 1e6, dtype=x.dtype)], 1)
    mask = torch.arange(205).expand(3, -1) < 200
    operator = EMOperator(2, 2, background=0.2, residual=False)
    one, two = operator(x, init=start_of(x)), operator(padded, mask, init=start_of(x))
    assert torch.allclose(one.means, two.means, atol=1e-9)
    assert torch.allclose(operator.log_prob(padded, two, mask)[:, :200], operator.log_prob(x, one), atol=1e-9)
    assert torch.allclose(
        operator.posterior(padded, two, mask).responsibilities[:, :200], operator.posterior(x, one).responsibilities
    )


def test_a_given_energy_equals_the_background_competition():
    x = two_clusters(3, 200, outliers=0.25)
    by_energy = EMOperator(2, 2, background={"weight": 0.5, "energy": 4.0}, residual=False)
    by_competition = EMOperator(2, 2, competition={"name": "background", "energy": 4.0}, residual=False)
    one, two = by_energy(x, init=start_of(x)), by_competition(x, init=start_of(x))
    assert torch.allclose(one.means, two.means, atol=1e-9) and torch.allclose(one.weights, two.weights, atol=1e-9)


def test_temperature_divides_the_joint_density():
    x = two_clusters(3, 150)
    hot = {"competition": {"name": "softmin", "temperature": 2.5}, "residual": False}
    wide = {"name": "huber", "delta": 60.0}  # a Gaussian within 60 deviations
    assert_close(EMOperator(4, 2, **hot)(x), EMOperator(4, 2, kernel=wide, **hot)(x), atol=1e-9)


@pytest.mark.parametrize("kernel", ["gaussian", "student_t"])
def test_weighted_and_repeated_points_stop_at_the_same_iteration(kernel):
    x, counts = 0.4 * two_clusters(1, 80), torch.randint(0, 4, (1, 80))  # clusters that overlap: many steps
    operator = EMOperator(2, 2, kernel=kernel, residual=False)
    start = start_of(x)
    counted = operator.fit(x, weights=counts.double(), init=start, tol=1e-6, max_iters=500)
    repeated = operator.fit(x[0].repeat_interleave(counts[0], 0)[None], init=start, tol=1e-6, max_iters=500)
    assert counted[1].tolist() == repeated[1].tolist() and int(counted[1]) < 500
    assert torch.allclose(counted[0].means, repeated[0].means, atol=1e-9)


@pytest.mark.parametrize("kernel", ["gaussian", "student_t"])
def test_fit_stops_each_set_independently(kernel):
    x = two_clusters(3, 150)
    x[0] = torch.randn(150, 2)  # one cluster for two components: slow convergence
    operator = EMOperator(2, 2, kernel=kernel, residual=False)
    mixture, steps = operator.fit(x, tol=1e-5, max_iters=500)
    assert len(set(steps.tolist())) > 1 and steps.max() < 500
    for b in range(3):
        alone, own_steps = operator.fit(x[b : b + 1], tol=1e-5, max_iters=500)
        assert own_steps.item() == steps[b].item()
        assert_close(alone, set_of(mixture, b), atol=1e-10)
        path = list(operator.iterate(x[b : b + 1], num_iters=own_steps.item()))
        assert torch.allclose(path[-1].means, alone.means, atol=1e-10)
        values = [operator.objective(x[b : b + 1], step).item() / 150 for step in path]
        rises = [after - before for before, after in zip(values, values[1:], strict=False)]
        assert rises[-2] < 1e-5 <= min(rises[:-2])  # the last M-step follows the test of convergence


def test_fit_ends_at_its_limit():
    x = two_clusters(3, 150)
    mixture, steps = EMOperator(2, 2, residual=False).fit(x, tol=0.0, max_iters=3)
    assert steps.tolist() == [3, 3, 3] and mixture.means.shape == (3, 2, 2)
    start, none = EMOperator(2, 2, residual=False).fit(x, max_iters=0)
    assert none.tolist() == [0, 0, 0] and torch.equal(
        start.means, EMOperator(2, 2, residual=False)(x, num_iters=0).means
    )
    empty = torch.zeros(3, 150, dtype=torch.bool)
    nothing, steps = EMOperator(2, 2, residual=False).fit(x, empty)
    assert steps.tolist() == [2, 2, 2] and is_finite(nothing)


def test_fit_is_differentiable():
    x = two_clusters(1, 20).requires_grad_()
    operator = EMOperator(2, 2, residual=False)
    mixture, steps = operator.fit(x, tol=1e-4)
    (one,) = torch.autograd.grad(mixture.means.sum(), x)
    (two,) = torch.autograd.grad(operator(x, num_iters=steps.item()).means.sum(), x)
    assert torch.allclose(one, two)


def test_start_covariances_have_the_shape_of_cores_and_the_size_of_cells():
    """Cells of three centers: one with a core, one with few points, one with too few for a covariance."""
    x = torch.cat([torch.randn(80, 2) * torch.tensor([1.0, 3.0]), 60 + torch.randn(6, 2), 140 + torch.rand(2, 2)])
    x = x.double()
    mixture = EMOperator(3, 2, init="farthest", covariance_floor=1e-3, residual=False)(x[None], num_iters=0)
    order = mixture.means[0, :, 0].argsort()
    means, covariances = mixture.means[0, order].numpy(), mixture.covariances[0, order].numpy()
    np.testing.assert_allclose(mixture.weights[0, order], [80 / 88, 6 / 88, 2 / 88], atol=1e-9)

    def spread(points):
        return np.cov(points.T, bias=True) + 1e-3 * np.eye(2)

    cells = [x[:80].numpy(), x[80:86].numpy(), x[86:].numpy()]
    # The trace of a covariance is that of its cell, where the cell has enough points.
    for k in range(2):
        assert np.trace(covariances[k]) == pytest.approx(np.trace(spread(cells[k])), rel=1e-9)
        assert np.linalg.norm(means[k] - cells[k].mean(0)) < 5.0
    # A cell of two points takes the variance that all cells share.
    np.testing.assert_allclose(covariances[2], covariances[2][0, 0] * np.eye(2), atol=1e-9)
    assert covariances[2][0, 0] > spread(cells[2]).max()


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_a_seed_gives_the_same_start_in_every_call(init):
    x = two_clusters(3, 150)
    seeded, other = EMOperator(4, 2, init=init, seed=3), EMOperator(4, 2, init=init, seed=4)
    state = torch.get_rng_state()
    assert torch.equal(seeded(x).means, seeded(x).means) and not torch.allclose(seeded(x).means, other(x).means)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is not used


@pytest.mark.parametrize("kernel", ["gaussian", "student_t"])
def test_the_best_of_several_starts_is_kept_for_each_set(kernel):
    x = two_clusters(4, 150)
    arguments = dict(init="random", kernel=kernel, prior={}, residual=False)
    several = EMOperator(5, 2, num_starts=6, seed=3, **arguments)
    best = several.eval()(x, num_iters=0)
    assert torch.equal(several.train().fit(x, max_iters=0)[0].means, best.means)  # a fit always compares the starts
    # Six draws in a row from the same generator.
    torch.manual_seed(3)
    one = EMOperator(5, 2, **arguments)
    tries = [one(x, num_iters=0) for _ in range(6)]
    scores = torch.stack([one.objective(x, one(x, init=start, num_iters=5)) for start in tries])
    for b, row in enumerate(scores.argmax(0).tolist()):
        assert torch.allclose(best.means[b], tries[row].means[b])
    assert len(set(scores.argmax(0).tolist())) > 1


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_sets_stay_finite(covariance, name):
    x, mask = degenerate(name)
    operator = EMOperator(
        4,
        3,
        covariance=covariance,
        background=0.1,
        init="kmeans++",
        num_starts=2,
    ).eval()
    mixture = operator(x, mask)
    log_prob = operator.log_prob(x, mixture, mask, operator.background.energies(x, mask))
    assert is_finite(mixture) and log_prob.isfinite().all()
    assert_finite_gradients(log_prob.sum() + mixture.means.sum(), x, operator)


def test_round_trips():
    x = two_clusters(3, 200, outliers=0.25)
    build = dict(kernel="student_t", prior={"learnable": True}, background=0.2)
    operator, fresh = EMOperator(2, 2, **build).double(), EMOperator(2, 2, **build).double()
    trained(operator)
    fresh.load_state_dict(operator.state_dict())
    for other in (fresh, pickle.loads(pickle.dumps(operator))):
        assert torch.equal(other(x).means, operator(x).means)
        assert torch.equal(other.log_prob(x, other(x)), operator.log_prob(x, operator(x)))


X = torch.randn(2, 10, 3)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: EMOperator(4, 3, background=1.5), ValueError, ["weight=1.5"]),
        (lambda: EMOperator(4, 3, background=1.0), ValueError, ["weight=1.0"]),
        (lambda: EMOperator(4, 3, background={"energy": math.nan}), ValueError, ["energy=nan"]),
        (lambda: EMOperator(4, 3, background="box"), TypeError, ["background='box'"]),
        (lambda: EMOperator(4, 3, background=0.1, competition="background"), ValueError, ["background", "competition"]),
        (lambda: EMOperator(4, 3, seed=2), ValueError, ["seed=2"]),
        (lambda: EMOperator(4, 3).fit(X, max_iters=-1), ValueError, ["max_iters=-1"]),
        (lambda: EMOperator(4, 3).fit(X, tol=-1.0), ValueError, ["tol=-1.0"]),
        (lambda: EMOperator(4, 3).log_prob(X[..., :2], EMOperator(4, 3)(X)), ValueError, ["x", "(2, 10, 2)"]),
    ],
)
def test_wrong_arguments_raise(call, error, words):
    assert_raises(error, words, call)


def test_balanced_components_couple_the_points_of_a_set_and_nothing_else():
    x = torch.randn(2, 30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(1)) < 0.7
    operator = EMOperator(3, 2, competition="balanced", residual=False, num_iters=3)
    mixture = operator(torch.where(mask.unsqueeze(-1), x, 1e3), mask)
    responsibilities = operator.posterior(x, mixture, mask).responsibilities
    for n in range(2):
        alone = operator(x[n : n + 1, mask[n]])
        torch.testing.assert_close(mixture.means[n], alone.means[0])
        torch.testing.assert_close(mixture.weights[n], torch.full((3,), 1 / 3).double())
        expected = operator.posterior(x[n : n + 1, mask[n]], alone).responsibilities[0]
        torch.testing.assert_close(responsibilities[n, mask[n]], expected)
