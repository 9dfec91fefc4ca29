"""Reader of IDX files, the format of MNIST and Fashion-MNIST, compressed by gzip or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path) -> Tensor:
    """Read the array of an IDX file in its own dtype and shape; gzip is recognized by its first bytes.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not IDX, or damaged.
    """
    data = Path(path).read_bytes()
    try:
        return torch.from_numpy(_parse(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path}: damaged or not an IDX file ({error}); download it again") from error


def _parse(data: bytes) -> np.ndarray:
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _DTYPES or data[3] == 0:
        raise ValueError(f"the first bytes are {data[:4]!r}")
    dtype, start = np.dtype(_DTYPES[data[2]]), 4 + 4 * data[3]
    if len(data) < start:
        raise ValueError(f"the header ends after {len(data)} bytes")
    shape = tuple(np.frombuffer(data[4:start], ">u4").tolist())
    size = math.prod(shape) * dtype.itemsize
    if len(data) - start != size:
        raise ValueError(f"shape {shape} needs {size} bytes, the file has {len(data) - start}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
