import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch.autograd import gradcheck

from em_lightning import EMOperator, Mixture
from em_lightning.mixture import COVARIANCES
from em_lightning.mixture.cloud import prepare
from em_lightning.mixture.factors import Factors
from em_lightning.mixture.starts import farthest_points, kmeans_plus_plus, random_points

KINDS = sorted(COVARIANCES)
INITS = ["farthest", "kmeans++", "random", "learned"]


def clusters(sets=2, items=120, features=3, dtype=torch.float64):
    centers = 4 * torch.randn(sets, 4, features, dtype=dtype)
    choice = torch.randint(0, 4, (sets, items))
    spread = torch.rand(features, dtype=dtype) + 0.2
    noise = torch.randn(sets, items, features, dtype=dtype) * spread
    return centers.gather(1, choice.unsqueeze(-1).expand(-1, -1, features)) + noise


def trained(operator):
    """Give the corrections something to do."""
    for parameter in operator.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return operator


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_an_untrained_operator_is_scikit_learn_step_for_step(kind, dtype, tolerance):
    x = clusters(1, 300, dtype=dtype)
    operator = EMOperator(4, 3, num_iters=10, covariance=kind, residual=True).to(dtype)
    path = [Mixture(*(part.detach()[0].double().numpy() for part in mixture)) for mixture in operator.iterate(x)]
    precisions = {
        "full": lambda c: np.linalg.inv(c),
        "tied": lambda c: np.linalg.inv(c[0]),
        "diag": lambda c: 1 / c,
        "spherical": lambda c: 1 / c,
    }[kind](path[0].covariances)
    start = np.exp(path[0].log_weights)
    for steps in range(1, 11):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            reference = GaussianMixture(
                4,
                covariance_type=kind,
                max_iter=steps,
                tol=0,
                weights_init=start / start.sum(),
                means_init=path[0].means,
                precisions_init=precisions,
            ).fit(x[0].double().numpy())
        log_weights, means, covariances = path[steps]
        covariances = covariances[0] if kind == "tied" else covariances
        np.testing.assert_allclose(np.exp(log_weights), reference.weights_, rtol=tolerance)
        np.testing.assert_allclose(means, reference.means_, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(covariances, reference.covariances_, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_points_permute_and_components_permute_along(kind):
    x = clusters()
    operator = trained(EMOperator(4, 3, covariance=kind).double())
    order = torch.randperm(x.shape[1])
    for one, two in zip(operator(x), operator(x[:, order]), strict=True):
        assert torch.allclose(one, two, atol=1e-9)
    start = operator(x, num_iters=0)
    swap = torch.tensor([2, 0, 3, 1])
    swapped = Mixture(
        start.log_weights[:, swap],
        start.means[:, swap],
        start.covariances if kind == "tied" else start.covariances[:, swap],
    )
    one, two = operator(x, init=start), operator(x, init=swapped)
    assert torch.allclose(one.means[:, swap], two.means, atol=1e-9)
    assert torch.allclose(one.log_weights[:, swap], two.log_weights, atol=1e-9)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", KINDS)
def test_masked_points_never_count_whatever_they_hold(kind, init):
    x = clusters()
    operator = trained(EMOperator(4, 3, covariance=kind, init=init).double())
    padded = torch.cat([x, torch.full((2, 30, 3), torch.nan, dtype=x.dtype)], 1)
    mask = torch.arange(150).expand(2, -1) < 120
    start = operator(x, num_iters=0)
    for one, two in zip(operator(x, init=start), operator(padded, mask, init=start), strict=True):
        assert torch.allclose(one, two, atol=1e-9)
    own = operator(padded, mask)
    assert all(part.isfinite().all() for part in own)
    if init in ("farthest", "learned"):
        assert torch.allclose(own.means, operator(x).means, atol=1e-9)
    else:
        chosen = operator.classical()(padded, mask, num_iters=0).means
        assert chosen.abs().max() <= x.abs().max()


def test_weights_count_as_repetitions():
    x = clusters()
    operator = trained(EMOperator(4, 3).double())
    weights = torch.randint(0, 3, (2, 120)).double()
    for b in range(2):
        repeated = x[b].repeat_interleave(weights[b].long(), 0)[None]
        for one, two in zip(operator(x[b : b + 1], weights=weights[b : b + 1]), operator(repeated), strict=True):
            assert torch.allclose(one, two, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_through_the_whole_operator(kind):
    x = clusters(1, 12, 2).requires_grad_()
    operator = trained(EMOperator(2, 2, num_iters=3, covariance=kind, init="learned").double())
    parameters = list(operator.parameters())
    weights = torch.rand(1, 12, dtype=torch.float64, requires_grad=True)

    def outcome(x, weights):
        mixture = operator(x, weights=weights)
        return mixture.log_prob(x), mixture.means, mixture.covariances

    assert gradcheck(outcome, (x, weights))
    outputs = outcome(x, weights)[0].sum()
    analytic = torch.autograd.grad(outputs, parameters)
    for parameter, gradient in zip(parameters, analytic, strict=True):
        place = int(gradient.abs().argmax())
        flat, step = parameter.data.view(-1), 1e-6
        values = []
        for sign in (1, -2):
            flat[place] += sign * step
            values.append(outcome(x, weights)[0].sum())
        flat[place] += step
        numeric = (values[0] - values[1]) / (2 * step)
        assert numeric.item() == pytest.approx(gradient.view(-1)[place].item(), rel=1e-4, abs=1e-6)


DEGENERATE = {
    "one point repeated": torch.ones(1, 40, 3),
    "collinear": torch.linspace(-1, 1, 40)[None, :, None] * torch.tensor([1.0, 2.0, -1.0]),
    "two points for four components": torch.tensor([[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]]),
    "one point": torch.ones(1, 1, 3),
    "two distant clusters": torch.cat([torch.randn(1, 20, 3), torch.randn(1, 20, 3) + 1e4], 1),
}


@pytest.mark.parametrize("name", [*DEGENERATE, "empty under its mask"])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_clouds_give_finite_numbers_and_gradients(name, init, kind, dtype):
    x = DEGENERATE.get(name, torch.randn(1, 10, 3)).to(dtype).clone().requires_grad_()
    mask = torch.zeros(1, 10, dtype=torch.bool) if name not in DEGENERATE else None
    operator = trained(EMOperator(4, 3, covariance=kind, init=init).to(dtype))
    mixture = operator(x, mask)
    assert all(part.isfinite().all() for part in mixture)
    log_prob = mixture.log_prob(x, mask)
    assert log_prob.isfinite().all()
    (log_prob.sum() + sum(part.sum() for part in mixture)).backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in operator.parameters())


@pytest.mark.parametrize("floor", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("kind", KINDS)
def test_corrected_covariances_stay_above_the_floor(kind, floor):
    operator = trained(EMOperator(4, 3, covariance=kind, covariance_floor=floor).double())
    with torch.no_grad():
        operator.correction.covariance_mlp[-1].bias -= 5.0
    covariances = operator(clusters()).covariances
    values = torch.linalg.eigvalsh(covariances) if kind in ("full", "tied") else covariances
    # Without a floor a component may be thinner than what rounding leaves of the sums in L L^T.
    assert values.min() >= floor * (1 - 1e-9) - 1e-15 * values.max()
    assert torch.isfinite(operator(clusters()).log_prob(clusters())).all()


def test_a_ruinous_last_correction_is_dropped_for_the_clouds_it_ruins():
    x = clusters(8)
    operator = EMOperator(4, 3, num_iters=2).double()
    with torch.no_grad():
        operator.correction.covariance_mlp[-1].bias[:3] = -9.0  # far too narrow
        operator.correction.mean_mlp[-1].bias[:] = 9.0
    ruined, plain = operator(x).log_prob(x).mean(-1), operator.classical()(x).log_prob(x).mean(-1)
    assert (ruined >= plain - 3.0).all()
    operator.correction.mean_mlp[-1].bias.data.zero_()
    operator.correction.covariance_mlp[-1].bias.data[:3] = 0.05  # hardly any change: kept
    assert not torch.allclose(operator(x).covariances, operator.classical()(x).covariances)


def test_classical_is_the_operator_without_its_corrections():
    x = clusters()
    operator = trained(EMOperator(4, 3).double())
    plain = EMOperator(4, 3, residual=False).double()
    assert torch.equal(operator.classical()(x).means, plain(x).means)
    assert operator.correction is not None and not torch.allclose(operator(x).means, plain(x).means)


@pytest.mark.parametrize("features", [1, 3, 6])
def test_a_corrected_covariance_is_the_formula(features):
    """``L (E (I - V) E^T + V) L^T``, with matrices written out; a diagonal one is the full one feature by feature."""
    before, after, correction = torch.rand(3, 2, 4, features, dtype=torch.float64) + 0.2
    repetitions, floor = torch.randn(2, 4, 2, dtype=torch.float64), torch.tensor([0.01, 0.03], dtype=torch.float64)
    diagonal, full = COVARIANCES["diag"], COVARIANCES["full"]
    below = torch.randn(2, 4, features * (features - 1) // 2, dtype=torch.float64)
    found = diagonal.correct(
        Factors(before, 1 / before), Factors(after, 1 / after), torch.cat([correction, repetitions], -1), floor
    )
    matrices = [Factors(part.diag_embed(), (1 / part).diag_embed()) for part in (before, after)]
    given = [torch.cat([correction, lower, repetitions], -1) for lower in (0 * below, below)]
    torch.testing.assert_close(found.scale.diag_embed(), full.correct(*matrices, given[0], floor).scale)
    torch.testing.assert_close(found.scale * found.inverse, torch.ones_like(after))

    root = torch.randn(2, 4, features, features, dtype=torch.float64)
    scale = torch.linalg.cholesky(root @ root.mT + torch.diag_embed(floor[:, None, None] + 0 * after))
    moved = full.correct(matrices[0], Factors(scale, torch.linalg.inv(scale)), given[1], floor)
    for b in range(2):
        for k in range(4):
            eye, step = np.eye(features), np.diag(np.exp(correction[b, k].numpy()))
            step[np.tril_indices(features, -1)] = below[b, k].numpy()
            change = np.linalg.inv(matrices[0].scale[b, k].numpy()) @ scale[b, k].numpy()
            change = change.T @ change
            change = change / max(1.0, np.trace(change) / features)
            once, twice = np.tanh(repetitions[b, k].numpy())
            step = step @ (eye + once * (change - eye) + twice * (change @ change - change))
            factor = scale[b, k].numpy()
            share = floor[b].item() * np.linalg.inv(factor) @ np.linalg.inv(factor).T
            expected = factor @ (step @ (eye - share) @ step.T + share) @ factor.T
            covariance = (moved.scale @ moved.scale.mT)[b, k].numpy()
            np.testing.assert_allclose(covariance, expected, atol=1e-7 * np.abs(expected).max())


def test_a_tied_covariance_is_corrected_by_what_its_components_ask_on_average():
    tied, size, floor = COVARIANCES["tied"], COVARIANCES["tied"].step_size(3), torch.full((2,), 0.01).double()
    before, after = (tied.expand(torch.rand(2, 3, dtype=torch.float64) + 0.2, 4, 3) for _ in range(2))
    correction = torch.randn(2, 4, size, dtype=torch.float64)
    found = tied.correct(before, after, correction, floor).scale
    for b in range(2):
        one = [Factors(part.scale[b : b + 1], part.inverse[b : b + 1]) for part in (before, after)]
        mean = sum(correction[b]) / 4
        torch.testing.assert_close(
            found[b, 0], COVARIANCES["full"].correct(*one, mean.reshape(1, 1, -1), floor[:1]).scale[0, 0]
        )


def test_farthest_points_are_gonzalezs():
    x = clusters(1, 50)
    cloud = prepare(x)
    points = x[0] - x[0].mean(0)
    chosen = [points.norm(dim=1).argmax().item()]
    while len(chosen) < 6:
        chosen.append(torch.cdist(points, points[chosen]).amin(1).argmax().item())
    assert torch.allclose(farthest_points(cloud, 6)[0], points[chosen])


@pytest.mark.parametrize("start", [kmeans_plus_plus, random_points])
def test_random_starts_are_seeded_points_of_the_cloud(start):
    x = clusters(3, 40)
    mask = torch.arange(40).expand(3, -1) < torch.tensor([[40], [20], [3]])
    cloud = prepare(x, mask)
    one = start(cloud, 5, torch.Generator().manual_seed(1))
    two = start(cloud, 5, torch.Generator().manual_seed(1))
    assert torch.equal(one, two)
    for b, count in enumerate([40, 20, 3]):
        distance = torch.cdist(one[b], cloud.points[b].T[:count])
        assert distance.amin(1).max() < 1e-6
        if count >= 5:
            assert len(distance.argmin(1).unique()) == 5


@pytest.mark.parametrize("start", [kmeans_plus_plus, random_points, lambda cloud, *_: farthest_points(cloud, 5)])
def test_points_without_weight_are_no_start(start):
    x = clusters(3, 40)
    weights = torch.rand(3, 40, dtype=x.dtype) * (torch.arange(40) % 4 == 0) * torch.tensor([[1.0], [1e-3], [1e-6]])
    cloud = prepare(x, weights=weights)
    found = start(cloud, 5, torch.Generator().manual_seed(1))
    for b in range(3):
        nearest = torch.cdist(found[b], (x - cloud.center[:, None].to(x))[b]).min(1)
        assert nearest.values.max() < 1e-6 and (nearest.indices % 4 == 0).all()


def test_kmeans_plus_plus_finds_separated_clusters():
    centers = torch.tensor([[0.0, 0], [100, 0], [0, 100], [100, 100]])
    x = (centers.repeat_interleave(25, 0) + torch.randn(100, 2))[None].expand(20, -1, -1)
    found = kmeans_plus_plus(prepare(x), 4)
    cells = torch.cdist(found + x.mean(1, keepdim=True), centers.expand(20, -1, -1)).argmin(-1).sort(-1).values
    assert torch.equal(cells, torch.arange(4).expand(20, -1))


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_the_best_of_several_starts_is_at_least_as_likely_after_a_step(init):
    x = clusters(20, 60)
    torch.manual_seed(5)
    one = EMOperator(6, 3, init=init, residual=False, num_iters=1).double()
    likelihoods = torch.stack([one(x).log_prob(x).mean(-1) for _ in range(5)])
    torch.manual_seed(5)
    several = EMOperator(6, 3, init=init, residual=False, num_iters=1, num_starts=5).double().eval()
    assert torch.allclose(several(x).log_prob(x).mean(-1), likelihoods.amax(0), atol=1e-9)
    several.train()
    torch.manual_seed(5)
    assert torch.allclose(several(x).log_prob(x).mean(-1), likelihoods[0], atol=1e-9)


def test_other_competitions_give_the_responsibilities():
    x = torch.randn(2, 120, 3, dtype=torch.float64)
    soft = EMOperator(4, 3, residual=False).double()
    by_name = EMOperator(4, 3, residual=False, competition={"name": "softmin", "temperature": 1.0}).double()
    assert torch.equal(soft(x).means, by_name(x).means)
    hot = EMOperator(4, 3, residual=False, competition={"name": "softmin", "temperature": 1e6}, num_iters=1).double()
    assert torch.allclose(hot(x).weights, torch.full((2, 4), 0.25, dtype=torch.float64), atol=1e-4)
    sparse = EMOperator(4, 3, residual=False, competition="sparsemin").double()
    assert all(part.isfinite().all() for part in sparse(x)) and not torch.allclose(sparse(x).means, soft(x).means)


def test_half_precision_and_autocast_are_computed_in_float32():
    x = clusters(dtype=torch.float32)
    operator = EMOperator(4, 3)
    expected = operator(x.bfloat16().float())
    assert torch.equal(operator(x.bfloat16()).means, expected.means)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixture = operator(x)
    assert mixture.means.dtype == torch.float32 and torch.allclose(mixture.means, operator(x).means, atol=1e-5)


def test_round_trips():
    x = clusters(dtype=torch.float32)
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
        (lambda: EMOperator(0, 3), ValueError, ["num_components=0", "at least 1"]),
        (lambda: EMOperator(4, 3, num_starts=0), ValueError, ["num_starts=0", "at least 1"]),
        (lambda: EMOperator(4, 3, num_starts=2), ValueError, ["num_starts=2", "'farthest'", "'kmeans++'"]),
        (lambda: EMOperator(4, 0), ValueError, ["num_features=0", "at least 1"]),
        (lambda: EMOperator(4, 3, num_iters=-1), ValueError, ["num_iters=-1"]),
        (lambda: EMOperator(4, 3)(X, num_iters=-2), ValueError, ["num_iters=-2"]),
        (lambda: EMOperator(4, 3, covariance="ful"), ValueError, ["covariance='ful'", "'full'"]),
        (lambda: EMOperator(4, 3, init="best"), ValueError, ["init='best'", "'kmeans++'"]),
        (lambda: EMOperator(4, 3, gradient="none"), ValueError, ["gradient='none'", "'unrolled'"]),
        (lambda: EMOperator(4, 3, covariance_floor=-1.0), ValueError, ["covariance_floor=-1.0", "negative"]),
        (lambda: EMOperator(4, 3, kernel="gausian"), ValueError, ["'gausian'", "did you mean 'gaussian'"]),
        (lambda: EMOperator(4, 3, background={"wait": 0.1}), TypeError, ["background={'wait': 0.1}", "give weight,"]),
        (lambda: EMOperator(4, 3, prior={"strength": 1}), TypeError, ["prior={'strength': 1}", "mean_strength"]),
        (lambda: EMOperator(4, 3)(X[0]), ValueError, ["(10, 3)", "(B, N, 3)"]),
        (lambda: EMOperator(4, 3)(X[..., :2]), ValueError, ["(2, 10, 2)", "(B, N, 3)"]),
        (lambda: EMOperator(4, 3)(X[:, :0]), ValueError, ["(2, 0, 3)", "at least one point"]),
        (lambda: EMOperator(4, 3)(X.long()), TypeError, ["torch.int64", "x.float()"]),
        (lambda: EMOperator(4, 3)([1.0]), TypeError, ["list", "tensor"]),
        (lambda: EMOperator(4, 3)(X, X[..., 0]), TypeError, ["mask", "torch.float32", "mask.bool()"]),
        (lambda: EMOperator(4, 3)(X, X[:, :5, 0] > 0), ValueError, ["mask", "(2, 5)", "(2, 10)"]),
        (lambda: EMOperator(4, 3)(X, weights=X[:, :, 0].abs() - 9), ValueError, ["weights", "cloud 0, row 0"]),
        (
            lambda: EMOperator(4, 3)(torch.where(torch.arange(60).view(2, 10, 3) == 47, torch.nan, X)),
            ValueError,
            ["not finite", "cloud 1, row 5", "nan"],
        ),
        (
            lambda: EMOperator(4, 3)(1e16 * X),
            ValueError,
            ["squares are beyond torch.float32", "cloud 0, row 0", "scale the points to 3e+15"],
        ),
        (
            lambda: EMOperator(4, 3).log_prob(torch.where(X > 1, torch.nan, X), EMOperator(4, 3)(X)),
            ValueError,
            ["not finite", "nan", "drop it or mask it"],
        ),
        (
            lambda: EMOperator(4, 3)(X, init=Mixture(torch.zeros(2, 4), torch.zeros(2, 4, 3), torch.ones(2, 4, 3))),
            ValueError,
            ["diag", "full"],
        ),
        (
            lambda: EMOperator(4, 3, covariance="diag")(
                X, init=Mixture(torch.zeros(2, 5), torch.zeros(2, 5, 3), torch.ones(2, 5, 3))
            ),
            ValueError,
            ["init.means", "(2, 5, 3)", "(2, 4, 3)"],
        ),
    ],
)
def test_wrong_use_is_answered(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
