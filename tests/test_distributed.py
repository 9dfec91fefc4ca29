"""Sums and moments over ranks."""

import copy
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from em_lightning import LOSSES, EMLoss
from em_lightning.checkpoints import check_agreement
from em_lightning.distributed import batch_mean, batch_moments, flatten_units, global_sum
from em_lightning.losses import FreeEnergyLoss

DOUBLE = torch.float64


def test_flatten_units_flattens_all_other_axes_into_items():
    x = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    items, counts = flatten_units(x, dim=1)
    assert counts is None
    assert torch.equal(items, torch.stack([x[b, :, p] for b in range(2) for p in range(4)]))
    assert torch.equal(flatten_units(x, dim=-2)[0], items)
    assert flatten_units(x.bfloat16())[0].dtype == torch.float32


def test_masked_items_may_be_nan():
    x = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf], [3.0, 4.0]])
    items, counts = flatten_units(x, mask=torch.tensor([True, False, True]), weights=torch.tensor([2.0, 5.0, 0.5]))
    assert counts.tolist() == [2.0, 0.0, 0.5] and items[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"dim": 2}, ValueError, "dim=2"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, "mask of shape (2,)"),
        ({"weights": torch.ones(3, 2)}, ValueError, "weights of shape (3, 2)"),
        ({"mask": torch.ones(3)}, TypeError, "mask of dtype torch.float32"),
    ],
)
def test_wrong_arguments_raise(arguments, error, words):
    with pytest.raises(error) as caught:
        flatten_units(torch.zeros(3, 2), **arguments)
    assert words in str(caught.value)
    with pytest.raises(ValueError, match="dim=-1"):
        flatten_units(torch.zeros(3, 0))


@pytest.mark.parametrize("offset, tolerance", [(0.0, 1e-6), (1e3, 1e-4)])
def test_moments_equal_numpy(offset, tolerance):
    x = torch.randn(50, 6) @ torch.randn(6, 6) + offset
    moments = batch_moments(x)
    oracle = x.double().numpy()
    np.testing.assert_allclose(moments.mean, oracle.mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.variance, oracle.var(0, ddof=1), rtol=tolerance)
    np.testing.assert_allclose(moments.covariance(), np.cov(oracle.T), atol=tolerance * 10)
    off_diagonal = np.corrcoef(oracle.T) - np.eye(6)
    np.testing.assert_allclose(moments.redundancy(), np.square(off_diagonal).sum(), rtol=tolerance * 10)


def test_weights_repeat_items_and_a_mask_removes_them():
    x = torch.randn(4, 3, dtype=DOUBLE)
    repeats = torch.tensor([2, 0, 1, 3])
    expected = batch_moments(x.repeat_interleave(repeats, dim=0))
    by_weight = batch_moments(x, weights=repeats.double())
    torch.testing.assert_close(by_weight.variance, expected.variance)
    torch.testing.assert_close(by_weight.redundancy(), expected.redundancy())
    masked = batch_moments(x, mask=repeats > 0)
    torch.testing.assert_close(masked.covariance(), torch.from_numpy(np.cov(x[repeats > 0].numpy().T)))
    torch.testing.assert_close(batch_mean(x, repeats.double()), expected.mean)


@pytest.mark.parametrize("value", [0.0, 1.0001, 12345.678, 1e6])
def test_a_constant_unit_has_variance_zero_and_no_gradient(value):
    x = torch.full((97, 2), value, requires_grad=True)
    moments = batch_moments(x)
    assert moments.variance.tolist() == [0.0, 0.0] and moments.redundancy() == 0
    (moments.std().sum() + moments.redundancy()).backward()
    assert x.grad.abs().max() == 0


@pytest.mark.parametrize("items", [0, 1])
def test_fewer_than_two_items_have_variance_zero(items):
    x = torch.randn(items, 3, requires_grad=True)
    with pytest.warns(UserWarning, match=f"a batch of {items} .*drop_last"):
        moments = batch_moments(x)
    (moments.variance.sum() + moments.covariance().sum()).backward()
    assert moments.variance.tolist() == [0.0] * 3 and not x.grad.any()
    assert torch.isfinite(batch_mean(x)).all()


@pytest.mark.parametrize("key", ["variance", "bounded_variance", "log_det", "decorrelation"])
def test_a_last_batch_of_one_item_is_reported(key):
    """The variance term of one item of 8 units is -8 log(eps) = 110, where 1 is usual."""
    with pytest.warns(UserWarning, match="a batch of 1 "):
        LOSSES.build(key)(torch.randn(1, 8))
    with pytest.warns(UserWarning, match="a batch of 1 "):
        EMLoss(**{"free_energy": 0, "variance": 0, "decorrelation": 0, key: 1.0}).total(torch.randn(1, 8))


@pytest.mark.parametrize("x", [torch.randn(2, 8), torch.randn(1, 8, 3, 3).movedim(1, -1)])
def test_two_items_and_feature_maps_give_no_warning(x):
    EMLoss().total(x)
    FreeEnergyLoss()(x[:1])


def test_moments_have_the_right_gradient():
    x = torch.randn(7, 3, dtype=DOUBLE, requires_grad=True)
    weights = torch.rand(7, dtype=DOUBLE) + 0.5
    assert torch.autograd.gradcheck(lambda x: batch_moments(x, weights=weights)[:3], (x,))
    assert torch.autograd.gradcheck(lambda x: batch_moments(x).covariance(), (x,))
    assert torch.autograd.gradgradcheck(lambda x: batch_moments(x).covariance(), (x,))


def test_statistics_ignore_autocast():
    x = torch.randn(64, 4) + 10
    expected = batch_moments(x).covariance()
    with torch.autocast("cpu", torch.bfloat16):
        moments = batch_moments(x)
        assert torch.equal(moments.covariance(), expected) and moments.variance.dtype == torch.float32


def test_compiles_to_one_graph_without_a_process_group():
    x = torch.randn(16, 4)
    compiled = torch.compile(lambda x: batch_moments(x).covariance(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), batch_moments(x).covariance())


def batches(rank):
    """Uneven shares of one batch whose mean is 1,000."""
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    return x if rank is None else (x[:19], x[19:])[rank]


def wide(rank):
    """Uneven shares of a batch with fewer items than units."""
    x = torch.randn(6, 9, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    return x if rank is None else (x[:4], x[4:])[rank]


def model():
    net = nn.Linear(5, 4)
    with torch.no_grad():
        net.weight.copy_(torch.randn(4, 5, generator=torch.Generator().manual_seed(1)))
        net.bias.fill_(1000.0)
    return net


def objective(y, weights=None):
    moments = batch_moments(y, weights=weights)
    mean = batch_mean(torch.tanh(y - 1000), weights)
    return moments.variance.log().sum() + moments.covariance().square().sum() + (mean**2).sum() + moments.mean.sum()


def on_a_rank(rank):
    net = DistributedDataParallel(model())
    loss = objective(net(batches(rank)))
    loss.backward()
    double = copy.deepcopy(net.module).double()
    double.zero_grad()
    exact = DistributedDataParallel(double)
    weights = torch.arange(30.0)[:19] if rank == 0 else torch.arange(30.0)[19:]
    loss_exact = objective(exact(batches(rank).double()), weights.double())
    loss_exact.backward()
    empty = batch_moments(torch.full((3 * rank, 2), 7.0))
    x = torch.full((2,), 1.0 + rank, dtype=DOUBLE, requires_grad=True)
    (gradient,) = torch.autograd.grad(global_sum(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    compiled = torch.compile(lambda x: batch_moments(x).covariance(), backend="aot_eager")(batches(rank))
    return {
        "loss": loss.detach(),
        "gradient": net.module.weight.grad,
        "exact_loss": loss_exact.detach(),
        "exact_gradient": exact.module.weight.grad,
        "size_with_an_empty_rank": empty.size,
        "sum": global_sum(x).detach(),
        "first": gradient.detach(),
        "second": second,
        "compiled": compiled,
        "redundancy": batch_moments(wide(rank)).redundancy(),
    }


def test_two_processes_equal_one(tmp_path):
    ranks = run_ranks(on_a_rank, folder=tmp_path)
    net, exact = model(), model().double()
    loss = objective(net(batches(None)))
    loss.backward()
    exact_loss = objective(exact(batches(None).double()), torch.arange(30, dtype=DOUBLE))
    exact_loss.backward()
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], loss.detach(), rtol=1e-6, atol=0)
        scale = net.weight.grad.abs().max()
        torch.testing.assert_close(rank["gradient"] / scale, net.weight.grad / scale, rtol=0, atol=1e-6)
        torch.testing.assert_close(rank["exact_loss"], exact_loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(rank["exact_gradient"], exact.weight.grad, rtol=1e-9, atol=1e-9)
        assert rank["size_with_an_empty_rank"] == 3
        assert rank["sum"].tolist() == [3.0, 3.0]
        # Both ranks computed the whole loss s^3 at s = 3: twice its derivative each, and twice again for the second.
        assert rank["first"].tolist() == [54.0, 54.0] and rank["second"].tolist() == [72.0, 72.0]
        torch.testing.assert_close(rank["compiled"], batch_moments(batches(None)).covariance())
        torch.testing.assert_close(rank["redundancy"], batch_moments(wide(None)).redundancy())


def agree(rank, facts):
    try:
        check_agreement(facts[rank])
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_differ_are_named(tmp_path):
    def run(name, *facts):
        (tmp_path / name).mkdir()
        return run_ranks(agree, facts, folder=tmp_path / name, world_size=len(facts))

    same = {"rows": [10, 3], "path": Path("a"), "nan": float("nan"), "none": None}
    assert run("same", same, dict(reversed(same.items())), {**same, "path": Path("b")}) == ["", "", ""]
    messages = run("other", {"rows": 10}, {"rows": 11}, {"rows": 10})
    assert len(set(messages)) == 1 and "\n" not in messages[0]
    host = re.escape(socket.gethostname())
    assert re.search(rf"same rows: it is 11 on host {host} \(rank 1\), but 10 on host {host} \(rank 0\)", messages[0])
    assert "same b: it is missing on host" in run("missing", {"a": 1, "b": 2}, {"a": 1})[0]
    check_agreement({"rows": 3})  # without a process group
