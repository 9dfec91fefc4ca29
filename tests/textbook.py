r"""EM for one point set as a textbook writes it: dense covariances, differences written out, no blocks, no shortcuts.

Everything is plain torch in float64, so that autograd through these functions is the reference for gradients, too.

    for _ in range(steps):
        parameters = em_step(x, parameters)

Source: Bishop, Pattern Recognition and Machine Learning, 2006, section 9.2; Fraley and Raftery, Bayesian Regularization
for Normal Mixture Estimation and Model-Based Clustering, 2007, for the prior; Kent and Tyler, Redescending M-estimates
of multivariate location and scatter, 1991, for the robust kernels.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from helpers import as_type, full_covariances
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from em_lightning import Mixture


class Parameters(NamedTuple):
    """Weights (K,), means (K, D) and dense covariances (K, D, D) of one mixture."""

    weights: Tensor
    means: Tensor
    covariances: Tensor


def parameters_of(mixture, b=0):
    """Return the parameters of set b of a batch of mixtures."""
    return Parameters(mixture.log_weights[b].exp(), mixture.means[b], full_covariances(mixture)[b])


def mixture_of(parameters, covariance_type):
    """Return a batch of one mixture."""
    weights, means, covariances = parameters
    return Mixture(weights.log()[None], means[None], as_type(covariances[None], covariance_type))


# Kernels: the energy rho of a squared Mahalanobis distance y, and its IRLS weight u = 2 d rho / dy.

ROBUST = {
    "t": {"name": "student_t", "df": 3.0, "density": True},
    "scaled t": {"name": "student_t", "df": 5.0, "scale": 2.0, "density": True},
    "laplace": {"name": "laplace"},
    "scaled laplace": {"name": "laplace", "scale": 0.5},
    "huber": {"name": "huber", "delta": 1.5},
    "pseudo_huber": {"name": "pseudo_huber", "delta": 0.7},
}


def energy(kernel, y, features):
    """Return rho(y) of a kernel with the arguments of ``KERNELS.build``."""
    name, scale, df, delta = _arguments(kernel)
    if name == "student_t":
        return 0.5 * (df + features) * (y / (df * scale**2)).log1p()
    if name == "laplace":
        return y.sqrt() / scale
    if name == "huber":
        return torch.where(y <= delta**2, 0.5 * y, delta * (y.sqrt() - 0.5 * delta))
    if name == "pseudo_huber":
        return delta**2 * ((1 + y / delta**2).sqrt() - 1)
    return 0.5 * y


def irls_weight(kernel, y, features):
    """Return u(y) = 2 rho'(y)."""
    name, scale, df, delta = _arguments(kernel)
    if name == "student_t":
        return (df + features) / (df * scale**2 + y)
    if name == "laplace":
        return 1 / (y.sqrt() * scale)
    if name == "huber":
        return (delta / y.sqrt()).clamp(max=1.0)
    if name == "pseudo_huber":
        return 1 / (1 + y / delta**2).sqrt()
    return torch.ones_like(y)


def _arguments(kernel):
    kernel = {"name": kernel} if isinstance(kernel, str) else kernel
    return kernel["name"], kernel.get("scale", 1.0), kernel.get("df", 1.0), kernel.get("delta", 1.0)


def log_normalizer(rho, features):
    """Return the logarithm of the integral of exp(-rho(|x|^2)) over space, by the trapezoidal rule over log |x|."""
    log_area = math.log(2) + 0.5 * features * math.log(math.pi) - math.lgamma(0.5 * features)
    log_radius = torch.linspace(-16, 18, 400_001, dtype=torch.float64)
    log_shells = log_area + features * log_radius - rho((2 * log_radius).exp())
    return torch.trapezoid(log_shells.exp(), log_radius).log()


# EM


def squared_distances(x, means, covariances):
    """Return (x_n - mu_k)^T Sigma_k^-1 (x_n - mu_k), as (N, K)."""
    offsets = x.unsqueeze(1) - means
    return torch.einsum("nki,kij,nkj->nk", offsets, torch.linalg.inv(covariances), offsets)


def log_joint(x, parameters, kernel="gaussian"):
    """Return log pi_k + log p(x_n | k) of points (N, D), as (N, K)."""
    weights, means, covariances = parameters
    features = x.shape[-1]
    y = squared_distances(x, means, covariances)
    if kernel == "gaussian":
        constant = 0.5 * features * math.log(2 * math.pi)
    else:
        constant = log_normalizer(lambda squares: energy(kernel, squares, features), features)
    return weights.log() - 0.5 * torch.logdet(covariances) - energy(kernel, y, features) - constant


def log_prob(x, parameters, kernel="gaussian"):
    """Return log p(x_n), as (N,)."""
    return log_joint(x, parameters, kernel).logsumexp(-1)


class Prior(NamedTuple):
    """Pseudo-counts and what they count: alpha - 1 of the weights, kappa at mean (D,), s at a diagonal (D,)."""

    weight: float
    mean_strength: float
    mean: Tensor
    covariance_strength: float
    covariance: Tensor


def prior_of(arguments, x, counts, components):
    """Return the prior that ``MixturePrior(**arguments)`` means for points (N, D) with counts (N,)."""
    share = counts / counts.sum()
    center = share @ x
    variance = share @ (x - center) ** 2
    covariance = arguments.get("covariance", 1 / components)
    covariance = covariance * variance if isinstance(covariance, float) else torch.tensor(covariance, dtype=x.dtype)
    return Prior(
        arguments.get("weight_concentration", 1.0) - 1.0,
        arguments.get("mean_strength", 0.01),
        torch.tensor(arguments["mean"], dtype=x.dtype) if "mean" in arguments else center,
        arguments.get("covariance_strength", 1.0),
        covariance,
    )


def m_step(x, r, u, covariance_type, floor=0.0, prior=None):
    """Return parameters from responsibilities r (N, K), which contain the counts, and IRLS weights u (N, K)."""
    features = x.shape[-1]
    prior = prior or Prior(0.0, 0.0, torch.zeros(features).to(x), 0.0, torch.zeros(features).to(x))
    mass = r.sum(0)
    weights = mass + prior.weight
    weighted = r * u
    means = (weighted.mT @ x + prior.mean_strength * prior.mean) / (weighted.sum(0) + prior.mean_strength)[:, None]
    offsets = x.unsqueeze(1) - means
    scatter = torch.einsum("nk,nki,nkj->kij", weighted, offsets, offsets)
    pull = means - prior.mean
    scatter = scatter + prior.mean_strength * pull.unsqueeze(2) * pull.unsqueeze(1)
    given, strength = prior.covariance_strength * prior.covariance.diag(), prior.covariance_strength
    if covariance_type == "tied":
        covariances = ((scatter.sum(0) + given) / (mass.sum() + strength)).expand_as(scatter)
    else:
        covariances = (scatter + given) / (mass + strength)[:, None, None]
    eye = torch.eye(features, dtype=x.dtype)
    if covariance_type == "diag":
        covariances = covariances * eye
    if covariance_type == "spherical":
        covariances = covariances.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * eye
    return Parameters(weights / weights.sum(), means, covariances + floor * eye)


def em_step(x, parameters, covariance_type, counts=None, *, kernel="gaussian", floor=0.0, prior=None):
    """Return the parameters after one iteration on points (N, D) with counts (N,)."""
    counts = torch.ones_like(x[:, 0]) if counts is None else counts
    r = counts.unsqueeze(-1) * log_joint(x, parameters, kernel).softmax(-1)
    y = squared_distances(x, parameters.means, parameters.covariances)
    return m_step(x, r, irls_weight(kernel, y, x.shape[-1]), covariance_type, floor, prior)


def em_step_beside_background(
    x, parameters, weight, log_density, covariance_type, counts, *, kernel="gaussian", prior=None
):
    """Return parameters and the weight of a background of constant density after one iteration that estimates it.

    The weights of the components sum to 1 among themselves here.
    """
    joint = torch.log1p(-weight) + log_joint(x, parameters, kernel)
    outside = (weight.log() + log_density).expand(len(x), 1)
    r = counts.unsqueeze(-1) * torch.cat([joint, outside], 1).softmax(-1)
    y = squared_distances(x, parameters.means, parameters.covariances)
    after = m_step(x, r[:, :-1], irls_weight(kernel, y, x.shape[-1]), covariance_type, prior=prior)
    mass = r.sum(0) + (0.0 if prior is None else prior.weight)
    return after, mass[-1] / mass.sum()


# scikit-learn


def scikit_learn(x, start, covariance_type, steps):
    """Return the mixture (a batch of one) that scikit-learn finds from a start after so many steps on points (N, D)."""
    parameters = parameters_of(start)
    precisions = as_type(torch.linalg.inv(parameters.covariances.double())[None], covariance_type)[0]
    weights = parameters.weights.double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = GaussianMixture(
            len(parameters.means),
            covariance_type=covariance_type,
            max_iter=steps,
            tol=0,
            weights_init=(weights / weights.sum()).numpy(),
            means_init=parameters.means.double().numpy(),
            precisions_init=(precisions[0] if covariance_type == "tied" else precisions).numpy(),
        ).fit(x.double().numpy())
    covariances = fit.covariances_[None] if covariance_type == "tied" else fit.covariances_
    return Mixture(
        *(torch.from_numpy(np.asarray(part))[None] for part in (np.log(fit.weights_), fit.means_, covariances))
    )
