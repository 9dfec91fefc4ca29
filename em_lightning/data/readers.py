"""Readers of point clouds and meshes: OFF, PLY, OBJ and STL with trimesh, PCD, text and arrays with NumPy."""

from __future__ import annotations

import codecs
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Faces = NDArray[np.int64]
MESHES = (".off", ".ply", ".obj", ".stl")
TEXTS = (".xyz", ".txt", ".csv", ".pts")
SUPPORTED = (*MESHES, *TEXTS, ".pcd", ".npy", ".npz")
_NUMBER = r"[-+]?\.?\d\S*?"  # text that begins as a number
_THREE_NUMBERS = re.compile(rf"\s*{_NUMBER}(?:[\s,;]+{_NUMBER}){{2}}", re.ASCII)
_MAX_COLUMNS = 12  # x, y, z and up to nine attributes (chosen: a normal, a color and an intensity are seven)


def read_points(path: str | Path, drop_non_finite: bool = False) -> tuple[Points, Faces | None]:
    """Read the points of a file, and its faces if it holds a mesh.

    The suffix determines the format: ``.off``, ``.ply``, ``.obj`` and ``.stl`` are read by trimesh. ``.xyz``, ``.txt``,
    ``.csv`` and ``.pts`` are text with one point per line and columns separated by blanks, commas or semicolons; the
    first three columns are read. A first line of column names and lines with the number of points are skipped. ``.pcd``
    is ASCII or binary. ``.npy`` holds an array of shape (N, 3) or wider, ``.npz`` one such array or one named
    ``points``. Polygons are split into triangles.

    Args:
        path: the file.
        drop_non_finite: whether to drop points with NaN or infinite coordinates and their faces, instead of raising.

    Returns:
        Points (N, 3) float64 and faces (F, 3) int64, or ``None`` if the file has no faces.

    Raises:
        ValueError: the suffix is unknown, the file is empty, truncated or corrupt, or a point is not finite.
    """
    return parse_points(Path(path).read_bytes(), str(path), drop_non_finite)


def parse_points(content: bytes, name: str, drop_non_finite: bool = False) -> tuple[Points, Faces | None]:
    """Return the points and faces of the content of a file of this name, as :func:`read_points`."""
    suffix = Path(name).suffix.lower()
    if suffix not in SUPPORTED:
        raise ValueError(f"{name}: the suffix must be one of {', '.join(SUPPORTED)}; convert the file")
    parse = {".pcd": _parse_pcd, ".npy": _parse_array, ".npz": _parse_array}.get(suffix, _parse_text)
    try:
        content = content.removeprefix(codecs.BOM_UTF8)
        points, faces = _parse_mesh(content, suffix) if suffix in MESHES else (parse(content), None)
        return _checked(points, faces, drop_non_finite)
    except Exception as error:  # trimesh raises errors of many types
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        remedy = "repair the file, leave it out, or export it again"
        remedy += " with triangles only" if suffix in MESHES else ""
        raise ValueError(f"{name}: {kind}{error}; {remedy}") from error


def has_points(path: Path) -> bool:
    """Return whether a file can hold points: a text without a row of three numbers, such as README.txt, cannot."""
    if path.suffix.lower() not in TEXTS:
        return True
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return any(_THREE_NUMBERS.match(line.replace("\0", "")) for line in file)  # in UTF-16, digits have a zero byte


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
            faces = (np.cumsum(finite) - 1)[faces[finite[faces].all(1)]]  # numbers of the remaining points
        points = points[finite]
    if not len(points):
        raise ValueError("the file holds no points")
    return points, faces if faces is not None and len(faces) else None


def _check_shape(shape: tuple[int, ...], max_columns: int = _MAX_COLUMNS) -> None:
    """Raise ValueError for fewer than 3 columns, or if columns seem to be the points: few rows and many columns."""
    if len(shape) != 2 or shape[1] < 3:
        raise ValueError(f"the array has shape {shape}, which must be (N, 3) or wider")
    if 3 <= shape[0] <= max_columns < shape[1]:
        raise ValueError(f"the array has shape {shape}, but points must be rows, (N, 3) or wider; transpose it")


def _parse_array(data: bytes) -> Points:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(array, np.lib.npyio.NpzFile):
            names = array.files
            if len(names) > 1 and "points" not in names:
                raise ValueError(f"of several arrays one must be named 'points', got {', '.join(names)[:200]}")
            array = np.asarray(array[names[0] if len(names) == 1 else "points"])
    except Exception as error:  # NumPy evaluates the header as Python, which may raise errors of any type
        raise ValueError(f"not a plain NumPy array of numbers ({error})") from None
    # Of an array, points in columns are more likely than three points with attributes.
    _check_shape(array.shape, max_columns=3 if array.shape[:1] == (3,) else _MAX_COLUMNS)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"the array has dtype {array.dtype}, which must be real numbers")
    return np.array(array[:, :3], dtype=np.float64)


def _parse_pcd(data: bytes) -> Points:
    last_line = re.search(rb"(?m)^DATA[ \t]+(\w+)[^\n]*\n", data)  # last line of the header, with the encoding
    if last_line is None:
        raise ValueError("a PCD file must have a header that ends with DATA")
    lines = (line.split() for line in data[: last_line.start()].decode("latin-1").split("\n"))
    header = {line[0]: line[1:] for line in lines if line}
    encoding, body = last_line[1], data[last_line.end() :]
    fields, num_points = header["FIELDS"], int(header["POINTS"][0])
    counts = [int(count) for count in header.get("COUNT", ["1"] * len(fields))]  # numbers per field
    places = [fields.index(name) for name in "xyz"]
    if encoding == b"ascii":
        columns = [sum(counts[:place]) for place in places]
        points = np.loadtxt(_lines(body), usecols=columns, ndmin=2, comments=None)
    elif encoding == b"binary":
        kinds = zip(header["TYPE"], header["SIZE"], counts, strict=True)
        dtype = np.dtype([(f"{i}", f"<{kind.lower()}{size}", count) for i, (kind, size, count) in enumerate(kinds)])
        rows = np.frombuffer(body, dtype)
        points = np.stack([rows[f"{place}"].reshape(len(rows)) for place in places], 1).astype(np.float64)
    else:
        raise ValueError(f"DATA {encoding.decode()} is not supported; save the cloud as binary or ascii")
    if len(points) != num_points:
        raise ValueError(f"the header declares {num_points} points but {len(points)} follow")
    return points


def _lines(data: bytes) -> list[str]:
    """Return the lines of a text without comments and empty lines; newlines and carriage returns end a line."""
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1", "replace")
    return [line for line in (line.partition("#")[0].strip() for line in re.split("[\r\n]", text)) if line]


def _parse_text(data: bytes) -> Points:
    lines = [line for line in _lines(data) if not line.isdecimal()]  # without the number of points of each scan
    begins_with_number = r"[-+.\d]|nan|inf"
    if lines and not re.match(begins_with_number, lines[0], re.IGNORECASE):
        lines = lines[1:]  # column names
    if not lines:
        raise ValueError("the file holds no points")
    delimiter = next((mark for mark in ";," if mark in lines[0]), None)
    separated_otherwise = r";|\d\s+[-+.\d]"  # by semicolons or blanks
    if "," in lines[0] and re.search(separated_otherwise, lines[0]):
        raise ValueError(f"decimal commas are not supported: {lines[0][:80]!r}; write decimal points")
    _check_shape((len(lines), len(lines[0].rstrip(";,").split(delimiter))))
    return np.loadtxt(lines, delimiter=delimiter, usecols=(0, 1, 2), ndmin=2, comments=None)


def _parse_mesh(data: bytes, suffix: str) -> tuple[Points, Faces]:
    import trimesh

    prepare = {".off": _prepare_off, ".ply": _prepare_ply, ".obj": _prepare_obj}
    content = io.BytesIO(prepare[suffix](data) if suffix in prepare else data)
    scene: Any = trimesh.load_scene(content, file_type=suffix[1:], process=False, skip_materials=True)
    points, faces = np.empty((0, 3)), np.empty((0, 3), dtype=np.int64)
    for part in scene.dump():
        faces_of_part = np.asarray(getattr(part, "faces", []), dtype=np.int64).reshape(-1, 3)  # a point cloud has none
        faces = np.concatenate([faces, faces_of_part + len(points)])
        points = np.concatenate([points, part.vertices])
    if suffix == ".stl" and data.count(b"vertex ") > len(points):
        raise ValueError(f"of {data.count(b'vertex ')} lines of vertices only {len(points)} hold three numbers")
    return points, faces


# trimesh reads malformed text without an error and repeats lines at comments: raise an error, and remove comments.


def _prepare_off(data: bytes) -> bytes:
    text = re.sub(rb"#[^\n]*", b"", data)
    header = re.match(rb"\s*(?:ST)?C?N?OFF\s*(\d+)\s+(\d+)", text)
    if header is None:
        raise ValueError("an OFF file must begin with OFF and the numbers of points and faces")
    declared = sum(map(int, header.groups()))
    rows = sum(1 for line in text[header.end() :].split(b"\n")[1:] if line.strip())
    if rows != declared:
        raise ValueError(f"the header declares {declared} points and faces but {rows} lines follow")
    return text


def _prepare_ply(data: bytes) -> bytes:
    header, end, body = data.partition(b"end_header")
    header = re.sub(rb"(?m)^(comment|obj_info).*\n", b"", header)
    # With edges, trimesh would return a path instead of points and faces.
    header = re.sub(rb"(?m)^element +edge ", b"element unused ", header)
    if not end or not header.startswith(b"ply"):
        raise ValueError("a PLY file must begin with a header from 'ply' to 'end_header'")
    if re.search(rb"(?m)^format +ascii", header):
        declared = sum(map(int, re.findall(rb"(?m)^element +\S+ +(\d+)", header)))
        rows = [line for line in body.split(b"\n") if line.strip()]
        if len(rows) != declared:
            raise ValueError(f"the header declares {declared} rows but {len(rows)} follow")
        body = b"\n" + b"\n".join(rows)
        if re.search(rb"[^\s\d.eE+\-naifNAIF]", body):  # nan and inf are numbers
            raise ValueError("the rows must hold numbers only")
        # trimesh would round the digits of the text to float32.
        header = re.sub(rb"(?m)^property +float(?:32)? ", b"property double ", header)
    return header + end + body


def _prepare_obj(data: bytes) -> bytes:
    text = re.sub(rb"#[^\n]*", b"", data)
    text = re.sub(rb"\\\r?\n", b" ", text)  # a backslash continues a line
    text = re.sub(rb"(?m)^ +", b"", text)
    no_integer, zero = rb"(?m)^f .*[^\d\s/-]", rb"(?m)^f (?:.* )?0+(?:[/\s]|$)"
    if re.search(no_integer, text) or re.search(zero, text):
        raise ValueError("faces must hold integers that count from 1")
    negative_index, point = rb"(?m)^f (?:.* )?-", rb"(?m)^v "
    relative = re.search(negative_index, text)
    if relative and re.search(point, text[relative.end() :]):
        raise ValueError("relative (negative) indices before the last point are not supported; export absolute ones")
    return text
