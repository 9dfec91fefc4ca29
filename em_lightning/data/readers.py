"""Points and faces read from mesh and point files: OFF, PLY, OBJ, XYZ or TXT, NPY.

Each reader checks what a file claims against its size before it allocates, so a corrupt header costs no memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from em_lightning.data.ply import parse_ply

Points = NDArray[np.float64]
Faces = NDArray[np.int64]
MAX_BYTES = 2**30


def read_points(path: str | Path) -> tuple[Points, Faces | None]:
    """Read the points of a file, and its faces where it has any.

    The ending says the format: ``.off``, ``.ply`` (text, or binary of either byte order), ``.obj``, ``.xyz`` or
    ``.txt`` (columns between blanks or commas, the first three are used), ``.npy`` (no pickle). Polygons become fans
    of triangles.

    Args:
        path: the file.

    Returns:
        Points (N, 3) float64 and faces (F, 3) int64, or ``None`` where the file holds points alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, too large, truncated or corrupt; the message names it and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; check the path")
    ending = path.suffix.lower()
    if ending not in SUPPORTED:
        raise ValueError(f"{path}: the ending {ending!r} is not read; convert to one of {', '.join(SUPPORTED)}")
    check_size(path.stat().st_size, str(path))
    if ending == ".npy":
        return _checked(str(path), lambda: (_load_npy(path), None))
    return parse_points(path.read_bytes(), str(path))


def parse_points(data: bytes, name: str) -> tuple[Points, Faces | None]:
    r"""Read the content of a file, such as a member of an archive; as :func:`read_points`, without ``.npy``.

    Args:
        data: the content.
        name: the file's name, for its ending and for messages.

    Raises:
        ValueError: as :func:`read_points`.

    Example:
        >>> parse_points(b"0 0 0, 9\n1,2,3\n", "two.xyz")
        (array([[0., 0., 0.], [1., 2., 3.]]), None)
    """
    check_size(len(data), name)
    return _checked(name, lambda: _PARSERS[Path(name).suffix.lower()](data))


def check_size(size: int, name: str) -> None:
    """Refuse an empty file, and one that is larger than ``MAX_BYTES``, before it is read."""
    if size == 0:
        raise ValueError(f"{name}: the file is empty; fetch or export it again")
    if size > MAX_BYTES:
        raise ValueError(
            f"{name}: {size} bytes are more than the {MAX_BYTES} that are read at once; decimate or split the file"
        )


def _checked(name: str, read: Callable[[], tuple[Points, Faces | None]]) -> tuple[Points, Faces | None]:
    """Run a parser and say of what file its complaints are; check what all formats have in common."""
    try:
        points, faces = read()
        if not len(points):
            raise ValueError("there are no points in it")
        bad = ~np.isfinite(points).all(1)
        if bad.any():
            raise ValueError(f"point {int(bad.argmax())} is {points[bad.argmax()].tolist()}, which is not finite")
        if faces is None or not len(faces):
            return points, None
        outside = (faces < 0) | (faces >= len(points))
        if outside.any():
            raise ValueError(f"a face names point {faces[outside][0]}, but points run from 0 to {len(points) - 1}")
        return points, faces
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name}: {error}; repair, export or fetch the file again") from error


def map_npy(path: Path) -> np.ndarray:
    """Return an NPY file as a memory map, which compares the header with the file's size and never unpickles.

    Raises:
        ValueError: the file is no array, or not as long as its header says.
    """
    try:
        with np.errstate(over="raise"):
            return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # the header is a Python literal, and its faults are as many as Python's
        raise ValueError(f"not a plain NumPy array of numbers ({error})") from error


def _load_npy(path: Path) -> Points:
    array = map_npy(path)
    if array.ndim != 2 or array.shape[1] < 3 or array.dtype.kind not in "fiu":
        raise ValueError(f"the array is {array.dtype} of shape {array.shape}, not numbers of shape (N, 3) or wider")
    return np.array(array[:, :3], dtype=np.float64)


def _lines(data: bytes) -> list[str]:
    """Return the lines that are left when comments and blank lines are gone."""
    lines = (line.partition("#")[0].strip() for line in data.decode("latin-1").splitlines())
    return [line for line in lines if line]


def _numbers(rows: Iterable[list[str]]) -> Points:
    table = [row[:3] for row in rows]
    short = next((row for row in table if len(row) < 3), None)
    if short is not None:
        raise ValueError(f"a point has fewer than three coordinates: {' '.join(short)[:60]!r}")
    return np.array(table, dtype=np.float64).reshape(-1, 3)


def fan(polygons: Iterable[list[int]]) -> Faces:
    """Return polygons as triangles that share each polygon's first corner."""
    triangles = []
    for polygon in polygons:
        if len(polygon) < 3:
            raise ValueError(f"a face has {len(polygon)} corners, and needs three or more")
        triangles += [(polygon[0], b, c) for b, c in zip(polygon[1:-1], polygon[2:], strict=True)]
    return np.array(triangles, dtype=np.int64).reshape(-1, 3)


def _parse_off(data: bytes) -> tuple[Points, Faces | None]:
    lines = _lines(data)
    # ModelNet runs header and counts together ("OFF8 6 12"); C, N and ST announce columns after the coordinates.
    header = re.match(r"(?:ST)?C?N?OFF\b|(?:ST)?C?N?OFF(?=\d)", lines[0] if lines else "")
    if header is None:
        raise ValueError(f"the first line is not OFF but {(lines[0] if lines else '')[:20]!r}")
    rest = lines[0][header.end() :].strip()
    lines = ([rest] if rest else []) + lines[1:]
    try:
        counts = [int(word) for word in lines[0].split()] if lines else []
    except ValueError:
        counts = []
    if len(counts) not in (2, 3) or min(counts) < 0:
        given = (lines[0] if lines else "")[:40]
        raise ValueError(f"after OFF come the numbers of points, faces and edges, 0 or more each, not {given!r}")
    num_points, num_faces = counts[:2]
    if num_points + num_faces != len(lines) - 1:
        raise ValueError(
            f"{num_points} points and {num_faces} faces are announced, but {len(lines) - 1} lines follow (truncated?)"
        )
    points = _numbers(line.split() for line in lines[1 : num_points + 1])
    return points, fan(_off_polygon(line) for line in lines[num_points + 1 :])


def _off_polygon(line: str) -> list[int]:
    words = line.split()
    size = int(words[0])
    if not 0 <= size < len(words):
        raise ValueError(f"a face announces {size} corners and has {len(words) - 1}: {line[:60]!r}")
    return [int(word) for word in words[1 : size + 1]]


def _parse_ply(data: bytes) -> tuple[Points, Faces | None]:
    points, polygons = parse_ply(data)
    return points, fan(polygons)


def _parse_obj(data: bytes) -> tuple[Points, Faces | None]:
    points: list[list[str]] = []
    polygons = []
    for line in _lines(data.replace(b"\\\r\n", b" ").replace(b"\\\n", b" ")):
        key, *words = line.split()
        if key == "v":
            points.append(words)
        elif key == "f":
            corners = [int(word.partition("/")[0]) for word in words]
            if 0 in corners:
                raise ValueError(f"a face names point 0, but OBJ counts from 1: {line[:60]!r}")
            # A negative index counts back from the points that are known by then.
            polygons.append([corner - 1 if corner > 0 else len(points) + corner for corner in corners])
    return _numbers(points), fan(polygons)


def _parse_columns(data: bytes) -> tuple[Points, Faces | None]:
    return _numbers(line.replace(",", " ").replace(";", " ").split() for line in _lines(data)), None


_PARSERS: dict[str, Callable[[bytes], tuple[Points, Faces | None]]] = {
    ".off": _parse_off,
    ".ply": _parse_ply,
    ".obj": _parse_obj,
    ".xyz": _parse_columns,
    ".txt": _parse_columns,
}
SUPPORTED = (*_PARSERS, ".npy")
