"""Checkpoints that are written atomically, checked for damage, and read without running code."""

from __future__ import annotations

import io
import os
import zipfile
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from typing_extensions import override

from em_lightning.files import write_whole


def check_archive(path: str | PathLike[str]) -> None:
    """Raise unless a file is an uncompressed archive as ``torch.save`` writes it, with matching CRCs.

    FileNotFoundError if there is no such file, ValueError if it is truncated, altered or no archive.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
                raise ValueError("its members are compressed")  # a small file could fill the memory
            damaged = archive.testzip()  # torch.load checks no CRC
        if damaged is not None:
            raise ValueError(f"CRC mismatch in {damaged!r}")
    except Exception as error:  # zipfile raises errors of many types on altered files
        raise _invalid(path, f"{path.stat().st_size:,} bytes, {error}") from error


def read_checkpoint(path: str | PathLike[str], weights_only: bool = True) -> dict[str, Any]:
    """Return the content of a checkpoint on the CPU, with its CRCs checked.

    With ``weights_only`` it may contain tensors, plain values and the classes in ``torch.serialization.safe_globals``
    only. With ``weights_only=False`` loading may run code that the file contains.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or altered, or contains anything else.
    """
    check_archive(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    except UnpicklingError as error:  # torch's message does not name all of the classes
        raise ValueError(_untrusted(path)) from error
    except Exception as error:  # pickle and torch raise errors of many types on altered files
        raise _invalid(path, error) from error
    if not isinstance(checkpoint, dict):
        raise _invalid(path, f"it contains a {type(checkpoint).__name__}, not a dictionary")
    return checkpoint


def _untrusted(path: str | PathLike[str]) -> str:
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # pickle and torch raise errors of many types on altered files
        names = []
    listed = f": {', '.join(names[:5])}" * bool(names) + f" and {len(names) - 5} more" * (len(names) > 5)
    return (
        f"{path}: invalid checkpoint (it contains more than tensors and plain values, which could run code{listed}); "
        f"only if you trust its author, for instance if these are hyperparameters of your own, allow the classes by "
        f"torch.serialization.safe_globals, or load it with weights_only=False"
    )


def _invalid(path: str | PathLike[str], reason: object) -> ValueError:
    reason = (str(reason).strip() or type(reason).__name__).splitlines()[0]
    return ValueError(f"{path}: invalid checkpoint ({reason}); use another one, or save it again with torch.save")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning plug-in that writes checkpoints atomically and reads them with :func:`read_checkpoint`.

    Lightning itself writes to a temporary folder and moves the file; between file systems it copies the file, and
    a kill or a full disk leaves a truncated one. Recipes use this plug-in; a Trainer takes it in ``plugins``. URLs such
    as ``s3://`` and ``weights_only=False`` are handled by Lightning.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, f"{folder}/last.ckpt")
        ...     print(os.listdir(folder), AtomicCheckpointIO().load_checkpoint(f"{folder}/last.ckpt"))
        ['last.ckpt'] {'state_dict': {}}
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; raises OSError if that fails."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_whole(path, buffer.getbuffer())

    @override
    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; raises FileNotFoundError or ValueError if that fails."""
        if weights_only is False or "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path)
