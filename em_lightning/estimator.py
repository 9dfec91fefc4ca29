"""GaussianMixture: a scikit-learn estimator for mixtures of large tables; this module imports scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from em_lightning.mixture import COVARIANCES, Covariance, Mixture, fit_blocks, information_criteria
from em_lightning.operators import EMOperator

_STARTS = {"k-means++": "kmeans++", "farthest": "farthest", "random_from_data": "random"}
_SAMPLE = 2**14
_ROWS = 2**16


class GaussianMixture(DensityMixin, BaseEstimator):
    r"""Fit :math:`p(x) = \sum_k \pi_k N(x | \mu_k, \Sigma_k)` by EM, as ``sklearn.mixture.GaussianMixture`` does.

    Parameters, attributes and results are those of scikit-learn's class: the same initialization gives the same mixture
    after the same number of iterations. Rows are read in blocks and responsibilities are not stored, so X may be a
    memory-mapped array. Rows may have weights.

    Args:
        n_components: K.
        covariance_type: ``"full"``, ``"tied"``, ``"diag"`` or ``"spherical"``.
        tol: EM stops when the log-likelihood per row changes by less.
        reg_covar: added to every variance.
        max_iter: largest number of iterations.
        n_init: number of initializations; the fit of the highest ``lower_bound_`` is kept.
        init_params: initialization of the centers: ``"k-means++"``, ``"random_from_data"``, or the deterministic
            ``"farthest"``.
        weights_init: (K,), initial weights; whichever of the three initial values is missing is drawn.
        means_init: (K, D), initial means.
        precisions_init: initial inverse covariances, in scikit-learn's shape.
        random_state: of the initialization and of :meth:`sample`.
        warm_start: whether a further :meth:`fit` starts from the mixture of the last one.

    Attributes:
        weights_: (K,).
        means_: (K, D).
        covariances_: full (K, D, D), tied (D, D), diagonal (K, D), spherical (K,).
        precisions_: inverse covariances, of the same shape.
        precisions_cholesky_: their factors :math:`U` with :math:`U U^T = \Sigma^{-1}`, of the same shape.
        converged_: whether ``tol`` was reached.
        n_iter_: number of iterations.
        lower_bound_: log-likelihood per row before the last M-step.

    Example:
        >>> X = np.array([[-2.0], [-1.9], [-2.1], [3.0], [3.1], [2.9]])
        >>> fit = GaussianMixture(n_components=2, random_state=0).fit(X)
        >>> sorted(fit.means_.round(3).ravel().tolist())
        [-2.0, 3.0]
        >>> len(set(fit.predict(X)[:3])), len(set(fit.predict(X)))
        (1, 2)
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "full",
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: str = "k-means++",
        weights_init: Any = None,
        means_init: Any = None,
        precisions_init: Any = None,
        random_state: Any = None,
        warm_start: bool = False,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.random_state = random_state
        self.warm_start = warm_start

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> GaussianMixture:
        """Fit the mixture to rows X (N, D) with weights ``sample_weight`` (N,).

        Raises:
            ValueError: an argument is out of range, or there are fewer rows than components.
        """
        self._check()
        X = validate_data(self, X, dtype=[np.float64, np.float32], order="C", ensure_min_samples=2)
        if len(X) < self.n_components:
            raise ValueError(f"n_samples={len(X)} must be at least n_components={self.n_components}")
        counts = None if sample_weight is None else _counts(sample_weight, len(X))
        random = check_random_state(self.random_state)
        again = self.warm_start and hasattr(self, "means_")
        drawn = self.init_params != "farthest" and any(
            part is None for part in (self.weights_init, self.means_init, self.precisions_init)
        )
        count = self.n_init if drawn else 1  # deterministic initializations are equal
        starts = [self._mixture] if again else (self._start(X, counts, random) for _ in range(count))
        fits = (
            fit_blocks(lambda: _blocks(X, counts), start, max_iters=self.max_iter, tol=self.tol, floor=self.reg_covar)
            for start in starts
        )
        fit = max(fits, key=lambda each: each.log_likelihoods[-1])
        if not fit.converged and self.tol > 0:
            warnings.warn(
                f"EM did not converge in max_iter={self.max_iter} iterations; increase max_iter or tol={self.tol}",
                ConvergenceWarning,
                stacklevel=2,
            )
        mixture, covariance = fit.mixture, self._covariance
        weights = mixture.weights[0].numpy()
        self.weights_, self.means_ = weights / weights.sum(), mixture.means[0].numpy()
        self.covariances_ = covariance.to_sklearn(mixture.covariances).numpy()
        self.precisions_ = covariance.to_sklearn(covariance.precisions(mixture.covariances)).numpy()
        self.precisions_cholesky_ = covariance.to_sklearn(covariance.precision_factors(mixture.covariances)).numpy()
        self.converged_, self.n_iter_ = fit.converged, len(fit.log_likelihoods)
        self.lower_bound_ = fit.log_likelihoods[-1]
        return self

    @property
    def _covariance(self) -> Covariance:
        return COVARIANCES[self.covariance_type]

    def _check(self) -> None:
        for name, value in (("n_components", self.n_components), ("max_iter", self.max_iter), ("n_init", self.n_init)):
            if not value >= 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name, number in (("tol", self.tol), ("reg_covar", self.reg_covar)):
            if not number >= 0:
                raise ValueError(f"{name}={number} must be at least 0")
        for name, choice, known in (
            ("covariance_type", self.covariance_type, list(COVARIANCES)),
            ("init_params", self.init_params, list(_STARTS)),
        ):
            if choice not in known:
                raise ValueError(f"{name}={choice!r} must be one of {', '.join(known)}")

    def _start(self, X: np.ndarray, counts: np.ndarray | None, random: np.random.RandomState) -> Mixture:
        given = self._given(X.shape[1])
        weights, means, covariances = given
        if weights is not None and means is not None and covariances is not None:
            return Mixture(weights, means, covariances)
        rows = np.sort(random.choice(len(X), _SAMPLE, replace=False)) if len(X) > _SAMPLE else slice(None)
        init = _STARTS[self.init_params]
        seed = int(random.randint(2**31 - 1))
        operator = EMOperator(
            self.n_components,
            X.shape[1],
            covariance=self.covariance_type,
            init=init,
            seed=None if init == "farthest" else seed,
            covariance_floor=self.reg_covar,
            residual=False,
        )
        chosen = None if counts is None else torch.from_numpy(counts[rows].astype(np.float64))[None]
        drawn = operator(torch.from_numpy(X[rows].astype(np.float64))[None], weights=chosen, num_iters=0)
        own = drawn.parameters()
        return Mixture(*(one if part is None else part for part, one in zip(given, own, strict=True)))

    def _given(self, num_features: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the given initial log-weights, means and covariances, in the shapes of a mixture."""
        K, D, covariance = self.n_components, num_features, self._covariance
        layout = covariance.to_sklearn(torch.empty(1, *covariance.shape(K, D))).shape
        parts = []
        for name, value, shape in (
            ("weights_init", self.weights_init, (K,)),
            ("means_init", self.means_init, (K, D)),
            ("precisions_init", self.precisions_init, layout),
        ):
            part = None if value is None else torch.as_tensor(np.asarray(value), dtype=torch.float64)
            if part is not None and part.shape != shape:
                raise ValueError(f"{name} has shape {tuple(part.shape)} but must have {tuple(shape)}")
            if part is not None and not part.isfinite().all():
                raise ValueError(f"{name} must be finite, but contains NaN or infinity")
            parts.append(part)
        weights, means, precisions = parts
        if weights is not None and not ((weights >= 0).all() and abs(weights.sum() - 1.0) < 1e-6):
            raise ValueError(f"weights_init={self.weights_init} must be non-negative and sum to 1")
        if precisions is not None:
            precisions = covariance.from_sklearn(precisions)
            full = covariance.to_full(precisions, torch.empty(1, K, D))
            if torch.linalg.cholesky_ex(full).info.any() or not torch.allclose(full, full.mT):
                raise ValueError(f"precisions_init={self.precisions_init} must be symmetric and positive definite")
        return (
            None if weights is None else weights.log()[None],
            None if means is None else means[None],
            None if precisions is None else covariance.precisions(precisions),
        )

    @property
    def _mixture(self) -> Mixture:
        check_is_fitted(self)
        covariances = self._covariance.from_sklearn(torch.from_numpy(self.covariances_))
        return Mixture(torch.from_numpy(self.weights_).log()[None], torch.from_numpy(self.means_)[None], covariances)

    def _read(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return validate_data(self, X, dtype=[np.float64, np.float32], order="C", reset=False)

    def score_samples(self, X: Any) -> np.ndarray:
        """Return the log-density (N,) of rows."""
        X, mixture = self._read(X), self._mixture
        return np.concatenate([mixture.log_prob(block[None])[0].numpy() for block, _ in _blocks(X)])

    def score(self, X: Any, y: Any = None) -> float:
        """Return the mean log-density of rows."""
        return float(self.score_samples(X).mean(dtype=np.float64))

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the responsibilities (N, K)."""
        X, mixture = self._read(X), self._mixture
        return np.concatenate([mixture.posterior(block[None]).responsibilities[0].numpy() for block, _ in _blocks(X)])

    def predict(self, X: Any) -> np.ndarray:
        """Return the component with the largest responsibility, (N,)."""
        X, mixture = self._read(X), self._mixture
        return np.concatenate([mixture.log_joint(block[None])[0].argmax(-1).numpy() for block, _ in _blocks(X)])

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> np.ndarray:
        """Fit, and return the component of each row."""
        return self.fit(X, y, sample_weight).predict(X)

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draw rows (n, D) from the mixture; return them and their components (n,), sorted by component."""
        check_is_fitted(self)
        if n_samples < 1:
            raise ValueError(f"n_samples={n_samples} must be at least 1")
        random = check_random_state(self.random_state)
        labels = np.repeat(np.arange(self.n_components), random.multinomial(n_samples, self.weights_))
        full = self._mixture.full()
        scale = COVARIANCES["full"].factorize(full.covariances).scale[0].numpy()
        noise = random.standard_normal((n_samples, self.means_.shape[1]))
        noise = (scale[labels] @ noise[..., None])[..., 0]
        return self.means_[labels] + noise, labels

    def bic(self, X: Any) -> float:
        """Return the Bayesian information criterion of the mixture on rows; lower is better."""
        return information_criteria(self._mixture, self.score(X) * len(X), len(X)).bic

    def aic(self, X: Any) -> float:
        """Return Akaike's information criterion of the mixture on rows; lower is better."""
        return information_criteria(self._mixture, self.score(X) * len(X), len(X)).aic


def _counts(sample_weight: Any, num_rows: int) -> np.ndarray:
    counts = np.asarray(sample_weight, dtype=np.float64)
    if counts.shape != (num_rows,) or not np.isfinite(counts).all() or (counts < 0).any() or not counts.any():
        raise ValueError(
            f"sample_weight of shape {counts.shape} must be ({num_rows},), finite, not negative and not all zero"
        )
    return counts


def _blocks(X: np.ndarray, counts: np.ndarray | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(X), _ROWS):
        rows = slice(start, start + _ROWS)
        # torch.from_numpy warns about arrays that are not writeable.
        block = X[rows] if X.flags.writeable else X[rows].copy()
        yield torch.from_numpy(block), None if counts is None else torch.from_numpy(counts[rows].astype(X.dtype))
