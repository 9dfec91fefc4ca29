"""The native backend of the E-step against the reference."""

import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from em_lightning import EMOperator, Mixture
from em_lightning.competition import Softmin
from em_lightning.mixture import COVARIANCES, Parameters, e_step, prepare
from em_lightning.mixture.backends import compiler, native, use_backend
from em_lightning.mixture.backends.compiler import load
from em_lightning.mixture.background import UniformBackground
from em_lightning.mixture.covariance.cholesky import cholesky_with_inverse, smallest_pivots
from em_lightning.mixture.e_step import Likelihood, SufficientStatistics
from em_lightning.mixture.em import em_step, iteration
from em_lightning.mixture.m_step import m_step
from em_lightning.mixture.points import Frame

try:
    with use_backend("native"):
        REASON = ""
except RuntimeError as error:
    REASON = str(error)
needs_compiler = pytest.mark.skipif(bool(REASON), reason=REASON)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = [torch.float32, torch.float64]
KINDS = ["full", "diag", "spherical", "tied"]


def problem(dtype, sets=2, items=300, components=3, features=2, seed=0):
    """Return points and the parameters of random mixtures of full covariances."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = (draw(sets, items, features) + 2.0 * draw(sets, 1, features)).to(dtype)
    factor = 0.3 * draw(sets, components, features, features) + torch.eye(features, dtype=torch.float64)
    log_weights = draw(sets, components).log_softmax(1)
    return x, Parameters(log_weights, 0.5 * draw(sets, components, features), factor @ factor.mT)


def covariances_of(kind, full):
    """Return covariances of a type near full ones."""
    variances = full.diagonal(dim1=-2, dim2=-1)
    return {
        "full": full,
        "tied": full.mean(1, keepdim=True),
        "diag": variances,
        "spherical": variances.mean(-1),
    }[kind]


def statistics_of(backend, kind, x, parameters, mask=None, weights=None, frame=None, **options):
    covariance = COVARIANCES[kind]
    with use_backend(backend):
        points = prepare(x, mask, weights, frame)
        return e_step(points, parameters, Likelihood(covariance), **options)


def gradients(found, inputs):
    """Return the gradients of a function of all statistics that depends on each entry in its own way."""
    total = 0.0
    for place, part in enumerate(found[:5]):
        generator = torch.Generator().manual_seed(place)
        total = total + (part * torch.randn(part.shape, generator=generator, dtype=part.dtype)).sum()
    return torch.autograd.grad(total, inputs, allow_unused=True)


def compare(kind, x, parameters, mask=None, weights=None, **options):
    """Assert that statistics and gradients of both backends agree, relative to the largest entry of each."""
    tolerance = TOLERANCE[x.dtype]
    parameters = parameters._replace(covariances=covariances_of(kind, parameters.covariances))
    x = x.clone().requires_grad_()
    inputs = [x, *(part.clone().requires_grad_() for part in parameters)]
    parameters = Parameters(*inputs[1:])
    if weights is not None:
        weights = weights.to(x.dtype).clone().requires_grad_()
        inputs.append(weights)
    results = []
    for backend in ("native", "reference"):
        found = statistics_of(backend, kind, x, parameters, mask, weights, **options)
        results.append([*found, *gradients(found, inputs)])
    for own, expected in zip(*results, strict=True):
        assert own.dtype == expected.dtype and own.shape == expected.shape
        scale = expected.abs().max().clamp(min=0.1)
        torch.testing.assert_close(own / scale, expected / scale, rtol=0.0, atol=tolerance)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_and_gradients_agree_with_the_reference(kind, dtype):
    x, parameters = problem(dtype)
    compare(kind, x, parameters, with_log_likelihood=True)


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 4, 2), (2, 129, 1, 3), (1, 5000, 5, 3), (5, 17, 3, 5)])
@pytest.mark.parametrize("kind", ["full", "diag"])
def test_shapes(kind, shape):
    x, parameters = problem(torch.float64, *shape)
    compare(kind, x, parameters, with_log_likelihood=True)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features, items", [(5, 300), (7, 129), (16, 700), (33, 40)])
def test_more_features(features, items, dtype):
    """Few, some and many features have code of their own."""
    x, parameters = problem(dtype, items=items, features=features)
    compare("full", x, parameters, with_log_likelihood=True)


@needs_compiler
@pytest.mark.parametrize("kind", ["full", "diag"])
def test_components_far_from_most_points(kind):
    """Points whose responsibilities do not count are skipped, in values and gradients."""
    generator = torch.Generator().manual_seed(4)
    means = 6.0 * torch.randn(1, 5, 9, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 700, 9, generator=generator, dtype=torch.float64)
    x = (means[:, torch.arange(700) % 5] + noise).float()
    eye = torch.eye(9, dtype=torch.float64).expand(2, 5, 9, 9)
    log_weights = torch.zeros(2, 5, dtype=torch.float64).log_softmax(1)
    parameters = Parameters(log_weights, means.expand(2, -1, -1).clone(), eye)
    frame = Frame(torch.zeros_like(noise[:, 0]), torch.ones_like(noise[:, 0, 0]))
    compare(kind, x, parameters, frame=frame, with_log_likelihood=True)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [2, 9])
def test_log_densities_and_their_gradients_agree_with_the_reference(kind, dtype, features):
    x, parameters = problem(dtype, features=features)
    parameters = parameters._replace(covariances=covariances_of(kind, parameters.covariances))
    target = torch.randn(x.shape[:2], generator=torch.Generator().manual_seed(5), dtype=dtype)
    results = []
    for backend in ("native", "reference"):
        inputs = [part.clone().requires_grad_() for part in (x, *parameters)]
        with use_backend(backend):
            density = Mixture(*inputs[1:]).log_prob(inputs[0])
            results.append([density, *torch.autograd.grad(density, inputs, target)])
    for own, expected in zip(*results, strict=True):
        scale = expected.abs().max().clamp(min=1.0)
        torch.testing.assert_close(own / scale, expected / scale, rtol=0.0, atol=TOLERANCE[dtype])


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_log_densities_by_differences(kind):
    x, parameters = problem(torch.float64, sets=1, items=4, components=2)
    inputs = [x, *parameters._replace(covariances=covariances_of(kind, parameters.covariances))]
    inputs = [part.clone().requires_grad_() for part in inputs]

    def density(x, log_weights, means, covariances):
        if kind in ("full", "tied"):
            covariances = 0.5 * (covariances + covariances.mT)
        return Mixture(log_weights, means, covariances).log_prob(x)

    with use_backend("native"):
        assert torch.autograd.gradcheck(density, inputs)
        assert torch.autograd.gradgradcheck(density, inputs)


@needs_compiler
@pytest.mark.parametrize("size", [1, 3, 6])
def test_cholesky_factors_by_differences(size):
    factor = torch.eye(size) + 0.3 * torch.randn(4, size, size, generator=torch.Generator().manual_seed(6))
    matrix = (factor @ factor.mT).double().requires_grad_()
    pivots = torch.full((4, size), 1e-12, dtype=torch.float64)

    def factors(matrix):
        return cholesky_with_inverse(0.5 * (matrix + matrix.mT), pivots)

    with use_backend("native"):
        scale, inverse = factors(matrix)
        torch.testing.assert_close(scale, torch.linalg.cholesky(matrix))
        torch.testing.assert_close(inverse, torch.linalg.inv(scale))
        assert torch.autograd.gradcheck(factors, matrix)
        assert torch.autograd.gradgradcheck(factors, matrix)


@needs_compiler
def test_cholesky_factors_of_transposed_matrices():
    matrix = torch.tensor([[[4.0, 2.0], [2.0, 5.0]]], dtype=torch.float64).mT
    with use_backend("native"):
        scale, inverse = cholesky_with_inverse(matrix, torch.full((1, 2), 1e-12, dtype=torch.float64))
    torch.testing.assert_close(scale, torch.tensor([[[2.0, 0.0], [1.0, 2.0]]], dtype=torch.float64))
    torch.testing.assert_close(scale @ inverse, torch.eye(2, dtype=torch.float64).unsqueeze(0))


@needs_compiler
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_matrices_that_are_not_positive_definite_have_finite_factors_and_gradients(backend):
    vectors = torch.randn(40, 3, 1, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    singular = vectors @ vectors.mT
    indefinite = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    matrix = torch.cat([singular, torch.zeros(1, 3, 3), indefinite.unsqueeze(0)]).requires_grad_()
    pivots = smallest_pivots(matrix.diagonal(dim1=-2, dim2=-1))
    with use_backend(backend):
        scale, inverse = cholesky_with_inverse(matrix, pivots)
    (gradient,) = torch.autograd.grad(scale.sum() + inverse.sum(), matrix)
    assert all(part.isfinite().all() for part in (scale, inverse, gradient))
    torch.testing.assert_close(scale[:-1] @ scale[:-1].mT, matrix[:-1], atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(scale @ inverse, torch.eye(3, dtype=torch.float64).expand(42, 3, 3))


def sums_of(kind, features=3, sets=3, components=4):
    """Return mass, first and second sums of random points; component 1 is almost empty, set 2 without points."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(sets, 40, features, generator=generator, dtype=torch.float64)
    responsibilities = torch.rand(sets, components, 40, generator=generator, dtype=torch.float64)
    responsibilities[:, 1] *= 1e-30
    responsibilities[2] = 0.0
    second = responsibilities @ COVARIANCES[kind].second_degree(x.mT).mT
    return [responsibilities.sum(-1), responsibilities @ x, second]


def m_step_of(backend, kind, mass, first, second, floor):
    zeros = torch.zeros(len(mass), dtype=torch.float64)
    before = torch.empty(len(mass), *COVARIANCES[kind].shape(mass.shape[1], first.shape[2]), dtype=torch.float64)
    with use_backend(backend):
        statistics = SufficientStatistics(mass, mass, first, second, zeros, zeros, zeros)
        return m_step(statistics, COVARIANCES[kind], floor, before)


@needs_compiler
@pytest.mark.parametrize("features", [1, 3, 8, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_m_step_and_its_gradient_agree_with_the_reference(kind, features):
    sums = [part.requires_grad_() for part in sums_of(kind, features)]
    floor = torch.tensor([1e-3, 1e-12, 1e-6], dtype=torch.float64)
    results = []
    for backend in ("native", "reference"):
        found = m_step_of(backend, kind, *sums, floor)
        results.append([part.detach() for part in (*found, *gradients(found, sums))])
    for own, expected in zip(*results, strict=True):
        assert own.isfinite().all()
        scale = expected.abs().max().clamp(min=1.0)
        torch.testing.assert_close(own / scale, expected / scale, rtol=0.0, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_the_m_step_by_differences(kind):
    sums = [part[:2, [0, 2, 3]].clone().requires_grad_() for part in sums_of(kind)]
    floor = torch.full((2,), 1e-3, dtype=torch.float64)

    def parameters(*sums):
        return tuple(m_step_of("native", kind, *sums, floor))

    assert torch.autograd.gradcheck(parameters, sums)
    assert torch.autograd.gradgradcheck(parameters, sums)


def whole_step(backend, kind, x, parameters, mask=None, weights=None):
    """Return parameters, statistics and the names of the operators of an EM iteration."""
    covariance = COVARIANCES[kind]
    parameters = parameters._replace(covariances=covariances_of(kind, parameters.covariances))
    with use_backend(backend), Operators() as operators:
        points = prepare(x, mask, weights)
        found = iteration(points, parameters, Likelihood(covariance), points.floor(1e-3), with_log_likelihood=True)
    return *found, operators.names


class Operators(TorchDispatchMode):
    """Collects the names of this library's operators in its context."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [func.name()] if func.namespace == "em_lightning" else []
        return func(*args, **(kwargs or {}))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features, items", [(1, 1), (2, 300), (3, 5000), (9, 40)])
def test_a_whole_step_agrees_with_the_reference(kind, dtype, features, items):
    x, parameters = problem(dtype, items=items, features=features)
    for mask, weights in ((None, None), (torch.rand(2, items) < 0.7, torch.rand(2, items, dtype=dtype))):
        after, statistics, names = whole_step("native", kind, x, parameters, mask, weights)
        if kind != "tied":  # which needs the sums of all components first
            assert names == ["em_lightning::em_step"]
        expected, of_reference, _ = whole_step("reference", kind, x, parameters, mask, weights)
        for own, other in zip((*after, *statistics), (*expected, *of_reference), strict=True):
            assert own.shape == other.shape
            scale = other.abs().max().clamp(min=0.1)
            torch.testing.assert_close(own / scale, other / scale, rtol=0.0, atol=TOLERANCE[dtype])


@needs_compiler
def test_a_whole_step_has_the_results_of_separate_ones_for_degenerate_components():
    x, parameters = problem(torch.float64, items=300)
    flat = parameters.covariances.clone()
    flat[0, 0] = torch.tensor([[1.0, 2.0], [2.0, 1.0]])  # indefinite
    flat[1, 1] = 0.0
    parameters = parameters._replace(covariances=flat, log_weights=parameters.log_weights - 800.0 * torch.eye(2, 3))
    after, statistics, names = whole_step("native", "full", x, parameters)
    leaf = parameters.means.clone().requires_grad_()
    expected, separate, _ = whole_step("native", "full", x, parameters._replace(means=leaf))
    assert names == ["em_lightning::em_step"]
    for own, other in zip((*after, *statistics), (*expected, *separate), strict=True):
        torch.testing.assert_close(own, other.detach(), rtol=1e-9, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
@pytest.mark.parametrize("features", [1, 3, 6])
@pytest.mark.parametrize("fault", ["singular", "negative", "wide"])
def test_a_step_gives_the_same_with_and_without_gradients_for_any_covariances(kind, features, fault):
    x = problem(torch.float64, items=3000, features=features)[0]
    ones = torch.ones(2, 3, features, features, dtype=torch.float64)
    start = {"singular": ones, "negative": -0.5 * ones, "wide": ones + torch.eye(features).double()}[fault]
    if fault == "wide":  # W has entries of 1e-110, whose product is not a number in double precision
        start = 1e220 * start
    means = torch.randn(2, 3, features, dtype=torch.float64)
    start = Mixture(torch.full((2, 3), 1 / 3).double().log(), means, covariances_of(kind, start))
    with torch.no_grad():
        whole = em_step(x, start)
    separate = em_step(x.clone().requires_grad_(), start)
    for own, other in zip(whole.parameters(), separate.parameters(), strict=True):
        assert own.isfinite().all()
        torch.testing.assert_close(own, other.detach(), rtol=1e-7, atol=1e-9)


@needs_compiler
def test_a_step_with_a_background_in_its_likelihood_is_not_a_whole_one():
    x, parameters = problem(torch.float64)
    covariance = COVARIANCES["full"]
    with use_backend("native"):
        points = prepare(x)
        terms = UniformBackground(weight=0.3).terms(points, parameters.log_weights)
        likelihood, floor = Likelihood(covariance, background=terms), points.floor(1e-3)
        after, _ = iteration(points, parameters, likelihood, floor)
        statistics = e_step(points, parameters, likelihood)
        expected = m_step(statistics, covariance, floor, parameters.covariances)
    for own, other in zip(after, expected, strict=True):
        torch.testing.assert_close(own, other)
    assert float(statistics.background_mass.min()) > 1.0


@needs_compiler
@pytest.mark.parametrize("which", ["points", "means", "weights"])
def test_a_step_whose_derivatives_are_wanted_is_not_a_whole_one(which):
    x, parameters = problem(torch.float64)
    weights = torch.rand(2, 300, dtype=torch.float64)
    inputs = {"points": x, "means": parameters.means, "weights": weights}

    def step_with(replacement, backend="native"):
        given = {**inputs, which: replacement}
        given_parameters = parameters._replace(means=given["means"])
        return whole_step(backend, "full", given["points"], given_parameters, weights=given["weights"])

    plain = inputs[which]
    leaf = plain.clone().requires_grad_()
    after, _, names = step_with(leaf)
    assert after.means.requires_grad and "em_lightning::em_step" not in names
    with torch.no_grad():
        assert step_with(leaf)[2] == ["em_lightning::em_step"]
    direction = torch.linspace(-1.0, 1.0, plain.numel(), dtype=plain.dtype).view_as(plain)
    tangents = []
    for backend in ("native", "reference"):
        with forward_ad.dual_level():
            after, _, _ = step_with(forward_ad.make_dual(plain, direction), backend)
            tangents.append(forward_ad.unpack_dual(after.means).tangent)
    assert tangents[0].abs().max() > 0
    torch.testing.assert_close(*tangents, rtol=1e-9, atol=1e-12)


@needs_compiler
@pytest.mark.slow
def test_compiled_and_exported_operators_contain_the_native_one():
    (x,), start = problem(torch.float32, items=2100)[:1], None
    operator = EMOperator(3, 2, num_iters=2, residual=False)
    start = operator(x, num_iters=0)

    def fit(points):
        mixture = operator(points, init=start)
        return mixture.means, mixture.log_prob(points).sum()

    expected = fit(x)
    torch._dynamo.reset()
    compiled = torch.compile(fit, fullgraph=True, backend="aot_eager")
    for own, other in zip(compiled(x), expected, strict=True):
        torch.testing.assert_close(own, other)
    slopes = [
        torch.autograd.grad(function(points)[1], points)[0]
        for function, points in ((fit, x.clone().requires_grad_()), (compiled, x.clone().requires_grad_()))
    ]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)
    with use_backend("native"):
        program = torch.export.export(EMOperator(3, 2, num_iters=1, residual=False), (x,))
    graphs = [module.graph for module in program.graph_module.modules() if hasattr(module, "graph")]
    targets = {str(node.target) for graph in graphs for node in graph.nodes}
    assert {f"em_lightning.{name}.default" for name in ("e_step", "m_step", "cholesky")} <= targets


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_weights_and_sets_without_points(kind, dtype):
    x, parameters = problem(dtype, sets=3)
    mask = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.6
    mask[1] = False
    x[~mask] = float("nan")
    weights = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(2))
    compare(kind, x, parameters, mask, weights, with_log_likelihood=True)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_components_without_points_or_weight(dtype):
    x, parameters = problem(dtype)
    parameters.means[:, 0] = 1e4
    parameters.log_weights[:, 1] = -torch.inf
    found, expected = (statistics_of(name, "full", x, parameters) for name in ("native", "reference"))
    assert (found.mass[:, :2] < 1e-30).all()
    torch.testing.assert_close(found.second[:, 2], expected.second[:, 2], rtol=TOLERANCE[dtype], atol=0.0)
    assert all(part.isfinite().all() for part in found)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("competition", [Softmin(0.3), Softmin(2.0, learnable=True).double()])
def test_temperature(dtype, competition):
    x, parameters = problem(dtype)
    compare("full", x, parameters, competition=competition)


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_derivatives_by_differences(kind):
    x, parameters = problem(torch.float64, sets=1, items=6, components=2)
    inputs = [x, *parameters._replace(covariances=covariances_of(kind, parameters.covariances))]
    weights = torch.rand(1, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    inputs = [part.clone().requires_grad_() for part in (*inputs, weights)]
    covariance = COVARIANCES[kind]
    frame = prepare(x).frame  # constant, so that differences do not move it

    def statistics(x, log_weights, means, covariances, weights):
        if kind in ("full", "tied"):
            covariances = 0.5 * (covariances + covariances.mT)
        points = prepare(x, None, weights, frame=frame)
        found = e_step(
            points, Parameters(log_weights, means, covariances), Likelihood(covariance), with_log_likelihood=True
        )
        return found[1:5]

    with use_backend("native"):
        assert torch.autograd.gradcheck(statistics, inputs)
        assert torch.autograd.gradgradcheck(statistics, inputs)


@needs_compiler
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-6, 1e6, 1e30])
def test_any_scale_of_the_points(scale):
    x, parameters = problem(torch.float32)
    mixture = Mixture(*parameters).map(torch.Tensor.float)
    results = []
    for backend in ("native", "reference"):
        with use_backend(backend):
            results.append(EMOperator(3, 2, num_iters=3, covariance_floor=0.0).double()(x * scale).means / scale)
    assert mixture.sets == 2
    torch.testing.assert_close(*results, rtol=1e-3 if scale < 1e-37 else 1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_thin_components_keep_the_likelihood_in_single_precision(offset):
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    slabs = torch.randn(1, 4096, 3, generator=generator, dtype=torch.float64)
    slabs = slabs * torch.tensor([1.0, 1.0, 1e-3], dtype=torch.float64)
    slabs[:, ::2] += torch.tensor([0.3, 0.2, 0.5])
    x = (slabs @ turn.mT + offset).float()
    with use_backend("reference"):
        start = EMOperator(4, 3, num_iters=20, residual=False, covariance_floor=1e-9)(x.double())
    frame = prepare(x).frame
    parameters = frame.enter_parameters(start.parameters())
    found, expected = (
        statistics_of(backend, "full", given, parameters, frame=frame, with_log_likelihood=True)
        for backend, given in (("native", x), ("reference", x.double()))
    )
    assert (found.log_likelihood - expected.log_likelihood).abs() / x.shape[1] < 1e-5
    torch.testing.assert_close(found.second, expected.second, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("features", [1, 2, 3, 5, 7])
def test_sums_of_thin_components_include_the_rounding_of_their_means(features):
    """Single precision points are compared with rounded means."""
    generator = torch.Generator().manual_seed(7)
    means = 0.5 + torch.rand(2, 3, features, generator=generator, dtype=torch.float64)
    noise = 1e-3 * torch.randn(2, 3, 200, features, generator=generator, dtype=torch.float64)
    x = (means.unsqueeze(2) + noise).flatten(1, 2).float()
    covariances = 1e-6 * torch.eye(features, dtype=torch.float64).expand(2, 3, -1, -1)
    frame = Frame(torch.zeros_like(means[:, 0]), torch.ones_like(means[:, 0, 0]))
    parameters = Parameters(torch.zeros(2, 3, dtype=torch.float64).log_softmax(1), means, covariances)
    found = statistics_of("native", "full", x, parameters, frame=frame)
    expected = statistics_of("reference", "full", x.double(), parameters, frame=frame)
    error = (found.first / found.mass.unsqueeze(-1) - expected.first / expected.mass.unsqueeze(-1)).abs().max()
    assert error < 3e-9  # the standard deviation is 1e-3, and rounding changes means by up to 6e-8


@needs_compiler
def test_results_are_the_same_for_every_run_and_number_of_threads():
    x, parameters = problem(torch.float32, sets=1, items=10_000)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            found.append(statistics_of("native", "full", x, parameters))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_compiler
def test_nan_points_give_nan():
    x, parameters = problem(torch.float32)
    x[0, 5, 1] = float("nan")
    found = statistics_of("native", "full", x, parameters, with_log_likelihood=True)
    assert found.log_likelihood[0].isnan() and found.mass[0].isnan().all()
    assert found.mass[1].isfinite().all()


def test_backend_can_be_set_in_a_block_or_permanently():
    x = torch.randn(1, 4096, 2)
    with use_backend("reference"):
        assert not native.serves(x.mT, COVARIANCES["full"])
    assert native.serves(x.mT, COVARIANCES["full"]) == (not REASON)
    with pytest.raises(ValueError, match="cuda"):
        use_backend("cuda")


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_without_a_compiler(backend, tmp_path):
    code = f"""
import torch, em_lightning
from em_lightning.mixture.backends import use_backend
use_backend({backend!r})
print(em_lightning.EMOperator(2, 3)(torch.randn(1, 5000, 3)).means.shape)
"""
    environment = {**os.environ, "PATH": "", "XDG_CACHE_HOME": str(tmp_path)}
    warnings = ["-W", "error", "-W", "ignore::FutureWarning:torch._export.utils"]  # of PyTorch 2.6 about its own code
    done = subprocess.run([sys.executable, *warnings, "-c", code], env=environment, capture_output=True, text=True)
    if backend == "auto":
        assert done.returncode == 0 and "[1, 2, 3]" in done.stdout, done.stderr
    else:
        assert done.returncode != 0 and "g++" in done.stderr


@needs_compiler
def test_message_of_a_failing_compiler(tmp_path, monkeypatch):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\nif [ $1 = --version ]; then exit 0; fi\necho cannot compile >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    load.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="cannot compile"):
            use_backend("native")
        assert not native.serves(torch.randn(1, 3, 5000), COVARIANCES["full"])
    finally:
        load.cache_clear()


@needs_compiler
def test_torch_compile_compiles_the_sources_that_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # an empty cache
    load.cache_clear(), compiler._cache_folder.cache_clear()
    operator, x = EMOperator(2, 3, num_iters=1, covariance="diag"), torch.randn(2, 9, 3)
    try:
        with use_backend("native"), torch.no_grad():
            found = torch.compile(operator, fullgraph=True, backend="eager")(x)
    finally:
        load.cache_clear(), compiler._cache_folder.cache_clear()
        torch._dynamo.reset()
    assert len(list((tmp_path / "em_lightning").glob("native_*"))) == 2  # one that use_backend tries, one for "diag"
    torch.testing.assert_close(found.means, operator(x).means)


@needs_compiler
@pytest.mark.parametrize("source", ["cholesky.cpp", "m_step.cpp", "ragged.cpp"])
def test_every_source_compiles(source):
    """Otherwise the reference takes over without a word, and tests of the native backend are skipped."""
    library, message = load(source)
    assert library is not None, message


class Products(TorchDispatchMode):
    """Collects the types of the factors of matrix products."""

    NAMES = {"mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "addbmm", "dot", "linear", "matmul"}

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.split("::")[1] in self.NAMES:
            self.dtypes |= {part.dtype for part in args if isinstance(part, torch.Tensor)}
        return function(*args, **(kwargs or {}))


def log_prob_of(kind):
    def density(x):
        parameters = problem(torch.float32, items=60)[1]
        fixed = Mixture(parameters.log_weights, parameters.means, covariances_of(kind, parameters.covariances))
        return fixed.to(torch.float32).log_prob(x)

    return density


DENSITIES = {
    **{f"log_prob, {kind}": log_prob_of(kind) for kind in KINDS},
    **{
        f"fit, {kind}": lambda x, kind=kind: EMOperator(3, 2, covariance=kind, residual=False)(x).log_prob(x)
        for kind in KINDS
    },
    "fit, student_t": lambda x: (op := EMOperator(3, 2, kernel="student_t", residual=False)).log_prob(x, op(x)),
    "fit, background": lambda x: EMOperator(3, 2, background=0.1, residual=False)(x).log_prob(x),
    "fit, prior": lambda x: EMOperator(3, 2, prior={}, residual=False)(x).log_prob(x),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_of_float32_points_take_products_in_float64(name):
    """A GPU may round products of float32 to TF32, which puts up to 2.4 nats of error into log-densities."""
    x = problem(torch.float32, items=60)[0].requires_grad_()
    with use_backend("reference"), Products() as products:
        DENSITIES[name](x).sum().backward()
    assert products.dtypes == {torch.float64}
