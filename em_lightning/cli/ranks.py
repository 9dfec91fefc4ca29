"""What a process does that Lightning has started as one of several ranks."""

from __future__ import annotations

import os
import sys
import threading
import time

_FIRST = "EM_LIGHTNING_FIRST_RANK"


def leave_process_group() -> None:
    """Leave the process group that Lightning has opened, if there is one.

    Lightning leaves those of NCCL alone. The threads of a gloo group may still hold a finished operation, and a process
    that ends around them is now and then aborted, with an exit code that tells of a failure where there was none
    (pytorch/pytorch#190489).
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def end_with_first_rank(seconds: float = 1.0) -> None:
    """End this process when the one that started it is gone, if that is the first of several ranks on this machine.

    A rank that waits for one that was killed hears of it from their connection, but not before there is one: it would
    wait for half an hour. Lightning itself watches the other way round, and ``torchrun`` and SLURM over all of theirs.

    Args:
        seconds: between two looks.
    """
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank == "0":
        os.environ[_FIRST] = str(os.getpid())  # which those that Lightning starts inherit
        return

    def watch(first: int) -> None:
        while os.getppid() == first:
            time.sleep(seconds)
        print(f"em-lightning: the process that started rank {rank} is gone, and so this one ends", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    if _FIRST in os.environ:
        threading.Thread(target=watch, args=[int(os.environ[_FIRST])], daemon=True).start()
