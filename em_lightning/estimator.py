"""GaussianMixture: a scikit-learn estimator for mixtures of large tables; this module requires scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn import mixture as sklearn_mixture
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from em_lightning.mixture import COVARIANCES, Mixture, fit_blocks

# Number of rows up to which scikit-learn's code runs. On one thread its evaluation took 0.3 to 1 times the time of the
# code here; its EM was faster up to about 1,000 rows (4 to 16 features, 3 to 8 components) and half as fast at 4,096.
_SMALL_ROWS = 2**12
_SAMPLE_ROWS = 2**14  # rows for a start; with 2^16 of 200,000 rows, a start takes 1 s more and the fit is no better
_BLOCK_ROWS = 2**16  # with larger blocks two ranks are slower, see docs/results/gaussian_mixture.md
_START_ARGUMENTS = ("weights_init", "means_init", "precisions_init")


class GaussianMixture(sklearn_mixture.GaussianMixture):
    r"""Fit :math:`p(x) = \sum_k \pi_k N(x | \mu_k, \Sigma_k)` by EM, as ``sklearn.mixture.GaussianMixture`` does.

    Parameters, attributes, methods and results are those of scikit-learn's class. In addition:

    - Rows are read in blocks and responsibilities are not stored, so X may be a memory-mapped array.
    - :meth:`fit` accepts weights of the rows. A common factor of the weights has no effect.

    A start is computed from all rows. With weights or more than 16,384 rows, it is computed from 16,384 rows drawn in
    proportion to their weights. Up to 4,096 rows of float64 without weights are fitted by scikit-learn's EM; otherwise
    EM runs in float64. Attributes have the dtype of X. Up to 4,096 rows are evaluated by scikit-learn's methods.
    ``weights_``, ``means_`` and ``covariances_`` may be set by hand, to match ``n_components`` and ``covariance_type``.

    Example:
        >>> X = np.array([[-2.0], [-1.9], [-2.1], [3.0], [3.1], [2.9]])
        >>> fit = GaussianMixture(n_components=2, random_state=0).fit(X)
        >>> sorted(fit.means_.round(3).ravel().tolist())
        [-2.0, 3.0]
        >>> len(set(fit.predict(X)[:3])), len(set(fit.predict(X)))
        (1, 2)
    """

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> GaussianMixture:
        """Fit the mixture to rows X (N, D) with weights ``sample_weight`` (N,).

        Raises:
            ValueError: an argument is out of range, there are fewer rows than components, or a covariance
                is not positive definite, which is possible if ``reg_covar`` is 0 or negligible.
        """
        for name in _START_ARGUMENTS:
            if getattr(self, name) is not None:
                check_array(getattr(self, name), ensure_2d=False, allow_nd=True, input_name=name)
        for name, least in (("n_components", 1), ("max_iter", 0), ("n_init", 1)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        original, to_library = X, _library_of(X)
        X = validate_data(self, _to_numpy(X), dtype=[np.float64, np.float32], order="C")
        row_weights = None if sample_weight is None else _relative_weights(sample_weight, len(X))
        random = check_random_state(self.random_state)
        resumes = self.warm_start and hasattr(self, "converged_")
        if resumes and (change := self._changed(X.shape[1])):
            warnings.warn(f"warm_start=True has no effect, a new mixture is fitted: {change}", stacklevel=2)
            del self.converged_  # type: ignore[has-type]
            resumes = False
        if resumes:  # scikit-learn starts from precisions_cholesky_: compute it, as covariances_ may be set by hand
            self._set_attributes(self._mixture(), to_library, X.dtype)
        if len(X) <= _SMALL_ROWS and X.dtype == np.float64 and row_weights is None:
            super().fit_predict(original)
            return self._remember()
        starts = [self._mixture()] if resumes else (self._start(X, row_weights, random) for _ in range(self.n_init))
        previous = self.lower_bound_ if resumes else None  # type: ignore[has-type]
        options: Any = {"max_iters": self.max_iter, "tol": self.tol, "floor": self.reg_covar, "report": self._report}
        fits = []
        for number, start in enumerate(starts):
            if self.verbose:
                print(f"Initialization {number}")
            fits.append(fit_blocks(lambda: _blocks(X, row_weights), start, previous=previous, **options))
        best = max(fits, key=lambda fit: fit.log_likelihoods[-1:])  # a list, which is empty for max_iter=0
        self._check_covariances(best.mixture)
        if not best.converged and self.max_iter > 0:
            as_sklearn = "Best performing initialization did not converge. Try different init parameters, or increase "
            warnings.warn(as_sklearn + "max_iter, tol, or check for degenerate data.", ConvergenceWarning, stacklevel=2)
        self._set_attributes(best.mixture, to_library, X.dtype)
        self.converged_, self.n_iter_ = best.converged, len(best.log_likelihoods)
        self.lower_bounds_ = best.log_likelihoods
        self.lower_bound_ = best.log_likelihoods[-1] if best.log_likelihoods else -np.inf
        return self._remember()

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Fit, and return the component of each row."""
        return self.fit(X, y, sample_weight).predict(X)

    def score_samples(self, X: Any) -> Any:
        """Return the log-density (N,) of rows."""
        return self._evaluate(X, "score_samples", lambda mixture, block: mixture.log_prob(block))

    def predict_proba(self, X: Any) -> Any:
        """Return the responsibilities (N, K)."""
        return self._evaluate(X, "predict_proba", lambda mixture, block: mixture.posterior(block).responsibilities)

    def predict(self, X: Any) -> Any:
        """Return the component with the largest responsibility, (N,)."""
        return self._evaluate(X, "predict", lambda mixture, block: mixture.log_joint(block).argmax(-1))

    def sample(self, n_samples: int = 1) -> tuple[Any, Any]:
        """Draw rows (n, D) from the mixture; return them and their components (n,), sorted by component."""
        mixture, to_library = self._mixture(), _library_of(self.means_)
        if not isinstance(n_samples, Integral) or n_samples < 1:
            raise ValueError(f"Invalid value for 'n_samples': {n_samples!r} must be an integer of at least 1")
        random = check_random_state(self.random_state)
        weights, means = mixture.weights[0].numpy(), mixture.means[0].numpy()
        labels = np.repeat(np.arange(len(means)), random.multinomial(n_samples, weights / weights.sum()))
        scale = COVARIANCES["full"].factorize(mixture.full().covariances).scale[0].numpy()
        rows = means[labels] + (scale[labels] @ random.standard_normal((n_samples, means.shape[1], 1)))[..., 0]
        return to_library(rows), to_library(labels)

    def _start(self, X: np.ndarray, row_weights: np.ndarray | None, random: np.random.RandomState) -> Mixture:
        """Return the mixture from which scikit-learn's EM starts."""
        if len(X) > _SAMPLE_ROWS or row_weights is not None:
            X = _draw(X, row_weights, random)
        start = sklearn_mixture.GaussianMixture(**self.get_params())
        start.set_params(max_iter=0, n_init=1, warm_start=False, verbose=0, random_state=random)
        start.set_params(**{name: _to_numpy(getattr(self, name)) for name in _START_ARGUMENTS})
        start.covariances_ = None  # scikit-learn reads it, but does not set it if precisions_init is given
        start.fit(X)
        if self.precisions_init is None:
            return self._of_arrays(start.weights_, start.means_, start.covariances_)
        inverse = self._of_arrays(start.weights_, start.means_, start.precisions_)  # precisions in place of covariances
        covariances = COVARIANCES[self.covariance_type].precisions(inverse.covariances)  # inverses of the precisions
        return Mixture(inverse.log_weights, inverse.means, covariances)

    def _check_covariances(self, mixture: Mixture) -> None:
        """Raise ValueError if a covariance is singular up to round-off, in any units of the columns."""
        variance, covariances = mixture.variance[0], mixture.full().covariances[0]
        if self.reg_covar > 1e-30 * variance.max():  # standard deviations are above 1e-15 of the largest one
            return
        correlations = covariances / (variance.unsqueeze(-1) * variance).sqrt().clamp(min=1e-300)  # avoids 0 / 0
        # Of 1,800 singular matrices of correlations with 2 to 50 columns, round-off left eigenvalues of up to 8e-15.
        if variance.min() <= 0 or torch.linalg.eigvalsh(correlations).min() < 1e-14:
            raise ValueError(
                f"reg_covar={self.reg_covar} leaves components with ill-defined covariances, such as those of equal "
                "rows; increase reg_covar, decrease n_components, or remove constant columns"
            )

    def _report(self, iteration: int, log_likelihood: float) -> None:
        if self.verbose and iteration % self.verbose_interval == 0:
            print(f"  Iteration {iteration}: log-likelihood {log_likelihood:.5f} per row")

    def _set_attributes(self, mixture: Mixture, to_library: Callable[[np.ndarray], Any], dtype: np.dtype) -> None:
        covariance, weights, covariances = COVARIANCES[self.covariance_type], mixture.weights[0], mixture.covariances
        parts = [weights / weights.sum(), mixture.means[0]]
        for matrices in (covariances, covariance.precisions(covariances), covariance.precision_factors(covariances)):
            parts.append(matrices[(0,) * covariance.sklearn_axes])  # scikit-learn lacks these axes, of length 1
        self.weights_, self.means_, self.covariances_, self.precisions_, self.precisions_cholesky_ = (
            to_library(part.numpy().astype(dtype)) for part in parts
        )

    def _remember(self) -> GaussianMixture:
        """Keep what shows later whether parameters or attributes were changed by hand."""
        self._fitted_type = self.covariance_type
        self._fitted_covariances = self._mixture().covariances
        self._fitted_factors = COVARIANCES[self.covariance_type].precision_factors(self._fitted_covariances)
        return self

    def _changed(self, num_features: int) -> str:
        """Return how the parameters differ from those of the fitted mixture; an empty string if they do not."""
        fitted_components, fitted_features = np.shape(self.means_)
        pairs = {
            "n_components": (self.n_components, fitted_components),
            "covariance_type": (self.covariance_type, getattr(self, "_fitted_type", self.covariance_type)),
            "n_features": (num_features, fitted_features),
        }
        differences = (f"{name}={now!r}, was {then!r}" for name, (now, then) in pairs.items() if now != then)
        return "; ".join(differences)

    def _mixture(self) -> Mixture:
        """Return the mixture given by the fitted attributes."""
        check_is_fitted(self)
        if change := self._changed(np.shape(self.means_)[-1]):
            raise ValueError(f"the fitted mixture does not have the parameters of the estimator; call fit: {change}")
        return self._of_arrays(self.weights_, self.means_, self.covariances_)

    def _of_arrays(self, *arrays: Any) -> Mixture:
        """Return the mixture with weights, means and covariances in scikit-learn's layout."""
        weights, means, covariances = (torch.from_numpy(np.array(_to_numpy(part), dtype=np.float64)) for part in arrays)
        axes = (None,) * COVARIANCES[self.covariance_type].sklearn_axes  # leading axes that scikit-learn's layout lacks
        return Mixture(weights.log()[None], means[None], covariances[axes])

    def _evaluate(self, X: Any, method: str, function: Callable[[Mixture, Tensor], Tensor]) -> Any:
        """Call scikit-learn's method for a small table, or a function of the mixture and each block of rows."""
        mixture, to_library = self._mixture(), _library_of(X)
        small = isinstance(X, np.ndarray) and X.dtype == np.float64 and len(X) <= _SMALL_ROWS
        # The method of scikit-learn below validates small tables too, and validation takes as long as their evaluation.
        if not small or X.shape[1:] != mixture.means.shape[2:] or hasattr(self, "feature_names_in_"):
            X = validate_data(self, _to_numpy(X), dtype=[np.float64, np.float32], order="C", reset=False)
        if len(X) > _SMALL_ROWS:
            return to_library(np.concatenate([function(mixture, block[None])[0].numpy() for block, _ in _blocks(X)]))
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # log of a weight of 0, distant rows
            values = getattr(self._sklearn_estimator(mixture), method)(X - mixture.mean.numpy())
        return to_library(values if method == "predict" else values.astype(X.dtype))

    def _sklearn_estimator(self, mixture: Mixture) -> sklearn_mixture.GaussianMixture:
        """Return scikit-learn's estimator of the mixture shifted to mean 0, as scikit-learn is inexact far from 0."""
        covariance, fitted = COVARIANCES[self.covariance_type], getattr(self, "_fitted_covariances", None)
        if fitted is not None and torch.equal(mixture.covariances, fitted):
            factors = self._fitted_factors
        else:  # set by hand
            factors = covariance.precision_factors(mixture.covariances)
        estimator = sklearn_mixture.GaussianMixture(mixture.components, covariance_type=self.covariance_type)
        estimator.weights_, estimator.means_ = mixture.weights[0].numpy(), (mixture.means - mixture.mean)[0].numpy()
        estimator.precisions_cholesky_ = factors[(0,) * covariance.sklearn_axes].numpy()
        return estimator


def _relative_weights(sample_weight: Any, num_rows: int) -> np.ndarray:
    """Return the weights divided by the largest; raise ValueError if they are invalid."""
    weights = np.asarray(_to_numpy(sample_weight), dtype=np.float64)
    if weights.shape != (num_rows,) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(
            f"sample_weight of shape {weights.shape} must be ({num_rows},), finite, not negative and not all zero, got "
            f"{weights.min()} to {weights.max()}; subtract the largest log-weight if they are exp() of log-weights"
        )
    return weights / weights.max()


def _draw(X: np.ndarray, row_weights: np.ndarray | None, random: np.random.RandomState) -> np.ndarray:
    """Draw ``_SAMPLE_ROWS`` rows in proportion to their weights by stratified sampling."""
    ends = np.cumsum(np.ones(len(X)) if row_weights is None else row_weights)
    positions = (np.arange(_SAMPLE_ROWS) + random.random_sample(_SAMPLE_ROWS)) * (ends[-1] / _SAMPLE_ROWS)
    return X[np.searchsorted(ends, positions, side="right").clip(max=len(X) - 1)]


def _blocks(X: np.ndarray, row_weights: np.ndarray | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(X), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        # torch.from_numpy warns about arrays that are not writeable.
        block = torch.from_numpy(X[rows] if X.flags.writeable else X[rows].copy())
        yield block, None if row_weights is None else torch.from_numpy(row_weights[rows].astype(X.dtype))


def _dispatched(X: Any) -> bool:
    """Return whether results must be converted to the array library of X."""
    return sklearn.get_config()["array_api_dispatch"] and hasattr(X, "__dlpack__") and not isinstance(X, np.ndarray)


def _to_numpy(X: Any) -> Any:
    return torch.from_dlpack(X).cpu().numpy() if _dispatched(X) else X


def _library_of(X: Any) -> Callable[[np.ndarray], Any]:
    """Return the function that turns NumPy arrays into arrays of the library and on the device of X."""
    if not _dispatched(X):
        return lambda array: array
    library = torch if isinstance(X, Tensor) else X.__array_namespace__()
    return lambda array: library.asarray(array, device=X.device)
