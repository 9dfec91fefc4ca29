"""The estimator passes scikit-learn's checks and gives scikit-learn's results."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from helpers import COVARIANCE_TYPES, assert_raises
from scipy import stats
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as Reference
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

from em_lightning import estimator
from em_lightning.estimator import GaussianMixture


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """Do not leave small tables to scikit-learn."""
    monkeypatch.setattr(estimator, "_SMALL_ROWS", 0)


def random_starts_depend_on_the_order_of_rows(model):
    reason = "a random start of several components depends on the order of the rows, as KMeans does"
    return {"check_sample_weight_equivalence_on_dense_data": reason} if model.n_components > 1 else {}


@parametrize_with_checks(
    [
        GaussianMixture(),
        GaussianMixture(2, init_params="random_from_data", covariance_type="diag"),
        GaussianMixture(2, init_params="k-means++", covariance_type="tied", warm_start=True, n_init=2),
    ],
    expected_failed_checks=random_starts_depend_on_the_order_of_rows,
)
@pytest.mark.filterwarnings("ignore")
def test_it_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def X():
    return make_blobs(600, 3, centers=4, cluster_std=1.5, random_state=0)[0]


def start_of(X, components=4, kind="full"):
    """Return initial parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        rough = Reference(components, covariance_type=kind, random_state=1, max_iter=1).fit(X)
    return {"weights_init": rough.weights_, "means_init": rough.means_, "precisions_init": rough.precisions_}


def fit_both(X, kind, **options):
    """Return the fits of both classes from the same start."""
    options |= start_of(X, kind=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return [cls(4, covariance_type=kind, **options).fit(X) for cls in (GaussianMixture, Reference)]


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_results_equal_scikit_learn(kind, X):
    ours, theirs = fit_both(X, kind, max_iter=50, tol=1e-5)
    assert ours.n_iter_ == theirs.n_iter_ and ours.converged_ == theirs.converged_
    assert ours.lower_bound_ == pytest.approx(theirs.lower_bound_, abs=1e-9)
    for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"):
        assert getattr(ours, name).shape == getattr(theirs, name).shape
        assert np.allclose(getattr(ours, name), getattr(theirs, name), atol=1e-8), name
    for name in ("predict", "predict_proba", "score_samples", "score", "bic", "aic"):
        assert np.allclose(getattr(ours, name)(X), getattr(theirs, name)(X), atol=1e-7), name
    assert ours.predict_proba(X).shape == (600, 4)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_samples_have_the_moments_of_the_mixture(kind, X):
    fit, _ = fit_both(X, kind, max_iter=20)
    fit.random_state = 3
    drawn, labels = fit.sample(40_000)
    assert drawn.shape == (40_000, 3) and (np.diff(labels) >= 0).all()
    assert np.allclose(np.bincount(labels, minlength=4) / 40_000, fit.weights_, atol=0.02)
    for k in range(4):
        own = {"full": fit.covariances_, "tied": [fit.covariances_] * 4}.get(kind)
        own = np.diag(np.broadcast_to(fit.covariances_[k], 3)) if own is None else own[k]
        assert np.allclose(drawn[labels == k].mean(0), fit.means_[k], atol=0.12)
        assert np.allclose(np.cov(drawn[labels == k].T), own, atol=0.25)


def test_a_mixture_made_by_hand_without_a_fit_is_evaluated():
    made = GaussianMixture(2)
    made.weights_, made.means_ = np.array([0.25, 0.75]), np.array([[0.0, 0.0], [3.0, 3.0]])
    made.covariances_ = np.stack([np.eye(2), 4 * np.eye(2)])
    rows = np.array([[0.0, 0.0], [3.0, 3.0], [1.0, -2.0]])
    densities = [stats.multivariate_normal(m, c).pdf(rows) for m, c in zip(made.means_, made.covariances_, strict=True)]
    np.testing.assert_allclose(made.score_samples(rows), np.log(made.weights_ @ densities), rtol=1e-12)
    np.testing.assert_array_equal(made.predict(rows), (made.weights_[:, None] * densities).argmax(0))


def test_weights_count_as_repetitions_of_rows(X):
    counts = np.random.default_rng(0).integers(0, 3, len(X))
    found = GaussianMixture(3, **start_of(X, 3)).fit(X, sample_weight=counts)
    expected = GaussianMixture(3, **start_of(X, 3)).fit(X.repeat(counts, 0))
    assert np.allclose(found.means_, expected.means_) and found.n_iter_ == expected.n_iter_
    assert np.allclose(found.score_samples(X), expected.score_samples(X))
    assert np.array_equal(found.predict(X), expected.predict(X))


@pytest.mark.parametrize("init", ["random_from_data", "k-means++", "kmeans", "random"])
def test_rows_without_weight_start_no_component(init, X):
    rows, weights = np.vstack([X, X + 1e3]), np.repeat([1.0, 0.0], len(X))
    for seed in range(5):
        fit = GaussianMixture(4, init_params=init, max_iter=0, random_state=seed).fit(rows, sample_weight=weights)
        assert (fit.means_ < 500).all()


@pytest.mark.parametrize("init", ["random_from_data", "k-means++"])
def test_rows_start_a_component_in_proportion_to_their_weights(init, X):
    rows, weights = np.vstack([X, X + 1e3]), np.repeat([9.0, 1.0], len(X))
    starts = [
        GaussianMixture(1, init_params=init, max_iter=0, random_state=seed).fit(rows, sample_weight=weights).means_
        for seed in range(100)
    ]
    share = np.mean([start[0, 0] > 500 for start in starts])
    assert 0.02 < share < 0.25  # 0.1 is expected, and 0.5 if weights did not count


@pytest.mark.parametrize("factor", [1e-300, 1e-60, 1e-14, 1e14, 1e300])
@pytest.mark.parametrize("init", ["k-means++", "kmeans"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_result_is_invariant_to_the_scale_of_the_weights(factor, init, dtype, X):
    counts = np.random.default_rng(0).random(len(X))
    fits = [
        GaussianMixture(3, init_params=init, random_state=0).fit(X.astype(dtype), sample_weight=own)
        for own in (counts, factor * counts)
    ]
    assert np.allclose(fits[0].means_, fits[1].means_) and fits[0].n_iter_ == fits[1].n_iter_
    assert fits[0].lower_bound_ == pytest.approx(fits[1].lower_bound_) and fits[1].converged_


@pytest.mark.parametrize(
    "weights", [np.zeros(600), np.exp(np.full(600, -1000.0)), -np.ones(600), np.full(600, np.nan), np.ones((600, 1))]
)
def test_weights_without_a_meaning_are_refused(weights, X):
    assert_raises(ValueError, ["sample_weight", "600"], lambda: GaussianMixture(2).fit(X, sample_weight=weights))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_many_rows_in_several_blocks_equal_their_weights(X):
    start = {"weights_init": [0.25] * 4, "means_init": X[:4], "precisions_init": np.stack([np.eye(3)] * 4)}
    many = np.tile(X, (200, 1))  # more rows than fit into one block
    found = GaussianMixture(4, max_iter=5, tol=0.0, **start).fit(many)
    expected = GaussianMixture(4, max_iter=5, tol=0.0, **start).fit(X)
    assert np.allclose(found.means_, expected.means_, atol=1e-8)
    assert found.score(many) == pytest.approx(expected.score(X), abs=1e-9)
    assert np.array_equal(found.predict(many), np.tile(expected.predict(X), 200))


def test_memory_mapped_and_single_precision_rows(X, tmp_path):
    np.save(tmp_path / "x.npy", X.astype(np.float32))
    mapped = GaussianMixture(4, random_state=0).fit(np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert np.allclose(mapped.means_, GaussianMixture(4, random_state=0).fit(X).means_, atol=1e-2)
    assert mapped.score_samples(X.astype(np.float32)).dtype == np.float32
    assert mapped.score(X) > Reference(1).fit(X).score(X) + 0.3


def test_grid_search_and_clone(X):
    search = GridSearchCV(GaussianMixture(random_state=0), {"n_components": [1, 4], "covariance_type": ["full"]}, cv=2)
    assert search.fit(X).best_params_["n_components"] == 4
    assert clone(search.best_estimator_).get_params()["n_components"] == 4
    assert len(set(GaussianMixture(4, random_state=0).fit_predict(X))) == 4


def test_the_best_of_several_starts_is_kept(X):
    random = np.random.RandomState(5)  # gives each start its seed
    each = GaussianMixture(4, init_params="random_from_data", random_state=random)
    bounds = [each.fit(X).lower_bound_ for _ in range(6)]
    best = GaussianMixture(4, init_params="random_from_data", n_init=6, random_state=5).fit(X)
    assert best.lower_bound_ == pytest.approx(max(bounds), abs=1e-12) and max(bounds) > min(bounds) + 1e-3


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_warm_start_continues_the_fit(X):
    start = {"tol": 0.0} | start_of(X)
    fit = GaussianMixture(4, max_iter=3, warm_start=True, **start).fit(X).fit(X)
    assert np.allclose(fit.means_, GaussianMixture(4, max_iter=6, **start).fit(X).means_, atol=1e-9)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_partial_initial_parameters(kind, X):
    """``lower_bound_`` after one iteration is the log-likelihood of the start."""
    _, theirs = fit_both(X, kind, max_iter=3)
    whole = {"weights_init": theirs.weights_, "means_init": theirs.means_, "precisions_init": theirs.precisions_}
    options = {"covariance_type": kind, "tol": 0.0, "max_iter": 1, "random_state": 0}
    drawn = GaussianMixture(4, **options).fit(X).lower_bound_
    assert GaussianMixture(4, **options, **whole).fit(X).lower_bound_ == pytest.approx(theirs.score(X), abs=1e-9)
    for name, value in whole.items():
        part = GaussianMixture(4, **options, **{name: value}).fit(X)
        assert np.isfinite(part.means_).all() and abs(part.lower_bound_ - drawn) > 1e-6, name


@pytest.mark.parametrize(
    "options, words",
    [
        ({"n_components": 0}, ["n_components", "0"]),
        ({"n_components": "3"}, ["n_components", "'3'"]),
        ({"n_components": True}, ["n_components", "True"]),
        ({"n_components": 601}, ["n_samples = 600", "n_components = 601"]),
        ({"max_iter": -1}, ["max_iter=-1"]),
        ({"max_iter": None}, ["max_iter=None"]),
        ({"n_init": 0}, ["n_init=0"]),
        ({"n_init": 2.5}, ["n_init=2.5"]),
        ({"tol": -1.0}, ["tol", "-1.0"]),
        ({"tol": None}, ["tol", "None"]),
        ({"reg_covar": -1.0}, ["reg_covar", "-1.0"]),
        ({"reg_covar": np.inf}, ["reg_covar", "inf"]),
        ({"covariance_type": "round"}, ["covariance_type", "'round'"]),
        ({"init_params": "grid"}, ["init_params", "'grid'"]),
        ({"means_init": np.zeros((2, 3))}, ["means", "(2, 3)", "(1, 3)"]),
        ({"means_init": np.full((1, 3), np.nan)}, ["means_init", "NaN"]),
        ({"weights_init": [0.5]}, ["weights", "0.5"]),
        ({"precisions_init": -np.eye(3)[None]}, ["precision", "positive"]),
        ({"precisions_init": [0.0], "covariance_type": "spherical"}, ["precision", "positive"]),
    ],
)
def test_wrong_arguments_are_reported(options, words, X):
    assert_raises(ValueError, words, lambda: GaussianMixture(**options).fit(X))


def test_a_fit_that_has_not_converged_warns(X):
    with pytest.warns(ConvergenceWarning, match="max_iter"):
        fit = GaussianMixture(4, max_iter=2, tol=1e-12, random_state=0).fit(X)
    assert not fit.converged_
    assert_raises(ValueError, ["n_samples", "0"], lambda: fit.sample(0))


@pytest.mark.parametrize("init", ["kmeans", "k-means++", "random", "random_from_data"])
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_every_start_is_that_of_scikit_learn(kind, init, X):
    options = {"covariance_type": kind, "init_params": init, "random_state": 3, "n_init": 2}
    ours, theirs = (cls(4, **options).fit(X) for cls in (GaussianMixture, Reference))
    assert np.allclose(ours.means_, theirs.means_, atol=1e-8) and ours.n_iter_ == theirs.n_iter_
    assert np.allclose(ours.lower_bounds_, theirs.lower_bounds_) and ours.lower_bounds_[-1] == ours.lower_bound_


def test_small_tables_have_the_same_result_in_blocks(X, monkeypatch):
    blocks = GaussianMixture(4, random_state=0).fit(X)
    monkeypatch.setattr(estimator, "_SMALL_ROWS", 2**12)
    whole = GaussianMixture(4, random_state=0).fit(X)
    assert np.allclose(whole.means_, blocks.means_) and np.array_equal(whole.predict(X), blocks.predict(X))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_small_tables_are_evaluated_as_in_blocks(kind, dtype, X, monkeypatch):
    rows = (X + 100.0).astype(dtype)
    fit = GaussianMixture(4, covariance_type=kind, random_state=0).fit(rows)

    def evaluated(size):
        monkeypatch.setattr(estimator, "_SMALL_ROWS", size)
        return [getattr(fit, name)(rows) for name in ("predict", "predict_proba", "score_samples")]

    for change in (1.0, 4.0):  # covariances of the fit, and set by hand
        fit.covariances_ = change * fit.covariances_
        for small, blocks in zip(evaluated(2**12), evaluated(0), strict=True):
            assert small.dtype == blocks.dtype and np.allclose(small, blocks, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(estimator, "_SMALL_ROWS", 2**12)
    assert_raises(ValueError, ["2 features", "3 features"], lambda: fit.predict(rows[:, :2]))
    assert_raises(ValueError, ["NaN"], lambda: fit.score_samples(np.where(rows > 100.0, np.nan, rows)))


@pytest.mark.parametrize("small", [0, 2**12])
@pytest.mark.parametrize(
    "before, after",
    [
        ({"covariance_type": "full"}, {"covariance_type": "diag"}),
        ({"covariance_type": "diag"}, {"covariance_type": "tied"}),  # the same shape for three components
        ({"covariance_type": "spherical"}, {"covariance_type": "full"}),
        ({"n_components": 2}, {"n_components": 3}),
        ({"n_components": 5}, {"n_components": 3}),
    ],
)
def test_a_warm_start_after_changed_parameters_fits_anew(before, after, small, X, monkeypatch):
    monkeypatch.setattr(estimator, "_SMALL_ROWS", small)
    fit = GaussianMixture(**{"n_components": 3, "warm_start": True, "random_state": 0, **before}).fit(X)
    fit.set_params(**after)
    for stale in (fit.predict, fit.score_samples, fit.bic, lambda _: fit.sample(3)):
        assert_raises(ValueError, [*after, repr(*before.values())], lambda stale=stale: stale(X))
    with pytest.warns(UserWarning, match=next(iter(after))):
        fit.fit(X)
    expected = GaussianMixture(**{"n_components": 3, "random_state": 0, **after}).fit(X)
    assert np.allclose(fit.covariances_, expected.covariances_) and fit.bic(X) == pytest.approx(expected.bic(X))
    with pytest.warns(UserWarning, match="n_features=2"):
        fit.fit(X[:, :2])
    assert fit.means_.shape == (3, 2)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_attributes_set_by_hand(kind, X):
    fit = GaussianMixture(3, covariance_type=kind, random_state=0).fit(X)
    scores, labels = fit.score_samples(X), fit.predict(X)
    fit.weights_, fit.means_, fit.covariances_ = fit.weights_.tolist(), fit.means_.tolist(), fit.covariances_.tolist()
    assert np.allclose(fit.score_samples(X), scores) and fit.sample(5)[0].shape == (5, 3)
    labels = fit.set_params(warm_start=True).fit(X).predict(X)
    order = slice(None, None, -1)  # views with negative strides
    fit.weights_, fit.means_ = fit.weights_[order], fit.means_[order]
    fit.covariances_ = fit.covariances_ if kind == "tied" else fit.covariances_[order]
    assert np.array_equal(fit.predict(X), 2 - labels) and fit.sample(5)[0].shape == (5, 3)
    fit.covariances_ = -np.asarray(fit.covariances_)
    for use in (fit.score_samples, fit.predict_proba, fit.predict):
        assert_raises(ValueError, ["covariances"], lambda use=use: use(X))


DEGENERATE = {
    "two points": np.repeat([[0.0] * 3, [1.0] * 3], 5, 0),
    "a line": np.linspace(-1, 1, 50)[:, None] * [[1.0, 2.0, 3.0]],
    "a constant column": np.column_stack([np.random.default_rng(0).normal(size=(50, 2)), np.full(50, 7.0)]),
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["full", "tied"])
@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_degenerate_rows_are_refused_without_a_floor(name, kind, weighted, given, X):
    rows, weights = DEGENERATE[name], np.ones(len(DEGENERATE[name])) if weighted else None
    start = {
        "weights_init": [0.5, 0.5],
        "means_init": rows[[0, -1]],
        "precisions_init": np.eye(3) if kind == "tied" else np.stack([np.eye(3)] * 2),
    }
    model = GaussianMixture(2, covariance_type=kind, reg_covar=0.0, **(start if given else {}))
    assert_raises(ValueError, ["covariance", "reg_covar"], lambda: model.fit(rows, sample_weight=weights))
    model.set_params(reg_covar=1e-6).fit(rows, sample_weight=weights)
    assert np.isfinite(model.score(rows))


def test_units_of_the_columns_are_no_degeneracy(X):
    units = np.array([1e-9, 1.0, 1e9])
    fits = [GaussianMixture(3, reg_covar=0.0, random_state=0).fit(rows) for rows in (X, X + 1e3)]
    assert np.isfinite([fit.score(X) for fit in fits]).all()
    scaled = GaussianMixture(3, reg_covar=0.0, random_state=0, init_params="random").fit(X * units)
    assert np.isfinite(scaled.score(X * units))


def test_progress_is_printed(X, capsys):
    with pytest.warns(ConvergenceWarning):
        GaussianMixture(3, verbose=1, verbose_interval=2, random_state=0, tol=0.0, max_iter=5, n_init=2).fit(X)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == [
        "Initialization 0",
        "Iteration 2",
        "Iteration 4",
        "Initialization 1",
        "Iteration 2",
        "Iteration 4",
    ]


@pytest.mark.parametrize("rows", [1, 2, 10])
def test_no_iterations_return_the_start(rows, X):
    means = X[:2] + rows
    fit = GaussianMixture(2, max_iter=0, means_init=means, random_state=0).fit(X)
    assert np.allclose(fit.means_, means) and fit.n_iter_ == 0 and fit.lower_bounds_ == [] and not fit.converged_


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_attributes_have_the_dtype_of_the_rows(dtype, X):
    rows = (10 * X).astype(dtype)
    fit = GaussianMixture(3, random_state=0).fit(rows, sample_weight=np.ones(len(rows)))
    expected = np.float64 if dtype == np.int64 else dtype
    for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"):
        assert getattr(fit, name).dtype == expected, name
    assert fit.score_samples(rows).dtype == fit.predict_proba(rows).dtype == expected


def test_the_package_does_not_import_scikit_learn():
    code = "import sys, em_lightning; em_lightning.Mixture, em_lightning.EMOperator; print('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
