import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from em_lightning import EMOperator, Mixture
from em_lightning.competition import none_of_the_above
from em_lightning.mixture import COVARIANCES, UniformBackground
from em_lightning.mixture.cloud import prepare
from em_lightning.mixture.starts import from_centers, kmeans_plus_plus, lloyd, random_points

KINDS = sorted(COVARIANCES)


def clouds(sets=3, items=150):
    return torch.randn(sets, items, 2, dtype=torch.float64) + 6 * torch.randint(0, 2, (sets, items, 1))


def with_outliers(sets=3, items=200, outliers=50):
    x = clouds(sets, items)
    x[:, :outliers] = 30 * torch.rand(sets, outliers, 2, dtype=torch.float64) - 12
    return x


def start_of(x):
    means = torch.tensor([[0.0, 0.0], [6.0, 6.0]], dtype=x.dtype).expand(len(x), -1, -1)
    return Mixture(x.new_full((len(x), 2), math.log(0.5)), means, torch.eye(2, dtype=x.dtype).expand(len(x), 2, 2, 2))


def test_a_background_is_a_uniform_component():
    x = with_outliers()
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
@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_never_falls_beside_a_background(kind, kernel):
    x = with_outliers()
    mask, weights = torch.rand(3, 200) < 0.8, torch.rand(3, 200, dtype=torch.float64)
    operator = EMOperator(
        2, 2, covariance=kind, kernel=kernel, background=0.2, prior={}, covariance_floor=0.0, residual=False
    )
    before = torch.full((3,), -math.inf, dtype=torch.float64)
    for mixture in operator.iterate(x, mask, weights, num_iters=30):
        after = operator.objective(x, mixture, mask, weights)
        by_hand = (operator.log_prob(x, mixture, mask) * weights).sum(-1)
        by_hand = by_hand + operator.prior.log_prob(mixture, x, mask, weights)
        assert torch.allclose(after, by_hand) and (after >= before - 1e-9).all()
        before = after


def test_masked_points_do_not_stretch_the_box():
    x = with_outliers()
    padded = torch.cat([x, torch.full((3, 5, 2), 1e6, dtype=x.dtype)], 1)
    mask = torch.arange(205).expand(3, -1) < 200
    operator = EMOperator(2, 2, background=0.2, residual=False)
    one, two = operator(x, init=start_of(x)), operator(padded, mask, init=start_of(x))
    assert torch.allclose(one.means, two.means, atol=1e-9)
    assert torch.allclose(operator.log_prob(padded, two, mask)[:, :200], operator.log_prob(x, one), atol=1e-9)
    assert torch.allclose(
        operator.posterior(padded, two, mask).responsibilities[:, :200], operator.posterior(x, one).responsibilities
    )


def test_a_given_energy_is_the_competition_background():
    x = with_outliers()
    by_energy = EMOperator(2, 2, background={"weight": 0.5, "energy": 4.0}, residual=False)
    by_competition = EMOperator(2, 2, competition={"name": "background", "energy": 4.0}, residual=False)
    one, two = by_energy(x, init=start_of(x)), by_competition(x, init=start_of(x))
    assert torch.allclose(one.means, two.means, atol=1e-9) and torch.allclose(one.weights, two.weights, atol=1e-9)


def test_the_weight_of_a_background_is_learned():
    for learnable in (False, True):
        assert UniformBackground(0.2, learnable=learnable).weight.item() == pytest.approx(0.2)
    x = with_outliers()
    operator = EMOperator(2, 2, background=UniformBackground(0.01, learnable=True), residual=False)
    optimizer = torch.optim.Adam(operator.parameters(), lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = -operator.log_prob(x, operator(x, init=start_of(x))).mean()
        loss.backward()
        optimizer.step()
    assert operator.background.weight.item() == pytest.approx(0.25, abs=0.05)
    assert "learnable" in repr(operator.background)


def test_temperature_divides_the_joint_density():
    x = clouds()
    by_argument = EMOperator(4, 2, temperature=2.5, residual=False)
    by_competition = EMOperator(4, 2, competition={"name": "softmin", "temperature": 2.5}, residual=False)
    for one, two in zip(by_argument(x), by_competition(x), strict=True):
        assert torch.allclose(one, two, atol=1e-12)
    # Robust kernels and other competitions take another path to the same temperature.
    wide = {"name": "huber", "delta": 60.0}
    for one, two in zip(by_argument(x), EMOperator(4, 2, temperature=2.5, kernel=wide, residual=False)(x), strict=True):
        assert torch.allclose(one, two, atol=1e-9)


def test_annealing_is_geometric():
    x = clouds()
    annealed = EMOperator(4, 2, num_iters=4, temperature=(16.0, 1.0), residual=False)
    path = list(annealed.iterate(x))
    for t, (before, after) in enumerate(zip(path, path[1:], strict=False), start=1):
        step = EMOperator(4, 2, temperature=16.0 ** (1 - t / 4), residual=False)(x, init=before, num_iters=1)
        assert torch.allclose(after.means, step.means, atol=1e-9)


def test_annealing_leaves_a_poor_start():
    """From two means that are almost one plain EM leaves slowly; a low temperature at first drives them apart."""
    x = clouds()
    near = start_of(x)._replace(means=x.mean(1, keepdim=True) + torch.tensor([[0.0, 0.1], [0.0, -0.1]]).double())
    near = near._replace(covariances=36 * near.covariances)
    plain = EMOperator(2, 2, residual=False, num_iters=8)
    annealed = EMOperator(2, 2, residual=False, num_iters=8, temperature=(0.2, 1.0))
    assert (annealed(x, init=near).log_prob(x).mean(1) > plain(x, init=near).log_prob(x).mean(1) + 0.1).all()


@pytest.mark.parametrize("kernel", ["gaussian", "student_t"])
def test_a_fit_of_counted_points_stops_where_that_of_repeated_ones_does(kernel):
    x, counts = 0.4 * clouds(1, 80), torch.randint(0, 4, (1, 80))  # clusters that overlap: many steps
    operator = EMOperator(2, 2, kernel=kernel, residual=False)
    start = start_of(x)
    counted = operator.fit(x, weights=counts.double(), init=start, tol=1e-6, max_iters=500)
    repeated = operator.fit(x[0].repeat_interleave(counts[0], 0)[None], init=start, tol=1e-6, max_iters=500)
    assert counted[1].tolist() == repeated[1].tolist() and int(counted[1]) < 500
    assert torch.allclose(counted[0].means, repeated[0].means, atol=1e-9)


@pytest.mark.parametrize("kernel", ["gaussian", "student_t"])
def test_fit_stops_each_cloud_by_itself(kernel):
    x = clouds()
    x[0] = torch.randn(150, 2)  # no two clusters here: slow
    operator = EMOperator(2, 2, kernel=kernel, residual=False)
    mixture, steps = operator.fit(x, tol=1e-5, max_iters=500)
    assert len(set(steps.tolist())) > 1 and steps.max() < 500
    for b in range(3):
        alone, own_steps = operator.fit(x[b : b + 1], tol=1e-5, max_iters=500)
        assert own_steps.item() == steps[b].item()
        for one, two in zip(alone, mixture, strict=True):
            assert torch.allclose(one[0], two[b], atol=1e-10)
        path = list(operator.iterate(x[b : b + 1], num_iters=own_steps.item()))
        assert torch.allclose(path[-1].means, alone.means, atol=1e-10)
        values = [operator.objective(x[b : b + 1], step).item() / 150 for step in path]
        rises = [after - before for before, after in zip(values, values[1:], strict=False)]
        assert rises[-1] < 1e-5 <= min(rises[:-1])


def test_fit_ends_at_its_limit_and_after_the_schedule():
    x = clouds()
    mixture, steps = EMOperator(2, 2, residual=False).fit(x, tol=0.0, max_iters=3)
    assert steps.tolist() == [3, 3, 3] and mixture.means.shape == (3, 2, 2)
    start, none = EMOperator(2, 2, residual=False).fit(x, max_iters=0)
    assert none.tolist() == [0, 0, 0] and torch.equal(
        start.means, EMOperator(2, 2, residual=False)(x, num_iters=0).means
    )
    _, cooled = EMOperator(2, 2, num_iters=12, temperature=(4.0, 1.0), residual=False).fit(x, tol=1e9)
    assert cooled.tolist() == [12, 12, 12]
    empty = torch.zeros(3, 150, dtype=torch.bool)
    nothing, steps = EMOperator(2, 2, residual=False).fit(x, empty)
    assert steps.tolist() == [1, 1, 1] and all(part.isfinite().all() for part in nothing)


def test_fit_is_differentiable():
    x = clouds(1, 20).requires_grad_()
    operator = EMOperator(2, 2, residual=False)
    mixture, steps = operator.fit(x, tol=1e-4)
    (one,) = torch.autograd.grad(mixture.means.sum(), x)
    (two,) = torch.autograd.grad(operator(x, num_iters=steps.item()).means.sum(), x)
    assert torch.allclose(one, two)


def test_lloyd_is_scikit_learns():
    x = clouds(2, 60)
    weights = torch.rand(2, 60, dtype=torch.float64)
    cloud = prepare(x, weights=weights)
    centers = random_points(cloud, 4)
    found = lloyd(cloud, centers, 100)
    for b in range(2):
        reference = KMeans(4, init=centers[b].numpy(), n_init=1, tol=0, max_iter=100, algorithm="lloyd")
        reference.fit(cloud.points[b].mT.numpy(), sample_weight=weights[b].numpy())
        np.testing.assert_allclose(found[b], reference.cluster_centers_, atol=1e-9)
    far = centers + 1e3 * (torch.arange(4) == 3).unsqueeze(-1)
    assert torch.equal(lloyd(cloud, far, 3)[:, 3], far[:, 3])  # nobody's nearest: it stays


def test_lloyd_steps_start_from_the_means_of_k_means():
    x = clouds()
    operator = EMOperator(4, 2, init="kmeans++", lloyd_steps=50, seed=1, residual=False)
    cloud = prepare(x)
    centers = kmeans_plus_plus(cloud, 4, torch.Generator().manual_seed(1))
    expected = from_centers(cloud, lloyd(cloud, centers, 50), COVARIANCES["full"], torch.full((3,), 1e-6).double())
    assert torch.allclose(operator(x, num_iters=0).means, expected.means + x.mean(1, keepdim=True))


def test_kmeans_plus_plus_keeps_the_best_of_its_candidates(monkeypatch):
    monkeypatch.setattr("em_lightning.mixture.starts._BLOCK", 2 * 40 * 4)  # several blocks
    x, weights = clouds(2, 60), torch.rand(2, 60, dtype=torch.float64)
    cloud = prepare(x, weights=weights)
    found = kmeans_plus_plus(cloud, 8, torch.Generator().manual_seed(3))
    generator, points = torch.Generator().manual_seed(3), x - cloud.center.unsqueeze(1)
    rows = torch.multinomial(weights, 1, generator=generator)
    for _ in range(7):
        nearest = torch.stack([torch.cdist(points[b], points[b, rows[b]]).square().amin(1) for b in range(2)])
        drawn = torch.multinomial(nearest * weights, 2 + 2, replacement=True, generator=generator)
        best = []
        for b in range(2):
            totals = []
            for row in drawn[b].tolist():
                left = torch.minimum(nearest[b], (points[b] - points[b, row]).square().sum(1))
                totals.append(float((left * weights[b]).sum()))
            best.append(drawn[b, int(np.argmin(totals))])
        rows = torch.cat([rows, torch.stack(best).unsqueeze(1)], 1)
    for b in range(2):
        assert torch.allclose(found[b], points[b, rows[b]])


def test_a_start_has_the_shape_of_cores_and_the_size_of_cells():
    x = torch.cat(
        [torch.randn(80, 2) * torch.tensor([1.0, 3.0]), 20 + torch.randn(6, 2), 40 + torch.rand(2, 2)]
    ).double()
    centers = torch.tensor([[0.5, 0.0], [20.0, 21.0], [40.0, 40.0], [-90.0, 0.0]], dtype=torch.float64)
    cloud, floor = prepare(x[None]), torch.tensor([1e-3], dtype=torch.float64)
    found = from_centers(cloud, centers[None] - cloud.center, COVARIANCES["full"], floor)
    covariances = COVARIANCES["full"].covariances(found.factors.scale)[0].numpy()

    def spread(points):
        return np.cov(points.T, bias=True) + 1e-3 * np.eye(2)

    distances = torch.cdist(x, centers).square().numpy()
    cell, inertia = distances.argmin(1), distances.min(1)
    cells = [x.numpy()[cell == k] for k in range(4)]
    cores = [x.numpy()[(cell == k) & (inertia <= 0.4 * inertia[cell == k].mean())] for k in range(3)]
    assert [len(points) for points in cells] == [80, 6, 2, 0] and len(cores[0]) > 4 >= len(cores[1])
    shared = (inertia.sum() / (2 * 88) + 1e-3) * np.eye(2)
    core = spread(cores[0])
    wanted = [core * np.trace(spread(cells[0])) / np.trace(core), spread(cells[1]), shared, shared]
    means = [cores[0].mean(0), cells[1].mean(0), cells[2].mean(0), centers[3].numpy()]
    np.testing.assert_allclose(covariances, wanted, atol=1e-9)
    np.testing.assert_allclose(found.means[0] + cloud.center, means, atol=1e-9)
    np.testing.assert_allclose(found.log_weights.exp()[0], [80 / 88, 6 / 88, 2 / 88, 0], atol=1e-9)


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_a_seed_gives_the_same_start_in_every_call(init):
    x = clouds()
    seeded, other = EMOperator(4, 2, init=init, seed=3), EMOperator(4, 2, init=init, seed=4)
    state = torch.get_rng_state()
    assert torch.equal(seeded(x).means, seeded(x).means) and not torch.equal(seeded(x).means, other(x).means)
    assert torch.equal(state, torch.get_rng_state())  # the global stream is left alone


@pytest.mark.parametrize("kernel", ["gaussian", "student_t"])
def test_the_best_of_several_starts_is_kept_for_each_cloud(kernel):
    x = clouds(4)
    arguments = dict(init="random", kernel=kernel, prior={}, residual=False)
    several = EMOperator(5, 2, num_starts=6, seed=3, **arguments)
    best = several.eval()(x, num_iters=0)
    assert torch.equal(several.train().fit(x, max_iters=0)[0].means, best.means)  # a fit is no training
    # Six draws in a row from the same generator.
    torch.manual_seed(3)
    one = EMOperator(5, 2, **arguments)
    tries = [one(x, num_iters=0) for _ in range(6)]
    scores = torch.stack([one.objective(x, one(x, init=start, num_iters=5)) for start in tries])
    for b, row in enumerate(scores.argmax(0).tolist()):
        assert torch.allclose(best.means[b], tries[row].means[b])
    assert len(set(scores.argmax(0).tolist())) > 1


DEGENERATE = {
    "one point repeated": torch.ones(1, 40, 3),
    "collinear": torch.linspace(-1, 1, 40)[None, :, None] * torch.tensor([1.0, 0.0, 0.0]),
    "one point": torch.ones(1, 1, 3),
    "empty": torch.randn(1, 10, 3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_clouds_stay_finite(kind, name):
    x = DEGENERATE[name].clone().requires_grad_()
    mask = torch.zeros(1, 10, dtype=torch.bool) if name == "empty" else None
    operator = EMOperator(
        4,
        3,
        covariance=kind,
        background={"learnable": True},
        temperature=(5.0, 1.0),
        init="kmeans++",
        num_starts=2,
        lloyd_steps=3,
    ).eval()
    mixture = operator(x, mask)
    log_prob = operator.log_prob(x, mixture, mask)
    (log_prob.sum() + mixture.means.sum()).backward()
    assert all(part.isfinite().all() for part in mixture) and log_prob.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in operator.parameters())


def test_round_trips():
    x = with_outliers()
    build = dict(kernel="student_t", prior={"learnable": True}, background={"learnable": True}, temperature=(2.0, 1.0))
    operator, fresh = EMOperator(2, 2, **build).double(), EMOperator(2, 2, **build).double()
    for parameter in operator.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    fresh.load_state_dict(operator.state_dict())
    for other in (fresh, pickle.loads(pickle.dumps(operator))):
        assert torch.equal(other(x).means, operator(x).means)
        assert torch.equal(other.log_prob(x, other(x)), operator.log_prob(x, operator(x)))


@pytest.mark.parametrize(
    "arguments",
    [
        dict(kernel={"name": "huber", "learnable": True}, prior={"learnable": True}, temperature=(2.0, 1.0)),
        dict(kernel="student_t", background={"learnable": True}, init="kmeans++", lloyd_steps=2),
    ],
)
def test_compiles_without_a_break(arguments):
    x = clouds(2, 20).requires_grad_()
    operator = EMOperator(3, 2, num_iters=2, **arguments)
    compiled = torch.compile(operator, fullgraph=True, backend="eager")
    outcomes = []
    for call in (operator, compiled):
        torch.manual_seed(1)
        means = call(x).means
        outcomes.append([means, *torch.autograd.grad(means.square().sum(), x)])
    for one, two in zip(*outcomes, strict=True):
        assert torch.allclose(one, two, atol=1e-9)


X = torch.randn(2, 10, 3)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: EMOperator(4, 3, background=1.5), ValueError, ["weight=1.5", "between 0 and 1"]),
        (lambda: EMOperator(4, 3, background=1.0), ValueError, ["weight=1.0", "between 0 and 1"]),
        (lambda: EMOperator(4, 3, background={"energy": math.nan}), ValueError, ["energy=nan", "bounding box"]),
        (lambda: EMOperator(4, 3, background="box"), TypeError, ["background='box'", "UniformBackground"]),
        (lambda: EMOperator(4, 3, background=0.1, competition="background"), ValueError, ["two backgrounds"]),
        (lambda: EMOperator(4, 3, temperature=0.0), ValueError, ["temperature=0.0", "positive"]),
        (lambda: EMOperator(4, 3, temperature=(1.0, 2.0, 3.0)), ValueError, ["(1.0, 2.0, 3.0)", "pair"]),
        (lambda: EMOperator(4, 3, lloyd_steps=-1), ValueError, ["lloyd_steps=-1", "negative"]),
        (lambda: EMOperator(4, 3, init="learned", lloyd_steps=1), ValueError, ["lloyd_steps=1", "'learned'"]),
        (lambda: EMOperator(4, 3, seed=2), ValueError, ["seed=2", "'kmeans++'"]),
        (lambda: EMOperator(4, 3).fit(X, max_iters=-1), ValueError, ["max_iters=-1"]),
        (lambda: EMOperator(4, 3).fit(X, tol=-1.0), ValueError, ["tol=-1.0"]),
        (lambda: EMOperator(4, 3).log_prob(X[..., :2], EMOperator(4, 3)(X)), ValueError, ["(2, 10, 2)", "3 features"]),
    ],
)
def test_wrong_use_is_answered(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("arguments", [{}, {"kernel": "huber"}, {"background": 0.1}])
def test_a_fit_passes_over_the_points_once_an_iteration(arguments, monkeypatch):
    """The objective comes out of the pass itself: one pass more than there are iterations sees the last of them."""
    from em_lightning.mixture import general, passes

    seen, forward, log_joint = [], passes.Moments.forward, general.log_joint
    monkeypatch.setattr(passes.Moments, "forward", lambda *args: seen.append(0) or forward(*args))
    monkeypatch.setattr(general, "log_joint", lambda *args: seen.append(0) or log_joint(*args))
    monkeypatch.setattr(passes.LogDensity, "forward", None)
    _, steps = EMOperator(2, 2, residual=False, **arguments).fit(clouds(), tol=1e-4)
    assert len(seen) == steps.max() + 1
