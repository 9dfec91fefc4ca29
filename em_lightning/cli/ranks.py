"""End of a process: leave the process group, and exit when the em-lightning process that started it has ended."""

from __future__ import annotations

import os
import sys
import threading
import time

_PARENT = "EM_LIGHTNING_PARENT"


def leave_process_group() -> None:
    """Destroy the process group that Lightning leaves open: it may abort the process (pytorch/pytorch#190489)."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def end_with_parent(seconds: float = 1.0) -> None:
    """Make this process exit when its parent has ended, if the parent is an em-lightning process that called this.

    Lightning ends rank 0 when another rank fails, but not the reverse: if rank 0 is killed before the ranks are
    connected, the others would wait for half an hour. ``torchrun`` and SLURM end all ranks.
    """
    parent = os.environ.get(_PARENT)
    os.environ[_PARENT] = str(os.getpid())  # inherited by the processes that this one starts

    def watch() -> None:
        while str(os.getppid()) == parent:
            time.sleep(seconds)
        print("em-lightning: exits, because the process that started it has ended", file=sys.stderr, flush=True)
        os._exit(1)

    if str(os.getppid()) == parent:
        threading.Thread(target=watch, daemon=True).start()
