"""LightningDataModules of small labeled images: scikit-learn's digits, MNIST and other data sets in IDX files."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from em_lightning.data.base import CACHE, download
from em_lightning.data.tensors import TensorDataModule, Tensors

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# MD5 of the published files, which are compressed by gzip.
MNIST_HASHES = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
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
        raise ValueError(f"{path}: damaged or not an IDX file ({error})") from error


def _parse(data: bytes) -> np.ndarray:
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _DTYPES or not 0 < data[3] <= (len(data) - 4) // 4:
        rule = "two zero bytes, a dtype code, a rank and the length of each axis"
        raise ValueError(f"it must start with {rule}, got {data[:4]!r} in {len(data)} bytes")
    dtype, start = np.dtype(_DTYPES[data[2]]), 4 + 4 * data[3]
    if len(data) < start:
        raise ValueError(f"the header ends after {len(data)} bytes")
    shape = tuple(np.frombuffer(data[4:start], ">u4").tolist())
    size = math.prod(shape) * dtype.itemsize
    if len(data) - start != size:
        raise ValueError(f"shape {shape} needs {size} bytes, the file has {len(data) - start}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


class Digits(TensorDataModule):
    """scikit-learn's digits: 1,797 images of 8 x 8 pixels, bundled with scikit-learn; needs no download.

    The test set is the last fifth of the file; most of its writers do not occur in the training set. The arguments are
    those of :class:`TensorDataModule`.

    Example:
        >>> data = Digits(batch_size=32)
        >>> x, y = next(iter(data.train_dataloader()))
        >>> x.shape, y.shape, data.num_features
        (torch.Size([32, 1, 8, 8]), torch.Size([32]), 64)
    """

    shape = (1, 8, 8)
    class_names = [str(i) for i in range(10)]
    source = "scikit-learn's digits (8 x 8 pixels, no download)"

    def load(self, train: bool) -> Tensors:
        """Return the first four fifths of the images, with pixels from 0 to 1, or the last fifth."""
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        cut = len(labels) * 4 // 5
        part = slice(cut) if train else slice(cut, None)
        x = torch.from_numpy(images[part].astype(np.float32) / 16).unflatten(1, self.shape)
        return Tensors(x, torch.from_numpy(labels[part]))


@dataclass(eq=False, repr=False)
class MNIST(TensorDataModule):
    """MNIST, or a data set in four files of the same names and format, such as Fashion-MNIST.

    Args:
        root: folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two ``t10k`` files, with or
            without the ending ``.gz``. ``None`` downloads MNIST to ~/.cache/em_lightning and verifies its MD5.

    Raises:
        ValueError: a file is missing or damaged, or images and labels do not match.
        ConnectionError: the download failed.
    """

    root: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source = "MNIST" if self.root is None else f"images in {self.root}"
        self.class_names = [str(i) for i in range(10)]
        size = (28, 28) if self.root is None else read_idx(self._path("t10k-images-idx3-ubyte")).shape[1:]
        self.shape = (1, *size)

    @property
    def _folder(self) -> Path:
        return Path(f"{CACHE}/MNIST" if self.root is None else self.root).expanduser()

    def _path(self, name: str) -> Path:
        for path in (self._folder / name, self._folder / f"{name}.gz"):
            if path.is_file():
                return path
        raise ValueError(f"root={str(self._folder)!r} has no {name} or {name}.gz; all four files are needed")

    def prepare_data(self) -> None:
        if self.root is None:
            remedy = "download the four files of MNIST and pass their folder as root"
            for name, md5 in MNIST_HASHES.items():
                download(f"{MNIST_URL}{name}.gz", self._folder / f"{name}.gz", f"md5:{md5}", remedy)

    def load(self, train: bool) -> Tensors:
        """Return the images (N, 1, H, W), uint8, and their labels."""
        self.prepare_data()
        part = "train" if train else "t10k"
        images, labels = self._path(f"{part}-images-idx3-ubyte"), self._path(f"{part}-labels-idx1-ubyte")
        x, y = read_idx(images), read_idx(labels)
        if x.dtype != torch.uint8 or x.ndim != 3 or x.shape[1:] != self.shape[1:]:
            height, width = self.shape[1:]
            raise ValueError(f"{images}: must hold uint8 (N, {height}, {width}), got {x.dtype} {tuple(x.shape)}")
        if y.dtype != torch.uint8 or y.shape != x.shape[:1]:
            raise ValueError(f"{labels}: must hold {len(x)} labels of uint8, got {y.dtype} {tuple(y.shape)}")
        largest = int(y.max())
        if train:
            self.class_names = [str(i) for i in range(largest + 1)]
        elif largest >= self.num_classes:
            raise ValueError(f"{labels}: label {largest} exceeds {self.num_classes - 1}, the largest training label")
        return Tensors(x.unsqueeze(1), y.long())
