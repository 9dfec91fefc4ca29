"""Checkpoints read as data: whole, of bounded size, and without running what they might hold."""

from __future__ import annotations

import zipfile
from os import PathLike
from pathlib import Path
from typing import Any

import torch


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Return what a checkpoint holds, on the CPU.

    The archive's sums are checked, which PyTorch itself leaves out, so that a flipped bit is no silent change of a
    weight. Its members must be stored as ``torch.save`` stores them, unpacked: a small file takes little memory. Only
    tensors and primitives are loaded (``weights_only=True``).

    Args:
        path: a file of Lightning's, or another dictionary written by ``torch.save``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, altered, or holds something else; the message names it and the remedy.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 3}, f"{folder}/last.ckpt")
        ...     read_checkpoint(f"{folder}/last.ckpt")
        {'epoch': 3}
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint; check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
                raise ValueError("it unpacks to more than its own size")
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the sum of {damaged!r} is another")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise ValueError(f"it holds a {type(checkpoint).__name__} and no dictionary")
    except Exception as error:  # whatever an altered file makes zipfile, pickle and torch complain of
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path}: no sound checkpoint ({reason}); take another one, or save it again with torch.save"
        ) from error
    return checkpoint
