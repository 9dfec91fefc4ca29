"""LightningDataModules of point clouds: the base class, procedural surfaces, and a folder of the user's files."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from em_lightning.checks import check_at_least, check_choice
from em_lightning.data.base import SPLITS, SplitDataModule
from em_lightning.data.clouds import (
    EpochSampler,
    PointCloudBatch,
    RandomDataset,
    Shape,
    ShapeSource,
    collate_clouds,
    draw_cloud,
)
from em_lightning.data.readers import SUPPORTED, has_points, read_points
from em_lightning.data.sampling import random_rotation
from em_lightning.data.surfaces import FAMILIES, random_surface


@dataclass(eq=False, repr=False, kw_only=True)
class PointCloudDataModule(SplitDataModule):
    """Batches of point clouds, each with points to fit and held-out points of the same shape.

    Training clouds are resampled every epoch; validation and test clouds are fixed by the seed. An item is a
    function of (seed, split, epoch, index). Subclasses define :meth:`shapes` and ``source``.

    Args:
        num_points: points per cloud to fit; the same number is held out.
        batch_size: clouds per batch and rank.
        num_workers: number of worker processes that draw clouds; 0 draws them in the main process.
        seed: at least 0; the clouds are a function of it.
        noise: standard deviation of Gaussian jitter, relative to the radius of the shape. A pair draws it for each
            cloud: zero for half of them, log-uniform between the two for the others. Points on a surface have no
            density in space, so without jitter the likelihood of a mixture is unbounded.
        holes: largest number of missing regions of a cloud, up to a third of its points together.
        rotate: random rotation of each training cloud: ``"none"``, about ``"z"``, or ``"so3"``, any rotation.

    Raises:
        ValueError: an argument is out of range.
    """

    num_features = 3

    num_points: int = 1024
    batch_size: int = 32
    num_workers: int = 0
    seed: int = 0
    noise: float | tuple[float, float] = 0.0
    holes: int = 0
    rotate: Literal["none", "z", "so3"] = "none"

    def __post_init__(self) -> None:
        super().__init__()
        check_at_least(1, num_points=self.num_points, batch_size=self.batch_size)
        check_at_least(0, num_workers=self.num_workers, seed=self.seed, holes=self.holes)
        if isinstance(self.noise, (tuple, list)):
            low, high = self.noise = (float(self.noise[0]), float(self.noise[1]))
            if not 0.0 < low <= high:
                raise ValueError(f"noise={self.noise} must be a number or a pair of positive numbers in order")
        else:
            check_at_least(0, noise=self.noise)
        check_choice("rotate", self.rotate, ("none", "z", "so3"))
        self.class_names: list[str] = []
        self.datasets: dict[str, RandomDataset] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        self.setup()
        return len(self.class_names)

    def shapes(self, split: str) -> tuple[ShapeSource, int]:
        """Return the shapes of a split and their number, and set ``class_names``."""
        raise NotImplementedError(f"{type(self).__name__} must define shapes(split)")

    def describe(self) -> str:
        counts = ", ".join(f"{len(data)} {split}" for split, data in self.datasets.items())
        counts = f": {counts} clouds" if counts else ""
        return f"{self.source}, {self.num_points} points per cloud to fit and as many held out{counts}"

    def setup(self, stage: str | None = None) -> None:
        """Create the datasets of all splits, once."""
        if self.datasets:
            return
        datasets = {}
        for split in SPLITS:
            shape, size = self.shapes(split)
            draw = partial(
                draw_cloud,
                shape,
                self.num_points,
                self.noise,
                self.holes,
                self.rotate if split == "train" else "none",
            )
            datasets[split] = RandomDataset(draw, size, split, self.seed)
        self.datasets = datasets

    def transfer_batch_to_device(self, batch: PointCloudBatch, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; its normalization becomes float32 on devices without float64."""
        if device.type == "mps":
            batch = batch._replace(center=batch.center.float(), scale=batch.scale.float())
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def loader(self, split: str) -> DataLoader[PointCloudBatch]:
        self.setup()
        data = self.datasets[split]
        return DataLoader(
            data,
            batch_size=self.batch_size,
            sampler=EpochSampler(data, *self.ranks, self.seed) if split == "train" else None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate_clouds,
        )


def _random_shape(families: Sequence[str], index: int, generator: torch.Generator) -> Shape:
    label = index % len(families)
    vertices, faces = random_surface(families[label], generator)
    return Shape.of(vertices @ random_rotation(generator).T, faces, label)


@dataclass(eq=False, repr=False)
class ProceduralSurfaces(PointCloudDataModule):
    """Random surfaces of 18 families with random parameters and rotations; needs no download.

    Every item is a new surface; item i is of family i modulo the number of families, in all splits.

    Args:
        train_clouds: clouds per epoch.
        val_clouds: validation clouds.
        test_clouds: test clouds.
        families: names of families; ``None`` means all (``em_lightning.data.FAMILIES``).

    Raises:
        ValueError: as :class:`PointCloudDataModule`, or a family is unknown.

    Example:
        >>> data = ProceduralSurfaces(num_points=64, batch_size=4, train_clouds=8)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.points.shape, batch.mask.all().item(), batch.label.shape
        (torch.Size([4, 64, 3]), True, torch.Size([4]))
    """

    train_clouds: int = 640
    val_clouds: int = 64
    test_clouds: int = 64
    families: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, train_clouds=self.train_clouds, val_clouds=self.val_clouds, test_clouds=self.test_clouds)
        if self.families == [] or not set(self.families or ()) <= set(FAMILIES):
            raise ValueError(f"families={self.families} must be some of {', '.join(FAMILIES)}")
        self.class_names = list(self.families or FAMILIES)
        self.source = f"procedural surfaces of {len(self.class_names)} families with random shape and pose"

    def shapes(self, split: str) -> tuple[ShapeSource, int]:
        return partial(_random_shape, self.class_names), getattr(self, f"{split}_clouds")


@dataclass(eq=False, repr=False)
class PointCloudFolder(PointCloudDataModule):
    """Meshes and point clouds from the files of a folder and its subfolders (formats: :func:`read_points`).

    The class of a file is its subfolder. Folders named ``train``, ``val`` and ``test``, above or below it, define the
    split; missing splits are drawn by a hash of the file name, which is the same on all machines. With fewer than three
    files every split holds all of them. Points are drawn from meshes; point clouds are divided into points to fit and
    held-out points, and padded if they are smaller than ``num_points``.
    Hidden files are skipped, and text files without a row of three numbers, such as README.txt, with a warning.

    Args:
        root: the folder.
        val_fraction: fraction of the files for validation.
        test_fraction: fraction of the files for the test.
        clouds_per_file: clouds per training file and epoch.
        pattern: glob pattern of the files, such as ``"*.off"`` or ``"chair/**/*.txt"``.
        drop_non_finite: whether to drop points with NaN or infinite coordinates, instead of raising.

    Raises:
        ValueError: an argument is out of range, ``root`` is not a folder, a split has no files, or a file is corrupt
            (raised by :meth:`setup`).
    """

    root: str
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    clouds_per_file: int = 1
    pattern: str = "*"
    drop_non_finite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, clouds_per_file=self.clouds_per_file)
        for name, value in {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}.items():
            if not 0 < value < 0.5:
                raise ValueError(f"{name}={value} must be between 0 and 0.5")
        self.folder = Path(self.root).expanduser()
        if not self.folder.is_dir():
            raise ValueError(f"root={self.root!r} must be a folder with {', '.join(SUPPORTED)} files")
        self.source = f"files in {self.folder}"
        self.files: dict[str, list[str]] = {}

    def _find(self) -> list[str]:
        names: list[str] = []
        skipped: list[str] = []
        for path in sorted(self.folder.rglob(self.pattern)):
            name = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in name.parts)
            if path.suffix.lower() in SUPPORTED and path.is_file() and not hidden:
                (names if has_points(path) else skipped).append(name.as_posix())
        if skipped:
            warnings.warn(f"root={self.root!r}: text files without points are skipped: {skipped}", stacklevel=2)
        if not names:
            raise ValueError(f"root={self.root!r}: {self.pattern!r} matches no {', '.join(SUPPORTED)} file")
        return sorted(names)

    def _split(self) -> None:
        names = self._find()
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
            files["test"], files["train"] = self._hold_out(outside, self.test_fraction)
        if files["train"] and not files["val"]:
            fraction = self.val_fraction / (1 - self.test_fraction) if outside else self.val_fraction
            files["val"], files["train"] = self._hold_out(files["train"], fraction)
        empty = [split for split in SPLITS if not files[split]]
        if empty:
            raise ValueError(f"root={self.root!r} has no files for {empty}; add folders of these names")
        self.class_names = sorted({self._label(name) for name in names})
        self.files = files

    def _hold_out(self, names: list[str], fraction: float) -> tuple[list[str], list[str]]:
        """Return a fraction of the files, at least one, and the rest; fewer than three files are in both."""
        if len(names) < 3:
            return names, names
        order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
        size = max(1, round(fraction * len(order)))
        return sorted(order[:size]), sorted(order[size:])

    @staticmethod
    def _label(name: str) -> str:
        return "/".join(part for part in Path(name).parts[:-1] if part not in SPLITS)

    def shapes(self, split: str) -> tuple[ShapeSource, int]:
        if not self.files:
            self._split()
        shapes = [
            read_shape(self.folder / name, self.class_names.index(self._label(name)), self.drop_non_finite)
            for name in self.files[split]
        ]
        return partial(cycle_shapes, shapes), len(shapes) * (self.clouds_per_file if split == "train" else 1)


def cycle_shapes(shapes: Sequence[Shape], index: int, generator: torch.Generator) -> Shape:
    """Return shape ``index`` modulo the number of shapes; a :data:`ShapeSource` for a list of shapes."""
    return shapes[index % len(shapes)]


def read_shape(path: Path, label: int = 0, drop_non_finite: bool = False) -> Shape:
    """Return the shape of a file's points and faces; an error names the file."""
    points, faces = read_points(path, drop_non_finite)
    try:
        return Shape.of(torch.from_numpy(points), None if faces is None else torch.from_numpy(faces), label)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; repair the file or remove it") from error
