"""Processes of a run: errors of their connection, and the end of their process group."""

from __future__ import annotations

import socket
import sys
import traceback
from pathlib import Path

# Of the communication between ranks, so that the loss of a rank ends a run soon; PyTorch's default is half an hour.
TIMEOUT_SECONDS = 120


def connection_error(error: BaseException) -> str | None:
    """Return a message for an error of the communication between ranks, or None for any other error."""
    import torch.distributed as dist

    words, frames = str(error), traceback.extract_tb(error.__traceback__)
    in_collective = "/torch/distributed/" in Path(frames[-1].filename).as_posix()
    if not (in_collective or isinstance(error, dist.DistError) or "gloo" in words or "NCCL" in words):
        return None
    reason = " ".join(words.split("\n")[0].split())[:300]
    rank = f", rank {dist.get_rank()}" if dist.is_initialized() else ""
    return (
        f"host {socket.gethostname()}{rank}: lost the other ranks ({reason}). Look for an earlier error of "
        "another rank; a host may be gone, slower than the timeout (--trainer.strategy.timeout), have the NODE_RANK of "
        "another host, or be unreachable: set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the network interface, such "
        "as eth0, if a host resolves its own name to 127.0.1.1. --ckpt_path=last resumes the run"
    )


def leave_process_group() -> None:
    """Destroy the process group, which Lightning leaves open: it may abort the process (pytorch/pytorch#190489)."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
