"""Functions on several processes of a gloo group, and the comparison of a loss on two processes with one."""

import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from em_lightning.testing import LossContract


def run_ranks(function, *arguments, folder, world_size=2):
    """Return the results of ``function(rank, *arguments)`` on each rank of a gloo group on this machine.

    Function and arguments are pickled, because processes are spawned; ``folder`` must be empty.
    """
    mp.spawn(_run_rank, (function, arguments, str(folder), world_size), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _run_rank(rank, function, arguments, folder, size):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    finally:
        if dist.is_initialized():  # the function may have destroyed the group
            time.sleep(0.05)  # without the GIL: PyTorch 2.6 deadlocks if a thread of gloo still has to release a tensor
            dist.destroy_process_group()


def assert_ranks_agree(losses, folder, tolerance=1e-6):
    """Check that two data-parallel processes with uneven shares of a batch get the loss and gradient of one process.

    The energies have a mean of 1,000, at which moments computed in one pass lose their digits. The tolerance is
    relative to the loss, or to 1 if that is larger, and to the largest gradient.
    """
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    ranks = run_ranks(_rank_gradients, list(losses), features, folder=folder)
    for index, loss in enumerate(losses):
        value, gradient = _gradient(loss, _network(), features)
        for rank in ranks:
            value_gap = float((rank[index][0] - value).abs() / value.abs().clamp(min=1.0))
            gradient_gap = float((rank[index][1] - gradient).abs().max() / gradient.abs().max())
            assert value_gap <= tolerance, f"{loss}: difference of the loss {value_gap:.1e}"
            assert gradient_gap <= tolerance, f"{loss}: relative difference of the gradient {gradient_gap:.1e}"


def _network():
    network = nn.Linear(4, 4)
    nn.init.eye_(network.weight)
    nn.init.constant_(network.bias, 1000.0)
    return network


def _gradient(loss, network, features):
    value = LossContract().value(loss, network(features))
    value.backward()
    return value.detach(), torch.cat([torch.as_tensor(parameter.grad).flatten() for parameter in network.parameters()])


def _rank_gradients(rank, losses, features):
    share = features[:19] if rank == 0 else features[19:]
    return [_gradient(loss, DistributedDataParallel(_network()), share) for loss in losses]
