"""The EM operator: classical EM step for step, invariances, masks, weights, gradients, corrections, input checks."""

import copy
import pickle

import numpy as np
import pytest
import textbook
import torch
from helpers import (
    COVARIANCE_TYPES,
    DEGENERATE,
    assert_close,
    assert_finite_gradients,
    assert_raises,
    clusters,
    degenerate,
    detached,
    full_covariances,
    is_finite,
    mixture_at,
    of_mean_one,
    parts,
    start_among,
    trained,
)
from torch.autograd import gradcheck

from em_lightning import EMOperator, Mixture
from em_lightning.operators import DirectionalEM, GeneralizedEM
from em_lightning.operators.residual import neighbour_moments

INITS = ["farthest", "kmeans++", "random", "learned"]
SPREAD = [0.4, 0.7, 1.1]


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_an_untrained_operator_equals_scikit_learn_step_for_step(covariance, dtype, tolerance):
    x = clusters(1, 300, 3, spread=SPREAD, dtype=dtype)
    operator = EMOperator(4, 3, num_iters=10, covariance=covariance, residual=True).to(dtype)
    path = list(operator.iterate(x))
    for steps in range(1, 11):
        reference = textbook.scikit_learn(x[0], detached(path[0]), covariance, steps)
        found = [part.detach().double() for part in parts(path[steps])]
        torch.testing.assert_close(found[0].exp(), reference.weights, rtol=tolerance, atol=0)
        for one, two in zip(found[1:], parts(reference)[1:], strict=True):
            torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_invariant_in_points_and_equivariant_in_components(covariance):
    x = clusters(2, 120, 3, spread=SPREAD)
    operator = trained(EMOperator(4, 3, covariance=covariance).double())
    order = torch.randperm(x.shape[1])
    assert_close(operator(x), operator(x[:, order]), atol=1e-8)
    start = operator(x, num_iters=0)
    swap = torch.tensor([2, 0, 3, 1])
    covariances = start.covariances if covariance == "tied" else start.covariances[:, swap]
    swapped = Mixture(start.log_weights[:, swap], start.means[:, swap], covariances)
    one, two = operator(x, init=start), operator(x, init=swapped)
    torch.testing.assert_close(one.means[:, swap], two.means, rtol=0, atol=1e-8)
    torch.testing.assert_close(one.log_weights[:, swap], two.log_weights, rtol=0, atol=1e-8)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_equivariant_in_shift_and_scale_of_the_points(covariance):
    x = clusters(2, 120, 3, spread=SPREAD)
    operator = trained(EMOperator(4, 3, covariance=covariance).double())
    shift, scale = torch.tensor([[3.0, -700.0, 0.5], [0.0, 2.0, 1e4]]).double(), torch.tensor([1e-6, 1e3]).double()
    for b in range(2):
        factor, own = scale[b : b + 1], x[b : b + 1]
        operator.covariance_floor = 1e-6  # in squared units of the points
        expected = operator(own).affine(factor, shift[b : b + 1] * factor)
        operator.covariance_floor = 1e-6 * factor.item() ** 2
        moved = operator((own + shift[b]) * factor)
        torch.testing.assert_close(moved.weights, expected.weights, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(moved.means, expected.means, rtol=1e-6, atol=0)
        torch.testing.assert_close(moved.covariances, expected.covariances, rtol=1e-5, atol=1e-15)


def test_padding_does_not_blur_small_clouds_far_from_the_origin():
    x = 1e4 + 1e-3 * torch.randn(1, 60, 3, generator=torch.Generator().manual_seed(0))
    padded, mask = torch.cat([x, torch.zeros(1, 20, 3)], 1), torch.arange(80).unsqueeze(0) < 60
    operator = EMOperator(2, 3, residual=False)
    assert_close(operator(padded, mask), operator(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_masked_points_are_ignored_even_if_nan(covariance, init):
    x = clusters(2, 120, 3, spread=SPREAD)
    operator = trained(EMOperator(4, 3, covariance=covariance, init=init).double())
    padded = torch.cat([x, torch.full((2, 30, 3), torch.nan, dtype=x.dtype)], 1)
    mask = torch.arange(150).expand(2, -1) < 120
    start = operator(x, num_iters=0)
    assert_close(operator(x, init=start), operator(padded, mask, init=start), atol=1e-9)
    own = operator(padded, mask)
    assert is_finite(own)
    if init in ("farthest", "learned"):
        torch.testing.assert_close(own.means, operator(x).means, rtol=0, atol=1e-9)
    else:
        assert operator.classical()(padded, mask, num_iters=0).means.abs().max() <= x.abs().max()


def test_integer_weights_equal_repeated_points():
    x = clusters(2, 120, 3, spread=SPREAD)
    # Weights count relative to their mean, and corrections know the number of points.
    operator = EMOperator(4, 3, residual=False).double()
    weights = torch.randint(0, 3, (2, 120)).double()
    for b in range(2):
        repeated = x[b].repeat_interleave(weights[b].long(), 0)[None]
        start = operator(repeated, num_iters=0)  # a start compares the number of points of a cell with a threshold
        counted = operator(x[b : b + 1], weights=weights[b : b + 1], init=start)
        assert_close(counted, operator(repeated, init=start), atol=1e-8)


@pytest.mark.parametrize("factor", [1e-14, 1e-3, 2.0, 1e14])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prior": {"weight_concentration": 2.0}},
        {"kernel": "huber"},
        {"background": {"estimate": True}, "prior": {"weight_concentration": 2.0}},
        {"init": "learned", "gradient": "checkpoint"},
        {"competition": {"name": "sparsemin", "temperature": 2.0}},
    ],
    ids=str,
)
def test_result_is_invariant_to_the_scale_of_the_weights(factor, options):
    x = clusters(2, 60, 3, spread=SPREAD)
    operator = trained(EMOperator(4, 3, **options).double(), 0.02)
    weights = 0.1 + torch.rand(2, 60, dtype=torch.float64)
    assert_close(operator(x, weights=factor * weights), operator(x, weights=weights), rtol=1e-9, atol=1e-9)
    ones = torch.full((2, 60), factor, dtype=torch.float64)
    assert_close(operator(x, weights=ones), operator(x), rtol=1e-9, atol=1e-9)
    points = x.clone().requires_grad_()
    slopes = [
        torch.autograd.grad(operator(points, weights=own).means.square().sum(), points)[0]
        for own in (factor * weights, weights)
    ]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-8)


def test_weights_are_relative_to_their_mean_under_a_prior():
    """Weights of mean 1 count as repetitions of the points beside the pseudo-counts of a prior."""
    x = clusters(1, 60, 3, spread=SPREAD)
    operator = EMOperator(4, 3, prior={"weight_concentration": 3.0, "mean_strength": 2.0}, residual=False)
    counts = torch.randint(1, 4, (1, 60))
    repeated = x[0].repeat_interleave(counts[0], 0)[None]
    start = start_among(x, 4)
    found = operator(repeated, init=start)
    assert_close(operator(repeated, weights=7.0 * torch.ones(1, repeated.shape[1]).double(), init=start), found)
    # Each pseudo-count is one point of mean weight: 60 weighted points are fewer than their repetitions.
    weighted = operator(x, weights=counts.double(), init=start)
    assert_close(weighted, operator(x, weights=of_mean_one(counts.double()), init=start))
    assert (weighted.means - found.means).abs().max() > 1e-4


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_gradients_equal_autograd_through_the_textbook(covariance):
    x = clusters(1, 30, 2, 3).requires_grad_()
    start = start_among(x, 3, covariance)
    operator = EMOperator(3, 2, num_iters=4, covariance=covariance, residual=False, covariance_floor=1e-3)
    parameters = textbook.parameters_of(start)
    for _ in range(4):
        parameters = textbook.em_step(x[0], parameters, covariance, floor=1e-3)
    mixture = operator(x, init=start)
    target = torch.randn(30, dtype=torch.float64)
    values = (mixture.log_prob(x)[0] @ target, textbook.log_prob(x[0], parameters) @ target)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in values), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_gradcheck_through_the_whole_operator(covariance):
    x = clusters(1, 12, 2).requires_grad_()
    operator = trained(EMOperator(2, 2, num_iters=3, covariance=covariance, init="learned").double())
    parameters = list(operator.parameters())
    weights = torch.rand(1, 12, dtype=torch.float64, requires_grad=True)

    def outcome(x, weights, *_):
        mixture = operator(x, weights=weights)
        return mixture.log_prob(x), mixture.means, mixture.covariances

    assert gradcheck(outcome, (x, weights))
    assert gradcheck(outcome, (x, weights, *parameters), fast_mode=True)


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_sets_have_finite_values_and_gradients(name, init, covariance, dtype):
    x, mask = degenerate(name, dtype)
    operator = trained(EMOperator(4, 3, covariance=covariance, init=init).to(dtype))
    mixture = operator(x, mask)
    log_prob = mixture.log_prob(x, mask)
    assert is_finite(mixture) and log_prob.isfinite().all()
    assert_finite_gradients(log_prob.sum() + sum(part.sum() for part in parts(mixture)), x, operator)


# Learned corrections.


@pytest.mark.parametrize("floor", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_corrected_covariances_stay_above_the_floor(covariance, floor):
    x = clusters(2, 120, 3, spread=SPREAD)
    operator = trained(EMOperator(4, 3, covariance=covariance, covariance_floor=floor).double())
    with torch.no_grad():
        operator.correction.decide[-1].bias -= 5.0
    mixture = operator(x)
    values = torch.linalg.eigvalsh(full_covariances(mixture))
    # Without a floor a component may be thinner than the rounding error of its covariance.
    assert values.min() >= floor * (1 - 1e-9) - 1e-15 * values.max()
    assert mixture.log_prob(x).isfinite().all()


def test_last_correction_is_dropped_per_set_if_it_lowers_the_likelihood():
    x = clusters(8, 120, 3, spread=SPREAD)
    operator = EMOperator(4, 3, num_iters=2).double()
    with torch.no_grad():
        operator.correction.decide[-1].bias[:3] = -9.0  # far too narrow
    harmed, plain = operator(x).log_prob(x).mean(-1), operator.classical()(x).log_prob(x).mean(-1)
    assert (harmed >= plain - 3.0).all()
    operator.correction.decide[-1].bias.data[:3] = 0.05  # a small change is kept
    assert not torch.allclose(operator(x).covariances, operator.classical()(x).covariances)


def test_classical_is_the_operator_without_its_corrections():
    x = clusters(2, 120, 3, spread=SPREAD)
    operator = trained(EMOperator(4, 3).double())
    plain = EMOperator(4, 3, residual=False).double()
    assert_close(operator.classical()(x), plain(x), atol=1e-12)
    assert operator.correction is not None and not torch.allclose(operator(x).means, plain(x).means)


@pytest.mark.parametrize("floor", [0.0, 0.02])
@pytest.mark.parametrize("features", [1, 3, 6])
@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_a_corrected_component_equals_its_formula(covariance, features, floor):
    """``mu + V tanh(a . V^T change / sigma) sigma`` and ``G (Sigma - floor) G + floor``, matrix by matrix.

    The networks end in zero weights, so that their biases are the correction of every component.
    """
    x = torch.randn(2, 80, features, dtype=torch.float64)
    start = mixture_at(x[:, :2], covariance, 0.5 + torch.rand(2, features))
    operator = EMOperator(2, features, num_iters=1, covariance=covariance, covariance_floor=floor).double()
    bias = operator.correction.decide[-1].bias.detach()
    bias.copy_(0.05 * torch.randn_like(bias))
    exact, found = operator.classical()(x, init=start), detached(operator(x, init=start))
    assert not torch.allclose(exact.means, found.means)
    before, after, spread = (full_covariances(mixture).numpy() for mixture in (start, exact, found))
    unit = x.var(1, correction=0).mean(-1).sqrt()[:, None, None]
    offset = exact.means.unsqueeze(1) - exact.means.unsqueeze(2)  # mu_j - mu_k, (B, k, j, D)
    moments = full_covariances(exact).unsqueeze(1) + offset.unsqueeze(-1) * offset.unsqueeze(-2)
    whole = (exact.weights[:, None, :, None, None] * moments).sum(2)
    tie_break = 1e-6 * (neighbour_moments(exact.parameters(), operator.family, unit) + whole).numpy()
    stretch, shift = 2 * np.tanh(bias[:features].numpy() / 2), 10 * np.tanh(bias[features : 2 * features].numpy() / 10)
    for b, k in np.ndindex(2, 2):
        axes = np.eye(features) if covariance == "diag" else np.linalg.eigh(after[b, k] + tie_break[b, k])[1]
        deviations = np.sqrt(np.diag(axes.T @ after[b, k] @ axes))
        mass = 80 * float(exact.weights[b, k])
        step = axes @ np.diag(np.exp(np.sqrt(8 / (8 + mass)) * stretch)) @ axes.T
        expected = step @ (after[b, k] - floor * np.eye(features)) @ step.T + floor * np.eye(features)
        np.testing.assert_allclose(spread[b, k], expected, atol=1e-7 * np.abs(expected).max())
        change = axes.T @ (exact.means[b, k] - start.means[b, k]).numpy() / deviations
        moved = exact.means[b, k].numpy() + axes @ (deviations * np.tanh(shift * change))
        # The axes are those of the covariance plus 1e-6 of the second moments of its neighbours and all.
        np.testing.assert_allclose(found.means[b, k], moved, atol=1e-7)


def test_a_correction_multiplies_the_pseudo_counts_of_each_component():
    x = torch.randn(2, 80, 3, dtype=torch.float64)
    prior = {"weight_concentration": 2.0, "mean_strength": 0.5, "covariance_strength": 3.0, "covariance": 0.2}
    operator = EMOperator(3, 3, num_iters=1, prior=prior).double()
    start = operator(x, num_iters=0)
    bias = operator.correction.decide[-1].bias.detach()
    bias[7] = -1e3  # no points at the prior mean
    found = operator(x, init=start)
    assert not torch.allclose(found.means, operator.classical()(x, init=start).means, atol=1e-2)
    without = EMOperator(3, 3, num_iters=1, residual=False, prior={**prior, "mean_strength": 0.0}).double()
    torch.testing.assert_close(found.means, without(x, init=start).means, atol=1e-2, rtol=0)


def test_every_output_of_an_untrained_correction_has_a_gradient():
    x, held_out = torch.randn(2, 6, 40, 3, generator=torch.Generator().manual_seed(0)).unbind(0)
    operator = EMOperator(4, 3, prior={"weight_concentration": 2.0, "mean_strength": 0.5, "covariance_strength": 3.0})
    (-operator(x).log_prob(held_out)).mean().backward()
    assert (operator.correction.decide[-1].bias.grad != 0).all()


def test_corrections_turn_with_the_points():
    x = clusters(4, 60, 3, spread=SPREAD)
    operator = trained(EMOperator(4, 3).double(), 0.1)
    start = operator(x, num_iters=0)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    found = operator(
        x @ turn.T, init=Mixture(start.log_weights, start.means @ turn.T, turn @ start.covariances @ turn.T)
    )
    expected = operator(x, init=start)
    torch.testing.assert_close(found.means, expected.means @ turn.T, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.covariances, turn @ expected.covariances @ turn.T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["full", "lowrank"])
def test_corrections_do_not_depend_on_the_order_of_points_if_one_is_isolated(kind):
    x = clusters(8, 60, 3, spread=SPREAD)
    x[:, 0] = 20.0 * torch.randn(8, 3)  # its component gets equal variances, except for round-off, in all directions
    options = {"rank": 1} if kind == "lowrank" else {}
    operator = trained(EMOperator(5, 3, covariance=kind, covariance_floor=1e-4, **options).double())
    start, root = operator(x, num_iters=0), torch.randn(8, 5, 3, 3, dtype=x.dtype)
    start = Mixture(start.log_weights, start.means, root @ root.mT + 0.01 * torch.eye(3))
    assert_close(operator(x[:, torch.randperm(60)], init=start), operator(x, init=start), atol=1e-8)


# Starts, competitions, dtypes, copies.


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_the_best_of_several_starts_is_at_least_as_likely_after_a_step(init):
    x = clusters(20, 60, 3, spread=SPREAD)
    torch.manual_seed(5)
    one = EMOperator(6, 3, init=init, residual=False, num_iters=1).double()
    likelihoods = torch.stack([one(x).log_prob(x).mean(-1) for _ in range(5)])
    torch.manual_seed(5)
    several = EMOperator(6, 3, init=init, residual=False, num_iters=1, num_starts=5).double().eval()
    assert torch.allclose(several(x).log_prob(x).mean(-1), likelihoods.amax(0), atol=1e-9)
    several.train()
    torch.manual_seed(5)
    assert torch.allclose(several(x).log_prob(x).mean(-1), likelihoods.amax(0), atol=1e-9)
    torch.manual_seed(5)
    assert torch.allclose(several(x.clone().requires_grad_()).log_prob(x).mean(-1), likelihoods[0], atol=1e-9)


@pytest.mark.parametrize("needs", ["nothing", "no_grad", "points", "weights", "parameters"])
def test_training_mode_tries_several_starts_where_nothing_needs_a_gradient(needs):
    x, weights = clusters(3, 60, 3, spread=SPREAD), torch.ones(3, 60, dtype=torch.float64)
    operator = EMOperator(6, 3, init="random", num_starts=5, seed=0, residual=needs in ("parameters", "no_grad"))
    operator = operator.double()
    (x if needs == "points" else weights).requires_grad_(needs in ("points", "weights"))
    with torch.set_grad_enabled(needs != "no_grad"):
        found = operator(x, weights=weights, num_iters=0).means
    best = operator.eval()(x, weights=weights, num_iters=0).means
    first = EMOperator(6, 3, init="random", seed=0, residual=False)(x, weights=weights, num_iters=0).means
    assert not torch.equal(best, first)
    torch.testing.assert_close(found, best if needs in ("nothing", "no_grad") else first, rtol=0, atol=0)


def test_other_competitions_give_the_responsibilities():
    x = torch.randn(2, 120, 3, dtype=torch.float64)
    soft = EMOperator(4, 3, residual=False).double()
    by_name = EMOperator(4, 3, residual=False, competition={"name": "softmin", "temperature": 1.0}).double()
    assert_close(soft(x), by_name(x), atol=1e-12)
    hot = EMOperator(4, 3, residual=False, competition={"name": "softmin", "temperature": 1e6}, num_iters=1).double()
    assert torch.allclose(hot(x).weights, torch.full((2, 4), 0.25, dtype=torch.float64), atol=1e-4)
    sparse = EMOperator(4, 3, residual=False, competition="sparsemin").double()
    assert is_finite(sparse(x)) and not torch.allclose(sparse(x).means, soft(x).means)


def test_half_precision_and_autocast_are_computed_in_float32():
    x = clusters(2, 120, 3, spread=SPREAD, dtype=torch.float32)
    operator = EMOperator(4, 3)
    expected = operator(x.bfloat16().float())
    assert_close(operator(x.bfloat16()), expected, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixture = operator(x)
    assert mixture.means.dtype == torch.float32 and torch.allclose(mixture.means, operator(x).means, atol=1e-5)


@pytest.mark.parametrize(
    "operator",
    [
        EMOperator(2, 3, num_iters=2),
        EMOperator(2, 3, num_iters=2, covariance="lowrank", rank=1, gradient="checkpoint"),
        EMOperator(2, 3, num_iters=2, gradient="last"),
        EMOperator(2, 3, num_iters=60, gradient="implicit", residual=False),
        DirectionalEM(2, 3, num_iters=2),
        GeneralizedEM(2, 3, kernel="huber", num_iters=2),
    ],
    ids=lambda operator: f"{type(operator).__name__}-{operator.gradient}",
)
def test_iterations_leave_the_autocast_of_the_caller_on(operator):
    x = clusters(2, 40, 3, spread=SPREAD, dtype=torch.float32).requires_grad_()

    def means(mixture):
        return mixture.centers if isinstance(operator, GeneralizedEM) else mixture.means

    expected = [means(mixture) for mixture in operator.iterate(x)]
    (expected_grad,) = torch.autograd.grad(expected[-1].square().sum(), x)
    seen = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for mixture in operator.iterate(x):
            assert torch.is_autocast_enabled("cpu") and (x[0] @ x[0].mT).dtype == torch.bfloat16
            seen.append(means(mixture))
        (grad,) = torch.autograd.grad(seen[-1].square().sum(), x)
        assert torch.is_autocast_enabled("cpu")
    assert len(seen) == operator.num_iters + 1
    for one, other in zip(seen, expected, strict=True):
        assert torch.equal(one, other)
    assert torch.allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_round_trips():
    x = clusters(2, 120, 3, spread=SPREAD, dtype=torch.float32)
    operator = trained(EMOperator(4, 3, init="learned"))
    fresh = EMOperator(4, 3, init="learned")
    fresh.load_state_dict(operator.state_dict())
    for other in (fresh, copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
        assert torch.equal(other(x).means, operator(x).means)
    assert "num_iters=5" in repr(operator)


X = torch.randn(2, 10, 3)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: EMOperator(0, 3), ValueError, ["num_components=0"]),
        (lambda: EMOperator(4, 3, num_starts=0), ValueError, ["num_starts=0"]),
        (lambda: EMOperator(4, 3, num_starts=2), ValueError, ["num_starts=2", "'farthest'"]),
        (lambda: EMOperator(4, 0), ValueError, ["num_features=0"]),
        (lambda: EMOperator(4, 3, num_iters=-1), ValueError, ["num_iters=-1"]),
        (lambda: EMOperator(4, 3)(X, num_iters=-2), ValueError, ["num_iters=-2"]),
        (lambda: EMOperator(4, 3, covariance="ful"), ValueError, ["covariance='ful'", "'full'"]),
        (lambda: EMOperator(4, 3, init="best"), ValueError, ["init='best'", "'kmeans++'"]),
        (lambda: EMOperator(4, 3, gradient="none"), ValueError, ["gradient='none'", "'unrolled'"]),
        (lambda: EMOperator(4, 3, covariance_floor=-1.0), ValueError, ["covariance_floor=-1.0"]),
        (lambda: EMOperator(4, 3, kernel="gausian"), ValueError, ["'gausian'", "'gaussian'"]),
        (lambda: EMOperator(4, 3, background={"wait": 0.1}), TypeError, ["background", "wait"]),
        (lambda: EMOperator(4, 3, prior={"strength": 1}), TypeError, ["prior", "strength"]),
        (lambda: EMOperator(4, 3)(X[0]), ValueError, ["x", "(10, 3)"]),
        (lambda: EMOperator(4, 3)(X[..., :2]), ValueError, ["x", "(2, 10, 2)"]),
        (lambda: EMOperator(4, 3)(X[:, :0]), ValueError, ["x", "(2, 0, 3)"]),
        (lambda: EMOperator(4, 3)(X.long()), TypeError, ["x", "torch.int64"]),
        (lambda: EMOperator(4, 3)([1.0]), TypeError, ["x", "list"]),
        (lambda: EMOperator(4, 3)(X.numpy()), TypeError, ["x", "numpy.ndarray", "torch.from_numpy"]),
        (lambda: EMOperator(4, 3)(X, (X[..., 0] > 0).numpy()), TypeError, ["mask", "numpy.ndarray"]),
        (lambda: EMOperator(4, 3)(X, weights=X[..., 0].numpy()), TypeError, ["weights", "numpy.ndarray"]),
        (lambda: EMOperator(4, 3)(X, X[..., 0]), TypeError, ["mask", "torch.float32"]),
        (lambda: EMOperator(4, 3)(X, X[:, :5, 0] > 0), ValueError, ["mask", "(2, 5)", "(2, 10)"]),
        (lambda: EMOperator(4, 3)(X, weights=X[:, :, 0].abs() - 9), ValueError, ["weights"]),
        (
            lambda: EMOperator(4, 3)(torch.where(torch.arange(60).view(2, 10, 3) == 47, torch.nan, X)),
            ValueError,
            ["x", "nan"],
        ),
        (
            lambda: EMOperator(4, 3).log_prob(torch.where(X > 1, torch.nan, X), EMOperator(4, 3)(X)),
            ValueError,
            ["x", "nan"],
        ),
        (
            lambda: EMOperator(4, 3)(X, init=Mixture(torch.zeros(2, 4), torch.zeros(2, 4, 3), torch.ones(2, 4, 3))),
            ValueError,
            ["diag", "full"],
        ),
        (lambda: EMOperator(4, 3, covariance="diag")(X, init=EMOperator(4, 3)(X)), ValueError, ["full", "'diag'"]),
        (
            lambda: EMOperator(4, 3, covariance="lowrank", rank=1)(X, init=EMOperator(4, 3, covariance="tied")(X)),
            ValueError,
            ["tied", "'lowrank'", "full"],
        ),
        (
            lambda: EMOperator(4, 3, covariance="diag")(
                X, init=Mixture(torch.zeros(2, 5), torch.zeros(2, 5, 3), torch.ones(2, 5, 3))
            ),
            ValueError,
            ["init", "(2, 5, 3)", "(2, 4, 3)"],
        ),
    ],
)
def test_wrong_arguments_raise(call, error, words):
    assert_raises(error, words, call)


def test_a_start_without_a_finite_objective_does_not_win(monkeypatch):
    torch.manual_seed(0)
    operator = EMOperator(2, 2, init="random", num_starts=3, seed=0, residual=False).eval()
    x, objectives = torch.randn(4, 60, 2), iter([1.0, float("nan"), 2.0])
    monkeypatch.setattr(operator, "_objective", lambda sets, state: torch.full((4,), next(objectives)))
    chosen = operator(x, num_iters=0).means
    monkeypatch.undo()
    drawn = EMOperator(2, 2, init="random", seed=0, residual=False).eval()
    first = drawn(x, num_iters=0).means
    objectives = iter([float("nan"), float("nan"), float("nan")])
    monkeypatch.setattr(operator, "_objective", lambda sets, state: torch.full((4,), next(objectives)))
    assert not torch.equal(chosen, first)
    assert torch.equal(operator(x, num_iters=0).means, first)
