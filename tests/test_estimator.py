"""The estimator passes scikit-learn's checks and gives scikit-learn's results."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as Reference
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

from em_lightning.estimator import GaussianMixture

KINDS = ["full", "tied", "diag", "spherical"]


@parametrize_with_checks([GaussianMixture(), GaussianMixture(2, init_params="farthest", covariance_type="diag")])
@pytest.mark.filterwarnings("ignore")
def test_it_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def X():
    return make_blobs(600, 3, centers=4, cluster_std=1.5, random_state=0)[0]


def pair(X, kind, **options):
    rough = Reference(4, covariance_type=kind, random_state=1, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        rough.fit(X)
        start = {"weights_init": rough.weights_, "means_init": rough.means_, "precisions_init": rough.precisions_}
        both = (made(4, covariance_type=kind, **start, **options).fit(X) for made in (GaussianMixture, Reference))
        return tuple(both)


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_scikit_learns(kind, X):
    ours, theirs = pair(X, kind, max_iter=50, tol=1e-5)
    assert ours.n_iter_ == theirs.n_iter_ and ours.converged_ == theirs.converged_
    assert ours.lower_bound_ == pytest.approx(theirs.lower_bound_, abs=1e-9)
    for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"):
        assert getattr(ours, name).shape == getattr(theirs, name).shape
        assert np.allclose(getattr(ours, name), getattr(theirs, name), atol=1e-8), name
    for name in ("predict", "predict_proba", "score_samples", "score", "bic", "aic"):
        assert np.allclose(getattr(ours, name)(X), getattr(theirs, name)(X), atol=1e-7), name
    assert ours.predict_proba(X).shape == (600, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_moments_of_the_mixture(kind, X):
    fit, _ = pair(X, kind, max_iter=20)
    fit.random_state = 3
    drawn, labels = fit.sample(40_000)
    assert drawn.shape == (40_000, 3) and (np.diff(labels) >= 0).all()
    assert np.allclose(np.bincount(labels, minlength=4) / 40_000, fit.weights_, atol=0.02)
    for k in range(4):
        own = {"full": fit.covariances_, "tied": [fit.covariances_] * 4}.get(kind)
        own = np.diag(np.broadcast_to(fit.covariances_[k], 3)) if own is None else own[k]
        assert np.allclose(drawn[labels == k].mean(0), fit.means_[k], atol=0.12)
        assert np.allclose(np.cov(drawn[labels == k].T), own, atol=0.25)


def test_weights_count_rows_and_blocks_do_not_show(X, monkeypatch):
    counts = np.random.default_rng(0).integers(0, 3, len(X))
    repeated = X.repeat(counts, 0)
    found = GaussianMixture(3, init_params="farthest").fit(X, sample_weight=counts)
    monkeypatch.setattr("em_lightning.estimator._ROWS", 50)
    expected = GaussianMixture(3, init_params="farthest").fit(repeated)
    assert np.allclose(found.means_, expected.means_) and found.n_iter_ == expected.n_iter_
    assert np.allclose(found.score_samples(X), expected.score_samples(X))
    assert np.array_equal(found.predict(X), expected.predict(X))


def test_memory_mapped_and_single_precision_rows_are_fitted(X, tmp_path, monkeypatch):
    monkeypatch.setattr("em_lightning.estimator._SAMPLE", 100)
    np.save(tmp_path / "x.npy", X.astype(np.float32))
    mapped = GaussianMixture(4, random_state=0).fit(np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert np.allclose(mapped.means_, GaussianMixture(4, random_state=0).fit(X).means_, atol=1e-3)
    assert mapped.score_samples(X.astype(np.float32)).dtype == np.float32
    assert mapped.score(X) > Reference(1).fit(X).score(X) + 0.3


def test_it_takes_part_in_scikit_learns_model_selection(X):
    search = GridSearchCV(GaussianMixture(random_state=0), {"n_components": [1, 4], "covariance_type": ["full"]}, cv=2)
    assert search.fit(X).best_params_["n_components"] == 4
    assert clone(search.best_estimator_).get_params()["n_components"] == 4
    assert len(set(GaussianMixture(4, random_state=0).fit_predict(X))) == 4


def test_of_several_starts_the_best_fit_is_kept(X):
    random = np.random.RandomState(5)  # hands one start after the other its seed, as one estimator does
    each = GaussianMixture(4, init_params="random_from_data", random_state=random)
    bounds = [each.fit(X).lower_bound_ for _ in range(6)]
    best = GaussianMixture(4, init_params="random_from_data", n_init=6, random_state=5).fit(X)
    assert best.lower_bound_ == pytest.approx(max(bounds), abs=1e-12) and max(bounds) > min(bounds) + 1e-3


def test_a_warm_start_goes_on(X):
    start = {"init_params": "farthest", "tol": 0.0}
    fit = GaussianMixture(4, max_iter=3, warm_start=True, **start).fit(X).fit(X)
    assert np.allclose(fit.means_, GaussianMixture(4, max_iter=6, **start).fit(X).means_, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_may_be_given_in_part(kind, X):
    means = X[:4]
    fit = GaussianMixture(4, covariance_type=kind, means_init=means, tol=0.0, max_iter=1, random_state=0)
    start = fit._start(X, None, np.random.RandomState(0))
    drawn = GaussianMixture(4, covariance_type=kind)._start(X, None, np.random.RandomState(0))
    assert np.array_equal(start.means[0], means) and not np.allclose(drawn.means[0], means)
    assert np.array_equal(start.weights, drawn.weights) and np.array_equal(start.covariances, drawn.covariances)
    assert np.isfinite(fit.fit(X).means_).all()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"n_components": 0}, ["n_components=0"]),
        ({"n_components": 601}, ["n_samples=600", "n_components=601"]),
        ({"max_iter": 0}, ["max_iter=0"]),
        ({"tol": -1.0}, ["tol=-1.0"]),
        ({"reg_covar": -1.0}, ["reg_covar=-1.0"]),
        ({"covariance_type": "round"}, ["covariance_type='round'", "spherical"]),
        ({"init_params": "kmeans"}, ["init_params='kmeans'", "k-means++"]),
        ({"n_init": 0}, ["n_init=0"]),
        ({"means_init": np.zeros((2, 3))}, ["means_init", "(2, 3)", "(1, 3)"]),
        ({"means_init": np.full((1, 3), np.nan)}, ["means_init", "NaN"]),
        ({"weights_init": [0.5]}, ["weights_init=[0.5]"]),
        ({"precisions_init": -np.eye(3)[None]}, ["precisions_init", "positive definite"]),
        ({"precisions_init": [0.0], "covariance_type": "spherical"}, ["precisions_init", "positive"]),
    ],
)
def test_errors_name_the_argument_and_the_value(options, words, X):
    with pytest.raises(ValueError) as caught:
        GaussianMixture(**options).fit(X)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_fits_that_do_not_converge_warn_and_empty_samples_raise(X):
    with pytest.warns(ConvergenceWarning, match="max_iter=2"):
        fit = GaussianMixture(4, max_iter=2, tol=1e-12, random_state=0).fit(X)
    with pytest.raises(ValueError, match="n_samples=0"):
        fit.sample(0)


def test_the_package_and_its_modules_do_without_scikit_learn():
    code = "import sys, em_lightning; em_lightning.Mixture, em_lightning.EMOperator; print('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_rows_whose_squares_overflow_raise():
    rows = np.array([[0.0, 1.0], [1e160, 0.0], [2.0, 3.0]])
    with pytest.raises(ValueError, match="X .*2e.123.*float64"):
        GaussianMixture(2).fit(rows)
