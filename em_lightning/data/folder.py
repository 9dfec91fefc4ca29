"""Point clouds from a user's own files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from em_lightning.data.base import PointCloudDataModule, at_least
from em_lightning.data.clouds import SPLITS, KnownShapes, Shape, Shapes
from em_lightning.data.readers import SUPPORTED, read_points


class PointCloudFolder(PointCloudDataModule):
    """The user's own meshes and point sets: OFF, PLY, OBJ, XYZ, TXT and NPY files in a folder and its subfolders.

    The subfolder is the class. Folders named ``train``, ``test`` and ``val``, above or below it, say the split;
    otherwise, and for a validation that has no folder, files are dealt out in the order of a hash of their names, so
    the split is the same on every machine. With fewer than three files to deal out every split has all of them, and
    fresh points. Meshes are sampled; sets of points are split into points to fit and held-out ones, and sets that are
    too small for ``num_points`` of each are padded.

    Args:
        root: the folder.
        val_fraction: the part of the files for validation.
        test_fraction: the part of the files for the test.
        clouds_per_file: clouds of a training file in an epoch.
        **options: the arguments of :class:`PointCloudDataModule`.

    Raises:
        ValueError: an argument is outside its range, ``root`` is no folder, holds no such files, or leaves a split
            without one; a file is corrupt (raised by :meth:`setup`, with its name).
    """

    def __init__(
        self,
        root: str,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        clouds_per_file: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        at_least(1, clouds_per_file=clouds_per_file)
        for name, value in {"val_fraction": val_fraction, "test_fraction": test_fraction}.items():
            if not 0 < value < 0.5:
                raise ValueError(f"{name}={value} must lie between 0 and 0.5; 0.1 is usual")
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise ValueError(f"root={root!r} is no folder; give one that holds {', '.join(SUPPORTED)} files")
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.clouds_per_file = clouds_per_file
        self._files: dict[str, list[str]] = {}

    def _split(self) -> None:
        if self._files:
            return
        found = (path.relative_to(self.root) for path in self.root.rglob("*") if path.suffix.lower() in SUPPORTED)
        names = sorted(path.as_posix() for path in found if not path.name.startswith("."))
        if not names:
            raise ValueError(f"root={str(self.root)!r} holds no {', '.join(SUPPORTED)} file; give another folder")
        files: dict[str, list[str]] = {split: [] for split in (*SPLITS, "")}
        for name in names:
            files[next((part for part in Path(name).parts[:-1] if part in SPLITS), "")].append(name)
        loose = files.pop("")
        if loose and len(loose) < len(names):
            raise ValueError(
                f"root={str(self.root)!r} has train and test folders, but {loose[0]!r} lies in none; move or remove it"
            )
        if loose:
            files["test"], loose = self._deal(loose, self.test_fraction)
            files["val"], files["train"] = self._deal(loose, self.val_fraction / (1 - self.test_fraction))
        elif files["train"] and not files["val"]:
            files["val"], files["train"] = self._deal(files["train"], self.val_fraction)
        empty = [split for split in SPLITS if not files[split]]
        if empty:
            raise ValueError(f"root={str(self.root)!r} has no file for {' and '.join(empty)}; add such a folder")
        self.class_names = sorted({self._label(name) for name in names})
        self._files = files

    def _deal(self, names: list[str], fraction: float) -> tuple[list[str], list[str]]:
        """Return the part of the files that a fraction takes, at least one, and the rest."""
        if len(names) < 3:
            return names, names
        order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
        size = max(1, round(fraction * len(order)))
        return sorted(order[:size]), sorted(order[size:])

    @staticmethod
    def _label(name: str) -> str:
        return "/".join(part for part in Path(name).parts[:-1] if part not in SPLITS)

    def shapes(self, split: str) -> Shapes:
        """Return what the files of a split hold."""
        self._split()
        known = []
        for name in self._files[split]:
            points, faces = read_points(self.root / name)
            label = self.class_names.index(self._label(name))
            try:
                shape = Shape.of(torch.from_numpy(points), None if faces is None else torch.from_numpy(faces), label)
            except ValueError as error:
                raise ValueError(f"{self.root / name}: {error}; repair or remove the file") from error
            known.append(shape)
        return KnownShapes(known, self.clouds_per_file if split == "train" else 1)

    def source(self) -> str:
        """Return in a few words what is drawn from."""
        return f"files in {self.root}"
