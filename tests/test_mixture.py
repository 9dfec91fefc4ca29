"""The mixture as a value: densities, posteriors, samples, derivatives, and operations on batches."""

import dataclasses
import math

import numpy as np
import pytest
import textbook
import torch
from helpers import (
    COVARIANCE_TYPES,
    assert_close,
    assert_raises,
    clusters,
    full_covariances,
    parts,
    random_mixture,
    replace,
    set_of,
)
from scipy.stats import multivariate_normal
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import _pytree as pytree

from em_lightning.mixture import COVARIANCES, Mixture, information_criteria


def scipy_log_prob(mixture, x):
    """Return log p(x) as (B, N)."""
    weights, covariances = mixture.weights.numpy(), full_covariances(mixture).numpy()
    density = np.zeros(x.shape[:2])
    for b, k in np.ndindex(*weights.shape):
        density[b] += weights[b, k] * multivariate_normal(mixture.means[b, k].numpy(), covariances[b, k]).pdf(x[b])
    return torch.from_numpy(np.log(density))


def test_covariance_types_are_those_of_the_registry():
    assert sorted(COVARIANCES) == sorted(COVARIANCE_TYPES)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
@pytest.mark.parametrize("features", [1, 2, 6])
def test_log_prob_equals_scipy(covariance, features):
    mixture, x = random_mixture(covariance, features=features), torch.randn(2, 7, features, dtype=torch.float64)
    assert mixture.covariance_type == covariance
    expected = scipy_log_prob(mixture, x)
    torch.testing.assert_close(mixture.log_prob(x), expected, rtol=0, atol=1e-11)
    joint = torch.stack([textbook.log_joint(x[b], textbook.parameters_of(mixture, b)) for b in range(2)])
    torch.testing.assert_close(mixture.log_joint(x), joint, rtol=0, atol=1e-10)
    posterior = mixture.posterior(x)
    torch.testing.assert_close(posterior.free_energy, -expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(posterior.responsibilities, joint.softmax(-1), rtol=0, atol=1e-10)
    torch.testing.assert_close(mixture.to_distribution().log_prob(x.transpose(0, 1)).T, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_masked_points_have_log_prob_zero_even_if_nan(covariance):
    mixture, x = random_mixture(covariance), torch.randn(2, 7, 2, dtype=torch.float64)
    mask = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    dirty = x.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    found = mixture.log_prob(dirty, mask)
    torch.testing.assert_close(found, mixture.log_prob(x).masked_fill(~mask, 0.0))
    (grad,) = torch.autograd.grad(found.sum(), dirty)
    assert grad.isfinite().all() and (grad[~mask] == 0).all()


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_samples_have_the_moments_of_the_mixture(covariance):
    mixture = random_mixture(covariance, sets=1)
    x = mixture.sample(200_000, generator=torch.Generator().manual_seed(3))[0]
    weights, means = mixture.weights[0], mixture.means[0]
    second = (weights[:, None, None] * (full_covariances(mixture)[0] + means[:, :, None] * means[:, None])).sum(0)
    torch.testing.assert_close(x.mean(0), weights @ means, rtol=0, atol=0.03)
    torch.testing.assert_close(x.T @ x / len(x), second, rtol=0, atol=0.1)
    assert mixture.sample(0).shape == (1, 0, 2)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_affine_changes_units(covariance):
    mixture, x = random_mixture(covariance), torch.randn(2, 5, 2, dtype=torch.float64)
    scale, shift = torch.tensor([2.0, 0.5], dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    moved = mixture.affine(scale, shift).log_prob(x * scale[:, None, None] + shift[:, None])
    torch.testing.assert_close(moved, mixture.log_prob(x) - 2 * scale.log()[:, None], rtol=0, atol=1e-12)


def test_wrong_shapes_raise():
    mixture = random_mixture("full")
    wrong = torch.ones(2, 9)
    assert_raises(
        ValueError,
        ["covariances", "(2, 9)"],
        lambda: replace(mixture, covariances=wrong).log_prob(torch.zeros(2, 1, 2)),
    )
    assert_raises(ValueError, ["x", "(2, 5, 3)"], lambda: mixture.log_prob(torch.zeros(2, 5, 3)))
    assert_raises(ValueError, ["n=-1"], lambda: mixture.sample(-1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_points_that_are_not_floating_point_are_refused(covariance, dtype):
    mixture, x = random_mixture(covariance), torch.ones(2, 3, 2, dtype=dtype)
    for use in (mixture.log_prob, mixture.log_joint, mixture.posterior):
        assert_raises(TypeError, [f"x has dtype {dtype}", "x.float()"], lambda use=use: use(x))
    assert mixture.log_prob(x.float()).isfinite().all()


# Derivatives of log p(x) against autograd through the textbook's formula.


def roots_and_others(covariance):
    """Return points and parameters that require gradients, and a function from them to a mixture."""
    mixture = random_mixture(covariance, sets=1)
    symmetric = mixture.covariances.ndim == 4
    spread = torch.linalg.cholesky(mixture.covariances) if symmetric else mixture.covariances.sqrt()
    inputs = [torch.randn(1, 4, 2, dtype=torch.float64), mixture.log_weights, mixture.means, spread]
    inputs = [part.detach().clone().requires_grad_() for part in inputs]

    def build(log_weights, means, root):
        covariances = root @ root.mT if symmetric else root.square()
        return Mixture(log_weights.log_softmax(-1), means, covariances)

    return inputs, build


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_first_and_second_derivatives_of_log_prob(covariance):
    inputs, build = roots_and_others(covariance)

    def ours(x, *given):
        return build(*given).log_prob(x)

    assert gradcheck(ours, inputs) and gradgradcheck(ours, inputs)

    def expected(x, *given):
        return textbook.log_prob(x[0], textbook.parameters_of(build(*given)))[None]

    hessians = [torch.autograd.functional.hessian(lambda *z, f=f: f(*z).sum(), tuple(inputs)) for f in (ours, expected)]
    for row, other in zip(*hessians, strict=True):
        for one, two in zip(row, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_second_derivatives_after_a_sum(covariance):
    """The gradient of a sum has a constant incoming gradient, where a once-differentiable function is silently zero."""
    inputs, build = roots_and_others(covariance)
    x, given = inputs[0], inputs[1:]
    mixture, parameters = build(*given), textbook.parameters_of(build(*given))
    direction = torch.randn_like(x)
    found = []
    for value in (mixture.log_prob(x).sum(), textbook.log_prob(x[0], parameters).sum()):
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        found.append(torch.autograd.grad((slope * direction).sum(), [x, *given]))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_functional_derivatives_of_log_prob(covariance):
    mixture = random_mixture(covariance, sets=1)
    parameters, point = textbook.parameters_of(mixture), torch.randn(2, dtype=torch.float64)

    def ours(z):
        return mixture.log_prob(z.view(1, 1, 2)).sum()

    def expected(z):
        return textbook.log_prob(z.view(1, 2), parameters).sum()

    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(transform(ours)(point), transform(expected)(point), rtol=1e-7, atol=1e-8)


# A batch of mixtures: fields, indexing, conversion.


def test_a_mixture_is_an_immutable_dataclass_and_a_pytree():
    mixture = random_mixture("diag")
    with pytest.raises(dataclasses.FrozenInstanceError):
        mixture.means = mixture.means + 1
    leaves, structure = pytree.tree_flatten(mixture)
    assert len(leaves) == 3
    assert_close(pytree.tree_unflatten(leaves, structure), mixture, atol=0)
    doubled = pytree.tree_map(lambda part: 2 * part, mixture)
    assert isinstance(doubled, Mixture) and torch.equal(doubled.means, 2 * mixture.means)
    assert_close(mixture.map(lambda part: 2 * part), doubled, atol=0)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_sizes_indexing_and_conversion(covariance):
    mixture = random_mixture(covariance, sets=4, components=3, features=2)
    assert (mixture.sets, mixture.components, mixture.features) == (4, 3, 2)
    for index, sets in ((1, [1]), (-1, [3]), (slice(1, 3), [1, 2]), (torch.tensor([3, 0]), [3, 0])):
        part = mixture[index]
        assert part.sets == len(sets)
        for own, b in enumerate(sets):
            assert_close(set_of(part, own), set_of(mixture, b), atol=0)
    single = mixture.to(torch.float32)
    assert all(part.dtype == torch.float32 for part in parts(single))
    assert single.covariance_type == covariance


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_mean_variance_and_number_of_parameters(covariance):
    mixture = random_mixture(covariance, components=3, features=4)
    weights, means = mixture.weights.unsqueeze(-1), mixture.means
    mean = (weights * means).sum(1)
    variance = (weights * (full_covariances(mixture).diagonal(dim1=-2, dim2=-1) + means.square())).sum(1) - mean**2
    torch.testing.assert_close(mixture.mean, mean)
    torch.testing.assert_close(mixture.variance, variance)
    assert mixture.num_parameters == 2 + 12 + {"full": 30, "tied": 10, "diag": 12, "spherical": 3}[covariance]
    criteria = information_criteria(mixture, -70.0, 100)
    assert criteria.bic == pytest.approx(140.0 + mixture.num_parameters * math.log(100))
    assert criteria.aic == pytest.approx(140.0 + 2 * mixture.num_parameters)


def test_a_loop_over_mixtures_ends():
    mixture = random_mixture(sets=3)
    assert [float(own.means[0, 0, 0]) for own in mixture] == mixture.means[:, 0, 0].tolist()
    for last in (-1, 2, np.int64(2), torch.tensor(2)):
        torch.testing.assert_close(mixture[last].means, mixture.means[2:])
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"sets={index} .* less than 3"):
            mixture[index]


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_a_marginal_is_the_mixture_of_some_features(covariance):
    mixture, x = random_mixture(covariance, features=3), torch.randn(2, 5, 3, dtype=torch.float64)
    weights, covariances = mixture.weights, full_covariances(mixture)[..., [0, 2], :][..., [0, 2]]
    expected = scipy_log_prob(Mixture(weights.log(), mixture.means[..., [0, 2]], covariances), x[..., [0, 2]])
    torch.testing.assert_close(mixture.marginal([0, 2]).log_prob(x[..., [0, 2]]), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_a_conditional_density_is_the_joint_divided_by_the_marginal(covariance):
    mixture, x = random_mixture(covariance, features=3), torch.randn(2, 5, 3, dtype=torch.float64)
    expected = mixture.log_prob(x) - mixture.marginal([2, 0]).log_prob(x[..., [2, 0]])
    given = mixture.condition([2, -3], x[..., [2, 0]])
    assert (given.sets, given.features) == (10, 1)
    torch.testing.assert_close(given.log_prob(x[..., 1].reshape(10, 1, 1)).view(2, 5), expected, rtol=0, atol=1e-10)
    first = mixture.condition([2, 0], x[:, 0, [2, 0]])
    torch.testing.assert_close(first.means, given.means[::5])
    with pytest.raises(ValueError, match=r"2 mixtures of 2 features"):
        mixture.condition([2, 0], x[:, 0])


@pytest.mark.parametrize(
    "covariances",
    [
        torch.tensor([[[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]]),
        torch.stack([torch.eye(2), torch.zeros(2, 2)]),
        torch.tensor([[[1.0, 0.0], [0.0, -1.0]]]),  # tied
        torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        torch.tensor([1.0, -1e-3]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_covariances_that_are_not_positive_definite_are_refused(covariances, dtype):
    mixture = Mixture(torch.tensor([[0.5, 0.5]]).log(), torch.zeros(1, 2, 2), covariances[None]).to(dtype)
    x = torch.zeros(1, 3, 2, dtype=dtype)
    for use in (mixture.log_prob, mixture.posterior, mixture.log_joint, lambda x: mixture.sample(2)):
        with pytest.raises(ValueError, match="covariances must be positive definite"):
            use(x)


def test_the_error_of_a_covariance_that_float32_lost_names_the_remedies():
    thin = torch.tensor([[1.0, 1.0 + 2e-7], [1.0 + 2e-7, 1.0]]).double()  # of float32 points, evaluated in float64
    mixture = Mixture(torch.zeros(1, 1).double(), torch.zeros(1, 1, 2).double(), thin[None, None])
    assert_raises(ValueError, ["float32", "x.double()", "covariance_floor"], lambda: mixture.log_prob(mixture.means))


def test_covariances_that_rounding_made_singular_are_evaluated():
    thin = torch.tensor([[1.0, 1.0 - 1e-9], [1.0 - 1e-9, 1.0]])  # equal to 1 in float32
    mixture = Mixture(torch.zeros(1, 1), torch.zeros(1, 1, 2), thin[None, None])
    assert mixture.log_prob(torch.ones(1, 1, 2)).isfinite().all()


@pytest.mark.parametrize("method", ["log_prob", "log_joint", "posterior"])
def test_numpy_arrays_are_refused(method):
    mixture = Mixture(torch.zeros(1, 1), torch.zeros(1, 1, 2), torch.ones(1, 1, 2))
    with pytest.raises(TypeError, match=r"x must be a tensor, got <class 'numpy.ndarray'>.*torch.from_numpy"):
        getattr(mixture, method)(np.zeros((1, 5, 2)))


def test_vmap_of_a_density_and_a_posterior_equals_a_batch():
    mixture, x = random_mixture("full"), clusters(2, 10, 2)

    def one(log_weights, means, covariances, x):
        single = Mixture(log_weights[None], means[None], covariances[None])
        return single.log_prob(x[None])[0], single.posterior(x[None]).responsibilities[0]

    log_prob, responsibilities = torch.func.vmap(one)(*mixture.parameters(), x)
    torch.testing.assert_close(log_prob, mixture.log_prob(x))
    torch.testing.assert_close(responsibilities, mixture.posterior(x).responsibilities)
