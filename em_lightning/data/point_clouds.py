"""Point clouds of shapes that are known by name: procedural ones, PyG's GeometricShapes, ModelNet."""

from __future__ import annotations

import pickle
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from em_lightning.data.base import PointCloudDataModule, at_least
from em_lightning.data.clouds import KnownShapes, Shape, Shapes
from em_lightning.data.download import fetch
from em_lightning.data.readers import MAX_BYTES, parse_points, read_points
from em_lightning.data.sampling import random_rotation
from em_lightning.data.surfaces import FAMILIES, random_surface

CACHE = "~/.cache/em_lightning"
# The archive that PyG's data set of that name is made of.
_SHAPES = "https://github.com/Yannick-S/geometric_shapes/raw/master/raw.zip"
# What PyG looks for, in ModelNet40 too.
_CLASSES = ("bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet")
_SHAPES_SHA256 = "fb5e5d132db7f871b415b6d9cb6e0fd258192ccb1aa64a172839146527c082dd"


class _RandomShapes:
    def __init__(self, families: Sequence[str], size: int) -> None:
        self.families, self.size = list(families), size

    def __len__(self) -> int:
        return self.size

    def __call__(self, index: int, generator: torch.Generator) -> Shape:
        label = index % len(self.families)
        vertices, faces = random_surface(self.families[label], generator)
        return Shape.of(vertices @ random_rotation(generator).T, faces, label)


class ProceduralSurfaces(PointCloudDataModule):
    """Random shapes of a dozen families and more, in random poses: the default, without a download.

    Every item is a new shape: the family goes round, its parameters and its pose are drawn, in all splits.

    Args:
        train_clouds: clouds in an epoch.
        val_clouds: clouds to validate on.
        test_clouds: clouds to test on.
        families: names of families; ``None`` takes all (``em_lightning.data.FAMILIES``).
        **options: the arguments of :class:`PointCloudDataModule`.

    Raises:
        ValueError: as :class:`PointCloudDataModule`, or a family is unknown.

    Example:
        >>> data = ProceduralSurfaces(num_points=64, batch_size=4, train_clouds=8)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.points.shape, batch.mask.all().item(), batch.label.shape
        (torch.Size([4, 64, 3]), True, torch.Size([4]))
    """

    def __init__(
        self,
        train_clouds: int = 640,
        val_clouds: int = 64,
        test_clouds: int = 64,
        families: list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        at_least(1, train_clouds=train_clouds, val_clouds=val_clouds, test_clouds=test_clouds)
        unknown = [name for name in families or () if name not in FAMILIES]
        if unknown or families == []:
            raise ValueError(f"families={families} is not known; choose from {', '.join(FAMILIES)}")
        self.sizes = {"train": train_clouds, "val": val_clouds, "test": test_clouds}
        self.class_names = list(families or FAMILIES)

    def shapes(self, split: str) -> Shapes:
        """Return shapes with fresh parameters."""
        return _RandomShapes(self.class_names, self.sizes[split])

    def source(self) -> str:
        """Return in a few words what is drawn from."""
        return f"procedural surfaces of {len(self.class_names)} families with random shape and pose"


Meshes = list[tuple[str, str, Shape]]  # class, split, shape


def _zip_meshes(path: Path) -> Meshes:
    """Read the meshes CLASS/SPLIT/NAME.off straight from an archive, since its folder may not be writable."""
    meshes = []
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".off")]
            size = sum(info.file_size for info in members)
            if size > MAX_BYTES:
                raise ValueError(f"{path}: its meshes unpack to {size} bytes, more than {MAX_BYTES}; fetch it again")
            if sum(info.compress_size for info in members) > path.stat().st_size:  # which zipfile would make room for
                raise ValueError(f"{path}: its meshes take more bytes than the archive has; fetch it again")
            for info in sorted(members, key=lambda info: info.filename):
                parts = Path(info.filename).parts
                if len(parts) >= 3 and parts[-2] in ("train", "test"):
                    points, faces = parse_points(archive.read(info), f"{path}/{info.filename}")
                    meshes.append((parts[-3], parts[-2], _shape(points, faces, f"{path}/{info.filename}")))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: no sound zip archive ({error}); fetch it again") from error
    return meshes


def _folder_meshes(folder: Path) -> Meshes:
    paths = [path for path in sorted(folder.glob("*/*/*.off")) if path.parent.name in ("train", "test")]
    return [(path.parts[-3], path.parts[-2], _shape(*read_points(path), str(path))) for path in paths]


def _shape(points: Any, faces: Any, name: str) -> Shape:
    """Return the shape of what a file holds; a mesh without an area is reported under the file's name."""
    try:
        return Shape.of(torch.from_numpy(points), None if faces is None else torch.from_numpy(faces))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


class GeometricShapes(PointCloudDataModule):
    """PyG's GeometricShapes: 40 classes of plain solids and flat figures with a mesh each for training and for test.

    In the published archive the two meshes of a class are the same, so the test shows fresh points of known shapes
    unless ``held_out_classes`` keeps whole classes for it. Validation draws the training meshes afresh.

    Args:
        root: the published ``raw.zip``, a folder with it, or a folder with its content; nothing is written to it.
            ``None`` downloads it to ~/.cache/em_lightning, checked against its SHA-256 sum.
        clouds_per_mesh: clouds of a training mesh in an epoch.
        eval_clouds_per_mesh: clouds of a mesh in validation and in test.
        held_out_classes: so many classes, drawn by the seed, are seen in the test alone and are all it has.
        **options: the arguments of :class:`PointCloudDataModule`.

    Raises:
        ValueError: an argument is outside its range, ``root`` lacks the meshes, or a mesh is corrupt.
    """

    def __init__(
        self,
        root: str | None = None,
        clouds_per_mesh: int = 16,
        eval_clouds_per_mesh: int = 1,
        held_out_classes: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        at_least(1, clouds_per_mesh=clouds_per_mesh, eval_clouds_per_mesh=eval_clouds_per_mesh)
        at_least(0, held_out_classes=held_out_classes)
        if root is not None and not Path(root).expanduser().exists():
            raise ValueError(f"root={root!r} does not exist; give raw.zip or its folder, or leave it out to download")
        self.root = root
        self.clouds_per_mesh = clouds_per_mesh
        self.eval_clouds_per_mesh = eval_clouds_per_mesh
        self.held_out_classes = held_out_classes
        self._meshes: Meshes = []

    def prepare_data(self) -> None:
        """Download the meshes where no ``root`` was given."""
        if self.root is None:
            fetch(_SHAPES, self._folder(), _SHAPES_SHA256, f"fetch {_SHAPES} and give it as root")

    def _folder(self) -> Path:
        return Path(f"{CACHE}/GeometricShapes/raw.zip" if self.root is None else self.root).expanduser()

    def _read(self) -> None:
        if self._meshes:
            return
        self.prepare_data()
        folder = self._folder()
        if folder.is_file():
            meshes = _zip_meshes(folder)
        else:
            meshes = _folder_meshes(folder) or _folder_meshes(folder / "raw")
            if not meshes and (folder / "raw.zip").is_file():
                meshes = _zip_meshes(folder / "raw.zip")
        if {split for _, split, _ in meshes} != {"train", "test"}:
            raise ValueError(
                f"root={str(folder)!r} holds no CLASS/train/*.off and CLASS/test/*.off, unpacked or in raw.zip; "
                f"give the published raw.zip or its folder"
            )
        self.class_names = sorted({name for name, _, _ in meshes})
        if self.held_out_classes >= len(self.class_names):
            raise ValueError(
                f"held_out_classes={self.held_out_classes} leaves none of the {len(self.class_names)} classes to "
                f"train on; give fewer"
            )
        self._meshes = meshes

    def shapes(self, split: str) -> Shapes:
        """Return the meshes of a split."""
        self._read()
        order = torch.randperm(len(self.class_names), generator=torch.Generator().manual_seed(self.seed))
        kept = {self.class_names[i] for i in order[: self.held_out_classes]}
        wanted = "test" if split == "test" else "train"
        known = [
            shape._replace(label=self.class_names.index(name))
            for name, part, shape in self._meshes
            if part == wanted and (not kept or (name in kept) == (split == "test"))
        ]
        return KnownShapes(known, self.clouds_per_mesh if split == "train" else self.eval_clouds_per_mesh)

    def source(self) -> str:
        """Return in a few words what is drawn from."""
        where = "downloaded" if self.root is None else f"from {self.root}"
        kept = f", {self.held_out_classes} classes for the test alone" if self.held_out_classes else ""
        return f"meshes of PyG's GeometricShapes {where}{kept}"


class _PyGShapes:
    """Meshes of a PyG data set. Their areas are found when they are drawn: all at once would fill the memory."""

    def __init__(self, source: Any, items: Sequence[int]) -> None:
        self.source, self.items = source, list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __call__(self, index: int, generator: torch.Generator) -> Shape:
        data = self.source[self.items[index]]
        return Shape.of(data.pos, data.face.T, int(data.y))


class ModelNet(PointCloudDataModule):
    """ModelNet10 or ModelNet40 (Wu et al., "3D ShapeNets", 2015) as PyG converts it: CAD models of 10 or 40 classes.

    Its authors publish no sum to check a download by, so nothing is downloaded: unpack their archive. The published
    test set is the test; a part of the training set, drawn by the seed, is the validation.

    Args:
        name: ``"10"`` or ``"40"``.
        root: PyG's folder of the data set, with the classes of the archive in its subfolder ``raw``; ``None`` is
            ~/.cache/em_lightning/ModelNet10 or 40. PyG writes what it converts beside them.
        val_fraction: the part of the training set that is kept for validation.
        **options: the arguments of :class:`PointCloudDataModule`.

    Raises:
        ValueError: an argument is outside its range, ``root`` lacks the classes, or what PyG once converted holds
            more than tensors.
    """

    def __init__(
        self, name: Literal["10", "40"] = "10", root: str | None = None, val_fraction: float = 0.1, **options: Any
    ) -> None:
        super().__init__(**options)
        if name not in ("10", "40"):
            raise ValueError(f"name={name!r} is no ModelNet; choose '10' or '40'")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} must lie between 0 and 1; 0.1 is usual")
        self.name = name
        self.root = root
        self.val_fraction = val_fraction

    def prepare_data(self) -> None:
        """Convert the data set where that has not been done."""
        self._source(True)

    def _source(self, train: bool) -> Any:
        from torch_geometric.datasets import ModelNet as Source

        folder = Path(self.root or f"{CACHE}/ModelNet{self.name}").expanduser()
        lacking = [name for name in _CLASSES if not (folder / "raw" / name).is_dir()]
        if lacking:  # PyG would download, without a look at certificate or sum
            raise ValueError(
                f"root={str(folder)!r} has no raw/{lacking[0]}; fetch {Source.urls[self.name]} and unpack its classes "
                f"into {folder / 'raw'}"
            )
        with warnings.catch_warnings():
            # Behind this warning PyG goes on and unpickles anything.
            warnings.filterwarnings("error", "Weights only load failed")
            try:
                return Source(str(folder), self.name, train=train)
            except (UserWarning, pickle.UnpicklingError) as error:
                raise ValueError(
                    f"{folder / 'processed'} holds more than tensors; remove it, and it is made again"
                ) from error

    def shapes(self, split: str) -> Shapes:
        """Return the meshes of a split."""
        source = self._source(train=split != "test")
        self.class_names = sorted(path.name for path in Path(source.raw_dir).iterdir() if path.is_dir())
        if split == "test":
            return _PyGShapes(source, range(len(source)))
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(self.seed)).tolist()
        val = max(1, round(self.val_fraction * len(order)))
        return _PyGShapes(source, order[:val] if split == "val" else order[val:])

    def source(self) -> str:
        """Return in a few words what is drawn from."""
        return f"meshes of ModelNet{self.name}" + (f" in {self.root}" if self.root else "")
