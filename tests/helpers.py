"""Point sets, mixtures and assertions that several test files share."""

import dataclasses
import math

import pytest
import torch

from em_lightning import Mixture

COVARIANCE_TYPES = ("diag", "full", "spherical", "tied")


# Point sets


def clusters(sets=2, items=120, features=2, components=4, *, distance=4.0, spread=1.0, dtype=torch.float64):
    """Draw points (B, N, D) of Gaussian clusters; item n belongs to cluster ``n % components``."""
    centers = distance * torch.randn(sets, components, features, dtype=dtype)
    spread = torch.as_tensor(spread, dtype=dtype)
    return centers[:, torch.arange(items) % components] + spread * torch.randn(sets, items, features, dtype=dtype)


def two_clusters(sets=2, items=120, features=2, *, distance=6.0, outliers=0.0, dtype=torch.float64):
    """Draw points (B, N, D) of unit Gaussians at 0 and at ``distance`` in each feature, n % 2 says which.

    A share ``outliers`` of the items, or one share per set, comes first and is uniform over a box around both.
    """
    x = torch.randn(sets, items, features, dtype=dtype) + distance * (torch.arange(items) % 2).unsqueeze(-1)
    shares = outliers if isinstance(outliers, (tuple, list)) else [outliers] * sets
    for points, share in zip(x, shares, strict=True):
        count = round(share * items)
        points[:count] = 5 * distance * torch.rand(count, features, dtype=dtype) - 2 * distance
    return x


def with_padding(x, share=0.8, positive_weights=True):
    """Return the points with NaN where a random mask is false, the mask, and random weights of mean 1 over it."""
    mask = torch.rand(x.shape[:2]) < share
    weights = torch.rand(x.shape[:2], dtype=x.dtype) + (0.1 if positive_weights else 0.0)
    return x.masked_fill(~mask.unsqueeze(-1), torch.nan), mask, of_mean_one(weights, mask)


def of_mean_one(weights, mask=None):
    """Return weights (B, N) divided by their mean over the points that count: weights above zero inside the mask."""
    counted = weights > 0 if mask is None else mask & (weights > 0)
    total = (weights * counted).sum(1, keepdim=True)
    return weights * counted.sum(1, keepdim=True) / torch.where(total > 0, total, 1.0)


def empty(items=10, features=3):
    """Return points (1, N, D) and a mask (1, N) that is false everywhere."""
    return torch.randn(1, items, features), torch.zeros(1, items, dtype=torch.bool)


def degenerate(name, dtype=torch.float32):
    """Return points (1, N, 3) that require a gradient, and their mask (1, N) or None."""
    line = torch.linspace(-1, 1, 40)[None, :, None]
    x, mask = {
        "one point repeated": (torch.ones(1, 40, 3), None),
        "collinear": (line * torch.tensor([1.0, 2.0, -1.0]), None),
        "two points": (torch.tensor([[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]]), None),
        "one point": (torch.ones(1, 1, 3), None),
        "empty": empty(),
    }[name]
    return x.to(dtype).requires_grad_(), mask


DEGENERATE = ("one point repeated", "collinear", "two points", "one point", "empty")


# Mixtures


def parts(value):
    """Return the tensors of a mixture, in the order of its fields."""
    if dataclasses.is_dataclass(value):
        return tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    return tuple(value)


def replace(value, **changes):
    """Return a mixture with other tensors in some fields."""
    return dataclasses.replace(value, **changes) if dataclasses.is_dataclass(value) else value._replace(**changes)


def cast(mixture, dtype):
    """Return a mixture in another dtype, detached."""
    return type(mixture)(*(part.detach().to(dtype) for part in parts(mixture)))


def detached(mixture):
    """Return a mixture without its graph."""
    return type(mixture)(*(part.detach() for part in parts(mixture)))


def set_of(mixture, b):
    """Return set b of a batch of mixtures, as a batch of one."""
    return type(mixture)(*(part[b : b + 1] for part in parts(mixture)))


def as_type(full, covariance_type):
    """Return covariances of a type from dense ones (B, K, D, D): tied takes the first, spherical the first variance."""
    return {
        "full": full,
        "tied": full[:, :1],
        "diag": full.diagonal(dim1=-2, dim2=-1),
        "spherical": full[..., 0, 0],
    }[covariance_type].clone()


def full_covariances(mixture):
    """Return the covariances of a mixture of any type as (B, K, D, D)."""
    sets, components, features = mixture.means.shape
    covariances = mixture.covariances
    if covariances.ndim == 2:
        covariances = covariances[..., None].expand(-1, -1, features)
    if covariances.ndim == 3:
        covariances = covariances.diag_embed()
    return covariances.expand(sets, components, features, features)


def random_mixture(covariance_type="full", sets=2, components=3, features=2, dtype=torch.float64, generator=None):
    """Draw mixtures about the origin with well-conditioned covariances."""
    options = {"generator": generator, "dtype": torch.float64}
    log_weights = torch.randn(sets, components, **options).log_softmax(-1)
    means = 2 * torch.randn(sets, components, features, **options)
    root = 0.3 * torch.randn(sets, components, features, features, **options).tril(-1)
    root = root + (0.3 + torch.rand(sets, components, features, **options)).diag_embed()
    covariances = as_type(root @ root.mT, covariance_type)
    return Mixture(*(part.to(dtype) for part in (log_weights, means, covariances)))


def mixture_at(means, covariance_type="full", variance=1.0):
    """Return mixtures of equal weights at means (B, K, D), whose components all have a variance () or (B, D)."""
    means = means.detach()
    sets, components, features = means.shape
    variance = torch.as_tensor(variance, dtype=means.dtype).detach().expand(sets, features)
    if covariance_type == "spherical":
        variance = variance.mean(-1, keepdim=True).expand(-1, features)
    full = variance.diag_embed().unsqueeze(1).expand(-1, components, -1, -1)
    log_weights = means.new_full((sets, components), -math.log(components))
    return Mixture(log_weights, means.clone(), as_type(full, covariance_type))


def start_among(x, components, covariance_type="full"):
    """Return mixtures with means near some points (B, N, D) and the variance of the whole set."""
    rows = torch.arange(components) * (x.shape[1] // components) + 1
    return mixture_at(x.detach()[:, rows] + 0.3, covariance_type, x.detach().var(1, correction=0))


# Operators


def trained(operator, size=0.05):
    """Move every parameter of a module at random, in place, so that learned corrections change the result."""
    for parameter in operator.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return operator


# Assertions


def assert_close(found, expected, rtol=0.0, atol=1e-9):
    """Assert that two mixtures have the same tensors up to a tolerance."""
    for one, two in zip(parts(found), parts(expected), strict=True):
        torch.testing.assert_close(one, two, rtol=rtol, atol=atol)


def is_finite(mixture):
    """Return whether all tensors of a mixture are finite."""
    return all(bool(part.isfinite().all()) for part in parts(mixture))


def assert_finite_gradients(output, x, module=None):
    """Backpropagate a number; assert that the gradients of the points and of a module's parameters are finite."""
    output.backward()
    assert x.grad.isfinite().all()
    if module is not None:
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def assert_raises(error, words, call):
    """Assert that a call raises an error whose message contains all words."""
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def log_prior(prior, mixture, x, mask=None, weights=None):
    """Return the log-density (B,) of a prior that may refer to the mean and variance of points."""
    counts = torch.ones_like(x[..., 0]) if weights is None else weights.to(x)
    counts = (counts if mask is None else torch.where(mask, counts, 0.0)).unsqueeze(-1).double()
    x = x.double() if mask is None else torch.where(mask.unsqueeze(-1), x, 0.0).double()
    mass = counts.sum(1)
    shares = counts / torch.where(mass > 0, mass, 1.0).unsqueeze(1)
    mean = (shares * x).sum(1)
    variance = (shares * (x - mean.unsqueeze(1)).square()).sum(1)
    return prior.log_density(mixture, mean, variance).to(x.dtype)
