"""scikit-learn's own tests of GaussianMixture, run on the estimator."""

import os
import subprocess
import sys

import numpy as np
import pytest
import sklearn.mixture

from em_lightning import estimator
from em_lightning.estimator import GaussianMixture

# scikit-learn's tests take the class from this module.
reference, sklearn.mixture.GaussianMixture = sklearn.mixture.GaussianMixture, GaussianMixture
from sklearn.mixture.tests import test_gaussian_mixture, test_mixture  # noqa: E402

sklearn.mixture.GaussianMixture = reference

LEFT_OUT = {
    "test_suffstat_sk_full": "private functions only",
    "test_suffstat_sk_tied": "private functions only",
    "test_suffstat_sk_diag": "private functions only",
    "test_gaussian_suffstat_sk_spherical": "private functions only",
    "test_compute_log_det_cholesky": "private functions only",
    "test_gaussian_mixture_log_probabilities": "private functions only",
    "test_gaussian_mixture_all_init_does_not_estimate_gaussian_parameters": "counts calls of a private function",
}
for module in (test_gaussian_mixture, test_mixture):
    for name, test in vars(module).items():
        if "array_api" in name and "SCIPY_ARRAY_API" not in os.environ:
            continue  # see test_arrays_of_other_libraries
        if name.startswith("test_") and callable(test) and name not in LEFT_OUT:
            # pytest deprecates parameters from a generator.
            test.pytestmark = [
                pytest.mark.parametrize(mark.args[0], list(mark.args[1])).mark if mark.name == "parametrize" else mark
                for mark in getattr(test, "pytestmark", [])
            ]
            globals()[name] = test
# One iteration collapses a component, which is refused where scikit-learn returns a variance of round-off.
REFUSED_IN_BLOCKS = {"test_gaussian_mixture_setting_best_params"}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=["whole", "blocks"], autouse=True)
def mode(request, monkeypatch):
    """Small tables are fitted by scikit-learn; test the EM of this package on them too."""
    if request.param == "blocks":
        if request.node.originalname in REFUSED_IN_BLOCKS:
            pytest.skip("refused")
        monkeypatch.setattr(estimator, "_SMALL_ROWS", 0)


@pytest.fixture(params=[np.float32, np.float64])
def global_dtype(request):
    return request.param


@pytest.fixture(params=[0, 42])
def global_random_seed(request):
    return request.param


@pytest.mark.slow
@pytest.mark.skipif("SCIPY_ARRAY_API" in os.environ, reason="runs itself")
def test_arrays_of_other_libraries():
    """scikit-learn reads the setting when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "array_api"]
    environment = {**os.environ, "SCIPY_ARRAY_API": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-2000:]
