"""Degenerate point sets: finite in value and gradient, and EM never falls; points far from 0, and from each other."""

import math

import pytest
import torch

from em_lightning import EMOperator, Mixture
from em_lightning.estimator import GaussianMixture
from em_lightning.mixture import COVARIANCES, MixturePrior, collect, em_step, maximize, no_statistics
from em_lightning.mixture.cloud import prepare
from em_lightning.mixture.general import frame_of
from em_lightning.mixture.radial import radial_of
from em_lightning.mixture.step import enter
from em_lightning.operators import DirectionalEM, EMAbstraction, EMPooling, EMRefinement, GeneralizedEM

KINDS = sorted(COVARIANCES)
KERNELS = ["gaussian", "student_t", "laplace", "huber", "pseudo_huber"]
ITEMS, K = 12, 4


def sets(features):
    """Return points (B, 12, D), weights and the name of each set: those that float32 cannot tell apart are equal."""
    generator = torch.Generator().manual_seed(features)
    noise = torch.randn(ITEMS, features, generator=generator, dtype=torch.float64)
    side = (torch.arange(ITEMS) % 2).double()
    cases = {
        "equal": torch.full((ITEMS, features), 3.0, dtype=torch.float64),
        "far": noise + 1e8 * side.unsqueeze(1),
        "three points": noise[torch.arange(ITEMS) % 3],
        "on a line": torch.linspace(-1, 1, ITEMS).double().unsqueeze(1).expand(-1, features),
        "constant feature": torch.cat([noise[:, :-1], torch.full_like(noise[:, :1], 5.0)], 1),
        "some count": noise,
        "one counts": noise,
        "none counts": noise,
    }
    weights = torch.ones(len(cases), ITEMS, dtype=torch.float64)
    names = list(cases)
    weights[names.index("some count")] = side
    weights[names.index("one counts")] = (torch.arange(ITEMS) == 5).double()
    weights[names.index("none counts")] = 0.0
    return torch.stack(list(cases.values())), weights, names


def dense_start(kind, sets, components, features, dtype, starved=False):
    """Return a start whose last component, where starved, no point ever belongs to."""
    means = torch.linspace(-1, 1, components, dtype=dtype)[None, :, None].expand(sets, -1, features).clone()
    log_weights = torch.full((sets, components), -math.log(components), dtype=dtype)
    if starved:
        means[:, -1] = 1e6
        log_weights[:, -1] = -700.0 if dtype == torch.float64 else -80.0
    eye = torch.eye(features, dtype=dtype).expand(sets, 1 if kind == "tied" else components, features, features)
    diagonal = torch.ones(sets, components, features, dtype=dtype)
    covariances = {"full": eye, "tied": eye, "diag": diagonal, "spherical": diagonal[..., 0]}[kind]
    return Mixture(log_weights, means, covariances.clone())


def assert_finite(operator, x, weights, init=None):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    mixture = operator(x, weights=weights, init=init)
    log_prob = operator.log_prob(x, mixture)
    assert all(part.isfinite().all() for part in mixture), "value"
    assert log_prob.isfinite().all(), "log_prob"
    total = log_prob.sum() + mixture.log_weights.clamp(min=-50).sum() + mixture.means.sum()
    try:
        grads = torch.autograd.grad(total, [x, weights, *operator.parameters()], allow_unused=True)
    except RuntimeError as error:  # documented: such a fixed point is not isolated
        assert operator.gradient == "implicit" and "implicit gradient's linear system" in str(error)
        return
    for grad in grads:
        assert grad is None or grad.isfinite().all(), "gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_sets_stay_finite(kind, kernel, dtype):
    for features, components in ((1, K), (3, 1), (3, K)):
        x, weights, _ = sets(features)
        operator = EMOperator(components, features, num_iters=3, covariance=kind, kernel=kernel).to(dtype)
        for init in (None, dense_start(kind, len(x), components, features, dtype, starved=components > 1)):
            assert_finite(operator, x.to(dtype), weights.to(dtype), init)


@pytest.mark.parametrize("gradient", ["checkpoint", "last", "implicit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_degenerate_sets_under_other_gradients(kernel, dtype, gradient):
    x, weights, _ = sets(3)
    x, weights = x.to(dtype), weights.to(dtype)
    for kind in KINDS:
        operator = EMOperator(K, 3, num_iters=3, covariance=kind, kernel=kernel, gradient=gradient).to(dtype)
        if gradient != "implicit":
            assert_finite(operator, x, weights)
            continue
        for b in range(len(x)):  # one at a time some have converged; the others are refused
            try:
                assert_finite(operator, x[b : b + 1], weights[b : b + 1])
            except RuntimeError as error:
                assert "needs a converged loop" in str(error)


# Other sizes, each with every structure, dtype and start, and kernels and gradients in turn.
SIZES = [(1, 16), (2, 1), (2, K), (2, 16), (16, 1), (16, K), (64, 1), (64, K)]
GRADIENTS = ["unrolled", "checkpoint", "last"]


@pytest.mark.parametrize("gradient", ["unrolled", "checkpoint", "last", "implicit"])
@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
@pytest.mark.parametrize("kind", [*KINDS, "lowrank"])
def test_batches_without_sets_have_mixtures_of_none(kind, kernel, gradient):
    x, rank = torch.zeros(0, 5, 2, requires_grad=True), 1 if kind == "lowrank" else None
    for options in ({"init": "learned"}, {"init": "kmeans++", "num_starts": 2, "prior": {}}, {"background": 0.1}):
        operator = EMOperator(3, 2, covariance=kind, rank=rank, kernel=kernel, gradient=gradient, **options)
        for layer in (operator, operator.eval()):
            mixture = layer(x)
            assert mixture.means.shape == (0, 3, 2)
            (mixture.means.sum() + layer.log_prob(x, mixture).sum()).backward()
            assert x.grad.shape == (0, 5, 2) and layer.objective(x, mixture).shape == (0,)
        fitted, steps = operator.fit(x, max_iters=2)
        assert fitted.means.shape == (0, 3, 2) and steps.shape == (0,)


def test_layers_take_batches_without_sets():
    x = torch.zeros(0, 5, 2, requires_grad=True)
    assert GeneralizedEM(3, 2, kernel="laplace")(x).centers.shape == (0, 3, 2)
    assert DirectionalEM(3, 2)(x).means.shape == (0, 3, 2)
    assert EMPooling(3, 2)(x).shape[0] == 0 and EMRefinement(3, 2)(x).shape == x.shape
    centers, tokens = EMAbstraction(3, 2, None, 4, pitch=1.0, blocks=1).eval()(x)
    assert centers.shape == (0, 3, 2) and tokens.shape == (0, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", range(len(SIZES)))
def test_degenerate_sets_of_other_sizes_stay_finite(place, kind, dtype):
    features, components = SIZES[place]
    x, weights, _ = sets(features)
    kernel = KERNELS[(place + KINDS.index(kind)) % len(KERNELS)]
    gradient = GRADIENTS[(place + KINDS.index(kind)) % len(GRADIENTS)]
    # Corrections of many features are large networks.
    options = {"covariance": kind, "kernel": kernel, "gradient": gradient, "residual": features < 64}
    operator = EMOperator(components, features, num_iters=2, **options).to(dtype)
    for init in (None, dense_start(kind, len(x), components, features, dtype, starved=components > 1)):
        assert_finite(operator, x.to(dtype), weights.to(dtype), init)


# Likelihoods.

FLOOR = 1e-6


def eigenvalues(mixture):
    """Return those of covariances as (B, K, D)."""
    spread = mixture.covariances
    if spread.ndim == 4:
        spread = torch.linalg.eigvalsh(spread)
    elif spread.ndim == 2:
        spread = spread.unsqueeze(-1)
    return spread.expand_as(mixture.means)


def largest_fall(x, mass, pull, mixture):
    r"""Return by how much (B,) an iteration that leads to a mixture may lower the log-likelihood.

    By what adding the floor f to a covariance costs: eigenvalues are v = s + f where s would be best, and as those
    before were at least f, log v + s / v is at most that of max(s, f), the best allowed, and the difference: its half
    is below 0.12 a point and feature at s near f, and (f / 2s)^2 far above.

    And by rounding: of squared distances, whose terms are as large as T, up to 1e12, beyond which points are taken
    about the means; and of covariances, which the eigenvalues of a component have only to eps times its trace. An
    energy is as much steeper than the Gaussian's as a kernel pulls.
    """
    values = eigenvalues(mixture)
    best = (values - FLOOR).clamp(min=0.0)
    allowed = best.clamp(min=FLOOR)
    cost = 0.5 * ((values / allowed).log() + best / values - best / allowed).sum(-1)
    floor = (mass.unsqueeze(-1) * mixture.weights * cost).sum(-1)
    least = values.amin(-1).clamp(min=FLOOR)
    terms = ((x - x.mean(1, keepdim=True)).square().sum(-1).amax(1) / least.amin(1)).clamp(max=1e12)
    condition = (values.sum(-1) / least).amax(1)
    return floor + 16 * pull * x.shape[1] * x.shape[2] * torch.finfo(x.dtype).eps * (terms + condition)


@pytest.mark.parametrize("features", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_of_degenerate_sets_never_falls(kind, features):
    x, weights, names = sets(features)
    mass = weights.sum(1)
    for place, components in enumerate((1, K, 16) if features < 64 else (1, K)):
        for kernel in KERNELS if features <= 3 else ("gaussian", KERNELS[1 + place]):
            options = {"covariance": kind, "kernel": kernel, "covariance_floor": FLOOR, "residual": False}
            operator = EMOperator(components, features, **options).double()
            for init in (None, dense_start(kind, len(x), components, features, x.dtype, starved=components > 1)):
                steps = list(operator.iterate(x, weights=weights, init=init, num_iters=6))
                likelihoods = [operator.objective(x, mixture, weights=weights) for mixture in steps]
                # What rounding did in one step, the next may take back.
                pull = {"student_t": 1.0 + features, "laplace": 1e4}.get(kernel, 1.0)
                falls = [torch.zeros_like(mass), *(largest_fall(x, mass, pull, mixture) for mixture in steps[1:])]
                for step in range(1, len(steps)):
                    before, after = likelihoods[step - 1 : step + 1]
                    assert after.isfinite().all()
                    fell = before - after > falls[step] + falls[step - 1] + 1e-11 * (1 + before.abs())
                    assert not fell.any(), (components, kernel, [names[b] for b in fell.nonzero().flatten()])


# Clusters so far from each other that squares of their coordinates hold nothing of their widths.


def far_clusters(features, items=10):
    generator = torch.Generator().manual_seed(features)
    noise = torch.randn(2, items, features, generator=generator, dtype=torch.float64)
    place = torch.tensor([-5e7, 5e7], dtype=torch.float64)[:, None, None]
    return noise + place, (noise + place).flatten(0, 1).unsqueeze(0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
@pytest.mark.parametrize("features", [1, 3, 5])
def test_clusters_far_apart_are_what_each_is_alone(features, kind, kernel):
    clusters, x = far_clusters(features)
    alone = EMOperator(1, features, covariance=kind, kernel=kernel, residual=False, covariance_floor=0.0, num_iters=4)
    centers = clusters[:, :1]  # which double precision holds differences from
    start = dense_start(kind, 2, 1, features, x.dtype)
    expected = alone(clusters - centers, init=start)
    both = EMOperator(2, features, covariance=kind, kernel=kernel, residual=False, covariance_floor=0.0, num_iters=4)
    parts = (part.transpose(0, 1) for part in (start.means + centers, start.covariances))
    found = both(x, init=Mixture(torch.full((1, 2), 0.5).log().double(), *parts))
    torch.testing.assert_close(found.covariances[0], expected.covariances[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.means[0] - centers[:, 0], expected.means[:, 0], rtol=0, atol=1e-6)
    density = alone.log_prob(clusters - centers, expected).flatten() - math.log(2)
    torch.testing.assert_close(both.log_prob(x, found)[0], density, rtol=0, atol=1e-4)
    if kernel == "gaussian":
        torch.testing.assert_close(found.log_prob(x)[0], density, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.posterior(x).free_energy[0], -density, rtol=0, atol=1e-4)


def step_by_differences(x, mixture, radial):
    """Return weights, means and full scatters (K, D, D) after a step, all from differences of points and means."""
    apart = x.unsqueeze(1) - mixture.means[0]  # (N, K, D)
    root = torch.linalg.cholesky(mixture.covariances[0])
    square = torch.linalg.solve_triangular(root, apart.unsqueeze(-1), upper=False).squeeze(-1).square().sum(-1)
    energies, pull = (0.5 * square, torch.ones_like(square)) if radial is None else radial.energy(square)
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    shares = (mixture.log_weights[0] - log_det - energies).softmax(1)
    pulled = shares * pull
    means = mixture.means[0] + (pulled.unsqueeze(-1) * apart).sum(0) / pulled.sum(0).unsqueeze(-1)
    apart = x.unsqueeze(1) - means
    scatter = torch.einsum("nk,nki,nkj->kij", pulled, apart, apart) / shares.sum(0)[:, None, None]
    return shares.mean(0), means, scatter


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_components_that_move_from_afar_are_exact(kind, kernel):
    """The first step takes means over 5e7 widths of what comes of it: moments about where they were hold no digit."""
    _, x = far_clusters(3)
    operator = EMOperator(2, 3, covariance=kind, kernel=kernel, residual=False, covariance_floor=1e-6, num_iters=1)
    means = torch.tensor([[[-1.0] * 3, [1.0] * 3]]).double()
    eye = torch.eye(3).double().expand(1, 2, 3, 3)
    log_weights = torch.full((1, 2), 0.5).log().double()
    given = {"full": eye, "tied": eye[:, :1], "diag": torch.ones(1, 2, 3), "spherical": torch.ones(1, 2)}[kind]
    start = Mixture(log_weights, means, given.double())
    weights, means, scatter = step_by_differences(x[0], Mixture(log_weights, means, eye), radial_of(operator.kernel, 3))
    spread = scatter.diagonal(dim1=-2, dim2=-1)
    expected = {
        "full": scatter + 1e-6 * torch.eye(3),
        "tied": (weights[:, None, None] * scatter).sum(0, keepdim=True) + 1e-6 * torch.eye(3),
        "diag": spread + 1e-6,
        "spherical": spread.mean(-1) + 1e-6,
    }[kind]
    steps = [operator(x, init=start)] + ([em_step(x, start)] if kernel == "gaussian" else [])
    for after in steps:
        assert torch.allclose(after.covariances[0], expected, rtol=1e-5, atol=1e-7), (after.covariances[0], expected)
        # Of points 1e8 apart a Laplace energy is as large, so shares are known to 1e-8.
        assert torch.allclose(after.means[0], means, rtol=1e-7, atol=0)


@pytest.mark.parametrize("prior", [None, MixturePrior(mean=[0.0] * 3, covariance=[1.0] * 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_far_clusters_add_up_to_the_step_on_all(kind, prior):
    _, x = far_clusters(3)
    means = torch.tensor([[[-5e7 - 1] * 3, [5e7 + 2] * 3]]).double()
    start = dense_start(kind, 2, 1, 3, x.dtype)
    covariances = start.covariances[:1] if kind == "tied" else start.covariances.transpose(0, 1)
    start = Mixture(torch.full((1, 2), 0.5).log().double(), means, covariances)
    # The center need not be the mean, and a set beside it has no part in this.
    near = Mixture(start.log_weights, means.sign(), covariances)
    both = Mixture(*(torch.cat(parts) for parts in zip(near, start, strict=True)))
    points = torch.cat([x - 5e7 * x.sign(), x])
    statistics = no_statistics(both, torch.tensor([[0.1] * 3, [1e7] * 3]).double())
    for block in points.split(7, 1):
        statistics = collect(block, both, statistics)
    found = maximize(statistics, kind, prior=prior)
    operator = EMOperator(2, 3, covariance=kind, prior=prior, residual=False, num_iters=1)
    for one, two in zip(found, operator(points, init=both), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(statistics.log_likelihood, both.log_prob(points).sum(1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimator_finds_far_clusters(kind):
    clusters, x = far_clusters(3, items=40)
    centers = clusters[:, :1]
    scatter = torch.stack([(own - center).T.cov(correction=0) for own, center in zip(clusters, centers, strict=True)])
    spread = scatter.diagonal(dim1=-2, dim2=-1)
    expected = {"full": scatter, "tied": scatter.mean(0), "diag": spread, "spherical": spread.mean(-1)}[kind]
    model = GaussianMixture(2, covariance_type=kind, reg_covar=0.0, random_state=0).fit(x[0].numpy())
    order = model.means_[:, 0].argsort() if kind != "tied" else slice(None)
    torch.testing.assert_close(torch.as_tensor(model.covariances_)[order], expected, rtol=1e-6, atol=1e-6)
    assert model.converged_ and model.score(x[0].numpy()) == pytest.approx(model.lower_bound_, abs=1e-6)


def test_far_float32_rows_are_fitted_and_scored_as_double_ones_are():
    _, x = far_clusters(3, items=40)
    rows = x[0].float().numpy()
    model = GaussianMixture(2, random_state=0).fit(rows)
    double = GaussianMixture(2, random_state=0).fit(rows.astype(float))
    assert model.lower_bound_ == pytest.approx(double.lower_bound_, abs=1e-9)
    assert model.score(rows) == pytest.approx(double.score(rows.astype(float)), abs=1e-5)
    assert model.predict_proba(rows).sum(1) == pytest.approx(1.0)
    mixture = Mixture(*(torch.as_tensor(part)[None] for part in (model.weights_, model.means_, model.covariances_)))
    joint = mixture._replace(log_weights=mixture.log_weights.log()).log_joint(torch.as_tensor(rows)[None])
    assert joint.dtype == torch.float32 and joint.logsumexp(-1).mean().item() == pytest.approx(
        model.score(rows), abs=1e-4
    )


@pytest.mark.parametrize("far", [False, True])
def test_a_component_whose_points_are_all_far_keeps_its_mean(far):
    """What a t kernel pulls by there is less than what guards an empty component."""
    x = torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(0)).double() + 3e7 * far
    operator = EMOperator(1, 2, kernel="student_t", residual=False, num_iters=1, covariance_floor=0.0)
    start = Mixture(torch.zeros(1, 1), torch.tensor([[[0.0, -4e7]]]).double(), torch.eye(2).expand(1, 1, 2, 2).double())
    _, means, scatter = step_by_differences(x[0], start, radial_of(operator.kernel, 2))
    after = operator(x, init=start)
    assert torch.allclose(after.means[0], means, rtol=0, atol=1e-6)
    assert torch.allclose(after.covariances[0], scatter, rtol=1e-5)


def test_the_height_of_a_narrow_component_far_from_all_points_is_what_it_is():
    # Taken from natural parameters it is a difference of terms of 1e18: off by hundreds of nats.
    x = torch.linspace(-1, 1, 12).double().unsqueeze(1).expand(1, -1, 16)
    spread = 1e-6 * torch.eye(16).double() + torch.ones(16, 16).double()
    means = torch.stack([torch.zeros(16), torch.full((16,), 1e6)]).double()
    mixture = Mixture(torch.tensor([[0.0, -36.0]]).double(), means.unsqueeze(0), spread.expand(1, 2, 16, 16))
    kernel = EMOperator(2, 16, kernel="student_t", residual=False).kernel
    peak = frame_of(enter(prepare(x), mixture), COVARIANCES["full"], radial_of(kernel, 16)).peak
    expected = torch.distributions.MultivariateNormal(means, spread).log_prob(means) + mixture.log_weights
    torch.testing.assert_close(peak.squeeze(-1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": "student_t"},
        {"prior": {}},
        {"background": {"estimate": True}, "prior": {"weight_concentration": 2.0}},
        {"background": 0.1, "kernel": "huber"},
        {"temperature": (2.0, 1.0), "competition": "sparsemin"},
        {"gradient": "checkpoint"},
        {"residual": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_their_own_change_nothing_elsewhere(kind, options, monkeypatch):
    x, _, _ = sets(3)
    x, weights = x[2:6].requires_grad_(), torch.linspace(0.5, 2, ITEMS, dtype=torch.float64).expand(4, -1)
    operator = EMOperator(2, 3, **{"num_iters": 3, "covariance": kind, "residual": False} | options).double()

    def results():
        mixture = operator(x, weights=weights)
        log_prob = operator.log_prob(x, mixture)
        (slope,) = torch.autograd.grad(log_prob.sum() + mixture.means.square().sum(), x)
        fitted, _ = operator.fit(x.detach(), weights=weights, max_iters=3)
        return *mixture, log_prob, slope, *fitted, operator.posterior(x, mixture).responsibilities

    usual = results()
    monkeypatch.setattr("em_lightning.mixture.moments.LARGEST_IN_DOUBLE", 0.0)
    for found, expected in zip(results(), usual, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# Far from zero, as map coordinates are.

OFFSETS = [1e3, 1e4, 1e5, 1e6]


def offset_points(offset):
    """Return float32 points (2, 400, 3) of four clusters around an offset."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 400, 3, generator=generator, dtype=torch.float64)
    x = x + 6 * torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).repeat_interleave(100, 1)
    return (x + offset * torch.tensor([1.0, -0.7, 0.3])).float()


def in_double(mixture):
    return Mixture(*(part.double() for part in mixture))


def assert_equal_means(found, expected):
    torch.testing.assert_close(found.double().mean(-1), expected.mean(-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_points_far_from_zero(kind, offset, large, monkeypatch):
    if large:
        monkeypatch.setattr("em_lightning.mixture.cloud._WHOLE", 0)
        monkeypatch.setattr("em_lightning.mixture.cloud._CHUNK", 600)
        monkeypatch.setattr("em_lightning.mixture.starts._BLOCK", 600)
        monkeypatch.setattr("em_lightning.mixture.passes._BLOCK", 600)
    x = offset_points(offset)
    operator = EMOperator(4, 3, num_iters=10, covariance=kind, residual=False)
    narrow, wide = operator(x), operator(x.double())
    # Of the fit: what the operator climbed to, as float32 gives it back.
    assert_equal_means(in_double(narrow).log_prob(x.double()), wide.log_prob(x.double()))
    # Of the evaluation: the same mixture, points in float32.
    assert_equal_means(narrow.log_prob(x), in_double(narrow).log_prob(x.double()))
    assert_equal_means(operator.log_prob(x, narrow), in_double(narrow).log_prob(x.double()))
    objective = operator.objective(x, narrow).double()
    torch.testing.assert_close(objective, in_double(narrow).log_prob(x.double()).sum(-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kernel", KERNELS[1:])
@pytest.mark.parametrize("offset", OFFSETS)
def test_robust_kernels_far_from_zero(kernel, offset):
    x = offset_points(offset)
    operator = EMOperator(4, 3, num_iters=10, kernel=kernel, residual=False)
    narrow, wide = operator(x), operator(x.double())
    expected = operator.log_prob(x.double(), wide)
    assert_equal_means(operator.log_prob(x.double(), in_double(narrow)), expected)
    assert_equal_means(operator.log_prob(x, narrow), operator.log_prob(x.double(), in_double(narrow)))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_estimator_far_from_zero(kind, offset):
    rows = offset_points(offset)[0]
    start = EMOperator(4, 3, covariance=kind, residual=False)(rows[None].double(), num_iters=1)
    arguments = {"weights_init": start.weights[0].numpy(), "means_init": start.means[0].numpy()}
    covariances = start.covariances[0]
    precisions = {
        "full": lambda c: torch.linalg.inv(c),
        "tied": lambda c: torch.linalg.inv(c[0]),
        "diag": lambda c: 1 / c,
        "spherical": lambda c: 1 / c,
    }[kind](covariances)
    fits = [
        GaussianMixture(4, covariance_type=kind, tol=1e-5, precisions_init=precisions.numpy(), **arguments).fit(X)
        for X in (rows.numpy(), rows.double().numpy())
    ]
    scores = [fit.score(X) for fit in fits for X in (rows.numpy(), rows.double().numpy())]
    assert scores == pytest.approx([scores[-1]] * 4, rel=1e-4)
