"""LightningDataModule of meshes and point clouds in the files of a folder or an archive."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from em_lightning.data.base import CACHE, SPLITS, RandomDataset, download
from em_lightning.data.point_clouds import PointCloudDataModule, Shape
from em_lightning.data.readers import SUPPORTED, has_points, read_points


@dataclass(eq=False, repr=False)
class PointCloudFolder(PointCloudDataModule):
    """Meshes and point clouds from the files of a folder and its subfolders (formats: :func:`read_points`).

    The class of a file is its subfolder. Folders named ``train``, ``val`` and ``test``, above or below it, define the
    split. Without ``val``, validation files are taken from the training files; without any of the folders, test and
    validation files are taken from all. They are chosen by a hash of their names, the same on all machines. Fewer than
    three files are not divided: each split that would get a part holds all. Points are drawn from meshes; point clouds
    are divided into points to fit and held-out points, at most ``num_points`` each. Hidden files are skipped, and text
    files without a row of three numbers, such as README.txt, with a warning.

    Args:
        root: the folder, a zip archive of it, or the URL of one, which is kept in ~/.cache/em_lightning.
        sha256: hash of an archive that is downloaded; ``None`` does not verify it.
        val_fraction: fraction of the files for validation; 0 validates on new clouds of the training files.
        test_fraction: fraction of the files for the test; 0 tests on new clouds of all files.
        clouds_per_file: clouds per training file and epoch.
        eval_clouds_per_file: clouds per validation and test file.
        pattern: glob pattern of the files, such as ``"*.off"`` or ``"chair/**/*.txt"``.
        drop_non_finite: whether to drop points with NaN or infinite coordinates, instead of raising.
        held_out_classes: number of classes, drawn by the seed, that form the test split and occur in no other.

    Raises:
        ValueError: an argument is out of range, ``root`` is neither a folder nor an archive, a split has no files, or a
            file is corrupt (raised by :meth:`setup`).
        ConnectionError: the download failed.
    """

    root: str
    sha256: str | None = None
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    clouds_per_file: int = 1
    eval_clouds_per_file: int = 1
    pattern: str = "*"
    drop_non_finite: bool = False
    held_out_classes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}.items():
            if not 0 <= value < 0.5:  # the sum must leave training files
                raise ValueError(f"{name}={value} must be at least 0 and less than 0.5")
        self.downloads = self.root.startswith(("https://", "http://"))
        cached = f"{CACHE}/{hashlib.sha256(self.root.encode()).hexdigest()[:16]}.zip"
        self.path = Path(cached if self.downloads else self.root).expanduser()
        self.source = f"files in {self.root}"
        self.files: dict[str, list[str]] = {}
        self._shapes: dict[str, Shape] = {}

    def prepare_data(self) -> None:
        if self.downloads:
            known_hash = None if self.sha256 is None else f"sha256:{self.sha256}"
            download(self.root, self.path, known_hash, "download it yourself and pass the file as root")

    @cached_property
    def datasets(self) -> dict[str, RandomDataset]:
        self.prepare_data()
        if not self.path.exists():
            raise ValueError(f"root={self.root!r} must be a folder or zip archive with {', '.join(SUPPORTED)} files")
        if self.path.is_dir():
            self._read(self.path)
        else:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    shutil.unpack_archive(self.path, folder, "zip")
                except Exception as error:  # zipfile raises errors of many types
                    raise ValueError(f"{self.path} is damaged or not a zip archive ({error})") from error
                content = list(Path(folder).iterdir())  # the folder itself, or its files
                self._read(content[0] if len(content) == 1 and content[0].is_dir() else Path(folder))
        return super().datasets

    def _read(self, folder: Path) -> None:
        """Set the files of the splits, their classes and their shapes."""
        names = self._find(folder)
        self.class_names = sorted(set(map(_class_of, names)))
        self.files = self._split(names)
        for name in sorted(set().union(*self.files.values())):
            points, faces = read_points(folder / name, self.drop_non_finite)
            label = self.class_names.index(_class_of(name))
            triangles = None if faces is None else torch.from_numpy(faces)
            try:
                self._shapes[name] = Shape.of(torch.from_numpy(points), triangles, label)
            except ValueError as error:
                raise ValueError(f"{folder / name}: {error}; repair the file or remove it") from error

    def _find(self, folder: Path) -> list[str]:
        names: list[str] = []
        skipped: list[str] = []
        for path in sorted(folder.rglob(self.pattern)):
            name = path.relative_to(folder)
            hidden = any(part.startswith(".") for part in name.parts)
            if path.suffix.lower() in SUPPORTED and path.is_file() and not hidden:
                (names if has_points(path) else skipped).append(name.as_posix())
        if skipped:
            warnings.warn(f"root={self.root!r}: text files without points are skipped: {skipped}", stacklevel=2)
        if not names:
            raise ValueError(f"root={self.root!r}: {self.pattern!r} matches no {', '.join(SUPPORTED)} file")
        return sorted(names)

    def _split(self, names: list[str]) -> dict[str, list[str]]:
        files: dict[str, list[str]] = {split: [] for split in SPLITS}
        outside: list[str] = []  # files in no train, val or test folder
        for name in names:
            split = next((part for part in Path(name).parts[:-1] if part in SPLITS), None)
            (outside if split is None else files[split]).append(name)
        if outside and len(outside) < len(names):
            raise ValueError(f"root={self.root!r}: {outside[0]!r} is in no train, val or test folder, but others are")
        if outside:
            files["test"], files["train"] = _hold_out(outside, self.test_fraction)
        if files["train"] and not files["val"]:
            remaining = 1 - self.test_fraction if outside else 1.0  # fraction of the files that the test left
            files["val"], files["train"] = _hold_out(files["train"], self.val_fraction / remaining)
        count = len(self.class_names)
        if self.held_out_classes >= count:
            raise ValueError(f"held_out_classes={self.held_out_classes} must be less than {count} classes")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        held_out = {self.class_names[i] for i in order[: self.held_out_classes]}
        if held_out:
            for split, part in files.items():
                files[split] = [name for name in part if (_class_of(name) in held_out) == (split == "test")]
        if empty := [split for split in SPLITS if not files[split]]:
            rule = f"with held_out_classes={self.held_out_classes}; add folders of these names"
            raise ValueError(f"root={self.root!r} has no files for {empty} {rule}")
        return files

    def shapes(self, split: str) -> tuple[Sequence[Shape], int]:
        shapes = [self._shapes[name] for name in self.files[split]]
        repeats = self.clouds_per_file if split == "train" else self.eval_clouds_per_file
        return shapes, len(shapes) * repeats


def _class_of(name: str) -> str:
    """Return the name of the class of a file: its folders, without those of the splits."""
    return "/".join(part for part in Path(name).parts[:-1] if part not in SPLITS)


def _hold_out(names: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Return a fraction of the files and the rest; all files twice if they are fewer than 3 or the fraction is 0."""
    if len(names) < 3 or not fraction:
        return names, names
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    size = max(1, round(fraction * len(order)))
    return sorted(order[:size]), sorted(order[size:])
