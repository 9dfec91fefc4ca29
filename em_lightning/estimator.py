"""GaussianMixture: a scikit-learn estimator for mixtures of large tables; this module requires scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn import mixture as reference
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from em_lightning.mixture import COVARIANCES, BlockFit, Mixture, fit_blocks

_SMALL = 2**12  # number of rows up to which scikit-learn is faster than the code here
_SAMPLE = 2**14  # rows from which a start is computed; of 200,000 rows, 2^16 take 1 s more and give no better fit
_ROWS = 2**16  # rows per block; with larger blocks two ranks are slower, see docs/results/gaussian_mixture.md
_GIVEN = ("weights_init", "means_init", "precisions_init")  # arguments that may give a start


class GaussianMixture(reference.GaussianMixture):
    r"""Fit :math:`p(x) = \sum_k \pi_k N(x | \mu_k, \Sigma_k)` by EM, as ``sklearn.mixture.GaussianMixture`` does.

    Parameters, attributes, methods and results are those of scikit-learn's class. In addition:

    - Rows are read in blocks and responsibilities are not stored, so X may be a memory-mapped array.
    - :meth:`fit` accepts weights of the rows. A common factor of the weights has no effect.

    Starts are computed from all rows or, with weights or more than 16,384 rows, from 16,384 rows drawn in proportion to
    their weights. Up to 4,096 unweighted float64 rows are fitted by scikit-learn's EM, which is faster for them, and up
    to 4,096 rows are evaluated by its methods. Otherwise EM runs in float64, and the attributes have the dtype of X.
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
        for name in _GIVEN:
            if getattr(self, name) is not None:
                check_array(getattr(self, name), ensure_2d=False, allow_nd=True, input_name=name)
        for name, least in (("n_components", 1), ("max_iter", 0), ("n_init", 1)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        original, to_library = X, _library_of(X)
        X = validate_data(self, _to_numpy(X), dtype=[np.float64, np.float32], order="C")
        counts = None if sample_weight is None else _counts(sample_weight, len(X))
        random = check_random_state(self.random_state)
        again = self.warm_start and hasattr(self, "converged_")
        if again and (change := self._changed(X.shape[1])):
            warnings.warn(f"warm_start=True has no effect, a new mixture is fitted: {change}", stacklevel=2)
            del self.converged_  # type: ignore[has-type]
            again = False
        if again:  # include attributes that were set by hand
            self._set_attributes(self._mixture(), lambda part: to_library(part.numpy().astype(X.dtype)))
        if len(X) <= _SMALL and X.dtype == np.float64 and counts is None:
            super().fit_predict(original)
            return self._remember()
        starts = [self._mixture()] if again else (self._start(X, counts, random) for _ in range(self.n_init))
        before = self.lower_bound_ if again else None  # type: ignore[has-type]
        fits = (self._iterate(X, counts, start, before, number) for number, start in enumerate(starts))
        best = max(fits, key=lambda fit: fit.log_likelihoods[-1:])  # a list, which is empty for max_iter=0
        self._check(best.mixture)
        if not best.converged and self.max_iter > 0:
            warnings.warn(
                "Best performing initialization did not converge. Try different init parameters, or increase max_iter, "
                "tol, or check for degenerate data.",
                ConvergenceWarning,
                stacklevel=2,
            )
        self._set_attributes(best.mixture, lambda part: to_library(part.numpy().astype(X.dtype)))
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

    def _start(self, X: np.ndarray, counts: np.ndarray | None, random: np.random.RandomState) -> Mixture:
        """Return the mixture from which scikit-learn's EM starts."""
        if len(X) > _SAMPLE or counts is not None:
            X = _draw(X, counts, random)
        start = reference.GaussianMixture(**self.get_params())
        start.set_params(max_iter=0, n_init=1, warm_start=False, verbose=0, random_state=random)
        start.set_params(**{name: _to_numpy(getattr(self, name)) for name in _GIVEN})
        start.covariances_ = None  # scikit-learn reads it, but does not set it if precisions_init is given
        start.fit(X)
        if self.precisions_init is None:
            return self._of_arrays(start.weights_, start.means_, start.covariances_)
        inverse = self._of_arrays(start.weights_, start.means_, start.precisions_)  # precisions in place of covariances
        covariances = COVARIANCES[self.covariance_type].precisions(inverse.covariances)
        return Mixture(inverse.log_weights, inverse.means, covariances)

    def _check(self, mixture: Mixture) -> None:
        """Raise ValueError if a covariance is singular up to round-off, in any units of the columns."""
        variance, covariances = mixture.variance[0], mixture.full().covariances[0]
        if self.reg_covar > 1e-30 * variance.max():  # relative standard deviations of 1e-15, the precision of float64
            return
        correlations = covariances / (variance.unsqueeze(-1) * variance).sqrt().clamp(min=1e-300)  # avoids 0 / 0
        if variance.min() <= 0 or torch.linalg.eigvalsh(correlations).min() < 1e-14:  # their round-off
            raise ValueError(
                f"reg_covar={self.reg_covar} leaves components with ill-defined covariances, such as those of equal "
                "rows; increase reg_covar, decrease n_components, or remove constant columns"
            )

    def _iterate(
        self, X: np.ndarray, counts: np.ndarray | None, start: Mixture, before: float | None, number: int
    ) -> BlockFit:
        """Run EM from a start; ``before`` is the log-likelihood per row of the last iteration of an earlier fit."""

        def report(iteration: int, log_likelihood: float) -> None:
            if self.verbose and iteration % self.verbose_interval == 0:
                print(f"  Iteration {iteration}: log-likelihood {log_likelihood:.5f} per row")

        if self.verbose:
            print(f"Initialization {number}")
        options: dict[str, Any] = {"max_iters": self.max_iter, "tol": self.tol, "floor": self.reg_covar}
        return fit_blocks(lambda: _blocks(X, counts), start, previous=before, report=report, **options)

    def _set_attributes(self, mixture: Mixture, convert: Callable[[Tensor], Any]) -> None:
        covariance = COVARIANCES[self.covariance_type]
        weights = mixture.weights[0]
        self.weights_, self.means_ = convert(weights / weights.sum()), convert(mixture.means[0])
        self.covariances_, self.precisions_, self.precisions_cholesky_ = (
            convert(function(mixture.covariances)[(0,) * covariance.sklearn_axes])
            for function in (lambda part: part, covariance.precisions, covariance.precision_factors)
        )

    def _remember(self) -> GaussianMixture:
        """Keep what shows later whether parameters or attributes were changed by hand."""
        self._fitted_type = self.covariance_type
        self._fitted_covariances = self._mixture().covariances
        self._fitted_factors = COVARIANCES[self.covariance_type].precision_factors(self._fitted_covariances)
        return self

    def _changed(self, num_features: int) -> str:
        """Return how the parameters differ from those of the fitted mixture; an empty string if they do not."""
        components, features = np.shape(self.means_)
        pairs = {
            "n_components": (self.n_components, components),
            "covariance_type": (self.covariance_type, getattr(self, "_fitted_type", self.covariance_type)),
            "n_features": (num_features, features),
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
        axes = (None,) * COVARIANCES[self.covariance_type].sklearn_axes
        return Mixture(weights.log()[None], means[None], covariances[axes])

    def _evaluate(self, X: Any, method: str, function: Callable[[Mixture, Tensor], Tensor]) -> Any:
        """Call scikit-learn's method for a small table, or a function of the mixture and each block of rows."""
        mixture, to_library = self._mixture(), _library_of(X)
        small_rows = isinstance(X, np.ndarray) and X.dtype == np.float64 and len(X) <= _SMALL
        # The method below validates rows too, which takes as long as the evaluation of a small table.
        if not small_rows or X.shape[1:] != mixture.means.shape[2:] or hasattr(self, "feature_names_in_"):
            X = validate_data(self, _to_numpy(X), dtype=[np.float64, np.float32], order="C", reset=False)
        if len(X) > _SMALL:
            return to_library(np.concatenate([function(mixture, block[None])[0].numpy() for block, _ in _blocks(X)]))
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # weights of 0, distant rows
            values = getattr(self._small(mixture), method)(X - mixture.mean.numpy())
        return to_library(values if method == "predict" else values.astype(X.dtype))

    def _small(self, mixture: Mixture) -> reference.GaussianMixture:
        """Return scikit-learn's estimator of the mixture shifted to mean 0: its expanded squares cancel far from 0."""
        covariance, fitted = COVARIANCES[self.covariance_type], getattr(self, "_fitted_covariances", None)
        if fitted is not None and torch.equal(mixture.covariances, fitted):
            factors = self._fitted_factors
        else:  # set by hand
            factors = covariance.precision_factors(mixture.covariances)
        small = reference.GaussianMixture(mixture.components, covariance_type=self.covariance_type)
        small.weights_, small.means_ = mixture.weights[0].numpy(), (mixture.means - mixture.mean)[0].numpy()
        small.precisions_cholesky_ = factors[(0,) * covariance.sklearn_axes].numpy()
        return small


def _counts(sample_weight: Any, num_rows: int) -> np.ndarray:
    """Return the weights divided by the largest; raise ValueError if they are invalid."""
    counts = np.asarray(_to_numpy(sample_weight), dtype=np.float64)
    if counts.shape != (num_rows,) or not np.isfinite(counts).all() or (counts < 0).any() or not counts.any():
        raise ValueError(
            f"sample_weight of shape {counts.shape} must be ({num_rows},), finite, not negative and not all zero, got "
            f"{counts.min()} to {counts.max()}; subtract the largest of log-weights before exp()"
        )
    return counts / counts.max()


def _draw(X: np.ndarray, counts: np.ndarray | None, random: np.random.RandomState) -> np.ndarray:
    """Draw ``_SAMPLE`` rows in proportion to their weights by stratified sampling."""
    ends = np.cumsum(np.ones(len(X)) if counts is None else counts)
    positions = (np.arange(_SAMPLE) + random.random_sample(_SAMPLE)) * (ends[-1] / _SAMPLE)
    return X[np.searchsorted(ends, positions, side="right").clip(max=len(X) - 1)]


def _blocks(X: np.ndarray, counts: np.ndarray | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(X), _ROWS):
        rows = slice(start, start + _ROWS)
        # torch.from_numpy warns about arrays that are not writeable.
        block = X[rows] if X.flags.writeable else X[rows].copy()
        yield torch.from_numpy(block), None if counts is None else torch.from_numpy(counts[rows].astype(X.dtype))


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
