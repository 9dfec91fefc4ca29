"""Reader of IDX files, the format of MNIST and Fashion-MNIST, compressed by gzip or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from em_lightning.data.readers import MAX_BYTES

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path) -> Tensor:
    """Read the array of an IDX file in its own dtype and shape; gzip is recognized by its first bytes.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not IDX, damaged, or larger than 1 GiB.
    """
    return _read(Path(path), header_only=False)[1]


def idx_shape(path: str | Path) -> tuple[int, ...]:
    """Return the shape of the array in an IDX file without reading the array; raises as :func:`read_idx`."""
    return _read(Path(path), header_only=True)[0]


def _read(path: Path, header_only: bool) -> tuple[tuple[int, ...], Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the file does not exist")
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            dtype, shape = _header(file)
            size = 0 if header_only else math.prod(shape) * dtype.itemsize
            # One byte more than the header announces: finds excess data, and makes gzip verify its checksum.
            data = b"" if header_only else file.read(size + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path}: damaged or not an IDX file ({error}); download it again") from error
    if len(data) != size:
        raise ValueError(f"{path}: shape {shape} needs {size} bytes, but the file has {len(data)} or more")
    if header_only:
        return shape, torch.empty(0)
    return shape, torch.from_numpy(np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("=")))


def _header(file: Any) -> tuple[np.dtype, tuple[int, ...]]:
    start = file.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _DTYPES or start[3] == 0:
        raise ValueError(f"the first bytes are {start!r}")
    sizes = file.read(4 * start[3])
    if len(sizes) < 4 * start[3]:
        raise ValueError(f"the header ends after {4 + len(sizes)} bytes")
    dtype, shape = np.dtype(_DTYPES[start[2]]), tuple(np.frombuffer(sizes, ">u4").tolist())
    if math.prod(shape) * dtype.itemsize > MAX_BYTES:
        raise ValueError(f"an array of shape {shape} has more than {MAX_BYTES} bytes")
    return dtype, shape
