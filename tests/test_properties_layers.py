"""Batch statistics, losses and metrics at any shape, dtype and magnitude, against plain Python and numpy in float64.

Keys come from the registries.
"""

import math

import drawing
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_properties_activations import log_total

from em_lightning import LOSSES, EMLoss, metrics, softmin
from em_lightning.distributed import (
    Moments,
    accumulation_dtype,
    batch_mean,
    batch_moments,
    flatten_units,
    global_sum,
    is_distributed,
)
from em_lightning.losses import WeightRedundancyLoss
from em_lightning.studies import linear_probe

pytestmark = pytest.mark.filterwarnings("ignore:a batch of:UserWarning")

# Batch statistics and losses.


def batch(values, dtype, most=30):
    """Return energies (N, D), mask and weights (N,), and the items that count with their weights, in numpy."""
    items, units = values.draw(st.integers(0, 5)), values.draw(st.integers(1, 4))
    x = values.draw(drawing.tensors((items, units), dtype, -30, most))
    mask, weights = values.draw(drawing.holes((items,))), values.draw(drawing.counts((items,), dtype))
    w = np.ones(items) if weights is None else weights.double().numpy().copy()
    if mask is not None:
        w[~mask.numpy()] = 0.0
        x = torch.where(mask[:, None], x, torch.nan)
    kept = x.double().numpy()[w > 0]
    return x, mask, weights, kept, w[w > 0]


def in_numpy(x, w):
    """Return mean and unbiased covariance by the definition."""
    total = w.sum()
    if total == 0:
        return np.zeros(x.shape[1]), np.zeros((x.shape[1],) * 2)
    mean = (w[:, None] * x).sum(0) / total
    centred = x - mean
    return mean, centred.T @ (w[:, None] * centred) / (total - 1) if total > 1 else np.zeros((x.shape[1],) * 2)


def squares_fit(kept, dtype):
    """Return whether squares of these numbers are in the range of the dtype that statistics are taken in."""
    return np.abs(kept).max(initial=0.0) ** 2 < 1e-2 * torch.finfo(torch.promote_types(dtype, torch.float32)).max


@given(values=st.data())
def test_means_and_layouts_of_random_batches(values):
    dtype = values.draw(st.sampled_from(drawing.DTYPES))
    x, mask, weights, kept, w = batch(values, dtype)
    items, counts = flatten_units(x, -1, mask, weights)
    wide = torch.promote_types(dtype, torch.float32)
    assert items.dtype == wide and items.isfinite().all()
    assert accumulation_dtype(items) == torch.float64 and not is_distributed() and torch.equal(global_sum(items), items)
    mean = batch_mean(items, counts)
    eps = 64 * torch.finfo(wide).eps
    expected = (w[:, None] * kept).sum(0) / max(w.sum(), 1e-300)
    size = float(np.abs(kept).max(initial=0.0))
    np.testing.assert_allclose(mean.double(), expected, rtol=eps, atol=eps * size + 1e-37)
    temperature = 10.0 ** values.draw(st.integers(-3, 3))
    free = softmin(items, temperature).free_energy.double().tolist()
    for row, value in zip(items.double().tolist(), free, strict=True):
        expected = -temperature * log_total([-z / temperature for z in row])
        reach = max(map(abs, row)) + temperature * (1 + math.log(len(row)))
        assert abs(value - expected) <= eps * reach


@given(values=st.data())
def test_moments_of_any_batch(values):
    dtype = values.draw(st.sampled_from(drawing.DTYPES))
    x, mask, weights, kept, w = batch(values, dtype)
    moments = batch_moments(x, mask=mask, weights=weights)
    assert isinstance(moments, Moments)
    mean, covariance = in_numpy(kept, w)
    eps = 64 * torch.finfo(moments.mean.dtype).eps
    size = float(np.abs(kept).max(initial=0.0))
    np.testing.assert_allclose(moments.mean.double(), mean, rtol=eps, atol=eps * size + 1e-37)
    if not squares_fit(kept, dtype):
        return  # documented
    # Rounding errors of the mean and of the items enter the deviations.
    total = float(w.sum())
    freedom = total / (total - 1) if total > 1 else 1.0
    # N - 1 cancels near N = 1, where weights are rounded in their own dtype.
    freedom = freedom * (1 + freedom)
    spread = float(np.abs(kept - mean).max(initial=0.0)) + eps * size
    allowed = eps * freedom * (spread**2 + spread * size) + 1e-37
    found = moments.covariance().double().numpy()
    assert np.abs(found - covariance).max(initial=0.0) <= allowed, (found, covariance)
    np.testing.assert_allclose(moments.variance.double(), found.diagonal(), rtol=eps, atol=allowed)
    assert moments.redundancy().isfinite()


def expected_loss(key, kept, w):
    """Return a loss computed by numpy, and the allowed error in units of eps."""
    _, covariance = in_numpy(kept, w)
    variance = covariance.diagonal()
    lows = kept.min(1, keepdims=True)
    total = np.exp(lows - kept).sum(1, keepdims=True)
    free = (lows - np.log(total))[:, 0]
    share = (w[:, None] * np.exp(lows - kept) / total).sum(0) / max(w.sum(), 1e-300)
    std = np.sqrt(variance) + 1e-8
    correlation = covariance / std / std[:, None]
    spectrum = np.linalg.eigvalsh(covariance).clip(0) + 1e-6
    reach = np.abs(kept).max(initial=0.0)
    # Rounding the items changes a variance by 2 |x| sigma + |x|^2 eps; the logarithm makes that relative.
    shake = (2 * reach * np.sqrt(variance) + 1e-3 * reach**2) / (variance + 1e-6)
    return {
        "free_energy": ((w * free).sum(), (w * (np.abs(free) + 1)).sum() + (w.sum() * reach)),
        "variance": (-np.log(variance + 1e-6).sum(), shake.sum() + 20 * len(variance)),
        "bounded_variance": (np.log1p(1 / (variance + 1e-6)).sum(), shake.sum() + 20 * len(variance)),
        "decorrelation": (
            (correlation**2).sum() - (correlation.diagonal() ** 2).sum(),
            len(std) ** 2 * (1 + (reach / std).max()),
        ),
        "log_det": (
            -np.log(spectrum).sum(),
            ((spectrum.max() + reach * np.sqrt(spectrum.max())) / spectrum).sum() + 20 * len(std),
        ),
        "balance": (math.log(len(std)) + (share * np.log(share.clip(1e-300))).sum(), 20 + 2 * reach),
    }[key]


# Losses of a weight, not of a batch of energies.
OF_ENERGIES = [key for key in LOSSES if key != "weight_redundancy"]
OF_SQUARES = ("variance", "bounded_variance", "decorrelation", "log_det")


@pytest.mark.parametrize("key", OF_ENERGIES)
@given(values=st.data())
def test_losses_of_any_batch(key, values):
    dtype = values.draw(st.sampled_from(drawing.DTYPES))
    # Documented: squares of energies lie in the range of the dtype.
    most = 18 if key in OF_SQUARES and dtype != torch.float64 else 30
    x, mask, weights, kept, w = batch(values, dtype, most)
    found = LOSSES.build(key)(x.requires_grad_(), mask, weights)
    wide = torch.promote_types(dtype, torch.float32)
    assert found.shape == () and found.dtype == wide
    assert found.isfinite(), (found, x)
    (grad,) = torch.autograd.grad(found, x)
    assert grad.isfinite().all() or (dtype == torch.float16 and not grad.isnan().any()), grad
    if mask is not None:
        assert not grad[~mask].any()
    if len(kept) and (w.sum() > 1.5 or key in ("free_energy", "balance")):
        expected, slack = expected_loss(key, kept, w)
        allowed = 64 * torch.finfo(wide).eps * (slack + abs(expected))
        assert abs(found.item() - expected) <= allowed or allowed > 0.1 * (1 + abs(expected)), (found, expected)


@given(values=st.data())
def test_composed_losses_are_the_sum_of_their_terms(values):
    dtype = values.draw(st.sampled_from(drawing.DTYPES))
    x, mask, weights, kept, w = batch(values, dtype, 18 if dtype != torch.float64 else 30)
    chosen = {key: values.draw(st.sampled_from((0.0, 0.5, 2.0))) for key in OF_ENERGIES}
    if not any(chosen.values()):
        with pytest.raises(ValueError, match="free_energy"):
            EMLoss(**chosen)
        return
    loss = EMLoss(**chosen)
    terms = loss(x.requires_grad_(), mask, weights)
    assert set(terms) == {key for key, weight in chosen.items() if weight}
    for key, value in terms.items():
        expected = chosen[key] * LOSSES.build(key)(x, mask, weights).item()
        slack = expected_loss(key, kept, w)[1] if len(kept) else 1.0
        allowed = 128 * torch.finfo(value.dtype).eps * (slack + abs(expected))
        assert abs(value.item() - expected) <= chosen[key] * allowed or allowed > 0.1, (key, value, expected)
    whole = loss.total(x, mask, weights)
    assert whole.item() == pytest.approx(sum(value.item() for value in terms.values()), rel=1e-5, abs=1e-3)
    grad = torch.autograd.grad(whole, x)[0]
    assert grad.isfinite().all() or (dtype == torch.float16 and not grad.isnan().any())


def test_energies_whose_squares_have_no_float_give_no_finite_loss():
    x = 1e25 * torch.tensor([[1.0, 2.0], [-1.0, 1.0], [0.5, -2.0]])
    assert LOSSES.build("variance")(x) == -torch.inf  # documented
    assert LOSSES.build("decorrelation")(x).isnan()
    assert EMLoss()(x)["decorrelation"].isnan()
    assert LOSSES.build("log_det")(x).isnan()
    assert LOSSES.build("decorrelation")(x.double()).isfinite()


@given(values=st.data())
def test_weight_redundancy_of_any_matrix(values):
    dtype = values.draw(st.sampled_from(drawing.DTYPES))
    rows, columns = values.draw(st.integers(0, 4)), values.draw(st.integers(0, 3))
    weight = values.draw(drawing.tensors((rows, columns), dtype)).requires_grad_()
    numbers = weight.detach().double().tolist()
    expected = 0.0
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            p, q = math.hypot(*a), math.hypot(*b)
            if i != j and p and q:
                expected += math.fsum(s / p * (t / q) for s, t in zip(a, b, strict=True)) ** 2
    found = WeightRedundancyLoss()(weight)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert found.item() == pytest.approx(expected, rel=64 * eps, abs=64 * eps * rows**2)
    (grad,) = torch.autograd.grad(found, weight)
    least = weight.detach().abs()[weight.detach() != 0].double().min().item() if weight.any() else 1.0
    assert grad.isfinite().all() or (not grad.isnan().any() and torch.finfo(dtype).max * least < 1e3), grad


# Metrics.


def moments_of(x):
    mean, covariance = in_numpy(x, np.ones(len(x)))
    return covariance if len(x) > 1 else np.full_like(covariance, np.nan)


def rank(x):
    if len(x) < 2:
        return math.nan
    spectrum = np.linalg.eigvalsh(moments_of(x)).clip(0)
    share = spectrum / spectrum.sum() if spectrum.sum() > 0 else spectrum
    return math.exp(-sum(p * math.log(p) for p in share if p > 0)) if spectrum.sum() > 0 else 0.0


def redundancy(x):
    if len(x) < 2:
        return math.nan
    if x.shape[1] == 1:
        return 0.0
    covariance = moments_of(x)
    std = np.sqrt(covariance.diagonal()) + 1e-8
    correlation = covariance / std / std[:, None]
    return (correlation**2).sum() - (correlation.diagonal() ** 2).sum()


def entropy(p):
    return -sum(q * math.log(q) for q in p if q > 0)


def mean_of(function):
    return lambda x: np.mean([function(row) for row in x]) if len(x) else math.nan


# Reference metrics, as functions of all items in float64.
METRICS = {
    "L0": mean_of(lambda row: (row > 0.01).sum()),
    "DeadUnits": lambda x: math.nan if len(x) < 2 else (moments_of(x).diagonal() < 0.01).sum(),
    "EffectiveRank": rank,
    "MaxResponsibility": mean_of(max),
    "MinVariance": lambda x: moments_of(x).diagonal().min(),
    "MixtureLogLikelihood": mean_of(lambda row: row[0]),
    "Redundancy": redundancy,
    "ResponsibilityEntropy": mean_of(entropy),
}


def update(name, metric, x, mask):
    """Update a metric with items (N, K)."""
    if name == "MixtureLogLikelihood":
        metric.update(x[:, 0], mask)
    else:
        metric.update(x, mask)


@pytest.mark.parametrize("name", METRICS)
@given(values=st.data())
def test_metrics_of_any_batches(name, values):
    metric = getattr(metrics, name)()
    items, units, cut = values.draw(st.integers(0, 6)), values.draw(st.integers(1, 4)), values.draw(st.integers(0, 6))
    dtype = values.draw(st.sampled_from(drawing.DTYPES))
    x = values.draw(drawing.tensors((items, units), dtype))
    if name == "L0":
        x = torch.where(x == x.new_tensor(0.01), 0.0, x)  # the threshold itself, rounded as the items are
    elif "Responsibility" in name:
        x = x.double().softmax(-1)
    mask = values.draw(drawing.holes((items,)))
    dirty = x if mask is None else torch.where(mask[:, None], x, torch.nan)
    for part in (slice(0, cut), slice(cut, None)):
        update(name, metric, dirty[part], None if mask is None else mask[part])
    kept = (x if mask is None else x[mask]).double().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = METRICS[name](kept)
    found = metric.compute().item()
    if math.isnan(expected):
        assert math.isnan(found)  # documented: no item was counted, or one, which has no variance
        return
    assert math.isfinite(found)
    covariance = moments_of(kept) if len(kept) > 1 else np.zeros((units, units))  # means of items need no variance
    size = np.abs(kept).max(initial=0.0)
    std = np.sqrt(covariance.diagonal())
    if name == "Redundancy" and (1e-13 * size > 1e-6 * (std + 1e-8)).any():
        assert -1e-9 <= found <= units**2 + 1e-6  # correlations of rounding errors
    elif name == "EffectiveRank" and 1e-12 * size > 1e-6 * std.max():
        assert 0 <= found <= units + 1e-6
    elif name == "DeadUnits" and (np.abs(covariance.diagonal() - 0.01) < 1e-14 * size**2 + 1e-12).any():
        assert 0 <= found <= units
    else:
        scale = size**2 if name == "MinVariance" else size if name == "MixtureLogLikelihood" else 1.0
        assert found == pytest.approx(expected, rel=1e-5 if name == "EffectiveRank" else 1e-9, abs=1e-12 * scale)


@given(values=st.data())
def test_metrics_of_layers_and_weights(values):
    items, units = values.draw(st.integers(2, 4)), values.draw(st.integers(1, 3))
    x = values.draw(drawing.tensors((items, units), values.draw(st.sampled_from(drawing.DTYPES))))
    together = metrics.layer_metrics()
    together.update(x)
    found = {name: value.item() for name, value in together.compute().items()}
    assert all(map(math.isfinite, found.values()))
    share = (-x.double()).softmax(-1)
    for name, alone in {
        "dead_units": metrics.DeadUnits(),
        "min_variance": metrics.MinVariance(),
        "redundancy": metrics.Redundancy(),
        "effective_rank": metrics.EffectiveRank(),
        "entropy": metrics.ResponsibilityEntropy(),
        "max_responsibility": metrics.MaxResponsibility(),
        "l0": metrics.L0(),
    }.items():
        alone.update(share if name in ("entropy", "max_responsibility") else x)
        # Half and single precision take responsibilities in float32.
        assert found[name] == pytest.approx(alone.compute().item(), rel=1e-5, abs=1e-5)


@given(values=st.data())
def test_probes_of_any_features(values):
    items, units = values.draw(st.integers(2, 6)), values.draw(st.integers(1, 3))
    x = values.draw(drawing.tensors((items, units), values.draw(st.sampled_from(drawing.WIDE)), -9, 9))
    labels = torch.arange(items) % 2
    accuracy = linear_probe(x, labels, x, labels)
    assert accuracy * items == pytest.approx(round(accuracy * items)) and 0 <= accuracy <= 1
    if units == 1 and (x[0] < x[1:2]).all():  # a probe separates two distinct points
        assert linear_probe(x[:2], labels[:2], x[:2], labels[:2]) == 1.0
