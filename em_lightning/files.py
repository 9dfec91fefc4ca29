"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_whole(path: str | Path, content: bytes | bytearray | memoryview | str) -> None:
    """Write a file so that whatever happens meanwhile, its name stands for all of the new content or all of the old.

    The content goes to ``<name>.partial`` in the same folder, reaches the disk, and takes the name in one step. What a
    killed process leaves behind the next write of that name takes up.

    Args:
        path: of the file, in a folder that is there.
        content: bytes, or text for UTF-8.

    Raises:
        OSError: the file cannot be written, because the disk is full for instance; what was there is there still.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(f"{folder}/a.txt", "text")
        ...     print(os.listdir(folder), Path(folder, "a.txt").read_text())
        ['a.txt'] text
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
        raise OSError(
            error.errno,
            f"{path} cannot be written ({error.strerror}); what was there is kept: make room, and try again",
        ) from error
