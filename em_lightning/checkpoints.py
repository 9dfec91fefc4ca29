"""Checkpoints that a kill, a full disk or a loss of power leaves whole."""

from __future__ import annotations

import io
import os
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from typing_extensions import override

from em_lightning.files import write_whole
from em_lightning.surgery import read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Save each checkpoint beside its place, and move it there when it is whole and on the disk.

    Lightning writes it to the system's folder for temporary files and moves it from there. Where that is another file
    system (a ``/tmp`` in memory, say) the move is a copy over the last good checkpoint, which a kill or a full disk
    leaves half written. Recipes have this plug-in; another Trainer gets it by ``plugins=[AtomicCheckpointIO()]``.
    Addresses such as ``s3://`` are left to Lightning.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, f"{folder}/last.ckpt")
        ...     print(os.listdir(folder), AtomicCheckpointIO().load_checkpoint(f"{folder}/last.ckpt"))
        ['last.ckpt'] {'state_dict': {}}
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: it cannot be written, because the disk is full for instance; what was there is there still.
        """
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_whole(path, buffer.getbuffer())

    @override
    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint: as :func:`~em_lightning.surgery.read_checkpoint` does, unless objects are asked for.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, altered, or no checkpoint.
        """
        if weights_only is False or not _is_local(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path)


def _is_local(path: Any) -> bool:
    return "local" in get_filesystem(path).protocol
