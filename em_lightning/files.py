"""Atomic file writes."""

from __future__ import annotations

import contextlib
import os
from os import PathLike
from pathlib import Path


def write_whole(path: str | PathLike[str], content: bytes | memoryview | str) -> None:
    """Write a file atomically: write ``<name>.partial`` in the same folder, flush it to disk and rename it.

    Raises:
        OSError: the file cannot be written, for instance because the disk is full; the old file is kept.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = f"{path} cannot be written ({error.strerror}); the old file is kept: free disk space and try again"
        raise OSError(error.errno, reason) from error
