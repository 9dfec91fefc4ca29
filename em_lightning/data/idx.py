"""Arrays read from IDX files, the format of MNIST and of what follows it, packed by gzip or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from em_lightning.data.readers import MAX_BYTES

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path) -> Tensor:
    """Read the array of an IDX file, in its own dtype and shape; gzip is recognized by content.

    What the header announces is held against a limit before anything of that size is read, and against what follows.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no sound IDX file or too large; the message names it and the remedy.
    """
    return torch.from_numpy(_read(Path(path)))


def idx_shape(path: str | Path) -> tuple[int, ...]:
    """Return the shape that an IDX file announces, without reading the rest; raises as :func:`read_idx`."""
    with _opened(Path(path)) as file:
        return _header(file, Path(path))[1]


def _opened(path: Path) -> BinaryIO:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; check the path")
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path, "rb")) if packed else path.open("rb")


def _bytes(file: BinaryIO, size: int, path: Path) -> bytes:
    try:
        data = file.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged ({error}); fetch it again") from error
    if len(data) < size:
        raise ValueError(f"{path}: {size} bytes are announced, but {len(data)} follow (truncated?); fetch it again")
    return data


def _header(file: BinaryIO, path: Path) -> tuple[np.dtype, tuple[int, ...]]:
    zeros, code, axes = np.frombuffer(_bytes(file, 4, path), ">u2, u1, u1")[0]
    if zeros != 0 or code not in _TYPES or axes == 0:
        raise ValueError(f"{path}: no IDX file, as its first bytes show; give one such as train-images-idx3-ubyte.gz")
    shape = tuple(int(size) for size in np.frombuffer(_bytes(file, 4 * int(axes), path), ">u4"))
    dtype = np.dtype(_TYPES[int(code)])
    if math.prod(shape) * dtype.itemsize > MAX_BYTES:
        raise ValueError(f"{path}: an array of shape {shape} is announced, over {MAX_BYTES} bytes; split the file")
    return dtype, shape


def _read(path: Path) -> np.ndarray:
    with _opened(path) as file:
        dtype, shape = _header(file, path)
        data = _bytes(file, math.prod(shape) * dtype.itemsize, path)
        try:
            rest = file.read(1)  # also makes gzip check its own sum
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged ({error}); fetch it again") from error
    if rest:
        raise ValueError(f"{path}: there is more than the array of shape {shape} that is announced; fetch it again")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))
