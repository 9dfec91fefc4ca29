"""Run a function on several processes of a gloo group, for tests of global-batch statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], *arguments: Any, folder: Path, world_size: int = 2) -> list[Any]:
    """Return the results of ``function(rank, *arguments)`` on each rank of a gloo group on this machine.

    Args:
        function: module-level function; function and arguments are pickled, because processes are spawned.
        *arguments: passed to every rank.
        folder: an empty folder for the rendezvous and the results, such as pytest's ``tmp_path``.
        world_size: number of processes.

    Returns:
        The results in the order of the ranks: tensors, numbers, strings and containers of these.
    """
    mp.spawn(_run_rank, (function, arguments, str(folder), world_size), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _run_rank(rank: int, function: Callable[..., Any], arguments: tuple[Any, ...], folder: str, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
