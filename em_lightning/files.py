"""Atomic file writes."""

from __future__ import annotations

import contextlib
import glob
import os
import socket
import threading
from os import PathLike
from pathlib import Path


def write_whole(path: str | PathLike[str], content: bytes | memoryview | str) -> None:
    """Write a file atomically: write a partial file in the same folder, flush it to disk and rename it.

    The partial file is ``<name>.<host>-<process>-<thread>.partial``; those of ended processes of this host are removed.

    Raises:
        OSError: the file cannot be written, for instance because the disk is full; the old file is kept.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}.partial")
    try:
        remove_abandoned(path)
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = f"{path} cannot be written ({error.strerror}); the old file is kept: check the folder and disk space"
        raise OSError(error.errno, reason) from error


def remove_abandoned(path: Path) -> None:
    """Remove the partial files of a path that were written by processes of this host which have ended."""
    if os.name != "posix":  # elsewhere os.kill(process, 0) may end the process
        return
    for partial in path.parent.glob(glob.escape(f"{path.name}.{socket.gethostname()}-") + "*.partial"):
        # Keep the file if the process is another user's, the folder read-only, or the name without a process number.
        with contextlib.suppress(OSError, ValueError):
            _, process, _ = partial.stem.rsplit("-", 2)
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                partial.unlink()
