"""Small images with labels: scikit-learn's digits, MNIST and whatever comes in its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from em_lightning.data.download import fetch, file_digest
from em_lightning.data.idx import idx_shape, read_idx
from em_lightning.data.point_clouds import CACHE
from em_lightning.data.tensors import TensorDataModule, Tensors

# MD5 sums of the unpacked files.
_MNIST = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"


class Digits(TensorDataModule):
    """scikit-learn's digits: 1,797 images of 8 x 8 pixels in its wheel, so nothing is downloaded.

    The last fifth in the order of the file, by other writers than most of the rest, is the test.

    Args:
        **options: the arguments of :class:`TensorDataModule`.

    Example:
        >>> data = Digits(batch_size=32)
        >>> x, y = next(iter(data.train_dataloader()))
        >>> x.shape, y.shape, data.num_features
        (torch.Size([32, 1, 8, 8]), torch.Size([32]), 64)
    """

    shape = (1, 8, 8)
    class_names = [str(i) for i in range(10)]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def load(self, train: bool) -> Tensors:
        """Return four fifths of the images, pixels from 0 to 1, or the last fifth."""
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        cut = len(labels) * 4 // 5
        part = slice(cut) if train else slice(cut, None)
        x = torch.from_numpy(images[part].astype(np.float32) / 16).unflatten(1, self.shape)
        return Tensors(x, torch.from_numpy(labels[part]))

    def source(self) -> str:
        """Return in a few words what data this is."""
        return "scikit-learn's digits (8 x 8 pixels, embedded)"


class MNIST(TensorDataModule):
    """MNIST, or any data set in four files of its names and format, such as Fashion-MNIST, by its folder.

    Args:
        root: folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two ``t10k`` files, each
            with ``.gz`` or without. ``None`` downloads MNIST to ~/.cache/em_lightning, checked against the MD5 sums of
            the published files.
        **options: the arguments of :class:`TensorDataModule`.

    Raises:
        ValueError: ``root`` lacks a file, a file is damaged, or images and labels do not belong together.
        ConnectionError: MNIST could not be downloaded.
    """

    def __init__(self, root: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.root = root
        self.class_names = [str(i) for i in range(10)]
        if root is not None and not Path(root).expanduser().is_dir():
            raise ValueError(f"root={root!r} is no folder; give one with {next(iter(_MNIST))}.gz, or none to download")
        self.shape = (1, 28, 28) if root is None else (1, *idx_shape(self._path("train-images-idx3-ubyte"))[1:])

    def prepare_data(self) -> None:
        """Download the files where no ``root`` was given."""
        if self.root is None:
            for name, md5 in _MNIST.items():
                path, remedy = self._folder() / f"{name}.gz", "fetch MNIST's four files and give their folder as root"
                fetch(_MIRROR + name + ".gz", path, md5, remedy, unpacked=True)

    def _folder(self) -> Path:
        return Path(CACHE if self.root is None else self.root).expanduser() / ("MNIST" if self.root is None else "")

    def _path(self, name: str) -> Path:
        for path in (self._folder() / name, self._folder() / f"{name}.gz"):
            if path.is_file():
                return path
        raise ValueError(f"root={str(self._folder())!r} has no {name} or {name}.gz; give a folder with all four files")

    def load(self, train: bool) -> Tensors:
        """Return the images (N, 1, H, W) of uint8, and their labels."""
        self.prepare_data()
        part = "train" if train else "t10k"
        paths = self._path(f"{part}-images-idx3-ubyte"), self._path(f"{part}-labels-idx1-ubyte")
        x, y = map(read_idx, paths)
        if x.dtype != torch.uint8 or x.ndim != 3 or x.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"{paths[0]}: holds {x.dtype} of shape {tuple(x.shape)}, not images of bytes as in training"
            )
        if y.dtype != torch.uint8 or y.shape != x.shape[:1]:
            raise ValueError(f"{paths[1]}: holds {y.dtype} of shape {tuple(y.shape)}, not one label for each image")
        if train:
            self.class_names = [str(i) for i in range(int(y.max()) + 1)]
        elif int(y.max()) >= self.num_classes:
            raise ValueError(f"{paths[1]}: has label {int(y.max())}, which no training image has; check the files")
        return Tensors(x.unsqueeze(1), y.long())

    def source(self) -> str:
        """Return in a few words what data this is."""
        paths = {self._path(name): md5 for name, md5 in _MNIST.items()}
        known = all(file_digest(path, "md5", path.suffix == ".gz") == md5 for path, md5 in paths.items())
        name = "MNIST" if known else "images, not MNIST's,"
        return name if self.root is None else f"{name} from {self.root}"
