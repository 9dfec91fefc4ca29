"""Points in blocks, and large sets that are not copied."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from em_lightning import EMOperator, Mixture
from em_lightning.mixture import COVARIANCES, MixturePrior, collect, em_step, maximize, no_statistics
from em_lightning.mixture.cloud import prepare
from em_lightning.mixture.starts import from_centers, kmeans_plus_plus

KINDS = sorted(COVARIANCES)


def points(sets=2, items=90, features=3, dtype=torch.float64):
    centers = 5 * torch.randn(sets, 3, features, dtype=dtype)
    return centers.repeat_interleave(items // 3, 1) + torch.randn(sets, items, features, dtype=dtype) + 20.0


def start_of(x, kind):
    return EMOperator(3, x.shape[-1], covariance=kind, residual=False)(x, num_iters=0)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_add_up_to_the_step_on_all_points(kind):
    x = points()
    mask, weights = torch.rand(2, 90) < 0.8, torch.rand(2, 90, dtype=torch.float64)
    dirty = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    mixture = start_of(x, kind)
    statistics = no_statistics(mixture, x[:, 0])
    for rows in (slice(0, 10), slice(10, 11), slice(11, 90)):
        statistics = collect(dirty[:, rows], mixture, statistics, mask[:, rows], weights[:, rows])
    assert torch.allclose(statistics.moments[..., 0].sum(1), (mask * weights).sum(1))
    assert torch.allclose(statistics.log_likelihood, (mixture.log_prob(dirty, mask) * weights).sum(1))
    for one, two in zip(maximize(statistics, kind), em_step(dirty, mixture, mask, weights), strict=True):
        assert torch.allclose(one, two, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_prior_is_the_operators(kind):
    x = points()
    prior = MixturePrior(weight_concentration=3.0, mean_strength=2.0, covariance_strength=5.0)
    mixture = start_of(x, kind)
    statistics = collect(x, mixture, no_statistics(mixture, x.mean(1)))
    found = maximize(statistics, kind, prior=prior, variance=x.var(1, correction=0))
    operator = EMOperator(3, 3, covariance=kind, prior=prior, residual=False)
    for one, two in zip(found, operator(x, init=mixture, num_iters=1), strict=True):
        assert torch.allclose(one, two, atol=1e-9)
    with pytest.raises(ValueError, match="variance=None.*give variance"):
        maximize(statistics, kind, prior=prior)


def test_float32_blocks_are_summed_in_double():
    x = points(1, 3000).float()
    mixture = Mixture(*(part.double() for part in start_of(x, "full")))
    for _ in range(5):
        statistics = no_statistics(mixture, x.mean(1))
        for block in x.split(100, 1):
            statistics = collect(block, mixture, statistics)
        exact = em_step(x.double(), mixture)
        mixture = maximize(statistics, "full")
        assert torch.allclose(mixture.covariances, exact.covariances, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["farthest", "kmeans++", "random"])
def test_large_sets_are_fitted_without_a_copy_and_alike(kind, init, monkeypatch):
    x, weights = points().requires_grad_(), torch.rand(2, 90, dtype=torch.float64)
    operator = EMOperator(3, 3, covariance=kind, init=init, lloyd_steps=2).double()
    for parameter in operator.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    outcomes = []
    for large in (False, True):
        if large:
            monkeypatch.setattr("em_lightning.mixture.cloud._WHOLE", 0)
            monkeypatch.setattr("em_lightning.mixture.cloud._CHUNK", 70)
            monkeypatch.setattr("em_lightning.mixture.starts._BLOCK", 100)
            monkeypatch.setattr("em_lightning.mixture.passes._BLOCK", 100)
        for counted in (None, weights):
            torch.manual_seed(1)
            mixture = operator(x, weights=counted)
            value = mixture.log_prob(x).sum() + mixture.covariances.sum()
            outcomes.append([*mixture, *torch.autograd.grad(value, x)])
        assert (prepare(x).shift is not None) == large
    for one, two in zip(outcomes[0] + outcomes[1], outcomes[2] + outcomes[3], strict=True):
        assert torch.allclose(one, two, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_robust_passes_and_backgrounds_of_large_sets(kind, monkeypatch):
    x = points()
    operator = EMOperator(3, 3, covariance=kind, kernel="student_t", background=0.1, residual=False)
    whole = operator.fit(x, max_iters=3)[0]
    density, responsibilities = operator.log_prob(x, whole), operator.posterior(x, whole).responsibilities
    monkeypatch.setattr("em_lightning.mixture.cloud._WHOLE", 0)
    for one, two in zip(operator.fit(x, max_iters=3)[0], whole, strict=True):
        assert torch.allclose(one, two, atol=1e-9)
    assert torch.allclose(operator.log_prob(x, whole), density, atol=1e-9)
    assert torch.allclose(operator.posterior(x, whole).responsibilities, responsibilities, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_is_the_same_in_blocks(kind, monkeypatch):
    cloud = prepare(points())
    centers = kmeans_plus_plus(cloud, 3)
    floor = torch.full((2,), 1e-6, dtype=torch.float64)
    whole = from_centers(cloud, centers, COVARIANCES[kind], floor)
    monkeypatch.setattr("em_lightning.mixture.starts._BLOCK", 500)
    blocks = from_centers(cloud, centers, COVARIANCES[kind], floor)
    assert torch.allclose(whole.means, blocks.means) and torch.allclose(whole.factors.scale, blocks.factors.scale)


class LargestResult(TorchDispatchMode):
    """Watches how many bytes the largest result of an operation has, views apart."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            results = [part for part in tree_leaves(result) if isinstance(part, torch.Tensor)]
            self.bytes = max([self.bytes, *(part.numel() * part.element_size() for part in results)])
        return result


@pytest.mark.parametrize("init", ["farthest", "kmeans++", "random"])
def test_a_start_takes_no_more_than_a_number_or_two_a_point(init, monkeypatch):
    monkeypatch.setattr("em_lightning.mixture.cloud._WHOLE", 0)
    monkeypatch.setattr("em_lightning.mixture.cloud._CHUNK", 2**12)
    monkeypatch.setattr("em_lightning.mixture.starts._BLOCK", 2**12)
    x = torch.randn(1, 20_000, 8)
    operator = EMOperator(6, 8, init=init, lloyd_steps=1, residual=False)
    with torch.no_grad(), LargestResult() as seen:
        operator(x, num_iters=0)
    assert 4 * x.shape[1] <= seen.bytes <= 8 * x.shape[1]
