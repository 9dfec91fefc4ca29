"""Statistics of posteriors."""

import pickle

import numpy as np
import pytest
import scipy.special
import torch

from em_lightning import STATISTICS
from em_lightning.competition import Posterior, background, grouped, softmin, sparsemin
from em_lightning.statistics import Mean, Mode, NegLogResponsibilities

KEYS = [
    "entropy",
    "log_responsibilities",
    "mean",
    "mode",
    "neg_log_responsibilities",
    "responsibilities",
    "variance",
]


def test_registry():
    assert sorted(STATISTICS) == KEYS
    for key in KEYS:
        built = STATISTICS.build(key)
        assert type(pickle.loads(pickle.dumps(built))) is STATISTICS[key]
    assert isinstance(STATISTICS.build(Mean), Mean)


@pytest.mark.parametrize("dim", [-1, 0])
def test_against_scipy(dim):
    d, values = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    posterior = softmin(d if dim == -1 else d.T, dim=dim)
    r = scipy.special.softmax(-d.numpy(), -1)
    mean = r @ values.numpy()
    expected = {
        "responsibilities": r,
        "mean": mean,
        "variance": r @ values.numpy() ** 2 - mean**2,
        "entropy": scipy.stats.entropy(r, axis=-1),
        "log_responsibilities": np.log(r),
        "neg_log_responsibilities": d.numpy() + scipy.special.logsumexp(-d.numpy(), -1, keepdims=True),
        "mode": values.numpy()[r.argmax(-1)],
    }
    for key, wanted in expected.items():
        found = STATISTICS.build(key)(posterior, values, dim)
        found = found.movedim(dim, -1) if dim == 0 and found.ndim == 2 else found
        np.testing.assert_allclose(found, wanted, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("key", KEYS)
def test_gradients(key):
    d, values = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)
    values.requires_grad_()
    statistic = STATISTICS.build(key)
    assert torch.autograd.gradcheck(lambda d, v: statistic(softmin(d), v), (d, values))


@pytest.mark.parametrize("key", KEYS)
def test_vmap_and_compile(key):
    torch._dynamo.reset()
    d, values, statistic = torch.randn(3, 5, 4), torch.randn(4), STATISTICS.build(key)

    def call(d):
        return statistic(softmin(d), values)

    expected = torch.stack([call(x) for x in d])
    torch.testing.assert_close(torch.func.vmap(call)(d), expected)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(d), expected)


def test_missing_values_raise():
    for key in ("mean", "variance"):
        with pytest.raises(ValueError, match=f"values=None.*{key}"):
            STATISTICS.build(key)(softmin(torch.zeros(3)))


def test_mode_without_values_is_the_index():
    assert Mode()(softmin(torch.tensor([[2.0, 1.0], [0.0, 3.0]]))).tolist() == [1, 0]


def test_log_responsibilities_are_finite_at_zero():
    d = torch.tensor([0.0, 1e4, torch.inf], requires_grad=True)
    y = STATISTICS.build("log_responsibilities")(softmin(d))
    (grad,) = torch.autograd.grad(y.sum(), d)
    assert y.isfinite().all() and grad.isfinite().all()


def test_excess_energy_of_all_competitions():
    d, statistic = torch.randn(3, 6, dtype=torch.float64), NegLogResponsibilities()
    torch.testing.assert_close(statistic(softmin(d, 0.5)), -0.5 * softmin(d, 0.5).responsibilities.log())
    of_groups = statistic(grouped(d, group_size=3))
    torch.testing.assert_close(of_groups[:, 3:], statistic(softmin(d[:, 3:])))
    open_world = background(d, energy=0.3)
    torch.testing.assert_close(statistic(open_world), -open_world.responsibilities.log())
    assert (statistic(sparsemin(d)) >= 0).all()


def test_half_precision_keeps_its_dtype():
    posterior = softmin(torch.randn(5, 4).bfloat16())
    for key in set(KEYS) - {"mode"}:
        assert STATISTICS.build(key)(posterior, torch.randn(4).bfloat16()).dtype == torch.bfloat16


def test_statistics_of_a_hand_written_posterior():
    posterior = Posterior(torch.zeros(2), torch.tensor([0.25, 0.75]), torch.zeros(()))
    assert Mean()(posterior, torch.tensor([0.0, 4.0])) == 3.0
