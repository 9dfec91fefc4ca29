"""EM layers for any shape, dtype, magnitude, mask and weights: finite values and gradients, monotone objectives."""

import math

import drawing
import pytest
import torch
from helpers import COVARIANCE_TYPES, full_covariances, is_finite
from hypothesis import given
from hypothesis import strategies as st
from test_properties_mixtures import mixtures, shapes

from em_lightning import KERNELS, EMOperator
from em_lightning.kernels import LearnedEnergyKernel
from em_lightning.operators import (
    DirectionalEM,
    EMAbstraction,
    EMPooling,
    EMRefinement,
    GeneralizedEM,
    ResidualCorrection,
)

ROBUST = ["gaussian", "student_t", "laplace", "huber", "pseudo_huber"]


def assert_slopes(output, inputs, dtype):
    """Assert that gradients are not NaN, and finite unless they are of half precision."""
    if not output.requires_grad:
        return
    for grad in torch.autograd.grad(output, inputs, allow_unused=True):
        assert grad is None or not grad.isnan().any(), grad
        assert grad is None or dtype == torch.float16 or grad.isfinite().all(), grad


def sets_of(values, power, features=3):
    """Return points (B, N, D), mask and weights (B, N), and K; points that do not count are NaN."""
    sets, items, components, features = shapes(values, features)
    dtype = values.draw(st.sampled_from(drawing.DTYPES))
    most = power.get(dtype, 2)
    x = values.draw(drawing.tensors((sets, items, features), dtype, -9, most))
    mask = values.draw(drawing.holes((sets, items)))
    weights = values.draw(drawing.counts((sets, items), torch.float32))
    if mask is not None:
        x = torch.where(mask.unsqueeze(-1), x, torch.nan)
    return x.requires_grad_(), mask, weights, components


# Powers of ten of the largest coordinates.
SQUARES = {torch.float64: 9, torch.float32: 6, torch.bfloat16: 6}


@pytest.mark.parametrize("kernel", ROBUST)
@given(values=st.data())
def test_operators_of_any_points(kernel, values):
    x, mask, weights, components = sets_of(values, SQUARES)
    sets, _, features = x.shape
    kind = values.draw(st.sampled_from([*COVARIANCE_TYPES, *["lowrank"] * (features > 1)]))
    init = values.draw(st.sampled_from(("farthest", "kmeans++", "random", "learned")))
    drawn = init in ("kmeans++", "random")
    background = values.draw(st.sampled_from((None, 0.1, {"estimate": True})))
    estimated = isinstance(background, dict)
    operator = EMOperator(
        components,
        features,
        num_iters=values.draw(st.integers(0, 3)),
        covariance=kind,
        rank=1 if kind == "lowrank" else None,
        kernel=kernel,
        init=init,
        num_starts=values.draw(st.integers(1, 2)) if drawn else 1,
        residual=values.draw(st.booleans()),
        background=background,
        prior=values.draw(st.sampled_from((None, {}))),
    )
    if operator.correction is not None and values.draw(st.booleans()):  # as if trained
        torch.nn.init.normal_(operator.correction.decide[-1].weight, std=0.3)
    mixture = operator(x, mask, weights)
    wide = torch.promote_types(x.dtype, torch.float32)
    assert mixture.means.shape == (sets, components, features) and mixture.means.dtype == wide
    assert is_finite(mixture), mixture
    total = mixture.weights.sum(-1)
    assert ((total < 1 + 1e-4) & ((total > 1 - 1e-4) | (estimated and total > 0.9e-5))).all(), total
    spread = torch.linalg.eigvalsh(full_covariances(mixture).detach().double()).flatten(1)
    # Second moments about the middle of a set have the digits of double precision relative to its squared extent.
    digits = 1e-15 * x.detach().double().nan_to_num().flatten(1).abs().amax(1, keepdim=True).square()
    assert (spread >= -1e-5 * spread.amax(1, keepdim=True) - digits).all(), spread
    counted = x.detach() if mask is None else x.detach()[mask]
    if len(counted.flatten()) and not operator.training and components == 1 and weights is None:
        low, high = counted.amin().double(), counted.amax().double()
        assert (mixture.means.double() >= low - 1e-5 * (high - low) - 1e-6 * low.abs()).all()
    background = operator.background
    energies = None if background is None else background.energies(x.to(wide), mask)
    log_prob = operator.log_prob(x.to(wide), mixture, mask, energies)
    assert log_prob.isfinite().all(), log_prob
    objective = operator.objective(x.to(wide), mixture, mask, weights)
    assert objective.isfinite().all()
    inputs = [x, *operator.parameters()]
    # Points that do not count may be so far from the fit that their gradients overflow.
    fitted = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
    fitted = fitted if weights is None else fitted & (weights > 0)
    energies = None if background is None else background.energies(x.to(wide), fitted)
    log_prob = operator.log_prob(x.to(wide), mixture, fitted, energies)
    if x.dtype == torch.float16:  # two infinite gradients may have the sum NaN
        assert_slopes(mixture.means.sum(), inputs, x.dtype)
    else:
        assert_slopes(mixture.means.sum() + log_prob.sum(), inputs, x.dtype)


@given(values=st.data())
def test_fits_of_any_points(values):
    x, mask, weights, components = sets_of(values, SQUARES)
    wide = torch.promote_types(x.dtype, torch.float32)
    operator = EMOperator(
        components, x.shape[-1], covariance=values.draw(st.sampled_from(COVARIANCE_TYPES)), residual=False
    )
    with torch.no_grad():
        x = x.to(wide)
        first = operator(x, mask, weights, num_iters=0)
        fitted, steps = operator.fit(x, mask, weights, max_iters=values.draw(st.integers(0, 4)))
        assert is_finite(fitted) and ((steps >= 0) & (steps <= 4)).all()
        last = list(operator.iterate(x, mask, weights, num_iters=2))
        assert len(last) == 3
        torch.testing.assert_close(last[0].means, first.means)
        plain = operator(x, mask, weights, num_iters=2)
        torch.testing.assert_close(last[-1].means, plain.means)
        background = operator.background
        energies = None if background is None else background.energies(x, mask)
        responsibilities = operator.posterior(x, fitted, mask, energies).responsibilities
        ones = torch.ones_like(x[..., 0])
        torch.testing.assert_close(responsibilities.sum(-1), ones, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [key for key in KERNELS if KERNELS[key] is not LearnedEnergyKernel])
@given(values=st.data())
def test_generalized_em_of_any_points(kernel, values):
    # The exponential kernel overflows for larger points.
    x, mask, weights, components = sets_of(values, {torch.float64: 6, torch.float32: 4}, 2)
    features = x.shape[-1]
    options = {"name": kernel, "num_features": features} if kernel == "mahalanobis" else kernel
    operator = GeneralizedEM(components, features, kernel=options, num_iters=2)
    if mask is not None:
        weights = None  # mask and weights are combined into one weight
    start, *_, mixture = operator.iterate(x, mask, weights)
    assert is_finite(mixture), mixture
    own = torch.where(mask.unsqueeze(-1), x, 0.0) if mask is not None else x
    wide = own.detach().to(mixture.centers.dtype)
    before, after = (operator.objective(wide, each, mask, weights) for each in (start, mixture))
    posterior = operator.posterior(wide, mixture)
    size = posterior.energies.detach().abs().amax((1, 2)) * (1 if weights is None else weights.sum(-1))
    eps = torch.finfo(wide.dtype).eps
    fell = after < before - 64 * eps * (1 + size.double() * x.shape[1] + before.abs())
    assert not (fell & before.isfinite()).any(), (before, after)
    assert_slopes(mixture.centers.sum(), [x], x.dtype)


@given(values=st.data())
def test_directional_em_of_any_points(values):
    x, mask, weights, components = sets_of(values, {torch.float64: 9, torch.float32: 9, torch.bfloat16: 9}, 4)
    if x.shape[-1] < 2:
        x = torch.cat([x, -x], -1).detach().requires_grad_()
    sets, _, features = x.shape
    init = values.draw(st.sampled_from(("farthest", "kmeans++", "random")))
    operator = DirectionalEM(components, features, num_iters=values.draw(st.integers(0, 3)), init=init)
    mixture = operator(x, mask, weights)
    assert is_finite(mixture)
    torch.testing.assert_close(mixture.means.norm(dim=-1), torch.ones(sets, components).to(mixture.means))
    log_prob = mixture.log_prob(x.to(mixture.means.dtype), mask)
    assert log_prob.isfinite().all()
    # Lengths do not matter: 2 is a power of the base.
    again = operator(2 * x.detach(), mask, weights) if init == "farthest" else mixture
    torch.testing.assert_close(again.means, mixture.means)
    least = x.detach().double().norm(dim=-1).nan_to_num()
    if (least[least > 0] > 1e-20).all():
        assert_slopes(mixture.means.sum() + (0.0 if x.dtype == torch.float16 else log_prob.sum()), [x], x.dtype)


@given(values=st.data())
def test_pooling_of_any_items(values):
    x, mask, weights, components = sets_of(values, SQUARES)
    features = x.shape[-1]
    parts = ("weights", "means", "scales", "values")
    out = values.draw(st.sampled_from((None, 3)))
    pooling = EMPooling(
        components,
        features,
        summary=[part for part in parts if values.draw(st.booleans())] or ["means"],
        out_features=out,
        head_features=values.draw(st.sampled_from((None, 2))),
    ).to(torch.promote_types(x.dtype, torch.float32))
    pooled = pooling(x, mask, weights)
    assert pooled.shape == (len(x), pooling.out_features) and pooled.dtype == x.dtype
    limit = torch.finfo(x.dtype).max
    assert pooled.isfinite().all() or (x.dtype == torch.float16 and not pooled.isnan().any()), (pooled, limit)
    assert_slopes(pooled.float().sum(), [x, *pooling.parameters()], x.dtype)


@given(values=st.data())
def test_refinement_of_any_items(values):
    x, mask, _, components = sets_of(values, SQUARES)
    x = x.detach().nan_to_num().requires_grad_()
    layer = EMRefinement(components, x.shape[-1], num_iters=2)
    refined = layer(x)
    assert torch.equal(refined, x)  # a new layer is the identity
    with torch.no_grad():
        layer.gate.fill_(1.0)
    moved = layer(x)
    # The added vector is a mean of means, within the bounding box of the points.
    added = (moved.double() - x.double()).detach()
    low, high = (bound.detach().double() for bound in (x.amin(1, keepdim=True), x.amax(1, keepdim=True)))
    slack = 16 * torch.finfo(x.dtype).eps * x.detach().double().abs().amax() + torch.finfo(x.dtype).smallest_normal
    assert ((added >= low - slack) & (added <= high + slack)).all(), (added, low, high)
    assert_slopes(moved.float().sum(), [x, layer.gate], x.dtype)


@given(values=st.data())
def test_abstraction_of_any_items(values):
    sets, items, components, features = shapes(values, 2)
    dtype = values.draw(st.sampled_from(drawing.WIDE))
    size = 10.0 ** values.draw(st.integers(-9, 9))
    x = (size * values.draw(drawing.tensors((sets, items, features), least=-3, most=3))).to(dtype)
    mask = values.draw(drawing.holes((sets, items)))
    width = values.draw(st.sampled_from((None, 2)))
    h = None if width is None else values.draw(drawing.tensors((sets, items, width), dtype, -9, 9)).requires_grad_()
    pitch = size * values.draw(st.sampled_from((0.1, 1.0, 10.0)))
    layer = EMAbstraction(components, features, width, 3, pitch=pitch, blocks=values.draw(st.integers(0, 1))).to(dtype)
    layer.eval()
    dirty = x if mask is None else torch.where(mask.unsqueeze(-1), x, torch.nan)
    centers, tokens = layer(dirty, h, mask)
    assert centers.shape == (sets, components, features) and tokens.shape == (sets, components, 3)
    assert centers.isfinite().all() and tokens.isfinite().all() and (tokens >= 0).all()
    if h is not None:
        assert_slopes(tokens.sum(), [h, *[p for p in layer.parameters() if p.requires_grad]], dtype)


@given(values=st.data())
def test_aggregation_of_any_groups(values):
    pytest.importorskip("torch_geometric")
    from em_lightning.operators import EMAggregation, register_aggregation

    rows, features, groups = (values.draw(st.integers(least, most)) for least, most in ((0, 6), (1, 3), (1, 3)))
    dtype = values.draw(st.sampled_from(drawing.DTYPES))
    x = values.draw(drawing.tensors((rows, features), dtype, -9, SQUARES.get(dtype, 2))).requires_grad_()
    index = torch.tensor([values.draw(st.integers(0, groups - 1)) for _ in range(rows)], dtype=torch.long)
    found = EMAggregation(2)(x, index, dim_size=groups)
    assert found.shape == (groups, features) and found.isfinite().all() and found.dtype == dtype
    # The initial aggregation is the mean, and zeros for an empty group.
    eps = 32 * torch.finfo(dtype).eps + 1e-5
    for group in range(groups):
        own = x.detach()[index == group].double()
        expected = own.mean(0) if len(own) else torch.zeros(features).double()
        size = float(own.abs().max()) if len(own) else 0.0
        least = max(eps * size, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)  # or its last digit
        torch.testing.assert_close(found[group].detach().double(), expected, rtol=eps, atol=least)
    register_aggregation()
    import torch_geometric.nn.aggr

    assert torch_geometric.nn.aggr.EMAggregation is EMAggregation
    if rows:
        assert_slopes(found.float().sum(), [x], dtype)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@given(values=st.data())
def test_corrections_of_any_weights(kind, values):
    sets, items, components, features = shapes(values)
    size = 10.0 ** values.draw(st.integers(-6, 6))
    operator = EMOperator(components, features, covariance=kind, num_iters=1, covariance_floor=1e-6 * size**2).double()
    correction = operator.correction
    assert isinstance(correction, ResidualCorrection)
    init = values.draw(mixtures(kind, sets, components, features, size=size))
    x = size * values.draw(drawing.tensors((sets, items, features), least=-2, most=1))
    exact = operator.classical()(x, init=init)
    torch.testing.assert_close(operator(x, init=init).means, exact.means, rtol=1e-12, atol=1e-12 * size)
    scale = 10.0 ** values.draw(st.integers(-3, 6))
    with torch.no_grad():
        for parameter in correction.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    corrected = operator(x, init=init)
    assert is_finite(corrected)
    spread = torch.linalg.eigvalsh(full_covariances(corrected))
    assert (spread > -1e-9 * spread.amax()).all()
    # Documented: a step is at most one standard deviation in a feature of the component's own frame.
    if kind in ("diag", "spherical"):
        root = exact.covariances.sqrt() if kind == "diag" else exact.covariances.sqrt().unsqueeze(-1)
        assert ((corrected.means - exact.means).abs() <= root * (1 + 1e-9)).all()
    # A correction that lowers the likelihood is dropped, up to the rounding of squared distances.
    before, after = (operator.objective(x, each) for each in (exact, corrected))
    reach = (x.abs().amax() + corrected.means.abs().amax()) ** 2 / min(spread.amin(), size**2)
    slack = 64 * torch.finfo(x.dtype).eps * (before.abs() + items * (1.0 + reach))
    spare = items - 1 - (components - 1 + components * features + operator.family.num_parameters(components, features))
    if spare > 0:
        allowed = items * (items - 1 - spare) / spare
        assert (after >= before - allowed - slack).all()
    assert_slopes(corrected.means.sum(), list(correction.parameters()), torch.float64)


@given(values=st.data())
def test_operators_report_wrong_input(values):
    operator = EMOperator(2, 2, residual=False)
    shape = values.draw(st.lists(st.integers(0, 3), min_size=0, max_size=4))
    dtype = values.draw(st.sampled_from((torch.float32, torch.long, torch.bool, torch.complex64)))
    x = torch.zeros(shape, dtype=dtype)
    if shape and values.draw(st.booleans()) and dtype == torch.float32 and x.numel():
        x.flatten()[0] = values.draw(st.sampled_from((math.nan, math.inf, -math.inf)))
    mask = values.draw(st.sampled_from((None, torch.ones(shape[:2], dtype=torch.bool), torch.ones(3))))
    weights = values.draw(st.sampled_from((None, -torch.ones(shape[:2]), torch.full(shape[:2], math.inf))))
    try:
        mixture = operator(x, mask, weights)
    except (ValueError, TypeError) as error:
        assert any(word in str(error) for word in ("x ", "mask", "weights")), error
        return
    assert len(shape) == 3 and shape[1] > 0 and shape[2] == 2
    assert is_finite(mixture)
