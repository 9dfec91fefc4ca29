"""Readers of point clouds and meshes: OFF, PLY, OBJ and STL with trimesh, text and NumPy files with NumPy."""

from __future__ import annotations

import io
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Faces = NDArray[np.int64]
MESHES = (".off", ".ply", ".obj", ".stl")
TEXTS = (".xyz", ".txt", ".csv", ".pts")
ARRAYS = (".npy", ".npz")
SUPPORTED = (*MESHES, *TEXTS, *ARRAYS)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_points(path: str | Path, drop_non_finite: bool = False) -> tuple[Points, Faces | None]:
    """Read the points of a file, and its faces if it holds a mesh.

    The ending decides the format: ``.off``, ``.ply``, ``.obj`` and ``.stl`` are read by trimesh. ``.xyz``, ``.txt``,
    ``.csv`` and ``.pts`` are text with one point per line, separated by blanks, commas or semicolons; the first three
    columns are read; a first line with column names or with the number of points is skipped. ``.npy`` holds an array
    of shape (N, 3) or wider, ``.npz`` one such array or one named ``points``. Polygons are split into triangles.

    Args:
        path: the file.
        drop_non_finite: whether to drop points with NaN or infinite coordinates and their faces, instead of raising.

    Returns:
        Points (N, 3) float64 and faces (F, 3) int64, or ``None`` if the file has no faces.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty, truncated or corrupt; the message names the file.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in SUPPORTED:
        raise ValueError(f"{path}: the ending must be one of {', '.join(SUPPORTED)}; convert the file")
    path.stat()  # raises FileNotFoundError
    try:
        if ending in MESHES:
            points, faces = _parse_mesh(path.read_bytes().removeprefix(_BYTE_ORDER_MARK), ending)
        else:
            points, faces = _parse_text(path.read_bytes()) if ending in TEXTS else _read_array(path), None
        return _checked(points, faces, drop_non_finite)
    except Exception as error:  # trimesh and zipfile raise errors of many types
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        remedy = "repair the file, leave it out, or export it again" + (
            " with triangles only" if ending in MESHES else ""
        )
        raise ValueError(f"{path}: {kind}{error}; {remedy}") from error


def map_npy(path: Path) -> np.ndarray:
    """Return an NPY file as a memory map; pickled objects are refused with a ValueError."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy evaluates the header as a Python literal
        raise ValueError(f"not a plain NumPy array of numbers ({error})") from error


def _checked(points: Points, faces: Faces | None, drop_non_finite: bool) -> tuple[Points, Faces | None]:
    """Check what all formats have in common: finite points, and faces that refer to them."""
    if faces is not None and len(faces) and not 0 <= faces.min() <= faces.max() < len(points):
        bad = faces.min() if faces.min() < 0 else faces.max()
        raise ValueError(f"a face refers to point {bad}, but the points are 0 to {len(points) - 1}")
    finite = np.asarray(np.isfinite(points).all(1))
    if not finite.all():
        if not drop_non_finite:
            bad = int(finite.argmin())
            raise ValueError(f"point {bad} is {points[bad].tolist()}, not finite; drop_non_finite=True drops it")
        if faces is not None:
            faces = (np.cumsum(finite) - 1)[faces[finite[faces].all(1)]]
        points = points[finite]
    if not len(points):
        raise ValueError("the file holds no points")
    return points, faces if faces is not None and len(faces) else None


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or shape[1] < 3:
        raise ValueError(f"the array has shape {shape}, which must be (N, 3) or wider")
    if shape[0] == 3 < shape[1] or 3 < shape[0] <= 12 < shape[1]:
        raise ValueError(f"the array has shape {shape}, but points must be rows, (N, 3) or wider; transpose it")


def _read_array(path: Path) -> Points:
    if path.suffix.lower() == ".npy":
        array = map_npy(path)
    else:
        # Extracted and mapped, because np.load would allocate any size that a damaged header announces.
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
            names = archive.namelist()
            name = names[0] if len(names) == 1 else "points.npy"
            if name not in names:
                raise ValueError(f"of several arrays one must be named 'points', got {', '.join(names)[:200]}")
            array = np.array(map_npy(Path(archive.extract(name, folder))))
    _check_shape(array.shape)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"the array has dtype {array.dtype}, which must be real numbers")
    return np.array(array[:, :3], dtype=np.float64)


def _parse_text(data: bytes) -> Points:
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1"
    text = data.removeprefix(_BYTE_ORDER_MARK).decode(encoding, "replace")
    # Only newline characters end a line.
    lines = [line for line in (line.partition("#")[0].strip() for line in text.split("\n")) if line]
    if lines and (lines[0] == str(len(lines) - 1) or re.match(r"(?!nan|inf)[^-+.\d]", lines[0], re.IGNORECASE)):
        lines = lines[1:]  # the number of points, or column names
    if not lines:
        raise ValueError("the file holds no points")
    delimiter = next((mark for mark in ";," if mark in lines[0]), None)
    _check_shape((len(lines), len(lines[0].rstrip(";,").split(delimiter))))
    return np.loadtxt(lines, delimiter=delimiter, usecols=(0, 1, 2), ndmin=2, comments=None)


def _parse_mesh(data: bytes, ending: str) -> tuple[Points, Faces]:
    import trimesh

    prepare = {".off": _prepare_off, ".ply": _prepare_ply, ".obj": _prepare_obj}
    content = io.BytesIO(prepare[ending](data) if ending in prepare else data)
    scene = trimesh.load_scene(content, file_type=ending[1:], process=False, skip_materials=True)
    points, faces, start = [np.empty((0, 3))], [np.empty((0, 3), dtype=np.int64)], 0
    part: Any
    for part in scene.dump():
        points.append(np.asarray(part.vertices, dtype=np.float64))
        faces.append(np.asarray(getattr(part, "faces", faces[0]), dtype=np.int64).reshape(-1, 3) + start)
        start += len(part.vertices)
    if ending == ".stl" and data.count(b"vertex ") > start:
        raise ValueError(f"{data.count(b'vertex ')} vertices are announced, {start} are numbers")
    return np.concatenate(points), np.concatenate(faces)


# trimesh reads truncated and malformed text without an error; these functions find it, and remove comments, after which
# trimesh repeats lines.


def _prepare_off(data: bytes) -> bytes:
    text = re.sub(rb"#[^\n]*", b"", data)
    header = re.match(rb"\s*(?:ST)?C?N?OFF\s*(\d+)\s+(\d+)", text)
    if header is None:
        raise ValueError("an OFF file must begin with OFF and the numbers of points and faces")
    announced = sum(map(int, header.groups()))
    rows = sum(1 for line in text[header.end() :].split(b"\n")[1:] if line.strip())
    if rows != announced:
        raise ValueError(f"{announced} points and faces are announced, {rows} lines follow")
    return text


def _prepare_ply(data: bytes) -> bytes:
    header, end, body = data.partition(b"end_header")
    header = re.sub(rb"(?m)^(comment|obj_info).*\n", b"", header)
    # trimesh would build a path from edges.
    header = re.sub(rb"(?m)^element +edge ", b"element unused ", header)
    if not end or not header.startswith(b"ply"):
        raise ValueError("a PLY file must begin with a header from 'ply' to 'end_header'")
    if re.search(rb"(?m)^format +ascii", header):
        announced = sum(map(int, re.findall(rb"(?m)^element +\S+ +(\d+)", header)))
        rows = [line for line in body.split(b"\n") if line.strip()]
        if len(rows) != announced:
            raise ValueError(f"{announced} rows are announced, {len(rows)} follow")
        body = b"\n" + b"\n".join(rows)
        if re.search(rb"[^\s\d.eE+\-naifNAIF]", body):
            raise ValueError("the rows must hold numbers only")
        # trimesh would round the digits of the text to float32.
        header = re.sub(rb"(?m)^property +float(?:32)? ", b"property double ", header)
    return header + end + body


def _prepare_obj(data: bytes) -> bytes:
    text = re.sub(rb"\\\r?\n", b" ", re.sub(rb"#[^\n]*", b"", data))
    text = re.sub(rb"(?m)^ +", b"", text)
    if re.search(rb"(?m)^f .*[^\d\s/-]", text) or re.search(rb"(?m)^f (?:.* )?0+(?:[/\s]|$)", text):
        raise ValueError("faces must hold integers that count from 1")
    relative = re.search(rb"(?m)^f (?:.* )?-", text)
    if relative and re.search(rb"(?m)^v ", text[relative.end() :]):
        raise ValueError("relative (negative) indices before the last point are not read; export absolute ones")
    return text
