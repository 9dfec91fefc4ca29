"""Metrics of layers and mixtures: equality with numpy and plain loops, merging, processes."""

import copy
import math
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from ranks import run_ranks
from scipy import stats
from torch import nn
from torchmetrics import MetricCollection

from em_lightning import metrics as room
from em_lightning.metrics import (
    L0,
    DeadUnits,
    EffectiveRank,
    MaxResponsibility,
    MinVariance,
    MixtureLogLikelihood,
    Redundancy,
    ResponsibilityEntropy,
    layer_metrics,
)


def activations(items=200, units=6, offset=0.0, seed=0):
    """Return correlated activations after a ReLU; unit 0 is dead, unit 1 has a small variance."""
    rng = np.random.default_rng(seed)
    a = np.maximum(rng.standard_normal((items, units)) @ rng.standard_normal((units, units)), 0)
    a[:, 0] = 0.0
    a[:, 1] = 0.05 * rng.standard_normal(items)
    return torch.from_numpy(a + offset).float()


def oracle(a):
    """Return the metrics of the published tables, computed by numpy over the whole set."""
    a = a.double().numpy()
    var = a.var(0, ddof=1)
    std = np.sqrt(var) + 1e-8
    corr = np.cov(a.T) / np.outer(std, std)
    r = np.exp(-(a - a.min(1, keepdims=True)))
    r /= r.sum(1, keepdims=True)
    spectrum = np.linalg.svd(np.cov(a.T), compute_uv=False)
    return {
        "dead_units": (var < 0.01).sum(),
        "min_variance": var.min(),
        "redundancy": (corr**2).sum() - (np.diag(corr) ** 2).sum(),
        "effective_rank": np.exp(stats.entropy(spectrum)),
        "entropy": stats.entropy(r, axis=1).mean(),
        "max_responsibility": r.max(1).mean(),
        "l0": (a > 0.01).sum(1).mean(),
    }


def assert_equal_to_oracle(values, expected, rel):
    assert {key: value.item() for key, value in values.items()} == {
        key: pytest.approx(value, rel=rel, abs=1e-12) for key, value in expected.items()
    }


@pytest.mark.parametrize("splits", [[], [100], [1, 2, 50, 51, 199], [10, 10, 150]])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_layer_metrics_equal_numpy_over_any_split(splits, offset):
    a = activations(offset=offset)
    metrics = layer_metrics()
    for batch in a.tensor_split(splits):
        metrics.update(batch)
    # The float32 softmax of energies near 1,000 is the only step that is not in float64.
    assert_equal_to_oracle(metrics.compute(), oracle(a), rel=1e-6)
    moments = {key: metrics[key] for key in ("min_variance", "redundancy", "effective_rank")}
    assert_equal_to_oracle(
        {key: metric.compute() for key, metric in moments.items()},
        {key: oracle(a)[key] for key in moments},
        rel=1e-9,
    )
    assert ["dead_units", *moments] in metrics.compute_groups.values()


def test_layer_metrics_of_a_feature_map_and_a_mask():
    a = activations(items=24)
    metrics = layer_metrics(dim=1)
    metrics.update(a.reshape(2, 3, 4, 6).movedim(-1, 1))
    assert_equal_to_oracle(metrics.compute(), oracle(a), rel=1e-6)
    mask = torch.arange(24) % 3 > 0
    metrics = layer_metrics(prefix="hidden/")
    metrics.update(torch.where(mask[:, None], a, torch.nan), mask)
    expected = {f"hidden/{key}": value for key, value in oracle(a[mask]).items()}
    assert_equal_to_oracle(metrics.compute(), expected, rel=1e-6)


def test_metrics_of_a_constant_layer():
    metrics = layer_metrics()
    metrics.update(torch.zeros(50, 8))
    values = {key: value.item() for key, value in metrics.compute().items()}
    assert values == {
        "dead_units": 8,
        "min_variance": 0,
        "redundancy": 0,
        "effective_rank": 0,
        "entropy": pytest.approx(math.log(8)),
        "max_responsibility": 0.125,
        "l0": 0,
    }


@pytest.mark.parametrize("cls", [DeadUnits, MinVariance, Redundancy, EffectiveRank])
def test_fewer_than_two_items_have_no_variance(cls):
    metric = cls()
    with pytest.warns(UserWarning, match="before"):
        assert metric.compute().isnan()
    metric.update(torch.ones(1, 3))
    assert metric.compute().isnan()
    metric.update(torch.full((2, 3), torch.nan), torch.tensor([True, False]))
    assert metric.compute().isnan()


UPDATES = {
    **dict.fromkeys((L0, DeadUnits, Redundancy, EffectiveRank), activations),
    MinVariance: lambda: activations()[:, 2:],
    **dict.fromkeys((MaxResponsibility, ResponsibilityEntropy), lambda: activations()[:, 2:].softmax(1)),
    MixtureLogLikelihood: lambda: activations(),
}


def test_every_metric_is_merged_and_plotted():
    assert {*UPDATES} == {
        cls for cls in vars(room).values() if isinstance(cls, type) and "metrics.base" not in cls.__module__
    }


@pytest.mark.parametrize("cls", UPDATES)
def test_merged_metrics_equal_one_of_all_items(cls):
    items = UPDATES[cls]()
    whole, first, second = cls(), cls(), cls()
    whole.update(items)
    first.update(items[:50])
    second.update(items[50:])
    before = second.compute()
    assert first.compute() != whole.compute() or cls is DeadUnits
    first.merge_state(second)
    first.merge_state(cls())  # has no items
    torch.testing.assert_close(first.compute(), whole.compute(), rtol=1e-12, atol=0)
    assert second.compute() == before
    empty = cls()
    empty.merge_state(whole.metric_state)
    assert empty.compute() == whole.compute()
    with pytest.raises(TypeError, match="incoming_state.*list"):
        first.merge_state([second])
    other = L0() if cls is not L0 else MinVariance()
    with pytest.raises(TypeError, match=f"incoming_state.*{cls.__name__}.*{type(other).__name__}"):
        first.merge_state(other)


def test_merging_checks_the_number_of_units():
    few, many = MinVariance(), MinVariance()
    few.update(torch.rand(4, 2))
    many.update(torch.rand(4, 3))
    with pytest.raises(ValueError, match="3 units.*2"):
        few.merge_state(many)


def test_members_of_a_collection_are_merged_one_by_one():
    a = activations()
    first, second = layer_metrics(), layer_metrics()
    first.update(a[:50])
    second.update(a[50:])
    for name in second:
        first[name].merge_state(second[name])
    assert_equal_to_oracle(first.compute(), oracle(a), rel=1e-6)


def test_forward_gives_the_batch_and_keeps_the_total():
    first, second = activations(40, seed=1), activations(30, seed=2)
    metric = Redundancy()
    assert metric(first).item() == pytest.approx(oracle(first)["redundancy"])
    assert metric(second).item() == pytest.approx(oracle(second)["redundancy"])
    assert metric.compute().item() == pytest.approx(oracle(torch.cat([first, second]))["redundancy"])
    metric.reset()
    metric.update(activations(20, units=3))
    with pytest.raises(ValueError, match=r"activations.*6.*3"):
        metric.update(first)


def test_mixture_metrics_equal_plain_loops():
    log_prob = torch.randn(3, 4)
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    points = torch.rand(3, 4)
    likelihood, weighted = MixtureLogLikelihood(), MixtureLogLikelihood()
    for row in range(3):
        likelihood.update(log_prob[row : row + 1], mask[row : row + 1])
        weighted.update(torch.where(mask, log_prob, -torch.inf)[row], mask[row], points[row])
    kept = [(b, n) for b in range(3) for n in range(4) if mask[b, n]]
    mean = sum(log_prob[i].item() for i in kept) / len(kept)
    assert likelihood.compute().item() == pytest.approx(mean)
    mean = sum(log_prob[i].item() * points[i].item() for i in kept) / sum(points[i].item() for i in kept)
    assert weighted.compute().item() == pytest.approx(mean)

    r = torch.softmax(torch.randn(3, 4, 5), dim=-1)
    entropy, largest = ResponsibilityEntropy(), MaxResponsibility()
    entropy.update(r, mask)
    largest.update(r, mask)
    assert entropy.compute().item() == pytest.approx(np.mean([stats.entropy(r[i].numpy()) for i in kept]), rel=1e-6)
    assert largest.compute().item() == pytest.approx(np.mean([r[i].max().item() for i in kept]), rel=1e-6)


def test_a_collection_does_not_merge_means_that_are_equal_after_the_first_batch():
    collection = MetricCollection({"few": L0(0.4), "many": L0(0.1)})
    collection.update(torch.tensor([[0.5, 0.5]]))
    collection.update(torch.tensor([[0.3, 0.7]]))
    assert {key: value.item() for key, value in collection.compute().items()} == {"few": 1.5, "many": 2.0}


def test_many_small_updates_keep_float64_accuracy():
    a = activations(items=4000, offset=1000.0)
    metric, total = MinVariance(), MixtureLogLikelihood()
    for batch in a[:, 2:].split(8):
        metric.update(batch)
        total.update(batch)
    assert metric.compute().item() == pytest.approx(a[:, 2:].double().numpy().var(0, ddof=1).min(), rel=1e-11)
    assert total.compute().item() == pytest.approx(a[:, 2:].double().mean().item(), rel=1e-14)


def test_states_stay_float64_and_copies_are_equal():
    module = nn.ModuleDict({"redundancy": Redundancy(), "entropy": ResponsibilityEntropy()})
    for cast in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16)):
        cast(module)
        assert module["redundancy"].moments.dtype == module["entropy"].sums.dtype == torch.float64
    metric = Redundancy()
    metric.update(activations().bfloat16().requires_grad_())
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert other.compute() == metric.compute()


def test_errors_name_the_argument_and_the_value():
    with pytest.raises(ValueError, match=r"mask.*\(3,\).*\(2, 3\)"):
        MixtureLogLikelihood().update(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))


def on_a_rank(rank):
    metrics = layer_metrics()
    for batch in activations(offset=1000.0).tensor_split([70, 80])[rank::2]:
        metrics.update(batch)
    likelihood, one_sided = MixtureLogLikelihood(), DeadUnits()
    likelihood.update(torch.arange(3.0 + rank))
    warnings.filterwarnings("ignore", ".*before the .*update.*")  # rank 0 has no items
    if rank == 1:
        one_sided.update(activations())
    return {**metrics.compute(), "likelihood": likelihood.compute(), "one_sided": one_sided.compute()}


def test_two_processes_equal_one(tmp_path):
    expected = oracle(activations(offset=1000.0)) | {"likelihood": 9 / 7, "one_sided": 2}
    for values in run_ranks(on_a_rank, folder=tmp_path):
        assert_equal_to_oracle(values, expected, rel=1e-6)
        assert values["redundancy"].item() == pytest.approx(expected["redundancy"], rel=1e-9)


def test_metrics_do_not_import_lightning():
    heavy = "{'lightning', 'pytorch_lightning', 'torch_geometric'}"
    code = f"import sys, em_lightning.metrics; print(*{heavy} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize("metric", [L0(), L0(threshold=0.5)])
def test_l0_counts_what_is_above_the_threshold(metric):
    metric.update(torch.tensor([[0.0, 0.3, 0.7], [0.6, 0.9, 0.01]]))
    assert metric.compute().item() == {0.01: 2.0, 0.5: 1.5}[metric.threshold]


def test_relative_threshold_of_dead_units():
    a = activations()
    for scale in (1e-6, 1.0, 1e6):
        metric = DeadUnits(threshold=1e-2, relative=True)
        metric.update(scale * a)
        assert metric.compute() == 2
    metric = DeadUnits(relative=True)
    metric.update(torch.zeros(5, 3))
    assert metric.compute() == 3
