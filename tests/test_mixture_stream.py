"""EM over blocks of one large set equals EM on the set in memory; large sets in memory are not copied."""

import pytest
import torch
from helpers import COVARIANCE_TYPES, assert_close, cast, clusters, mixture_at
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from em_lightning import EMOperator
from em_lightning.mixture import MixturePrior, StreamedEM, em_step, fit_blocks


def blocks_of(x, weights=None, size=7):
    """Return a function that returns blocks of the points of one set (1, N, D)."""
    rows = [slice(row, row + size) for row in range(0, x.shape[1], size)]
    return lambda: [(x[0, row], None if weights is None else weights[0, row]) for row in rows]


def start_of(x, covariance):
    return EMOperator(3, x.shape[-1], covariance=covariance, residual=False)(x, num_iters=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_blocks_add_up_to_steps_on_all_points(covariance, weighted):
    x = 20.0 + clusters(1, 90, 3, 3)
    weights = torch.rand(1, 90, dtype=torch.float64) if weighted else None
    start = start_of(x, covariance)
    fit = fit_blocks(blocks_of(x, weights), start, max_iters=3, tol=0.0, floor=1e-4)
    expected, levels = start, []
    for _ in range(3):
        counts = torch.ones(1, 90).double() if weights is None else weights
        levels.append(float((expected.log_prob(x) * counts).sum() / counts.sum()))
        expected = em_step(x, expected, weights=weights, floor=1e-4)
    assert_close(fit.mixture, expected, atol=1e-9)
    assert fit.log_likelihoods == pytest.approx(levels, abs=1e-9) and not fit.converged


@pytest.mark.parametrize("factor", [1e-14, 1e14])
def test_result_is_invariant_to_the_scale_of_the_weights(factor):
    x, weights = clusters(1, 90, 3, 3), torch.rand(1, 90, dtype=torch.float64)
    start = start_of(x, "full")
    fits = [fit_blocks(blocks_of(x, own), start, max_iters=3, tol=0.0) for own in (weights, factor * weights)]
    assert_close(fits[0].mixture, fits[1].mixture, atol=1e-8)
    assert fits[0].log_likelihoods == pytest.approx(fits[1].log_likelihoods, abs=1e-8)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_a_prior_over_blocks_is_that_of_the_operator(covariance):
    x = clusters(1, 90, 3, 3)
    prior = MixturePrior(
        weight_concentration=3.0, mean_strength=2.0, mean=[0.5] * 3, covariance_strength=5.0, covariance=[0.7] * 3
    )
    start = start_of(x, covariance)
    mixture, streamed = start, StreamedEM.about(start)
    for _ in range(4):
        found = [streamed.e_step(block, mixture) for block in x[0].split(40)]
        mixture = streamed.m_step(found[0].plus(found[1]).plus(found[2]), mixture, prior=prior)
    operator = EMOperator(3, 3, covariance=covariance, prior=prior, residual=False)
    assert_close(mixture, operator(x, init=start, num_iters=4), atol=1e-9)


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_result_does_not_depend_on_the_block_size(covariance):
    x = clusters(1, 90, 3, 3)
    start = start_of(x, covariance)
    fits = [fit_blocks(blocks_of(x, size=size), start, tol=1e-6) for size in (1, 40, 1000)]
    for fit in fits[1:]:
        assert fit.converged and len(fit.log_likelihoods) == len(fits[0].log_likelihoods)
        assert_close(fit.mixture, fits[0].mixture, atol=1e-9)


def test_sums_over_float32_blocks_are_as_accurate_as_float64():
    x = (20.0 + clusters(1, 3000, 3, 3)).float()
    start = cast(start_of(x, "full"), torch.float64)
    narrow, wide = (fit_blocks(blocks_of(y, size=100), start, max_iters=5, tol=0.0) for y in (x, x.double()))
    assert_close(cast(narrow.mixture, torch.float64), wide.mixture, atol=1e-4)


# Large sets in memory.


class LargestResult(TorchDispatchMode):
    """Record how many bytes the largest result of an operation has, views excluded."""

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
def test_start_of_a_large_set_uses_bounded_memory_per_point(init):
    """The start allocates no matrix of points and components, nor one of points and pairs of features."""
    x = torch.randn(1, 2**19, 4)
    operator = EMOperator(32, 4, init=init, residual=False)
    with torch.no_grad(), LargestResult() as seen:
        operator(x, num_iters=0)
    # A matrix of points and components would have 8 times the size of the points, one of pairs of features 4 times.
    assert seen.bytes <= 4 * x.numel() * x.element_size()


def test_iteration_on_a_large_set_uses_bounded_memory_per_point():
    x = torch.randn(1, 2**19, 4)
    start = mixture_at(x[:, :32], "full")
    operator = EMOperator(32, 4, num_iters=1, residual=False)
    with torch.no_grad(), LargestResult() as seen:
        operator(x, init=start)
    assert seen.bytes <= 4 * x.numel() * x.element_size()


@pytest.mark.parametrize("covariance", COVARIANCE_TYPES)
def test_large_set_equals_its_blocks(covariance):
    x = clusters(1, 300_000, 3, 3, dtype=torch.float32)  # block size
    start = start_of(x[:, :1000], covariance)
    whole = EMOperator(3, 3, covariance=covariance, residual=False)(x, init=start, num_iters=2)
    fit = fit_blocks(blocks_of(x, size=50_000), cast(start, torch.float64), max_iters=2, tol=0.0)
    assert_close(cast(fit.mixture, torch.float32), whole, rtol=1e-3, atol=1e-3)
