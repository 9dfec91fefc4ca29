"""Second derivatives and torch.func transforms of densities and operators, of few and of many points."""

import pytest
import torch

from em_lightning import EMOperator, Mixture
from em_lightning.competition import balanced
from em_lightning.mixture.backends import use_backend
from em_lightning.operators import DirectionalEM, DirectionalMixture, EMPooling, GeneralizedEM

FEW, MANY = 7, 3000  # of 3 features and 4 components; many are served by compiled code and evaluated in blocks


def points(size):
    return torch.randn(1, size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(size))


def mixture(covariance):
    generator = torch.Generator().manual_seed(1)
    means = 2 * torch.randn(1, 4, 3, dtype=torch.float64, generator=generator)
    root = torch.randn(1, 4, 3, 3, dtype=torch.float64, generator=generator)
    full = root @ root.mT + torch.eye(3)
    shapes = {"full": full, "diag": full.diagonal(dim1=-2, dim2=-1), "spherical": full[..., 0, 0], "tied": full[:, :1]}
    return Mixture(torch.tensor([[0.1, 0.2, 0.3, 0.4]]).double().log(), means, shapes[covariance])


def check(function, x, tolerance=1e-6):
    """Compare the first and second derivative along a random direction with central differences."""
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5))

    def score(at, create_graph=False):
        at = at.detach().requires_grad_() if not create_graph else at
        return torch.autograd.grad(function(at), at, create_graph=create_graph)[0]

    place, step = x.clone().requires_grad_(), 1e-5
    first = score(place, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), place)
    torch.testing.assert_close(score(place), first.detach(), rtol=1e-9, atol=1e-12)
    slope = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
    torch.testing.assert_close((first.detach() * direction).sum(), slope, rtol=1e-6, atol=1e-6)
    expected = (score(x + step * direction) - score(x - step * direction)) / (2 * step)
    torch.testing.assert_close(second, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    return first.detach()


@pytest.mark.parametrize("size", [FEW, MANY])
@pytest.mark.parametrize("covariance", ["full", "diag", "spherical", "tied"])
def test_log_prob(covariance, size):
    fitted, x = mixture(covariance), points(size)
    found = check(lambda x: fitted.log_prob(x).sin().sum(), x)
    with use_backend("reference"):
        torch.testing.assert_close(check(lambda x: fitted.log_prob(x).sin().sum(), x), found)


@pytest.mark.parametrize("summary", [lambda p: p.free_energy, lambda p: p.responsibilities, lambda p: p.entropy()])
def test_balanced_competition(summary):
    energies = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    check(lambda d: summary(balanced(d, 0.7, item_dim=1)).sin().sum(), energies)
    check(lambda t: summary(balanced(energies, t, item_dim=1)).sin().sum(), torch.tensor(0.7).double())


@pytest.mark.parametrize("size", [FEW, MANY])
def test_log_prob_in_the_parameters(size):
    x, fitted = points(size), mixture("diag")
    check(lambda means: Mixture(fitted.log_weights, means, fitted.covariances).log_prob(x).sum(), fitted.means)
    check(lambda c: Mixture(fitted.log_weights, fitted.means, c).log_prob(x).sum(), fitted.covariances)
    check(lambda w: Mixture(w.log_softmax(-1), fitted.means, fitted.covariances).log_prob(x).sum(), fitted.log_weights)


@pytest.mark.parametrize("size", [40, MANY])
@pytest.mark.parametrize("covariance", ["full", "diag", "spherical", "tied"])
def test_em_operator(covariance, size):
    torch.manual_seed(0)
    residual = covariance in ("diag", "spherical")
    operator = EMOperator(4, 3, num_iters=2, covariance=covariance, init="learned", residual=residual).double()
    check(lambda x: operator(x).means.square().sum(), points(size))


@pytest.mark.parametrize("sets", [2, 15, 24])  # compiled code of the M-step serves many components
@pytest.mark.parametrize("covariance", ["full", "diag", "spherical"])
def test_em_operator_on_sets(covariance, sets):
    x = torch.randn(sets, 30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(sets))
    operator = EMOperator(3, 3, num_iters=2, covariance=covariance, init="learned", residual=False).double()
    check(lambda x: operator(x).log_prob(x).sum(), x, tolerance=1e-5)


@pytest.mark.parametrize("size", [40, MANY])
@pytest.mark.parametrize("covariance", ["full", "tied"])
def test_corrections_of_full_covariances_refuse_second_derivatives(covariance, size):
    operator = EMOperator(4, 3, num_iters=2, covariance=covariance).double()
    x = points(size).requires_grad_()
    torch.autograd.grad(operator(x).means.square().sum(), x)
    with pytest.raises(RuntimeError, match="second derivatives.*residual=False"):
        torch.autograd.grad(operator(x).means.square().sum(), x, create_graph=True)


@pytest.mark.parametrize("size", [40, MANY])
@pytest.mark.parametrize(
    "make",
    [
        lambda: EMOperator(2, 3, num_iters=2, kernel="student_t", init="learned", residual=False),
        lambda: EMOperator(2, 3, num_iters=2, background=0.1, init="learned", residual=False),
        lambda: EMOperator(2, 3, num_iters=2, init="learned", gradient="checkpoint", residual=False),
        lambda: EMPooling(2, 3, num_iters=2, out_features=2, summary=("weights", "values")),
    ],
    ids=["student_t", "background", "checkpoint", "pooling"],
)
def test_layers(make, size):
    torch.manual_seed(0)
    layer = make().double()

    def value(x):
        out = layer(x)
        return (out if isinstance(out, torch.Tensor) else out.means).square().sum()

    check(value, points(size))


def test_directional_log_prob():
    means = torch.nn.functional.normalize(points(4), dim=-1)
    fitted = DirectionalMixture(
        torch.full((1, 4), 0.25).double().log(), means, torch.tensor([[1.0, 2.0, 5.0, 9.0]]).double()
    )
    for size in (FEW, MANY):
        check(lambda x: fitted.log_prob(x).sum(), points(size))


@pytest.mark.parametrize("size", [FEW, MANY])
def test_torch_func(size):
    fitted, x = mixture("full"), points(size)
    expected = torch.autograd.grad(fitted.log_prob(place := x.clone().requires_grad_()).sum(), place)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: fitted.log_prob(x).sum())(x), expected)

    def in_means(means):
        return Mixture(fitted.log_weights, means, fitted.covariances).log_prob(x).sum()

    hessian = torch.func.hessian(in_means)(fitted.means).reshape(12, 12)
    expected = torch.autograd.functional.hessian(in_means, fitted.means).reshape(12, 12)
    torch.testing.assert_close(hessian, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
    torch.manual_seed(0)
    operator = EMOperator(4, 3, num_iters=2, init="learned", residual=False).double()
    place = x.clone().requires_grad_()
    expected = torch.autograd.grad(operator(place).means.square().sum(), place)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: operator(x).means.square().sum())(x), expected)


@pytest.mark.parametrize("make", [lambda: DirectionalEM(2, 3, num_iters=2), lambda: GeneralizedEM(2, 3, num_iters=2)])
def test_other_operators(make):
    """Their starts are constants, so only the gradient is compared."""
    operator, x = make().double(), points(MANY)
    place = x.clone().requires_grad_()
    centers = operator(place)
    centers = centers.means if hasattr(centers, "means") else centers.centers
    score = torch.autograd.grad(centers.square().sum(), place, create_graph=True)[0]
    assert score.requires_grad and torch.autograd.grad(score.square().sum(), place)[0].any()
