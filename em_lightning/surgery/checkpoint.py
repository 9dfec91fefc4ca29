"""Checkpoints read as data: whole, of bounded size, and without running what they might hold."""

from __future__ import annotations

import pickle  # noqa: S403 - for the name of an error alone
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
    check_sums(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise ValueError(f"it holds a {type(checkpoint).__name__} and no dictionary")
    except pickle.UnpicklingError as error:
        # Torch's own words come with the advice to load it all the same.
        raise _unsound(path, "it holds more than tensors and plain values, which could run code") from error
    except Exception as error:  # whatever else an altered file makes pickle and torch complain of
        raise _unsound(path, error) from error
    return checkpoint


def check_sums(path: str | PathLike[str]) -> None:
    """Raise ValueError unless a file is an archive as ``torch.save`` writes it, with the sums of its members."""
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
    except zipfile.BadZipFile as error:
        size = f"of its {path.stat().st_size:,} bytes no archive can be made"
        raise _unsound(path, f"{size}: it is empty, cut short or no file of torch.save") from error
    except Exception as error:
        raise _unsound(path, error) from error


def _unsound(path: str | PathLike[str], reason: object) -> ValueError:
    reason = (str(reason).strip() or type(reason).__name__).splitlines()[0]
    return ValueError(f"{path}: no sound checkpoint ({reason}); take another one, or save it again with torch.save")
