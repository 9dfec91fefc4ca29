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
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the file does not exist")
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            return torch.from_numpy(_read(file))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path}: damaged or not an IDX file ({error}); download it again") from error


def _read(file: Any) -> np.ndarray:
    start = file.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _DTYPES or start[3] == 0:
        raise ValueError(f"the first bytes are {start!r}")
    sizes = file.read(4 * start[3])
    if len(sizes) < 4 * start[3]:
        raise ValueError(f"the header ends after {4 + len(sizes)} bytes")
    dtype, shape = np.dtype(_DTYPES[start[2]]), tuple(np.frombuffer(sizes, ">u4").tolist())
    size = math.prod(shape) * dtype.itemsize
    if size > MAX_BYTES:
        raise ValueError(f"an array of shape {shape} has more than {MAX_BYTES} bytes")
    # One byte more than announced: finds excess data, and makes gzip verify its checksum.
    data = file.read(size + 1)
    if len(data) != size:
        raise ValueError(f"shape {shape} needs {size} bytes, the file has {len(data)}{' or more' * (len(data) > size)}")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))
