"""End of a process that is one of several ranks: leave the process group, and end when the first rank has ended."""

from __future__ import annotations

import os
import sys
import threading
import time

_FIRST = "EM_LIGHTNING_FIRST_RANK"


def leave_process_group() -> None:
    """Destroy the process group that Lightning leaves open: a process may abort at its end (pytorch/pytorch#190489)."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def end_with_first_rank(seconds: float = 1.0) -> None:
    """Make this process exit when the process that started it has ended, if that is the first of several local ranks.

    Lightning ends the first rank when another one fails, but not the reverse: a rank whose first rank is killed before
    they are connected would wait for half an hour. ``torchrun`` and SLURM end all ranks.
    """
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank == "0":
        os.environ[_FIRST] = str(os.getpid())  # inherited by the ranks that Lightning starts
        return

    def watch(first: int) -> None:
        while os.getppid() == first:
            time.sleep(seconds)
        text = f"em-lightning: rank {rank} exits, because the process that started it has ended"
        print(text, file=sys.stderr, flush=True)
        os._exit(1)

    if _FIRST in os.environ:
        threading.Thread(target=watch, args=[int(os.environ[_FIRST])], daemon=True).start()
