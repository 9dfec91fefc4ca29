"""LightningDataModules of meshes and point clouds in files: the user's folder or archive, and GeometricShapes."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from em_lightning.checks import check_at_least
from em_lightning.data.base import CACHE, SPLITS, download
from em_lightning.data.point_clouds import PointCloudDataModule, Shape, ShapeSource
from em_lightning.data.readers import SUPPORTED, has_points, read_points

# The archive of PyG's data set.
SHAPES_URL = "https://github.com/Yannick-S/geometric_shapes/raw/master/raw.zip"
SHAPES_CACHE = f"{CACHE}/GeometricShapes/raw.zip"
SHAPES_HASH = "sha256:fb5e5d132db7f871b415b6d9cb6e0fd258192ccb1aa64a172839146527c082dd"


@dataclass(eq=False, repr=False)
class PointCloudFolder(PointCloudDataModule):
    """Meshes and point clouds from the files of a folder and its subfolders (formats: :func:`read_points`).

    The class of a file is its subfolder. Folders named ``train``, ``val`` and ``test``, above or below it, define the
    split; missing splits are drawn by a hash of the file name, which is the same on all machines. With fewer than three
    files every split holds all of them. Points are drawn from meshes; point clouds are divided into points to fit and
    held-out points, and padded if they are smaller than ``num_points``.
    Hidden files are skipped, and text files without a row of three numbers, such as README.txt, with a warning.

    Args:
        root: the folder, or a zip archive of it.
        val_fraction: fraction of the files for validation; 0 draws other points from the training files.
        test_fraction: fraction of the files for the test.
        clouds_per_file: clouds per training file and epoch.
        eval_clouds_per_file: clouds per validation and test file.
        pattern: glob pattern of the files, such as ``"*.off"`` or ``"chair/**/*.txt"``.
        drop_non_finite: whether to drop points with NaN or infinite coordinates, instead of raising.

    Raises:
        ValueError: an argument is out of range, ``root`` is neither a folder nor an archive, a split has no files, or a
            file is corrupt (raised by :meth:`setup`).
    """

    root: str
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    clouds_per_file: int = 1
    eval_clouds_per_file: int = 1
    pattern: str = "*"
    drop_non_finite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, clouds_per_file=self.clouds_per_file, eval_clouds_per_file=self.eval_clouds_per_file)
        for name, value in {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}.items():
            if not 0 <= value < 0.5:
                raise ValueError(f"{name}={value} must be at least 0 and less than 0.5")
        self.path = Path(self.root).expanduser()
        self.source = f"files in {self.path}"
        self.files: dict[str, list[str]] = {}

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:
            return
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
                self._read(Path(folder))
        super().setup()

    def _read(self, folder: Path) -> None:
        """Set the files of the splits, their classes and their shapes."""
        names = self._find(folder)
        self.class_names = sorted(set(map(_label, names)))
        self.files = self._split(names)
        self._shapes = {
            name: _read_shape(folder / name, self.class_names.index(_label(name)), self.drop_non_finite)
            for name in sorted(set().union(*self.files.values()))
        }

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
            raise ValueError(
                f"root={self.root!r}: {outside[0]!r} is in no train, val or test folder, but other files are"
            )
        if outside:
            files["test"], files["train"] = _hold_out(outside, self.test_fraction)
        if files["train"] and not files["val"]:
            fraction = self.val_fraction / (1 - self.test_fraction) if outside else self.val_fraction
            files["val"], files["train"] = _hold_out(files["train"], fraction)
        empty = [split for split in SPLITS if not files[split]]
        if empty:
            raise ValueError(f"root={self.root!r} has no files for {empty}; add folders of these names")
        return files

    def shapes(self, split: str) -> tuple[ShapeSource, int]:
        shapes = [self._shapes[name] for name in self.files[split]]
        repeats = self.clouds_per_file if split == "train" else self.eval_clouds_per_file
        return partial(_cycle, shapes), len(shapes) * repeats


def _label(name: str) -> str:
    return "/".join(part for part in Path(name).parts[:-1] if part not in SPLITS)


def _hold_out(names: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Return a fraction of the files and the rest; both are all files if there are fewer than three or it is 0."""
    if len(names) < 3 or not fraction:
        return names, names
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    size = max(1, round(fraction * len(order)))
    return sorted(order[:size]), sorted(order[size:])


def _cycle(shapes: Sequence[Shape], index: int, generator: torch.Generator) -> Shape:
    return shapes[index % len(shapes)]


def _read_shape(path: Path, label: int, drop_non_finite: bool) -> Shape:
    points, faces = read_points(path, drop_non_finite)
    try:
        return Shape.of(torch.from_numpy(points), None if faces is None else torch.from_numpy(faces), label)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; repair the file or remove it") from error


@dataclass(eq=False, repr=False)
class GeometricShapes(PointCloudFolder):
    """PyG's GeometricShapes: 40 classes of solids and flat figures, each with one mesh for training and one for test.

    In the published archive both meshes of a class are equal, so the test measures new points of known shapes, unless
    ``held_out_classes`` reserves classes for the test. Validation draws new points from the training meshes.

    Args:
        root: the published ``raw.zip``, or a folder with its content. By default it is downloaded and its SHA-256
            verified.
        held_out_classes: number of classes, drawn by the seed, that occur in the test only; the test has no others.

    Raises:
        ValueError: as :class:`PointCloudFolder`.
        ConnectionError: the download failed.
    """

    root: str = SHAPES_CACHE
    val_fraction: float = 0.0
    clouds_per_file: int = 16
    held_out_classes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, held_out_classes=self.held_out_classes)
        self.source = "meshes of PyG's GeometricShapes"
        self.source += f", {self.held_out_classes} classes in the test only" if self.held_out_classes else ""

    def prepare_data(self) -> None:
        if self.root == SHAPES_CACHE:
            download(SHAPES_URL, self.path, SHAPES_HASH, f"download {SHAPES_URL} and pass it as root")

    def _read(self, folder: Path) -> None:
        super()._read(folder / "raw" if (folder / "raw").is_dir() else folder)

    def _split(self, names: list[str]) -> dict[str, list[str]]:
        files, count = super()._split(names), len(self.class_names)
        if self.held_out_classes >= count:
            raise ValueError(f"held_out_classes={self.held_out_classes} must be less than {count} classes")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        held_out = {self.class_names[i] for i in order[: self.held_out_classes]}
        if held_out:
            files = {k: [n for n in part if (_label(n) in held_out) == (k == "test")] for k, part in files.items()}
        return files
