"""LightningDataModules of published meshes: PyG's GeometricShapes and ModelNet."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from em_lightning.checks import check_at_least, check_choice
from em_lightning.data.base import CACHE, download
from em_lightning.data.clouds import Shape, ShapeSource
from em_lightning.data.point_clouds import PointCloudDataModule, cycle_shapes, read_shape

# The archive of PyG's data set.
SHAPES_URL = "https://github.com/Yannick-S/geometric_shapes/raw/master/raw.zip"
SHAPES_HASH = "sha256:fb5e5d132db7f871b415b6d9cb6e0fd258192ccb1aa64a172839146527c082dd"


@dataclass(eq=False, repr=False)
class GeometricShapes(PointCloudDataModule):
    """PyG's GeometricShapes: 40 classes of solids and flat figures, each with one mesh for training and one for test.

    In the published archive both meshes of a class are equal, so the test measures new points of known shapes, unless
    ``held_out_classes`` reserves classes for the test. Validation draws new points from the training meshes.

    Args:
        root: the published ``raw.zip``, its folder, or a folder with its content; only read. ``None`` downloads the
            archive to ~/.cache/em_lightning and verifies its SHA-256.
        clouds_per_mesh: clouds per training mesh and epoch.
        eval_clouds_per_mesh: clouds per mesh in validation and test.
        held_out_classes: number of classes, drawn by the seed, that occur in the test only; the test has no others.

    Raises:
        ValueError: an argument is out of range, ``root`` has no meshes, or a mesh is corrupt.
        ConnectionError: the download failed.
    """

    root: str | None = None
    clouds_per_mesh: int = 16
    eval_clouds_per_mesh: int = 1
    held_out_classes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, clouds_per_mesh=self.clouds_per_mesh, eval_clouds_per_mesh=self.eval_clouds_per_mesh)
        check_at_least(0, held_out_classes=self.held_out_classes)
        self.path = Path(self.root or f"{CACHE}/GeometricShapes/raw.zip").expanduser()
        if self.root is not None and not self.path.exists():
            raise ValueError(f"root={self.root!r} must be raw.zip or its folder, or None to download")
        self.source = f"meshes of PyG's GeometricShapes {'downloaded' if self.root is None else f'from {self.root}'}"
        self.source += f", {self.held_out_classes} classes in the test only" if self.held_out_classes else ""
        self._meshes: list[tuple[str, str, Shape]] = []  # class, train or test, shape

    def prepare_data(self) -> None:
        if self.root is None:
            download(SHAPES_URL, self.path, SHAPES_HASH, f"download {SHAPES_URL} and pass it as root")

    def _read(self) -> None:
        self.prepare_data()
        path = self.path / "raw.zip" if (self.path / "raw.zip").is_file() else self.path
        with tempfile.TemporaryDirectory() as folder:
            if path.is_file():
                try:
                    shutil.unpack_archive(path, folder, "zip")
                except Exception as error:  # zipfile raises errors of many types
                    raise ValueError(f"{path} is damaged or not a zip archive ({error}); download it again") from error
            files = [
                file
                for file in sorted(Path(folder if path.is_file() else path).rglob("*.off"))
                if file.parent.name in ("train", "test")
            ]
            self._meshes = [(file.parent.parent.name, file.parent.name, read_shape(file)) for file in files]
        if {part for _, part, _ in self._meshes} != {"train", "test"}:
            raise ValueError(f"root={str(path)!r} must have CLASS/train/*.off and CLASS/test/*.off, as raw.zip has")
        self.class_names = sorted({name for name, _, _ in self._meshes})
        if self.held_out_classes >= len(self.class_names):
            raise ValueError(
                f"held_out_classes={self.held_out_classes} must be less than {len(self.class_names)} classes"
            )

    def shapes(self, split: str) -> tuple[ShapeSource, int]:
        if not self._meshes:
            self._read()
        order = torch.randperm(len(self.class_names), generator=torch.Generator().manual_seed(self.seed))
        held_out = {self.class_names[i] for i in order[: self.held_out_classes]}
        part = "test" if split == "test" else "train"
        shapes = [
            shape._replace(label=self.class_names.index(name))
            for name, mesh_part, shape in self._meshes
            if mesh_part == part and (not held_out or (name in held_out) == (split == "test"))
        ]
        repeats = self.clouds_per_mesh if split == "train" else self.eval_clouds_per_mesh
        return partial(cycle_shapes, shapes), len(shapes) * repeats


def _pyg_shape(source: Any, items: Sequence[int], index: int, generator: torch.Generator) -> Shape:
    # Areas are computed when a cloud is drawn: those of all meshes take too much memory.
    data = source[items[index]]
    return Shape.of(data.pos, data.face.T, int(data.y))


@dataclass(eq=False, repr=False)
class ModelNet(PointCloudDataModule):
    """ModelNet10 or ModelNet40 as PyG converts it: CAD models of 10 or 40 classes.

    The authors publish no hash, so nothing is downloaded: unpack their archive. The published test set is the test; a
    part of the training set, drawn by the seed, is the validation.

    Args:
        name: ``"10"`` or ``"40"``.
        root: PyG's folder of the data set, with the classes of the archive in its subfolder ``raw``; ``None`` means
            ~/.cache/em_lightning/ModelNet10 or 40. PyG writes its converted files there.
        val_fraction: fraction of the training set for validation.

    Raises:
        ValueError: an argument is out of range, or ``root`` has no classes.

    Source: Wu et al., 3D ShapeNets, 2015.
    """

    name: Literal["10", "40"] = "10"
    root: str | None = None
    val_fraction: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("name", self.name, ("10", "40"))
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must be between 0 and 1")
        self.source = f"meshes of ModelNet{self.name}" + (f" in {self.root}" if self.root else "")

    def prepare_data(self) -> None:
        self._data(True)

    def _data(self, train: bool) -> Any:
        from torch_geometric.datasets import ModelNet as Source

        folder = Path(self.root or f"{CACHE}/ModelNet{self.name}").expanduser()
        if not (folder / "raw" / "bathtub").is_dir():  # PyG would download without verification
            raise ValueError(
                f"root={str(folder)!r} has no raw/bathtub; download {Source.urls[self.name]} and unpack its classes "
                f"into {folder / 'raw'}"
            )
        for path in (folder / "processed").glob("*.pt"):
            torch.load(path, weights_only=True, mmap=True)  # PyG would fall back to unpickling arbitrary objects
        return Source(str(folder), self.name, train=train)

    def shapes(self, split: str) -> tuple[ShapeSource, int]:
        source = self._data(train=split != "test")
        self.class_names = sorted(path.name for path in Path(source.raw_dir).iterdir() if path.is_dir())
        items = list(range(len(source)))
        if split != "test":
            order = torch.randperm(len(source), generator=torch.Generator().manual_seed(self.seed)).tolist()
            val = max(1, round(self.val_fraction * len(order)))
            items = order[:val] if split == "val" else order[val:]
        return partial(_pyg_shape, source, items), len(items)
