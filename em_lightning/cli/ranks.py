"""What a process does that Lightning has started as one of several ranks."""

from __future__ import annotations

import os
import sys
import threading
import time


def end_with_parent(seconds: float = 1.0) -> None:
    """End this process when the one that started it is gone, if that is the first of several ranks on this machine.

    A rank that waits for one that was killed hears of it from their connection, but not before there is one: it would
    wait for half an hour. Lightning itself watches the other way round. ``torchrun`` and SLURM look after theirs.

    Args:
        seconds: between two looks.
    """
    parent = os.getppid()
    if os.environ.get("LOCAL_RANK", "0") == "0" or {"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"} & set(os.environ):
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        rank = os.environ["LOCAL_RANK"]
        print(f"em-lightning: the process that started rank {rank} is gone, and so this one ends", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
