"""Kernels, competitions and statistics at random shapes, dtypes and magnitudes, compared with reference formulas.

Keys come from the registries, formulas from the contract tests.
"""

import math
import warnings

import drawing
import pytest
import test_competition
import test_kernels
import torch
from contracts import CompetitionChecks, KernelChecks
from hypothesis import given
from hypothesis import strategies as st

from em_lightning import COMPETITIONS, KERNELS, STATISTICS
from em_lightning.competition import Posterior, ScopeWarning
from em_lightning.kernels import (
    EllipticalKernel,
    LearnedEnergyKernel,
    NoDensityError,
    density_kernel,
    squared_distance,
    unit_vectors,
)

FORMULAS = {
    type(cls().make(2)): cls()
    for cls in list(vars(test_kernels).values())
    if isinstance(cls, type) and issubclass(cls, KernelChecks) and cls is not KernelChecks
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore", ScopeWarning)
    OPERATORS = {
        type(cls().make()): cls()
        for cls in list(vars(test_competition).values())
        if isinstance(cls, type) and issubclass(cls, CompetitionChecks) and cls is not CompetitionChecks
    }
GIVEN = {"mahalanobis": lambda features: {"num_features": features}}


def build_kernel(key, features):
    formula = FORMULAS.get(KERNELS[key])
    if formula is not None:
        return formula.make(features), formula.energy
    return KERNELS.build(key, **GIVEN.get(key, lambda features: {})(features)), None


def in_plain_python(energy, item, center):
    """Return the value of the formula, or None where Python's floats overflow."""
    try:
        return energy(item, center)
    except ZeroDivisionError:
        return 1.0  # a zero vector under the cosine
    except OverflowError:
        return None


@given(values=st.data())
def test_unit_vectors_of_any_size(values):
    dtype = values.draw(st.sampled_from(drawing.DTYPES))
    shape = (values.draw(st.integers(0, 3)), values.draw(st.integers(1, 3)))
    x = values.draw(drawing.tensors(shape, dtype)).nan_to_num(0.0)
    units = unit_vectors(x)
    expected = (x != 0).any(-1).double()
    torch.testing.assert_close(units.double().norm(dim=-1), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("key", [key for key in KERNELS if KERNELS[key] is not LearnedEnergyKernel])
@given(values=st.data())
def test_energies_of_any_size(key, values):
    items, centers, features = (values.draw(st.integers(least, 3)) for least in (0, 0, 1))
    dtype = values.draw(st.sampled_from(drawing.DTYPES))
    kernel, energy = build_kernel(key, features)
    x = values.draw(drawing.tensors((items, features), dtype))
    c = values.draw(drawing.tensors((centers, features), dtype))
    if items and centers and values.draw(st.booleans()):
        c[0] = x[0]
    found = kernel(x.requires_grad_(), c.requires_grad_())
    assert found.shape == (items, centers) and found.dtype == dtype
    # Each pair separately in float64, so that each gradient belongs to one energy.
    pairs = [part.detach().double().expand(items, centers, features).unsqueeze(-2) for part in (x.unsqueeze(1), c)]
    pairs = [part.clone().requires_grad_() for part in pairs]
    wide = kernel.double()(*pairs).squeeze((-1, -2))
    slopes = torch.autograd.grad(wide.sum(), pairs)
    wide = wide.detach()
    # Error of the energy caused by rounding the inputs, in units of eps.
    shake = sum((slope * part.detach()).abs().sum((-1, -2)) for slope, part in zip(slopes, pairs, strict=True))
    if energy is not None:
        for n in range(items):
            for k in range(centers):
                expected = in_plain_python(energy, x[n].tolist(), c[k].tolist())
                if expected is not None and not (key == "exponential" and expected > 1e15):  # documented: it saturates
                    assert wide[n, k].item() == pytest.approx(
                        expected, rel=1e-9, abs=1e-9 * (1e-3 + shake[n, k].item())
                    )
    info = torch.finfo(dtype)
    known = (wide.abs() + shake) < 0.5 * info.max
    # Documented: beyond the square root of the largest number a robust energy of the squared distance is infinite.
    square = (pairs[0] - pairs[1]).detach().square().sum((-1, -2))
    known &= (key != "student_t") | (square < 1e-2 * torch.finfo(torch.promote_types(dtype, torch.float32)).max)
    eps = max(info.eps, torch.finfo(torch.float32).eps if dtype != torch.float64 else 0.0)
    error = (found.detach().double() - wide).abs()
    inner = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    allowed = 64 * inner * (wide.abs() + shake) + eps * wide.abs() + info.smallest_normal * 64
    if key == "cosine":
        allowed = allowed + 16 * inner  # rounding of the cosine near 1
    assert (error <= allowed)[known].all(), (found, wide)
    # Only sums of products may overflow to inf - inf.
    assert key == "dot_product" or not found.isnan().any(), found
    if known.all():
        for grad, slope in zip(torch.autograd.grad(found.sum(), (x, c)), slopes, strict=True):
            assert grad.isfinite().all() or (slope.abs() > 0.3 * info.max).any(), (grad, slope)


@pytest.mark.parametrize("key", [key for key in KERNELS if KERNELS[key] is not LearnedEnergyKernel])
@given(values=st.data())
def test_normalizers_of_any_shape_parameter(key, values):
    features = values.draw(st.integers(1, 64))
    kernel = build_kernel(key, values.draw(st.integers(1, 3)) if key == "mahalanobis" else features)[0]
    with torch.no_grad():
        for name, parameter in kernel.named_parameters():
            if name != "log_factor":
                parameter += values.draw(st.floats(-4, 4))
    try:
        normalizer = kernel.log_normalizer(getattr(kernel, "num_features", features))
    except NoDensityError as error:
        assert type(kernel).__name__ in str(error)
        return
    assert normalizer.isfinite(), (kernel, features, normalizer)
    if normalizer.requires_grad:
        for grad in torch.autograd.grad(normalizer, list(kernel.parameters()), allow_unused=True):
            assert grad is None or grad.isfinite().all()


@pytest.mark.parametrize("key", [key for key in KERNELS if issubclass(KERNELS[key], EllipticalKernel)])
@given(values=st.data())
def test_elliptical_energies_of_any_size(key, values):
    features = values.draw(st.integers(1, 8))
    dtype = values.draw(st.sampled_from(drawing.WIDE))
    kernel = density_kernel({"name": key, "learnable": values.draw(st.booleans())})
    y = values.draw(drawing.tensors((5,), dtype)).abs().requires_grad_()
    rho, weight = kernel.rho(y, features), kernel.irls_weight(y, features)
    (slope,) = torch.autograd.grad(rho.sum(), y)
    assert (rho >= 0).all() and rho.isfinite().all() and (weight >= 0).all() and weight.isfinite().all()
    torch.testing.assert_close(2 * slope, weight, rtol=1e-4, atol=torch.finfo(dtype).smallest_normal)
    if weight.requires_grad:
        assert torch.autograd.grad(weight.sum(), y, materialize_grads=True)[0].isfinite().all()


@given(values=st.data())
def test_squared_distances_of_any_size(values):
    items, centers, features = (values.draw(st.integers(0, 4)) for _ in range(3))
    x = values.draw(drawing.tensors((items, features), least=-150, most=150))
    c = values.draw(drawing.tensors((centers, features), least=-150, most=150))
    found = squared_distance(x, c)
    expected = [[math.fsum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in c.tolist()] for p in x.tolist()]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64).reshape(items, centers), rtol=1e-14, atol=1e-300
    )


# Competitions.


@pytest.mark.filterwarnings("ignore::em_lightning.competition.ScopeWarning")
@pytest.mark.parametrize("key", list(COMPETITIONS))
@given(values=st.data())
def test_posteriors_of_any_energies(key, values):
    contract = OPERATORS.get(COMPETITIONS[key])
    dtype = values.draw(st.sampled_from(drawing.DTYPES))
    shape = [values.draw(st.integers(0, 4)), (4 if key == "grouped" else 2) * values.draw(st.integers(1, 4))]
    temperature = 10.0 ** values.draw(st.integers(-3, 3))
    balanced = key == "balanced"
    d = values.draw(drawing.tensors(shape, dtype, *((-3, 3) if balanced else (-30, 30))))
    if balanced:  # documented: energies up to a thousand times T
        temperature = max(temperature, 1e-3 * float(d.double().abs().max()) if d.numel() else 1.0)
    elif shape[0] and values.draw(st.booleans()):
        d[0, : values.draw(st.integers(1, shape[1]))] = torch.inf
    build = COMPETITIONS[key] if contract is None else contract.make
    operator = build(temperature=temperature)
    posterior = operator(d.requires_grad_())
    r, free = posterior.responsibilities.detach().double(), posterior.free_energy.detach().double()
    info = torch.finfo(dtype)
    eps = 64 * max(info.eps, 1e-13)
    lost = torch.isposinf(d.detach()).all(-1)  # without a background, all responsibilities are 0 there
    assert (r >= 0).all() and (r <= 1 + eps).all()
    assert r[..., : shape[1]][torch.isposinf(d.detach())].eq(0).all()
    totals = r.sum(-1) if contract is None else contract.totals(r)
    alone = ((totals.unsqueeze(-1) - 1).abs() <= (max(1e-3, eps) if balanced else eps)).flatten(1).all(-1)
    assert (alone | torch.isposinf(d.detach()).any(-1) if key == "grouped" else alone | lost).all(), r
    low = posterior.energies.detach().double().amin(-1)
    if key not in ("grouped", "balanced"):
        size = math.log(posterior.energies.shape[-1])
        slack = eps * (low.abs() + temperature) + info.tiny
        inside = (free <= low + slack) & (free >= low - temperature * size * (1 + eps) - slack)
        inside = inside | (low - temperature * size < -info.max)
        assert (inside | (lost & torch.isposinf(free)) | (low.abs() > 0.9 * info.max)).all(), (free, low)
    found = posterior.free_energy
    (grad,) = torch.autograd.grad(found[found.isfinite()].sum(), d)
    assert grad.isfinite().all()
    kept = ~lost & found.detach().unsqueeze(-1).flatten(1).isfinite().all(-1)
    gap = (grad.double() - r[..., : shape[1]]).abs()[kept]
    assert (gap <= (max(1e-2, eps) if balanced else eps)).all(), (grad, r)


@given(values=st.data())
def test_softmin_is_its_formula(values):
    size = values.draw(st.integers(1, 5))
    temperature = 10.0 ** values.draw(st.integers(-30, 30))
    d = values.draw(drawing.tensors((size,)))
    prior = values.draw(st.one_of(st.none(), drawing.tensors((size,), least=-2, most=2)))
    posterior = COMPETITIONS.build("softmin", temperature=temperature)(d, prior)
    logits = [
        -e / temperature + p for e, p in zip(d.tolist(), [0.0] * size if prior is None else prior.tolist(), strict=True)
    ]
    top = max(logits)
    total = math.fsum(math.exp(z - top) for z in logits)
    expected = [math.exp(z - top) / total for z in logits]
    # Rounding error of a logit, relative to its size.
    rel = 1e-13 + 1e-15 * max(abs(z) for z in logits)
    if rel < 0.1:
        assert posterior.responsibilities.tolist() == pytest.approx(expected, rel=rel, abs=rel)
    # A sum near 1 has an error of eps, and so has its logarithm: F has an error of at least eps T.
    free = -temperature * (top + math.log(total))
    assert posterior.free_energy.item() == pytest.approx(free, rel=1e-12, abs=1e-300 + 1e-15 * temperature)


# Statistics.


@pytest.mark.parametrize("key", list(STATISTICS))
@given(values=st.data())
def test_statistics_of_any_posterior(key, values):
    dtype = values.draw(st.sampled_from(drawing.DTYPES))
    items, size, width = values.draw(st.integers(0, 3)), values.draw(st.integers(1, 4)), values.draw(st.integers(0, 2))
    d = values.draw(drawing.tensors((items, size), dtype, -30, 4)).requires_grad_()
    posterior = COMPETITIONS.build("softmin")(d)
    vectors = values.draw(drawing.tensors((size, width) if width else (size,), dtype, -4, 2))
    found = STATISTICS.build(key)(posterior, vectors if key in ("mean", "variance", "mode") else None)
    r = posterior.responsibilities.detach().double()
    full = vectors.double() if width else vectors.double().unsqueeze(-1)
    mean = r @ full
    winner = posterior.responsibilities.detach().argmax(-1)
    expected = {
        "responsibilities": r,
        "mean": mean,
        "variance": torch.einsum("nk,nkv->nv", r, (full - mean.unsqueeze(1)).square()),
        "mode": full[winner],
        "entropy": -torch.special.xlogy(r, r).sum(-1),
        "log_responsibilities": r.clamp_min(torch.finfo(dtype).tiny).log(),
        "neg_log_responsibilities": d.detach().double() - posterior.free_energy.detach().double().unsqueeze(-1),
    }.get(key)
    assert found.isfinite().all(), found
    if expected is not None:
        expected = expected if width or expected.ndim == found.ndim else expected.squeeze(-1)
        scale = full.abs().amax().item() if full.numel() and key in ("mean", "variance", "mode") else 1.0
        scale = scale**2 if key == "variance" else scale
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            found.detach().double(),
            expected,
            rtol=tolerance,
            atol=tolerance * scale + torch.finfo(dtype).smallest_normal,
        )
    # Documented: the derivative of a variance by a responsibility is a square; here that of the sum over features.
    squares = (full - mean.unsqueeze(1)).square().sum(-1) if key == "variance" else mean.new_zeros(1)
    if found.requires_grad and (squares < torch.finfo(dtype).max).all():
        assert torch.autograd.grad(found.float().sum(), d)[0].isfinite().all()


@given(values=st.data())
def test_any_posterior_can_be_read(values):
    items, size = values.draw(st.integers(0, 3)), values.draw(st.integers(1, 4))
    raw = values.draw(drawing.tensors((items, size), least=-3, most=3)).abs()
    r = raw / raw.sum(-1, keepdim=True).clamp_min(1e-300)
    posterior = Posterior(raw, r, raw.sum(-1))
    entropy = posterior.entropy()
    assert ((entropy >= 0) & (entropy <= math.log(size) + 1e-12)).all()
    torch.testing.assert_close(posterior.perplexity(), entropy.exp())
    assert (posterior.mode() == r.argmax(-1)).all()
    assert (posterior.variance(torch.ones(size).double()).abs() <= 1e-12 * (1 - r.sum(-1)).abs() + 1).all()
