"""The estimator passes scikit-learn's checks and gives scikit-learn's results."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from helpers import COVARIANCE_TYPES, assert_raises
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as Reference
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

from em_lightning.estimator import GaussianMixture


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


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_results_equal_scikit_learn(kind, X):
    ours, theirs = pair(X, kind, max_iter=50, tol=1e-5)
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


def test_weights_count_as_repetitions_of_rows(X):
    counts = np.random.default_rng(0).integers(0, 3, len(X))
    found = GaussianMixture(3, init_params="farthest").fit(X, sample_weight=counts)
    expected = GaussianMixture(3, init_params="farthest").fit(X.repeat(counts, 0))
    assert np.allclose(found.means_, expected.means_) and found.n_iter_ == expected.n_iter_
    assert np.allclose(found.score_samples(X), expected.score_samples(X))
    assert np.array_equal(found.predict(X), expected.predict(X))


@pytest.mark.parametrize("factor", [1e-14, 1e14])
def test_a_common_factor_of_the_weights_does_not_matter(factor, X):
    counts = np.random.default_rng(0).random(len(X))
    fits = [GaussianMixture(3, init_params="farthest").fit(X, sample_weight=own) for own in (counts, factor * counts)]
    assert np.allclose(fits[0].means_, fits[1].means_) and fits[0].n_iter_ == fits[1].n_iter_


def test_many_rows_in_several_blocks_equal_their_weights(X):
    start = {"weights_init": [0.25] * 4, "means_init": X[:4], "precisions_init": np.stack([np.eye(3)] * 4)}
    many = np.tile(X, (200, 1))  # block size
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


def test_a_warm_start_continues_the_fit(X):
    start = {"init_params": "farthest", "tol": 0.0}
    fit = GaussianMixture(4, max_iter=3, warm_start=True, **start).fit(X).fit(X)
    assert np.allclose(fit.means_, GaussianMixture(4, max_iter=6, **start).fit(X).means_, atol=1e-9)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_a_start_may_be_given_in_part(kind, X):
    """``lower_bound_`` after one iteration is the log-likelihood of the start."""
    _, theirs = pair(X, kind, max_iter=3)
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
    for init in ({"init_params": "farthest"}, {}):
        assert_raises(ValueError, words, lambda options={**init, **options}: GaussianMixture(**options).fit(X))


def test_a_fit_that_has_not_converged_warns(X):
    with pytest.warns(ConvergenceWarning, match="max_iter"):
        fit = GaussianMixture(4, max_iter=2, tol=1e-12, random_state=0).fit(X)
    assert not fit.converged_
    assert_raises(ValueError, ["n_samples", "0"], lambda: fit.sample(0))


def test_the_package_does_not_import_scikit_learn():
    code = "import sys, em_lightning; em_lightning.Mixture, em_lightning.EMOperator; print('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
