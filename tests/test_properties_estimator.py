"""The estimator on rows of any size against scikit-learn from the same start."""

import warnings

import drawing
import numpy as np
import pytest
import sklearn.mixture
import torch
from helpers import COVARIANCE_TYPES
from hypothesis import given
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from test_properties_mixtures import matrices, mixtures

from em_lightning import estimator
from em_lightning.estimator import GaussianMixture

estimator_in_blocks = pytest.fixture(autouse=True)(lambda monkeypatch: monkeypatch.setattr(estimator, "_SMALL_ROWS", 0))


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@given(values=st.data())
def test_the_estimator_equals_scikit_learn(kind, values):
    components, features = values.draw(st.integers(1, 3)), values.draw(st.integers(1, 3))
    rows = values.draw(st.integers(max(components, 2), 9))
    size = 10.0 ** values.draw(st.integers(-6, 6))
    dtype = values.draw(st.sampled_from(drawing.WIDE))
    mixture = values.draw(mixtures(kind, 1, components, features, size=size))
    X = (size * values.draw(drawing.tensors((rows, features), least=-1, most=1))).to(dtype).numpy()
    precisions = np.linalg.inv(matrices(mixture)[0])
    arguments = {
        "covariance_type": kind,
        "weights_init": mixture.weights[0].numpy(),
        "means_init": mixture.means[0].numpy(),
        "precisions_init": {
            "full": precisions,
            "tied": precisions[0],
            "diag": np.einsum("kii->ki", precisions),
            "spherical": precisions[:, 0, 0],
        }[kind],
        "reg_covar": 1e-2 * size**2,
        "tol": values.draw(st.sampled_from((0.0, 1e-3))),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        most = values.draw(st.integers(1, 3))
        for iterations in range(1, most + 1):
            arguments["max_iter"] = iterations
            theirs = sklearn.mixture.GaussianMixture(components, **arguments).fit(X.astype(np.float64))
            if theirs.weights_.min() < 1e-3:
                break  # nearly empty components depend on guards against division by zero
        ours = GaussianMixture(components, **arguments).fit(X)
    eps = 1e-6 if dtype == torch.float64 else 2e-2
    reach = float(np.abs(X).max()) + size
    scores = ours.score_samples(X)
    assert np.isfinite(scores).all() and np.isfinite(ours.covariances_).all()
    if theirs.weights_.min() > 1e-3 and ours.n_iter_ == theirs.n_iter_:
        np.testing.assert_allclose(ours.weights_, theirs.weights_, atol=eps)
        np.testing.assert_allclose(ours.means_, theirs.means_, atol=eps * reach)
        np.testing.assert_allclose(ours.covariances_, theirs.covariances_, atol=eps * reach**2)
        if dtype == torch.float64:
            np.testing.assert_allclose(scores, theirs.score_samples(X), rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-4)
            assert ours.bic(X) == pytest.approx(theirs.bic(X), rel=1e-4, abs=1e-2)
            assert ours.aic(X) == pytest.approx(theirs.aic(X), rel=1e-4, abs=1e-2)
    assert (ours.predict(X) == ours.predict_proba(X).argmax(1)).all() or (ours.predict_proba(X).max(1) < 0.51).any()
    drawn, labels = ours.sample(5)
    assert drawn.shape == (5, features) and np.isfinite(drawn).all() and (np.diff(labels) >= 0).all()
